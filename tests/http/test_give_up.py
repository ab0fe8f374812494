"""What the server does when starting a model's workers was given up: stay and say so, or end so that somebody notices."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.handlers import TOOLS, until
from tests.http.archives import write_model
from tests.http.test_program import Program

FLAG = (
    TOOLS
    + """
if os.path.exists({flag!r}):
    raise RuntimeError("the weights are gone")
def handle(data, context):
    return data and ["answer" for row in data]
"""
)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start a server with one worker of a model that cannot be loaded any more once ``flag`` exists."""
    programs: list[Program] = []
    folder = write_model(tmp_path / "store", "noop")
    (handler,) = folder.glob("*.py")
    handler.write_text(FLAG.format(flag=str(tmp_path / "flag")))

    def start(*arguments: str) -> Program:
        store = ("--model-store", "store", "--models", "noop", "--default-workers-per-model", "1")
        programs.append(Program((*store, "--max-retry-timeout", "0.5", *arguments), tmp_path))
        programs[-1].wait_for("Model server started")
        return programs[-1]

    yield start
    for program in programs:
        program.process.kill()
        program.process.wait()
        assert program.process.stdout is not None
        program.process.stdout.close()


def describe(program: Program) -> dict[str, object]:
    (item,) = program.client().get("/models/noop").json()
    assert isinstance(item, dict)
    return item


def kill_worker(program: Program, flag: Path) -> None:
    """Have the model's template and worker die, and none come in their place."""
    flag.touch()
    (worker,) = describe(program)["workers"]  # type: ignore[misc]
    template = psutil.Process(worker["pid"]).parent()
    assert template is not None
    template.kill()
    os.kill(worker["pid"], signal.SIGKILL)


def test_it_exits_with_a_code_of_its_own(start: Callable[..., Program], tmp_path: Path) -> None:
    """With on_give_up=exit the program ends by itself with code 3, says why, and leaves no process."""
    program = start("--on-give-up", "exit")
    family = psutil.Process(program.process.pid).children(recursive=True)
    kill_worker(program, tmp_path / "flag")
    assert program.process.wait(40) == 3
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    log = program.log.read_text()
    assert "noop:1.0" in log
    assert "the weights are gone" in log
    assert "on_give_up" in log


@pytest.mark.parametrize("arguments", [(), ("--on-give-up", "stay")])
def test_it_stays_and_says_so(start: Callable[..., Program], tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """By default it stays: describe shows FAILED and why, and scaling the mended model serves it again."""
    program = start(*arguments)
    kill_worker(program, tmp_path / "flag")
    until(lambda: describe(program)["state"] == "FAILED", "the version failed")
    item = describe(program)
    assert "the weights are gone" in str(item["lastError"])
    assert item["workers"] == []
    assert program.client("Inference").get("/ping").status_code in {200, 500}
    assert program.process.poll() is None
    (tmp_path / "flag").unlink()
    answer = program.client().put("/models/noop?min_worker=1&synchronous=true")
    assert answer.status_code == 200, answer.text
    assert describe(program)["state"] == "READY"
    assert program.end() == 0


def test_a_registration_that_fails_is_no_reason_to_end(start: Callable[..., Program], tmp_path: Path) -> None:
    """A synchronous registration of a broken model is refused to its caller; the server goes on with the others."""
    program = start("--on-give-up", "exit", "--enable-model-api")
    folder = write_model(tmp_path / "store", "broken")
    (handler,) = folder.glob("*.py")
    handler.write_text("raise RuntimeError('no weights at all')\n")
    answer = program.client().post("/models?url=broken&initial_workers=1&synchronous=true", timeout=40)
    assert answer.status_code >= 400
    assert "no weights at all" in answer.text
    assert describe(program)["state"] == "READY"
    assert program.process.poll() is None
    assert program.end() == 0


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    """Another value of on_give_up ends the start with one line that names it and what it may be."""
    from tests.http.test_program import run

    done = run("--on-give-up", "panic", cwd=tmp_path)
    assert done.returncode == 2
    assert "on_give_up" in done.stderr or "on-give-up" in done.stderr
    assert "stay or exit" in done.stderr
