"""The thread backend: workers in this process, each with a model of its own; nothing of the process changes for them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import psutil
import pytest

from tests.handlers import ECHO, EVAL, PATIENCE_S, until, write_folder
from torchmgmt.backends import Backend, Outcome
from torchmgmt.backends.thread import ThreadBackend, ThreadWorker
from torchmgmt.channel import decode, encode
from torchmgmt.errors import ManagerClosed
from torchmgmt.exchange import Encoded, WorkerRequest
from torchmgmt.records import ModelKey, ModelSpec, WorkerExit, WorkerFault

GATE = "context.model_yaml_config['gate']"
WAIT = f"[{GATE}.started.set(), {GATE}.released.wait(), 'late'][-1]"
"""A batch that is begun, and then hangs until the gate is opened."""


@attrs.frozen
class Gate:
    """What a handler hangs at; released at the end of the test, so that its thread can go."""

    started: threading.Event = attrs.field(factory=threading.Event)
    released: threading.Event = attrs.field(factory=threading.Event)


@attrs.define
class Listener:
    """Notes what it is told, on which thread, and lets a test wait for it."""

    events: list[tuple[Any, ...]] = attrs.field(factory=list)
    threads: set[threading.Thread] = attrs.field(factory=set)
    changed: threading.Condition = attrs.field(factory=threading.Condition)

    def note(self, *event: Any) -> None:
        with self.changed:
            self.events.append(event)
            self.threads.add(threading.current_thread())
            self.changed.notify_all()

    def ready(self) -> None:
        self.note("ready")

    def done(self, number: int, outcomes: Sequence[Outcome], handler_s: float | None = None) -> None:
        self.note("done", number, outcomes)

    def exited(self, exit: WorkerExit) -> None:
        self.note("exited", exit)

    def wait(self, *beginning: object) -> tuple[Any, ...]:
        """Return the first event that begins so."""

        def found() -> list[tuple[Any, ...]]:
            return [event for event in self.events if event[: len(beginning)] == beginning]

        with self.changed:
            assert self.changed.wait_for(found, PATIENCE_S), f"{beginning} was not told; {self.events} was"
            return found()[0]

    def answers(self, number: int) -> list[Any]:
        outcomes = self.wait("done", number)[2]
        return [decode(each) if isinstance(each, Encoded) else each for each in outcomes]

    def fault(self, number: int) -> WorkerFault:
        [fault] = self.answers(number)
        assert isinstance(fault, WorkerFault)
        return fault

    def exit(self) -> WorkerExit:
        exit = self.wait("exited")[1]
        assert isinstance(exit, WorkerExit)
        return exit

    def names(self) -> list[tuple[Any, ...]]:
        return [event[:2] if event[0] == "done" else event[:1] for event in self.events]


@attrs.define
class Stage:
    """Makes workers of a backend from the source of a handler."""

    root: Path
    backend: ThreadBackend
    gate: Gate
    count: int = 0

    def spec(self, source: str = EVAL, *, handler: str = "handler.py", files: Any = None, **config: Any) -> ModelSpec:
        self.count += 1
        folder = write_folder(self.root / f"model{self.count}", source, **(files or {}))
        config = {"gate": self.gate, **config}
        return ModelSpec(key=ModelKey("m", "1.0"), model_dir=str(folder), handler=handler, config=config)

    def worker(
        self, spec: ModelSpec | str = EVAL, *, threads: int = 1, **options: Any
    ) -> tuple[ThreadWorker, Listener]:
        """Return a worker that was started, and its listener."""
        if isinstance(spec, str):
            spec = self.spec(spec, **options)
        listener = Listener()
        worker = self.backend.host(spec).worker(str(9000 + self.count), threads, listener)
        worker.start()
        return worker, listener

    def busy(self) -> tuple[ThreadWorker, Listener]:
        """Return a worker that hangs in its batch 1."""
        worker, listener = self.worker()
        worker.run(1, batch(WAIT))
        assert self.gate.started.wait(PATIENCE_S)
        listener.wait("ready")
        return worker, listener


def batch(*bodies: Any) -> list[WorkerRequest]:
    rows = [encode({"body": body}, frozen=True) for body in bodies]
    return [WorkerRequest(row, f"id{position}", {"h": str(position)}) for position, row in enumerate(rows)]


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.released.set()


@pytest.fixture
def threads() -> Iterator[ThreadBackend]:
    backend = ThreadBackend()
    yield backend
    backend.close()


@pytest.fixture
def stage(tmp_path: Path, threads: ThreadBackend, gate: Gate) -> Stage:
    return Stage(tmp_path, threads, gate)


def test_it_is_a_backend(threads: ThreadBackend) -> None:
    """A ThreadBackend is what the interface asks for, and making one starts nothing."""
    backend: Backend = threads
    before = threading.active_count()
    assert backend.host(ModelSpec(key=ModelKey("m", "1"), model_dir=".", handler="h")).sharing.is_shared is False
    until(lambda: threading.active_count() == before)


def test_batches_are_answered_in_order(stage: Stage) -> None:
    """What a worker is given, before it is ready and after, is run in that order, a description among it."""
    worker, listener = stage.worker()
    worker.run(1, batch("'a'", "'b'"))
    worker.describe(2)
    worker.run(3, batch("context.get_request_id(0) + context.get_request_header(0, 'H')"))
    listener.wait("ready")
    assert worker.pid == os.getpid()
    assert (listener.answers(1), listener.answers(2), listener.answers(3)) == (["a", "b"], [{}], ["id00"])
    assert listener.names() == [("ready",), ("done", 1), ("done", 2), ("done", 3)]


def test_each_worker_is_one_daemon_thread_with_a_handler_of_its_own(stage: Stage) -> None:
    """Two workers of one version run on threads named after them, and do not share the handler's module."""
    host = stage.backend.host(stage.spec("seen = []\n" + EVAL))
    listeners = [Listener(), Listener()]
    for number, listener in enumerate(listeners):
        worker = host.worker(f"{number}", 1, listener)
        worker.start()
        worker.run(1, batch("seen.append(threading.current_thread()) or [(t.name, t.daemon) for t in seen]"))
    assert [listener.answers(1) for listener in listeners] == [
        [[("torchmgmt-worker-0", True)]],
        [[("torchmgmt-worker-1", True)]],
    ]


def test_two_workers_compute_at_the_same_time(stage: Stage) -> None:
    """A handler that lets others run does not keep them waiting: two can only pass the barrier together."""
    spec = stage.spec(barrier=threading.Barrier(2))
    pairs = [stage.worker(spec) for _ in range(2)]
    for worker, _ in pairs:
        worker.run(1, batch(f"context.model_yaml_config['barrier'].wait({PATIENCE_S}) >= 0"))
    assert [listener.answers(1) for _, listener in pairs] == [[True], [True]]


def test_listeners_are_called_on_one_thread_of_the_backend(stage: Stage) -> None:
    """Everything is told on the one thread that also runs timers, and that the backend knows as its own."""
    (worker, first), (_, second) = stage.worker(), stage.worker()
    own: list[bool] = []
    told = threading.Event()
    dispatcher = stage.backend.dispatcher
    dispatcher.call_soon(lambda: (own.append(dispatcher.on_thread()), told.set()))
    worker.run(1, batch("1"))
    worker.stop()
    first.wait("exited")
    second.wait("ready")
    assert told.wait(PATIENCE_S)
    assert own == [True]
    assert not dispatcher.on_thread()
    assert len(first.threads | second.threads) == 1


def test_rows_and_answers_are_copies(stage: Stage) -> None:
    """A handler gets arrays that it may write to, nobody else's; and what it does to its answer later changes nothing."""
    source = """
import numpy
kept = numpy.zeros(3)
def handle(data, context):
    for row in data or ():
        row["body"] += 1
        kept[:] = row["body"]
    return data and [kept for row in data]
"""
    worker, listener = stage.worker(source)
    request = batch(np.arange(3.0))
    worker.run(1, request)
    worker.run(2, batch(np.full(3, 7.0)))
    listener.wait("done", 2)
    [answer] = listener.answers(1)
    assert answer.tolist() == [1, 2, 3]
    answer += 1  # an answer may be written to, as one that came from a process
    assert decode(request[0].row)["body"].tolist() == [0, 1, 2]


def test_what_a_handler_writes_into_its_manifest_is_its_own(stage: Stage) -> None:
    """Manifest and configuration are copies for each worker; live objects in them are handed over as they are."""
    live = object()
    spec = stage.spec(nested={"list": [1]}, live=live)
    worker, listener = stage.worker(spec)
    worker.run(
        1, batch("context.model_yaml_config['nested']['list'].append(2) or id(context.model_yaml_config['live'])")
    )
    assert listener.answers(1) == [id(live)]
    assert spec.config["nested"] == {"list": [1]}


def test_a_request_past_its_deadline_is_not_begun(stage: Stage) -> None:
    """Nobody waits for it any more: the batch runs without it, and has an outcome for it all the same."""
    worker, listener = stage.worker()
    late, on_time = batch("1", "len(data)")
    worker.run(
        1, [attrs.evolve(late, deadline=time.monotonic()), attrs.evolve(on_time, deadline=time.monotonic() + 60)]
    )
    fault, answer = listener.answers(1)
    assert "deadline" in fault.reason
    assert answer == 1


# -- what a handler finds, and leaves ----------------------------------------------------------------------------------


def process_state() -> tuple[Any, ...]:
    return (
        Path.cwd(),
        list(sys.path),
        {name for name in sys.modules if "handler" in name or name.startswith("_torchm")},
    )


def test_the_process_is_left_as_it_was(stage: Stage) -> None:
    """No chdir, no change of sys.path, and when the worker has ended none of its names in sys.modules."""
    stage.worker()[1].wait("ready")  # what the library itself imports is there now
    before = process_state()
    worker, listener = stage.worker("class Mine(Exception): pass\n" + EVAL)
    worker.run(1, batch("os.path.realpath(os.curdir)", "__name__"))
    cwd, module = listener.answers(1)
    assert Path(cwd) == before[0]
    assert "handler" in module
    assert module != "handler"
    assert module in sys.modules
    assert "handler" not in sys.modules
    worker.stop()
    listener.wait("exited")
    until(lambda: not worker.is_alive(), "its thread's end")
    assert process_state() == before


def test_a_handlers_own_exception_has_the_same_name_with_every_worker(stage: Stage) -> None:
    """Who tells errors apart by type need not know that each worker imports the handler under another name."""
    worker, listener = stage.worker("class Mine(Exception): pass\n" + EVAL)
    worker.run(1, batch("fail(Mine('no'))"))
    fault = listener.fault(1)
    assert (fault.error_type, fault.reason) == ("handler.Mine", "handler.Mine: no")
    assert fault.traceback.endswith("\nhandler.Mine: no\n")


@pytest.mark.parametrize(
    "source, what",
    [
        ("import helpers\n", "the model's own file 'helpers'"),
        ("from helpers import x\n", "the model's own file 'helpers'"),
        ("import importlib\nimportlib.import_module('helpers')\n", "the model's own file 'helpers'"),
        ("def later():\n    import helpers.deep\n", "the model's own file 'helpers'"),
        ("import attrs\n", "the model's own file 'attrs'"),  # which the program has, too, and means another one
        ("from ts.torch_handler.base_handler import BaseHandler\n", "TorchServe's module 'ts'"),
    ],
)
def test_a_handler_that_needs_sys_path_is_told_to_be_a_process(stage: Stage, source: str, what: str) -> None:
    """A sibling file or ``ts`` cannot be imported; the error says so, and what to register instead."""
    assert "ts" not in sys.modules
    _, listener = stage.worker(source + ECHO, files={"helpers": "x = 1", "attrs": "y = 1"})
    exit = listener.exit()
    assert exit.fault is not None
    assert what in exit.fault.reason
    assert 'backend="process"' in exit.fault.reason
    assert "helpers" not in sys.modules


def test_an_import_that_fails_for_other_reasons_is_left_as_it_is(stage: Stage) -> None:
    """What no backend could find is not called a limit of this one."""
    _, listener = stage.worker("import nowhere_to_be_found\n" + ECHO)
    fault = listener.exit().fault
    assert fault is not None
    assert fault.reason == "ModuleNotFoundError: No module named 'nowhere_to_be_found'"


def test_a_sibling_that_is_only_tried_is_no_error_where_ts_is(stage: Stage) -> None:
    """A handler that can do without ``ts`` is left to do so."""
    source = "try:\n    import ts\nexcept ImportError:\n    ts = 'none'\n" + EVAL
    worker, listener = stage.worker(source)
    worker.run(1, batch("ts"))
    assert listener.answers(1) == ["none"]


@pytest.mark.parametrize("threads_wanted", [1, 3])
def test_a_workers_threads_are_its_own(stage: Stage, threads_wanted: int) -> None:
    """The intra-op number is the worker thread's: this thread keeps its own, and a later one gets the program's."""
    import torch

    def of_a_new_thread() -> int:
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return found[0]

    before, default = torch.get_num_threads(), of_a_new_thread()
    worker, listener = stage.worker("import torch\n" + EVAL, threads=threads_wanted)
    worker.run(1, batch("torch.get_num_threads()"))
    assert listener.answers(1) == [threads_wanted]
    assert torch.get_num_threads() == before
    assert of_a_new_thread() == default


def test_memory_is_the_processes(stage: Stage) -> None:
    """A worker that is ready shows this process's resident memory, and no private memory that its end would free."""
    worker, listener = stage.worker()
    listener.wait("ready")
    resident = psutil.Process().memory_info().rss
    assert resident / 2 < worker.memory_bytes < resident * 2
    assert worker.private_bytes == 0
    assert worker.last_lines() == ()


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, kind",
    [
        ("def handle(data, context: 1 / 0", "SyntaxError"),
        ("raise ValueError('at import')", "ValueError"),
        ("import sys\nsys.exit(3)", "SystemExit"),
        (
            "class H:\n    def initialize(self, c): raise OSError('no weights')\n    def handle(self, d, c): pass",
            "OSError",
        ),
        ("x = 1", "torchmgmt.worker.loader.HandlerError"),
    ],
)
def test_a_model_that_cannot_be_loaded_ends_its_worker_with_the_fault(stage: Stage, source: str, kind: str) -> None:
    """What loading raises is told with the worker's end, its traceback included; no batch was begun."""
    worker, listener = stage.worker(source)
    worker.run(1, batch("1"))
    exit = listener.exit()
    assert exit.fault is not None
    assert exit.fault.error_type == kind
    assert kind in exit.fault.traceback
    assert (exit.pid, exit.exitcode, exit.last_started, exit.is_final) == (os.getpid(), None, 0, False)
    assert listener.names() == [("exited",)]


def test_a_handler_that_raises_goes_on(stage: Stage) -> None:
    """What a batch raises is its outcome alone, as is a wrong number of answers; the next batch is served."""
    worker, listener = stage.worker("def handle(data, context): return data and data[0]['body'].pop()")
    worker.run(1, batch([]))
    worker.run(2, batch([[1, 2]]))
    worker.run(3, batch([["right"]]))
    assert listener.fault(1).reason == "IndexError: pop from empty list"
    assert "returned 2 answers for a batch of 1" in listener.fault(2).reason
    assert listener.answers(3) == ["right"]


def test_an_answer_that_cannot_be_pickled_fails_alone(stage: Stage) -> None:
    """Answers are pickled here as anywhere, so that a model works the same with any backend."""
    worker, listener = stage.worker()
    worker.run(1, batch("lambda: 1", "'fine'"))
    fault, answer = listener.answers(1)
    assert "pickle" in fault.reason
    assert answer == "fine"


@pytest.mark.parametrize("error", ["SystemExit(3)", "KeyboardInterrupt()"])
def test_what_asks_for_an_end_ends_the_worker(stage: Stage, error: str) -> None:
    """sys.exit() in a handler ends its worker, in words and with the traceback; there is no exit status."""
    worker, listener = stage.worker()
    worker.run(1, batch("1"))
    worker.run(2, batch(f"fail({error})"))
    worker.run(3, batch("1"))
    exit = listener.exit()
    assert exit.reason.startswith("its handler raised " + error.partition("(")[0])
    assert any("handler.py" in line for line in exit.last_lines)
    assert worker.last_lines() == exit.last_lines
    assert (exit.exitcode, exit.last_started, exit.is_final, exit.fault) == (None, 2, False, None)
    assert listener.names() == [("ready",), ("done", 1), ("exited",)]


CLOSING = """
class Handler:
    def handle(self, data, context): return [row["body"] for row in data]
    def close(self, context):
        context.model_yaml_config["gate"].started.set()
        context.model_yaml_config["gate"].released.wait()
"""


def test_its_end_is_told_after_its_hooks(stage: Stage, gate: Gate) -> None:
    """A worker that is told to stop has ended when its handler's close has, and not before."""
    worker, listener = stage.worker(CLOSING)
    worker.run(1, batch("x"))
    worker.stop()
    assert gate.started.wait(PATIENCE_S)
    assert listener.answers(1) == ["x"]
    assert ("exited",) not in listener.names()
    gate.released.set()
    assert listener.exit().reason == "it was told to end"


def test_a_hook_that_hangs_is_abandoned(stage: Stage, gate: Gate) -> None:
    """One that is killed while its handler's close hangs is abandoned as one that hangs in a batch is."""
    worker, listener = stage.worker(CLOSING)
    worker.stop()
    assert gate.started.wait(PATIENCE_S)
    worker.terminate()
    worker.kill()
    exit = listener.exit()
    assert "abandoned" in exit.reason
    assert any("close" in line for line in exit.last_lines)


def test_a_worker_that_is_terminated_calls_no_hooks(stage: Stage, gate: Gate) -> None:
    """What begins nothing more does not begin to close either."""
    worker, listener = stage.worker(CLOSING)
    listener.wait("ready")
    worker.terminate()
    assert listener.exit().reason == "it was told to end"
    assert not gate.started.is_set()


def test_a_hung_worker_is_abandoned_for_good(stage: Stage, gate: Gate) -> None:
    """kill() on a worker that hangs tells its final end and its stack at once; what it still answers is void."""
    worker, listener = stage.busy()
    worker.run(2, batch("1"))
    worker.kill()
    exit = listener.exit()
    assert (exit.is_final, exit.exitcode, exit.last_started, exit.fault) == (True, None, 1, None)
    assert "cannot be killed" in exit.reason
    assert 'backend="process"' in exit.reason
    assert any("handler.py" in line and "in handle" in line for line in exit.last_lines)
    assert "wait" in exit.last_lines[-1]
    assert worker.is_alive()
    gate.released.set()
    until(lambda: not worker.is_alive(), "the end of a thread that does not hang any more")
    worker.kill()
    stage.backend.close()
    assert listener.names() == [("ready",), ("exited",)]


def test_one_that_hangs_while_it_loads_is_abandoned_too(stage: Stage, gate: Gate) -> None:
    """kill() before it is ready is final as well: another one would hang in the same place."""
    worker, listener = stage.worker(f"def handle(data, context):\n    return data or {WAIT} and None")
    assert gate.started.wait(PATIENCE_S)
    worker.kill()
    exit = listener.exit()
    assert (exit.is_final, exit.last_started) == (True, 0)
    assert any("handler.py" in line for line in exit.last_lines)
    gate.released.set()
    until(lambda: not worker.is_alive(), "the end of its thread")
    assert listener.names() == [("exited",)]


def test_killing_an_idle_worker_is_not_final(stage: Stage) -> None:
    """One that waits for a batch ends when told to, in whatever way, and another may take its place."""
    worker, listener = stage.worker()
    worker.run(1, batch("1"))
    listener.answers(1)
    until(lambda: "WAITING" in repr(worker), "its waiting")
    worker.kill()
    assert not listener.exit().is_final
    until(lambda: not worker.is_alive(), "the end of its thread")


# -- how it ends -------------------------------------------------------------------------------------------------------


def test_stop_lets_it_finish_what_it_was_given(stage: Stage, gate: Gate) -> None:
    """After stop() the batches that lie there are run, and nothing that comes later."""
    worker, listener = stage.busy()
    worker.run(2, batch("2"))
    worker.stop()
    worker.run(3, batch("3"))
    gate.released.set()
    assert listener.exit().last_started == 2
    assert listener.names() == [("ready",), ("done", 1), ("done", 2), ("exited",)]


def test_terminate_hands_back_what_was_not_begun(stage: Stage, gate: Gate) -> None:
    """After terminate() the running batch is answered and the next ones are not begun: ``last_started`` says so."""
    worker, listener = stage.busy()
    worker.run(2, batch("2"))
    worker.terminate()
    assert listener.names() == [("ready",)]
    gate.released.set()
    exit = listener.exit()
    assert (exit.last_started, exit.is_final) == (1, False)
    assert listener.answers(1) == ["late"]
    assert listener.names() == [("ready",), ("done", 1), ("exited",)]


def test_terminate_does_not_wait_for_a_model_that_loads(stage: Stage, gate: Gate) -> None:
    """A worker that is told to end while it loads counts as ended at once; its thread goes when it has loaded."""
    worker, listener = stage.worker(f"def handle(data, context):\n    return data or {WAIT} and None")
    assert gate.started.wait(PATIENCE_S)
    worker.terminate()
    exit = listener.exit()
    assert (exit.last_started, exit.is_final) == (0, False)
    gate.released.set()
    until(lambda: not worker.is_alive(), "the end of its thread")
    assert listener.names() == [("exited",)]


def test_close_ends_idle_workers(stage: Stage) -> None:
    """When close() returns idle workers have ended, their listeners know, and no thread is left; again is no error."""
    pairs = [stage.worker() for _ in range(2)]
    for _, listener in pairs:
        listener.wait("ready")
    stage.backend.close()
    for worker, listener in pairs:
        assert not worker.is_alive()
        assert listener.names() == [("ready",), ("exited",)]
        assert not listener.exit().is_final
    stage.backend.close()
    names = {thread.name for thread in threading.enumerate()}
    assert not [name for name in names if name.startswith("torchmgmt-worker") or name == "torchmgmt-threads"]


def test_close_waits_for_a_batch_that_is_about_to_end(
    stage: Stage, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose batch ends within the time that close() gives is joined, and its answer told."""
    monkeypatch.setattr("torchmgmt.backends.thread._CLOSE_GRACE_S", PATIENCE_S)
    worker, listener = stage.busy()
    worker.run(2, batch("2"))
    closing = threading.Thread(target=stage.backend.close)
    closing.start()
    until(lambda: worker._is_terminated, "close() at work")
    gate.released.set()
    closing.join()
    assert not worker.is_alive()
    assert listener.names() == [("ready",), ("done", 1), ("exited",)]
    assert (listener.exit().last_started, listener.exit().is_final) == (1, False)


def test_close_abandons_a_worker_that_hangs(stage: Stage, gate: Gate) -> None:
    """close() does not wait for one that hangs: its listener is told before close() returns."""
    worker, listener = stage.busy()
    stage.backend.close()
    assert listener.names() == [("ready",), ("exited",)]
    assert listener.exit().is_final
    assert worker.is_alive()
    gate.released.set()
    until(lambda: not worker.is_alive(), "the end of its thread")


def test_close_from_a_listener_or_a_handler_does_not_wait_for_itself(stage: Stage, tmp_path: Path) -> None:
    """Whoever closes the backend on one of its own threads is not waited for."""
    closing: Callable[[], None] = stage.backend.close
    worker, listener = stage.worker(stage.spec(close=closing))
    worker.run(1, batch("context.model_yaml_config['close']()"))
    assert listener.exit().last_started == 1
    until(lambda: not worker.is_alive(), "the end of its thread")

    other = ThreadBackend()
    stage = Stage(tmp_path / "other", other, stage.gate)
    closed = threading.Event()
    other.dispatcher.call_soon(lambda: (other.close(), closed.set()))
    assert closed.wait(PATIENCE_S)
    with pytest.raises(ManagerClosed):
        stage.worker()


def test_nothing_starts_after_close(stage: Stage) -> None:
    """start() of a closed backend's worker raises, and its listener hears nothing."""
    listener = Listener()
    worker = stage.backend.host(stage.spec()).worker("1", 1, listener)
    stage.backend.close()
    with pytest.raises(ManagerClosed):
        worker.start()
    worker.terminate()
    worker.kill()
    stage.backend.warm()
    assert listener.names() == []
    assert not worker.is_alive()


def test_a_thread_that_cannot_be_started_is_an_oserror(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that is out of threads makes start() raise what the interface names; the listener hears nothing."""
    listener = Listener()
    worker = stage.backend.host(stage.spec()).worker("1", 1, listener)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "torchmgmt-worker-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(OSError, match="can't start new thread"):
            worker.start()
    worker.terminate()
    stage.backend.close()
    assert listener.names() == []


# -- torch -------------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, threading
from torchmgmt.backends.thread import ThreadBackend
backend = ThreadBackend()
assert "torch" not in sys.modules
backend.warm()
backend.warm()
[importing] = [thread for thread in threading.enumerate() if thread.name == "torchmgmt-import"]
importing.join()
print("torch" in sys.modules)
backend.close()
"""


def test_torch_is_imported_by_warm_in_the_background_and_not_before() -> None:
    """A program that has a ThreadBackend pays for torch when it warms it or loads with it, not before."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("True\n", "")


BROKEN_TORCH = """
import sys, threading
sys.modules["torch"] = None
from torchmgmt.backends.thread import ThreadBackend
from torchmgmt.records import ModelKey, ModelSpec
class Listener:
    def exited(self, exit):
        print(exit.reason, exit.is_final)
backend = ThreadBackend()
backend.host(ModelSpec(key=ModelKey("m", "1"), model_dir=".", handler="h")).worker("1", 1, Listener()).start()
[worker.join(30) for worker in backend._workers]
backend.close()
"""


def test_a_torch_that_cannot_be_imported_is_told() -> None:
    """Without a torch that can be imported a worker ends, and says that."""
    done = subprocess.run([sys.executable, "-c", BROKEN_TORCH], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("torch could not be imported into this process: ModuleNotFoundError")
    assert done.stderr == ""
