"""Signals that end a service reach all of its processes: what the program has started goes on as long as that needs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.processes import forkers_of, only_pid
from tests.handlers import EVAL, PATIENCE_S, Deployer, Gate, is_gone, until, write_folder
from torchmgmt import Model, ModelManager, ProcessBackend

STOPS = (signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize("number", STOPS)
def test_what_is_started_lives_on(deploy_own: Deployer, tmp_path: Path, number: signal.Signals) -> None:
    """Workers, templates and the torch-only process ignore what systemd sends to every process of a service."""
    model = deploy_own()
    gate = Gate(tmp_path / "gate")
    worker = only_pid(model)
    before = {worker, *(process.pid for process in forkers_of(worker))}
    running = model.submit(f"{gate.expression} or 'finished'")
    until(gate.reached)
    for pid in before:
        for _ in range(3):
            os.kill(pid, number)
    time.sleep(0.1)
    gate.open()
    assert running.result(PATIENCE_S) == "finished"
    assert only_pid(model) == worker
    assert not any(map(is_gone, before))
    model.scale(2)
    assert model.predict("1 + 1", timeout=PATIENCE_S) == 2


def test_a_worker_that_loads_lives_on(own: ProcessBackend, tmp_path: Path) -> None:
    """So do a template, and a worker, in the midst of initialize()."""
    gate = Gate(tmp_path / "gate")
    source = f"{EVAL}\n{gate.expression}\n"
    with ModelManager(backend=own) as manager:
        model = Deployer(tmp_path, manager)(source, synchronous=False)
        (loading,) = until(gate.reached)
        os.kill(loading, signal.SIGTERM)
        gate.open()
        model.wait_ready(PATIENCE_S)
        assert model.predict("1") == 1
        assert not model.describe().last_error


def test_what_a_handler_starts_ends_as_everywhere(deploy_both: Deployer) -> None:
    """A program that it runs, and a process that it forks, have the usual handlers of both signals."""
    model = deploy_both()
    program = "import signal; print([signal.getsignal(n) is d for n, d in ((15, signal.SIG_DFL), (2, signal.default_int_handler))])"
    run = (
        f"__import__('subprocess').run([{sys.executable!r}, '-c', {program!r}], capture_output=True, text=True).stdout"
    )
    assert model.predict(run, timeout=PATIENCE_S) == "[True, True]\n"
    fork = "__import__('multiprocessing').get_context('fork').Process(target=time.sleep, args=(60,))"
    code = f"(lambda child: (child.start(), child.terminate(), child.join(), child.exitcode)[-1])({fork})"
    assert model.predict(code, timeout=PATIENCE_S) == -signal.SIGTERM


def test_a_handlers_own_signal_handler_stays(deploy_both: Deployer) -> None:
    """One that wants to know of SIGTERM is told."""
    source = f"""{EVAL}
import signal
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(os.getpid()))
"""
    model = deploy_both(source)
    worker = only_pid(model)
    os.kill(worker, signal.SIGTERM)
    assert until(lambda: model.predict("told")) == [worker]


PROGRAM = """
import json, os, signal, sys, time
import psutil
from torchmgmt import ModelManager
if sys.argv[2] == "session":
    os.setsid()
manager = ModelManager()
manager.warm()
me = psutil.Process()
while not me.children():
    time.sleep(0.001)
print(json.dumps([child.pid for child in me.children()]), flush=True)
signal.pause()
"""


@pytest.mark.parametrize("after_s", [0, 0.02, 0.3])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_script_that_ends_while_torch_is_imported_leaves_nothing(
    tmp_path: Path, number: signal.Signals, after_s: float
) -> None:
    """The process that imports torch, for a second or more, goes with it, though it does not look yet."""
    folder = write_folder(tmp_path / "m", EVAL)
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, folder, ""], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as program:
        assert program.stdout is not None
        (importing,) = json.loads(program.stdout.readline())
        time.sleep(after_s)
        program.send_signal(number)
        program.wait(PATIENCE_S)
        started = time.monotonic()
        until(lambda: is_gone(importing))
        assert time.monotonic() - started < 5  # not only once torch is imported, which takes long on a slow disk


def test_the_import_goes_on_when_the_whole_service_is_signalled(own: ProcessBackend, tmp_path: Path) -> None:
    """From its first moment: nothing of ours ends by it, so that models that are being loaded then are there."""
    me = psutil.Process()
    before = {child.pid for child in me.children()}
    own.warm()
    (started,) = until(lambda: {child.pid for child in me.children()} - before)
    for _ in range(50):
        os.kill(started, signal.SIGTERM)
        time.sleep(0.002)
    with ModelManager(backend=own) as manager:
        assert Deployer(tmp_path, manager)().predict("1", timeout=PATIENCE_S) == 1
    assert own.forkserver.pid == started


def test_a_loop_that_ends_does_not_take_the_import_with_it(tmp_path: Path, light_torch: Path) -> None:
    """Where a loop has the rounds as the torch-only process is started, its thread may end long before the program."""
    import asyncio
    import threading

    backend = ProcessBackend()
    with ModelManager(backend=backend) as manager:
        model: Model = Deployer(tmp_path, manager)(initial_workers=0)

        async def host() -> None:
            undo = manager.run_on(asyncio.get_running_loop())
            while not backend.dispatcher.on_thread():  # noqa: ASYNC110 - nobody tells of it
                await asyncio.sleep(0.001)
            manager.scale("m", 1, synchronous=False)
            undo()

        thread = threading.Thread(target=lambda: asyncio.run(host()))
        thread.start()
        thread.join()
        assert model.predict("1", timeout=PATIENCE_S) == 1
    backend.close()
