"""The server program keeps its state: what it has again, what it says of it, and what counts before what."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.http.archives import write_model
from tests.http.test_program import PORTS, Program, run, start

__all__ = ["start"]  # the fixture

Start = Callable[..., Program]
STORE = ("--model-store", "store", "--default-workers-per-model", "0")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        write_model(tmp_path / "store", name)
    return tmp_path / "store"


def names(program: Program) -> list[str]:
    return [model["modelName"] for model in program.client().get("/models").json()["models"]]


def lines(program: Program, beginning: str) -> list[str]:
    return [line for line in program.lines if line.startswith(beginning)]


@pytest.mark.usefixtures("store")
def test_a_second_start_has_what_the_first_one_had(start: Start, tmp_path: Path) -> None:
    """Also after SIGKILL: it says what it restored, from where, and how to turn that off; --ncs turns it off."""
    first = start(*STORE, "--enable-model-api")
    assert lines(first, "State file") == [
        f"State file: {tmp_path / 'logs' / 'config' / 'torchmgmt' / 'state.json'} (--ncs turns it off)"
    ]
    assert lines(first, "Restored") == []
    client = first.client()
    assert client.post("/models?url=a&batch_size=3&model_name=mine&synchronous=true").status_code == 200
    assert client.put("/models/mine?min_worker=1&synchronous=true").status_code == 200
    first.process.kill()
    first.process.wait()

    second = start(*STORE)
    assert lines(second, "Restored") == ["Restored: mine version 1.0; start with --ncs to begin without what was there"]
    (item,) = second.client().get("/models/mine").json()
    assert (item["batchSize"], item["minWorkers"], len(item["workers"])) == (3, 1, 1)
    assert second.end() == 0

    third = start(*STORE, "--ncs")
    assert (lines(third, "State file"), names(third)) == (["State file: none"], [])
    assert third.end() == 0


@pytest.mark.usefixtures("store")
def test_the_command_line_counts_before_the_state_and_that_before_the_file(start: Start, tmp_path: Path) -> None:
    """What was unregistered stays away if the file lists it, and is there if the command line does."""
    (tmp_path / "config.properties").write_text("load_models=a,b\n")
    first = start(*STORE, "--enable-model-api")
    assert names(first) == ["a", "b"]
    assert first.client().delete("/models/b").status_code == 200
    assert first.client().put("/models/a?min_worker=0&max_worker=2").status_code in {200, 202}
    first.end()

    (tmp_path / "config.properties").write_text("load_models=a,b,c\n")
    second = start(*STORE)
    assert names(second) == ["a", "c"]
    assert second.client().get("/models/a").json()[0]["maxWorkers"] == 2
    second.end()

    third = start(*STORE, "--models", "b")
    assert names(third) == ["a", "b", "c"]
    third.end()


def test_a_snapshot_in_the_configuration_is_restored(start: Start, store: Path, tmp_path: Path) -> None:
    """Together with what else the file asks for."""
    version = {"defaultVersion": True, "marName": "a", "minWorkers": 0, "maxWorkers": 0, "batchSize": 7}
    snapshot = {"name": "startup.cfg", "modelCount": 1, "created": 1, "models": {"x": {"1.0": version}}}
    (tmp_path / "config.properties").write_text(f"load_models=b\nmodel_snapshot={json.dumps(snapshot)}\n")
    program = start(*STORE)
    assert names(program) == ["b", "x"]
    assert program.client().get("/models/x").json()[0]["batchSize"] == 7
    program.end()
    assert store.is_dir()


@pytest.mark.usefixtures("store")
def test_what_cannot_be_used_as_a_state_ends_it_with_the_reason(start: Start, tmp_path: Path) -> None:
    """A file that another server uses, and one that a later release wrote; nothing of it is touched."""
    first = start(*STORE)
    second = run(*PORTS, *STORE, cwd=tmp_path)
    assert second.returncode == 1
    assert f"in use by process {first.process.pid}" in second.stderr
    assert "--state-dir names another folder, --ncs keeps no state" in second.stderr
    assert first.end(signal.SIGINT) == 0
    path = tmp_path / "logs" / "config" / "torchmgmt" / "state.json"
    path.write_text('{"format": 2}')
    third = run(*PORTS, *STORE, cwd=tmp_path)
    assert (third.returncode, third.stdout) == (1, "")
    assert "its format is 2, but this release knows only 1" in third.stderr
    assert path.read_text() == '{"format": 2}'
