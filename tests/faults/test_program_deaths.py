"""The torch-only process or the embedding program dies: nothing hangs, and no process is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.conftest import both_ways
from tests.faults.processes import forkers_of, kill, only_pid, pids_of, torch_only_of, wait_for_another
from tests.handlers import EVAL, TOOLS, Deployer, Gate, is_gone, until, write_folder
from torchmgmt import ModelManager, ProcessBackend
from torchmgmt.backends import child, forker
from torchmgmt.errors import TorchmgmtError, WorkerDied, WorkerStartFailed

PROGRAM = """
import json, os, sys, threading
import psutil
from torchmgmt import ModelManager
manager = ModelManager()
model = manager.register(sys.argv[1], model_name="m", handler="handler.py", initial_workers=2)
children = model.predict("[__import__('subprocess').Popen(['sleep', '1000']).pid]")
if sys.argv[2] == "busy":
    futures = [model.submit("threading.Event().wait()") for _ in range(2)]
    while not all(future.running() for future in futures):
        pass
if sys.argv[2] == "starting":
    model.scale(4, synchronous=False)
if sys.argv[2] == "computing":
    # Holds the interpreter lock in each worker, so that no Python thread of theirs gets to run.
    futures = [model.submit("sum(iter(lambda: 1, 0))") for _ in range(2)]
    while not all(future.running() for future in futures):
        pass
print(json.dumps([process.pid for process in psutil.Process().children(recursive=True)] + children), flush=True)
threading.Event().wait()
"""


@pytest.mark.usefixtures("swept")
@pytest.mark.parametrize(
    "what, number",
    [
        ("idle", signal.SIGKILL),
        ("idle", signal.SIGTERM),
        ("busy", signal.SIGKILL),
        ("busy", signal.SIGTERM),
        ("starting", signal.SIGKILL),
        ("computing", signal.SIGKILL),
    ],
)
def test_no_process_outlives_the_program(
    tmp_path: Path, what: str, number: signal.Signals, request: pytest.FixtureRequest
) -> None:
    """However the program dies and whatever its workers do, they, their children and the torch-only process end."""
    if what != "idle":
        request.getfixturevalue("light_torch")
    folder = write_folder(tmp_path / "model", EVAL)
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), what], stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        pids: list[int] = json.loads(program.stdout.readline())
        assert len(pids) >= 4
        assert not any(map(is_gone, pids[:3]))
        program.send_signal(number)
        program.wait(20)
    for pid in pids:
        until(lambda pid=pid: is_gone(pid), f"process {pid} of a program that was {what} is gone")


LOADING_PROGRAM = """
import json, os, sys, threading
import psutil
from torchmgmt import ModelManager
manager = ModelManager()
options = {"handler": "handler.py", "share_weights": sys.argv[2], "synchronous": False}
model = manager.register(sys.argv[1], model_name="m", initial_workers=2, **options)
while not os.path.exists(sys.argv[3]):
    pass
print(json.dumps([process.pid for process in psutil.Process().children(recursive=True)]), flush=True)
threading.Event().wait()
"""


@pytest.mark.usefixtures("light_torch", "swept")
@pytest.mark.parametrize("torch_only_too", [False, True], ids=["program", "both"])
@both_ways
def test_no_process_outlives_the_program_while_it_loads(
    tmp_path: Path, share_weights: str, torch_only_too: bool
) -> None:
    """Killed in the middle of a load that never ends, the program leaves nobody: not who loads, nor what that started."""
    begun = tmp_path / "begun"
    # Nobody is left who could end what a handler had started when both are killed at once.
    start = "" if torch_only_too else "__import__('subprocess').Popen(['sleep', '1000'])\n"
    folder = write_folder(tmp_path / "model", f"{TOOLS}{start}note({str(begun)!r})\nthreading.Event().wait()\n")
    command: list[Any] = [sys.executable, "-c", LOADING_PROGRAM, folder, share_weights, begun]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        pids: list[int] = json.loads(program.stdout.readline())
        assert len(pids) >= (2 if torch_only_too else 3)
        if torch_only_too:
            os.kill(pids[0], signal.SIGKILL)
        program.kill()
        program.wait(20)
    for pid in pids:
        until(lambda pid=pid: is_gone(pid), f"process {pid} of a program that was loading is gone")


@pytest.mark.usefixtures("light_torch")
def test_ctrl_c_reaches_the_program_alone(tmp_path: Path) -> None:
    """Ctrl-C in a terminal, a signal to the whole process group, interrupts the program but no running request."""
    source = """
import sys, time
from torchmgmt import ModelManager
with ModelManager() as manager:
    model = manager.register(sys.argv[1], model_name="m", handler="handler.py")
    future = model.submit("time.sleep(0.5) or 'finished'")
    while not future.running():
        pass
    try:
        print("ready", flush=True)
        time.sleep(30)
    except KeyboardInterrupt:
        print(future.result(20), flush=True)
"""
    folder = write_folder(tmp_path / "model", EVAL)
    command = [sys.executable, "-c", source, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        os.killpg(program.pid, signal.SIGINT)
        assert program.stdout.readline() == "finished\n"
        assert program.wait(20) == 0


def test_workers_outlive_the_torch_only_process(deploy_own: Deployer) -> None:
    """When the torch-only process is killed, workers go on serving, and scaling up still works."""
    model = deploy_own()
    worker = only_pid(model)
    kill(torch_only_of(worker))

    assert model.predict("os.getpid()", timeout=20) == worker
    assert [each.state.name for each in model.scale(2).workers] == ["READY", "READY"]
    assert worker in pids_of(model)
    assert model.predict("1", timeout=20) == 1


def test_a_template_outlives_the_torch_only_process(own: ProcessBackend, tmp_path: Path) -> None:
    """A template whose torch-only process was killed goes on to be forked: nothing is loaded again."""
    with ModelManager(backend=own) as manager:
        model = Deployer(tmp_path, manager)()
        template, torch_only = forkers_of(only_pid(model))
        kill(torch_only)
        model.scale(3)
        assert {psutil.Process(pid).ppid() for pid in pids_of(model)} == {template.pid}
        assert own.forkserver.pid is None


def test_the_torch_only_process_and_the_template_may_die_together(deploy_own: Deployer, gate: Gate) -> None:
    """When all that could fork is killed at once, running batches end as they should, and new workers come again."""
    model = deploy_own(initial_workers=2)
    old = pids_of(model)
    running = model.submit(f"{gate.expression} or 'finished'")
    until(gate.reached, "the request runs")
    kill(*forkers_of(old[0]))
    gate.open()
    assert running.result(20) == "finished"
    model.scale(3)
    (new,) = {*pids_of(model)} - {*old}
    assert torch_only_of(new).is_running()
    assert deploy_own(model_name="other").predict("1", timeout=20) == 1


def test_an_orphaned_worker_that_dies_is_replaced(deploy_own: Deployer, gate: Gate) -> None:
    """A worker that outlived all that forked it is still watched: its death fails its batch, and it is replaced."""
    model = deploy_own()
    worker = only_pid(model)
    kill(*forkers_of(worker))
    running = model.submit(gate.expression)
    until(gate.reached, "the request runs")
    waiting = [model.submit("os.getpid()") for _ in range(5)]

    os.kill(worker, signal.SIGKILL)

    error = running.exception(20)
    assert isinstance(error, WorkerDied)
    assert error.pid == worker
    assert worker not in [future.result(20) for future in waiting]
    assert wait_for_another(model, worker)


def test_an_orphaned_worker_goes_when_it_is_not_wanted(deploy_own: Deployer) -> None:
    """A worker that outlived all that forked it ends like any other when it is scaled away."""
    model = deploy_own()
    worker = only_pid(model)
    kill(*forkers_of(worker))
    model.scale(0)
    until(lambda: is_gone(worker), "the worker is gone")


def test_an_orphaned_worker_ends_with_its_backend(own: ProcessBackend, tmp_path: Path) -> None:
    """Closing a backend ends workers and templates that had outlived the torch-only process, busy or not."""
    manager = ModelManager(backend=own)
    model = Deployer(tmp_path, manager)()
    worker = only_pid(model)
    template, torch_only = forkers_of(worker)
    kill(torch_only)
    running = model.submit("threading.Event().wait()")
    own.close()
    for pid in (worker, template.pid):
        until(lambda pid=pid: is_gone(pid), f"process {pid} is gone")
    assert isinstance(running.exception(20), TorchmgmtError)
    manager.close()


def test_a_torch_only_process_that_was_stopped_is_replaced(deploy_own: Deployer) -> None:
    """A torch-only process that somebody stopped (SIGSTOP) is killed soon; workers serve on, and others can be started."""
    model = deploy_own()
    worker = only_pid(model)
    torch_only = torch_only_of(worker)
    torch_only.suspend()
    other = deploy_own(model_name="other", synchronous=False)

    assert model.predict("os.getpid()", timeout=20) == worker
    assert other.predict("1", timeout=20) == 1
    until(lambda: is_gone(torch_only.pid), "the stopped torch-only process is gone")
    assert model.predict("os.getpid()", timeout=20) == worker


def test_a_hung_torch_only_process_is_replaced(deploy_own: Deployer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch-only process that does not fork in time is killed; the next start gets a new one, old workers serve on."""
    monkeypatch.setattr(forker, "FORK_LIMIT_S", 0.5)
    monkeypatch.setattr(child, "STOPPED_LIMIT_S", 1000)  # it hangs for another reason, as far as anybody can see
    model = deploy_own()
    worker = only_pid(model)
    torch_only = torch_only_of(worker)
    torch_only.suspend()

    other = deploy_own(model_name="other")

    assert is_gone(torch_only.pid)
    assert other.predict("1", timeout=20) == 1
    assert model.predict("os.getpid()", timeout=20) == worker


def test_an_impatient_model_does_not_fail_the_start_of_others(deploy_own: Deployer, light_torch: Path) -> None:
    """That one model's startup_timeout is shorter than importing torch takes fails the start of no other model."""
    with (light_torch / "torch" / "__init__.py").open("a") as file:
        file.write("import time\ntime.sleep(1)\n")
    patient = deploy_own(model_name="patient", synchronous=False)
    with contextlib.suppress(WorkerStartFailed):
        deploy_own(model_name="impatient", startup_timeout=0.2)
    patient.wait_ready(40)
    assert patient.describe().last_error == ""


def test_a_torch_only_process_that_cannot_run_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an interpreter that can import torch a registration fails with the reason, and leaves nothing."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    folder = write_folder(tmp_path / "model", EVAL)
    with ModelManager() as manager:
        with pytest.raises(WorkerStartFailed) as caught:
            manager.register(folder, model_name="m", handler="handler.py")
        assert "exit code 1" in caught.value.reason
        assert len(manager) == 0


def test_no_interpreter_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``sys.executable`` a registration fails with a reason that names it, and does not hang."""
    monkeypatch.setattr(sys, "executable", "")
    folder = write_folder(tmp_path / "model", EVAL)
    with ModelManager() as manager:
        with pytest.raises(WorkerStartFailed, match=r"sys\.executable"):
            manager.register(folder, model_name="m", handler="handler.py")
        assert len(manager) == 0


@pytest.mark.usefixtures("light_torch")
def test_descriptors_that_run_out_are_an_error_not_a_hang(tmp_path: Path) -> None:
    """When the program has no descriptor left, scaling fails with the reason, and works again when it has some."""
    source = """
import os, resource, sys
from torchmgmt import ModelManager
from torchmgmt.errors import TorchmgmtError
with ModelManager() as manager:
    model = manager.register(sys.argv[1], model_name="m", handler="handler.py")
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    try:
        model.scale(2)
    except TorchmgmtError as error:
        print(type(error).__name__, "Too many open files" in str(error))
    print(model.predict("'served'"))
    for fd in taken:
        os.close(fd)
    print(len(model.scale(2).workers))
"""
    folder = write_folder(tmp_path / "model", EVAL)
    command: list[Any] = [sys.executable, "-c", source, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.stdout.splitlines() == ["WorkerStartFailed True", "served", "2"], done.stderr


LONG_WAIT = """
import sys
from torchmgmt import ModelManager

manager = ModelManager()
model = manager.register(sys.argv[1], model_name="slow", handler="handler.py")
asks = {
    "predict": lambda: model.predict(),
    "result": lambda: model.submit().result(),
    "map": lambda: list(model.map([1, 2])),
    "stream": lambda: list(model.stream()),
}
asks[sys.argv[2]]()
"""
LONG = """
import pathlib, time
def handle(data, context):
    if data:
        pathlib.Path({begun!r}).touch()
        time.sleep(60)
    return data and ["x" for _ in data]
"""


@pytest.mark.parametrize("call", ["predict", "result", "map", "stream"])
def test_ctrl_c_ends_a_program_that_waits_for_a_long_request(call: str, tmp_path: Path) -> None:
    """Nobody waits for what was asked: the program does not, either."""
    begun = tmp_path / "begun"
    (tmp_path / "handler.py").write_text(LONG.format(begun=str(begun)))
    command = [sys.executable, "-c", LONG_WAIT, str(tmp_path), call]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr is not None
        until(begun.exists, "the request was begun")
        began = time.monotonic()
        program.send_signal(signal.SIGINT)
        said = program.stderr.read()
        assert program.wait(20) == -signal.SIGINT
    assert "KeyboardInterrupt" in said
    assert time.monotonic() - began < 15, "of the 30 s that closing waits, and the 60 s that the request takes"
