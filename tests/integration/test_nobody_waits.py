"""What runs for nobody any more: neither the others, nor close(), nor the end of the program waits for it."""

from __future__ import annotations

import time
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

from tests.handlers import EVAL, PATIENCE_S, Deployer, Gate, run_program, until, write_folder
from torchmgmt import Model, ModelManager, ProcessBackend
from torchmgmt.answer_future import AnswerFuture
from torchmgmt.errors import DeadlineExceeded

PID = "os.getpid()"


def abandoned(model: Model, gate: Gate) -> AnswerFuture:
    """Have a worker run a request that waits at the gate, and give that up."""
    future = model.submit(gate.expression)
    until(gate.reached, "it runs")
    future.abandon()
    with pytest.raises(CancelledError):
        future.result(PATIENCE_S)
    return future


def test_who_waits_gets_the_worker_of_one_for_whom_nobody_does(deploy: Deployer, gate: Gate) -> None:
    """By default a worker that computes for nobody is ended when somebody else waits for it; that is no failure."""
    model = deploy(EVAL)
    abandoned(model, gate)
    (old,) = gate.reached()
    assert model.submit(PID).result(PATIENCE_S) != old
    assert not gate.file.exists()
    assert model.describe().last_error == ""


def test_it_is_left_to_finish_while_nobody_else_needs_it(deploy: Deployer, gate: Gate) -> None:
    """By default nothing is ended that is in nobody's way, nor where another worker is free."""
    model = deploy(EVAL, initial_workers=2)
    pids = {worker.pid for worker in model.describe().workers}
    abandoned(model, gate)
    for _ in range(5):
        assert model.submit(PID).result(PATIENCE_S) not in gate.reached()
        time.sleep(0.2)
    gate.open()
    until(lambda: {worker.state.name for worker in model.describe().workers} == {"READY"})
    assert {worker.pid for worker in model.describe().workers} == pids


def test_now_means_at_once(deploy: Deployer, gate: Gate) -> None:
    """With cancel_running="now" its worker is replaced, though nobody waits."""
    model = deploy(EVAL, cancel_running="now")
    abandoned(model, gate)
    (old,) = gate.reached()
    until(lambda: [worker.pid for worker in model.describe().workers if worker.pid != old])
    assert model.submit(PID).result(PATIENCE_S) != old


def test_never_means_that_others_wait(deploy: Deployer, gate: Gate) -> None:
    """With cancel_running="never" it is finished, and the same worker goes on."""
    model = deploy(EVAL, cancel_running="never")
    abandoned(model, gate)
    waiting = model.submit(PID)
    time.sleep(1.2)
    assert not waiting.done()
    gate.open()
    assert [waiting.result(PATIENCE_S)] == gate.reached()


@pytest.mark.parametrize("policy", ["when_needed", "now"])
def test_one_of_a_batch_that_still_waits_keeps_the_worker(deploy: Deployer, gate: Gate, policy: str) -> None:
    """Nobody is ended in whose batch there is anybody left."""
    model = deploy(EVAL, batch_size=2, max_batch_delay=1000, cancel_running=policy)
    before = model.submit("time.sleep(0.2)")
    until(before.running, "the worker has something to do, so that the next two are a batch")
    first, second = model.submit(gate.expression), model.submit(PID)
    until(gate.reached, "they run")
    first.abandon()
    other = [model.submit(PID) for _ in range(2)]
    time.sleep(0.8)
    gate.open()
    (old,) = gate.reached()
    assert second.result(PATIENCE_S) == old
    assert [each.result(PATIENCE_S) for each in other] == [old] * 2


@pytest.mark.parametrize("policy", ["when_needed", "now", "never"])
def test_close_does_not_wait_for_it(backend: ProcessBackend, tmp_path: Path, policy: str) -> None:
    """After predict(timeout=...) is over close() is, too, whatever the policy; nothing counts as failed."""
    with ModelManager(backend=backend) as manager:
        model = Deployer(tmp_path, manager)(EVAL, cancel_running=policy)
        with pytest.raises(DeadlineExceeded):
            model.predict("time.sleep(60)", timeout=0.1)
        began = time.monotonic()
        report = manager.close()
        assert time.monotonic() - began < 5
    assert report.failed_requests == 0


def test_unregister_does_not_wait_for_it(deploy: Deployer, gate: Gate) -> None:
    """Nor for a request that was cancelled before it was begun."""
    model = deploy(EVAL)
    abandoned(model, gate)
    waiting = model.submit(PID)
    assert waiting.cancel()
    began = time.monotonic()
    model.unregister()
    assert time.monotonic() - began < 5


CTRL_C = """
import os, signal, sys, threading, time
from torchmgmt import ModelManager
{manager}
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    model.predict("time.sleep(40)")
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
MAKE = 'manager = ModelManager(); model = manager.register(sys.argv[1], model_name="m", handler="handler.py")'


def test_ctrl_c_in_a_long_handler_does_not_delay_the_end(tmp_path: Path, light_torch: Path) -> None:
    """A program that is interrupted as it waits ends at once, though its model would compute for long."""
    began = time.monotonic()
    program = run_program(CTRL_C.format(manager=MAKE), write_folder(tmp_path / "model", EVAL))
    assert (program.returncode, program.stdout, program.stderr) == (0, "interrupted\n", "")
    assert time.monotonic() - began < 15


# -- an answer that the program cannot take ----------------------------------------------------------------------------


def test_an_answer_for_which_there_is_no_memory_is_its_workers_end(
    deploy: Deployer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The request hears why, it is logged once, other models answer meanwhile, and another worker takes its place."""
    from torchmgmt import channel

    model, other = deploy(EVAL, model_name="m"), deploy(EVAL, model_name="other")
    pid = model.predict(PID)

    class NoMemory(bytearray):
        def __init__(self, source: Any = b"") -> None:
            if source == 12_345_678 or (isinstance(source, int) and source > 1 << 23):
                raise MemoryError
            super().__init__(source)

    monkeypatch.setattr(channel, "bytearray", NoMemory, raising=False)
    huge = model.submit("'x' * (1 << 24)")
    assert other.submit("1").result(PATIENCE_S) == 1
    error = huge.exception(PATIENCE_S)
    assert "MemoryError" in str(error)
    assert model.submit(PID).result(PATIENCE_S) != pid
    assert other.submit("2").result(PATIENCE_S) == 2
    told = [record for record in caplog.records if "MemoryError" in record.getMessage()]
    assert 1 <= len(told) <= 2, "that it is killed, and that it has ended"


@pytest.mark.parametrize("nonsense", ["bytes(100)", "b'\\\\xff' * 64"])
def test_nonsense_in_its_channel_is_a_workers_end(deploy: Deployer, nonsense: str) -> None:
    """A handler that writes to the socket of its worker harms itself alone."""
    model, other = deploy(EVAL, model_name="m"), deploy(EVAL, model_name="other")
    pid = model.predict(PID)
    find = (
        "[os.write(int(fd), {nonsense}) for fd in os.listdir('/proc/self/fd')"
        " if os.path.exists('/proc/self/fd/' + fd) and os.readlink('/proc/self/fd/' + fd).startswith('socket:')]"
    )
    bad = model.submit(find.format(nonsense=nonsense) + " and time.sleep(30)")
    assert bad.exception(PATIENCE_S) is not None
    assert model.submit(PID).result(PATIENCE_S) != pid
    assert other.submit("2").result(PATIENCE_S) == 2
