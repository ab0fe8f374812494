"""The server program: what it prints, what it refuses, and that nothing is left of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import requests

import torchmgmt
from tests.handlers import until
from tests.http.archives import BROKEN, SLOW_TO_LOAD, write_model
from tests.http.conftest import Client
from torchmgmt.http.command_line import parse_command_line
from torchmgmt.http.loader import ModelToLoad

STARTED = "Model server started"
FREE = "http://127.0.0.1:0"
PORTS = ("--management-address", FREE, "--inference-address", FREE, "--metrics-address", FREE)


class Program:
    """A server program that runs, and what it printed until it said that it is started."""

    def __init__(self, arguments: tuple[str, ...], folder: Path) -> None:
        self.log = folder / "stderr.txt"
        command = [sys.executable, "-m", "torchmgmt.http", *PORTS, *arguments]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True, env=environment()
            )
        self.lines: list[str] = []

    def wait_for(self, line: str) -> None:
        assert self.process.stdout is not None
        for printed in self.process.stdout:
            self.lines.append(printed.rstrip("\n"))
            if self.lines[-1].startswith(line):
                return
        pytest.fail(f"it ended without {line!r}: {self.lines}\n{self.log.read_text()}")

    def client(self, which: str = "Management") -> Client:
        (url,) = [line.split(": ", 1)[1] for line in self.lines if line.startswith(f"{which} address")]
        return Client(url)

    def end(self, number: int = signal.SIGTERM) -> int:
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        code = self.process.wait(30)
        _, alive = psutil.wait_procs(family, timeout=5)
        assert alive == []
        return code


def environment() -> dict[str, str]:
    root = str(Path(torchmgmt.__file__).parent.parent)
    paths = [root, os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Program]]:
    """Start programs; what still runs at the end is killed."""
    programs: list[Program] = []

    def start(*arguments: str, line: str = STARTED) -> Program:
        programs.append(Program(arguments, tmp_path))
        programs[-1].wait_for(line)
        return programs[-1]

    yield start
    for program in programs:
        program.process.kill()
        program.process.wait()
        program.process.stdout.close()


def run(*arguments: str, code: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = ["-c", code] if code else ["-m", "torchmgmt.http"]
    return subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=50,
        env=environment(),
        check=False,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(start, tmp_path, number):
    """SIGTERM and SIGINT: exit code 0, no process left, its workers included."""
    write_model(tmp_path / "store", "noop")
    program = start("--model-store", "store", "--models", "noop", "--default-workers-per-model", "1")
    (item,) = program.client().get("/models/noop").json()
    assert item["loadedAtStartup"] is True
    assert len(item["workers"]) == 1
    assert program.client("Inference").get("/ping").json() == {"status": "Healthy"}
    assert program.end(number) == 0
    assert "Traceback" not in program.log.read_text()


def test_the_start_lines_say_what_serves_where(start, tmp_path):
    """The store, whether the model API is on, and the addresses with their real ports."""
    (tmp_path / "model_store").mkdir()
    program = start("--enable-model-api", "--ncs", "--foreground", "--start")
    assert f"Model store: {tmp_path / 'model_store'}" in program.lines
    assert "Registering and unregistering over HTTP: on" in program.lines
    ports = [int(port) for port in re.findall(r"127\.0\.0\.1:(\d+)", " ".join(program.lines))]
    assert len(ports) == 3
    assert 0 not in ports
    assert program.end() == 0


def test_without_store_and_model_api_it_says_so(start):
    """What is not there is said, too."""
    program = start()
    assert "Model store: none" in program.lines
    assert any("--enable-model-api" in line for line in program.lines)
    assert program.client().post("/models", params={"url": "a"}).status_code == 405
    assert program.end() == 0


def test_models_are_loaded_at_start_and_one_that_fails_stops_no_other(start, tmp_path):
    """All of the store or those named; a broken one is logged with its reason."""
    for name, code in (("good", None), ("broken", BROKEN)):
        write_model(tmp_path / "model_store", name, *([code] if code else []))
    (tmp_path / "model_store" / "notes.txt").write_text("no model")
    program = start("--models", "all,mine=good", "nope.mar", "--default-workers-per-model", "1")
    client = program.client()
    listed = {model["modelName"]: model for model in client.get("/models").json()["models"]}
    assert list(listed) == ["broken", "good", "mine", "nope"]
    assert listed["good"] == {"modelName": "good", "modelUrl": "good"}
    for name, reason in (("broken", "broken on purpose"), ("nope", "Model not found at: nope.mar")):
        assert (listed[name]["state"], reason in listed[name]["lastError"]) == ("FAILED", True)
        (item,) = client.get(f"/models/{name}").json()
        assert item["state"] == "FAILED"
        assert reason in item["lastError"]
        assert item["workers"] == []
    assert client.get("/models/good").json()[0]["state"] == "READY"
    assert program.client("Inference").get("/ping").json() == {"status": "Partial Healthy"}
    log = program.log.read_text()
    assert "broken on purpose" in log
    assert "Model not found at: nope.mar" in log
    assert program.end() == 0


def test_a_request_in_flight_is_finished(start, tmp_path):
    """A caller that waits when the signal comes gets an answer, and the program then ends."""
    write_model(tmp_path / "model_store", "slow", "import time\ntime.sleep(1)\n" + "def handle(d, c): return d")
    program = start("--enable-model-api")
    answers = []

    def register() -> None:
        parameters = {"url": "slow", "initial_workers": 1, "synchronous": "true"}
        answers.append(program.client().post("/models", params=parameters))

    caller = threading.Thread(target=register)
    caller.start()
    wait_until_registered(program.client(), "slow")
    assert program.end() == 0
    caller.join()
    assert answers[0].status_code == 200


def test_a_second_signal_hastens_the_end(start, tmp_path):
    """A caller that would wait for a minute does not hold up a second Ctrl-C."""
    write_model(tmp_path / "model_store", "slow", SLOW_TO_LOAD)
    program = start("--enable-model-api")
    failures = []

    def register() -> None:
        try:
            parameters = {"url": "slow", "initial_workers": 1, "synchronous": "true"}
            failures.append(program.client().post("/models", params=parameters).status_code)
        except requests.ConnectionError:
            failures.append(0)

    caller = threading.Thread(target=register)
    caller.start()
    wait_until_registered(program.client(), "slow")
    program.process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        program.process.wait(1.5)
    assert program.end(signal.SIGINT) == 0
    caller.join()
    assert len(failures) == 1
    assert failures[0] != 200


def test_the_same_signal_again_hastens_nothing(start, tmp_path):
    """``timeout``, systemd and terminals send it to the program, to its group, to all of it: requests are finished."""
    begun = tmp_path / "begun"
    slow = f"""
import pathlib, time
def handle(data, context):
    if data is None:
        return None
    pathlib.Path({str(begun)!r}).touch()
    time.sleep(1.5)
    return ["done"] * len(data)
"""
    write_model(tmp_path / "store", "slow", slow)
    program = start("--model-store", "store", "--models", "slow", "--default-workers-per-model", "1")
    answers: list[bytes] = []
    caller = threading.Thread(
        target=lambda: answers.append(program.client("Inference").post("/predictions/slow", data="x").content)
    )
    caller.start()
    until(begun.exists)
    family = psutil.Process(program.process.pid).children(recursive=True)
    for process in [program.process, *family, program.process]:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert program.process.wait(30) == 0
    caller.join()
    assert answers == [b"done"]
    assert "died" not in program.log.read_text()


def test_a_signal_while_models_load_ends_it(start, tmp_path):
    """Nobody waits for a model that loads when the program is to end."""
    write_model(tmp_path / "model_store", "slow", SLOW_TO_LOAD)
    program = start("--models", "slow", "--default-workers-per-model", "1", line="Management address")
    wait_until_registered(program.client(), "slow")
    assert program.end() == 0
    assert STARTED not in program.lines


def wait_until_registered(client: Client, name: str) -> None:
    pause = threading.Event()
    while client.get(f"/models/{name}").status_code == 404:
        pause.wait(0.02)


def test_an_occupied_port_is_one_line_and_code_1(start):
    """Which address, and why; nothing is started."""
    program = start()
    url = program.client().url
    ended = run("--management-address", url, "--inference-address", FREE, "--metrics-address", FREE)
    assert ended.returncode == 1
    assert ended.stderr == f"torchmgmt: error: Cannot listen at {url}: Address already in use\n"
    ended = run("--management-address", FREE, "--inference-address", url, "--metrics-address", FREE)
    assert ended.returncode == 1
    assert program.end() == 0


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("--start", "--stop"), "not allowed with argument"),
        (("--ts-config", "x"), "the configuration file is 'x', but must be a file that can be read (No such file"),
        (("--contract", "torchserve-0.11"), "contract is 'torchserve-0.11', but must be documented or"),
        (("--nonsense",), "--nonsense"),
        (("--job-queue-size", "0"), "job_queue_size is 0, but must be a whole number"),
        (("--model-store", "/nowhere"), "model_store is '/nowhere', but must be a folder that exists"),
        (("--inference-address", "https://127.0.0.1:0"), "certificate_file"),
        (("--management-address", "https://127.0.0.1:8080"), "one port speaks either http or https"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(arguments, expected, tmp_path):
    """A flag that this release cannot honour, and a wrong value, end it with code 2 and the reason."""
    ended = run(*arguments, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.startswith("torchmgmt: error: ")
    assert ended.stderr.count("\n") == 1
    assert expected in ended.stderr
    assert ended.stdout == ""


def test_version_and_help():
    """--version is the package's; --help shows every setting."""
    assert run("--version").stdout == f"torchmgmt {torchmgmt.__version__}\n"
    shown = run("--help")
    assert shown.returncode == 0
    assert "--default-workers-per-model" in shown.stdout
    assert "--ts-config" in shown.stdout
    assert "exit codes:\n  0   it was told to end" in shown.stdout


@pytest.mark.parametrize("flag", ["--log-config", "--workflow-store", "--plugins-path", "--ppath", "--cpp-log-config"])
def test_flags_of_torchserve_that_mean_nothing_are_accepted_with_a_warning(flag):
    """Scripts that start TorchServe go on working."""
    (warning,) = parse_command_line([flag, "x", "--ncs"], {}).warnings
    assert "has no effect" in warning


@pytest.mark.parametrize(
    "item, model",
    [
        ("a.mar", ModelToLoad("a.mar")),
        ("b=a.mar", ModelToLoad("a.mar", "b")),
        ("http://x/a.mar?k=v", ModelToLoad("http://x/a.mar?k=v")),
        ("b=http://x/a.mar?k=v", ModelToLoad("http://x/a.mar?k=v", "b")),
        ("=a.mar", ModelToLoad("=a.mar")),
    ],
)
def test_an_item_of_models_may_name_the_model(item, model):
    """name=a.mar, but not the = of a URL."""
    assert ModelToLoad.parse(item) == model


HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "falcon":
            raise ModuleNotFoundError("No module named 'falcon'", name="falcon")
sys.meta_path.insert(0, Hidden())
"""
LINE = "torchmgmt.http needs falcon: pip install 'torchmgmt[http]'"


def test_without_the_extra_the_program_says_what_to_install(tmp_path):
    """`python -m torchmgmt.http` without falcon: one line, no traceback, not zero."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env["PYTHONPATH"]])
    command = [sys.executable, "-m", "torchmgmt.http"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50, env=env, check=False)
    assert ended.returncode == 1
    assert (ended.stdout, ended.stderr) == ("", LINE + "\n")


def test_without_the_extra_importing_says_what_to_install():
    """`import torchmgmt.http` without falcon raises ImportError with the line; the rest of the package is fine."""
    ended = run(code=HIDE + "import torchmgmt\ntry:\n    import torchmgmt.http\nexcept ImportError as e:\n    print(e)")
    assert (ended.stdout, ended.stderr) == (LINE + "\n", "")
