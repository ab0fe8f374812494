"""Code of the embedding program that is called: listeners, callbacks, log handlers. Nothing that it does costs others anything."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, as_completed, wait
from pathlib import Path
from typing import Any

import pytest

from tests.handlers import ECHO, EVAL, PATIENCE_S, Deployer, Gate, run_program, until, write_folder
from tests.interruptions import Nuisance
from torchmgmt import Model, ModelManager, ProcessBackend
from torchmgmt.errors import ModelNotFound, TorchmgmtError
from torchmgmt.events import (
    BatchFinished,
    Event,
    ModelRegistered,
    ModelUnregistered,
    VersionStateChanged,
    WorkerReady,
    WorkerStopped,
)
from torchmgmt.lifecycle import VersionState

# As classes: an error that is kept keeps the frames in which it was raised.
ERRORS: list[type[BaseException]] = [ValueError, SystemExit, KeyboardInterrupt]


@pytest.fixture
def quiet() -> Iterator[None]:
    """Have nothing logged of what a test makes fail: pytest would keep the frames, and what is in them."""
    loggers = [
        logging.getLogger(f"torchmgmt.{name}") for name in ("announcer", "owned_future", "pool.actions", "batch")
    ]
    for logger in loggers:
        logger.disabled = True
    yield
    for logger in loggers:
        logger.disabled = False


# -- listeners ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("error", ERRORS)
def test_a_listener_that_raises_costs_nothing(
    backend: ProcessBackend, tmp_path: Path, error: type[BaseException]
) -> None:
    """Workers are started, replaced, scaled and ended; requests are answered; other listeners hear of all of it."""
    heard: list[Event] = []

    def broken(_event: Event) -> None:
        raise error("no")

    with ModelManager(backend=backend, listeners=[broken, heard.append, broken]) as manager:
        model = Deployer(tmp_path, manager)(EVAL)
        (worker,) = model.describe().workers
        os.kill(worker.pid or 0, signal.SIGKILL)
        until(lambda: model.describe().workers and model.predict("os.getpid()") != worker.pid, "it is replaced")
        model.scale(2)
        assert list(model.map(["1"] * 5)) == [1] * 5
        model.scale(1)
        model.unregister()
        assert "m" not in manager
    kinds = [type(event) for event in heard]
    assert [kinds.count(kind) for kind in (ModelRegistered, ModelUnregistered)] == [1, 1]
    assert kinds.count(WorkerReady) == kinds.count(WorkerStopped) == 3
    assert kinds.count(BatchFinished) >= 6


class Noted:
    """What a listener was told of each version, in order; the versions of a name that come one after the other are apart."""

    def __init__(self) -> None:
        self.events: defaultdict[str, list[Event]] = defaultdict(list)
        self.threads: set[int] = set()
        self.is_telling = threading.Lock()
        self.overlaps = 0

    def __call__(self, event: Event) -> None:
        if not self.is_telling.acquire(blocking=False):
            self.overlaps += 1
            return
        try:
            self.events[str(event.key)].append(event)
        finally:
            self.is_telling.release()

    def states(self, key: str) -> list[tuple[VersionState, VersionState]]:
        return [(event.before, event.after) for event in self.events[key] if isinstance(event, VersionStateChanged)]


def check_life(told: Sequence[tuple[VersionState, VersionState]]) -> None:
    """Each state follows from the one before, from REGISTERED to GONE, and none is told of twice."""
    assert told[0][0] is VersionState.REGISTERED
    assert told[-1] == (VersionState.RETIRING, VersionState.GONE)
    assert told[-2][1] is VersionState.RETIRING
    for (before, after), (next_before, _) in itertools.pairwise([*told, (VersionState.GONE, VersionState.GONE)]):
        assert before is not after
        assert next_before is after


def test_events_come_in_the_order_in_which_they_happened(backend: ProcessBackend, tmp_path: Path) -> None:
    """While four threads register, scale, ask and unregister: each version's whole life, one event at a time."""
    noted = Noted()
    folder = write_folder(tmp_path / "model", ECHO)
    errors: list[BaseException] = []
    with ModelManager(backend=backend, listeners=[noted]) as manager:

        def live(name: str) -> None:
            try:
                for version in range(3):
                    model = manager.register(
                        folder, model_name=name, version=str(version), handler="handler.py", synchronous=version != 1
                    )
                    if version != 1:
                        assert model.predict(1, timeout=PATIENCE_S) == 1
                        model.scale(2, synchronous=False)
                    model.unregister()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=live, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert errors == []
    assert noted.overlaps == 0
    assert len(noted.events) == 12
    for key, events in noted.events.items():
        check_life(noted.states(key))
        assert isinstance(events[0], ModelRegistered)
        ready = [event.worker_id for event in events if isinstance(event, WorkerReady)]
        stopped = [event.worker_id for event in events if isinstance(event, WorkerStopped)]
        assert {*ready} <= {*stopped}, "each that began has ended"
        for worker_id in ready:
            kinds = [type(event) for event in events if getattr(event, "worker_id", None) == worker_id]
            assert kinds[0] is WorkerReady
            assert kinds[-1] is WorkerStopped


def test_no_state_is_told_of_that_never_was(backend: ProcessBackend, tmp_path: Path) -> None:
    """A version whose only worker dies, and cannot be replaced, goes from READY to what it is then."""
    noted = Noted()
    flag = tmp_path / "flag"
    flag.touch()
    source = f"import os\nif not os.path.exists({str(flag)!r}):\n    os._exit(3)\n" + EVAL
    with ModelManager(backend=backend, listeners=[noted]) as manager:
        model = Deployer(tmp_path, manager)(source, share_weights="never", config="maxRetryTimeoutInSec: 0\n")
        flag.unlink()
        with pytest.raises(TorchmgmtError):
            model.predict("os._exit(1)")
        until(lambda: model.state is VersionState.FAILED, "it is given up")
    told = noted.states("m:1.0")
    check_life(told)
    starts = sum(isinstance(event, WorkerStopped) for event in noted.events["m:1.0"])
    loading = sum(after is VersionState.LOADING for _, after in told)
    assert loading <= starts, "LOADING was told of as often as a worker was loading, at most"
    assert [after for _, after in told[:2]] == [VersionState.LOADING, VersionState.READY]


def test_no_loading_is_invented_where_none_begins(backend: ProcessBackend, tmp_path: Path) -> None:
    """Scaled to none, a version goes from READY to REGISTERED, and back by way of LOADING."""
    noted = Noted()
    with ModelManager(backend=backend, listeners=[noted]) as manager:
        model = Deployer(tmp_path, manager)(ECHO)
        model.scale(0)
        model.scale(1)
    names = [after.name for _, after in noted.states("m:1.0")]
    assert names == ["LOADING", "READY", "REGISTERED", "LOADING", "READY", "RETIRING", "GONE"]


# -- callbacks ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("error", ERRORS)
def test_a_done_callback_that_raises_costs_its_batch_nothing(
    deploy: Deployer, gate: Gate, error: type[BaseException]
) -> None:
    """All of the batch are answered, all callbacks called, and the next batch runs, whether it ends well or not."""
    model = deploy(EVAL, batch_size=4, max_batch_delay=50)
    called: list[int] = []

    def fail(_future: Future[Any]) -> None:
        raise error("no")

    for bodies in (["1", "2", "3", "4"], ["1", "2", "3", "1 / 0"], ["os._exit(1)", "2", "3", "4"]):
        before = model.submit("time.sleep(0.1)")
        until(before.running, "the worker has something to do, so that the next four are a batch")
        futures = [model.submit(body) for body in bodies]
        called.clear()
        for number, future in enumerate(futures):
            future.add_done_callback(fail)
            future.add_done_callback(lambda _future, number=number: called.append(number))
            future.add_done_callback(fail)
        outcomes = [future.exception(PATIENCE_S) is None for future in futures]
        assert outcomes in ([True] * 4, [False] * 4)
        until(lambda: sorted(called) == [0, 1, 2, 3], "all callbacks are called")
    assert model.submit("5").result(PATIENCE_S) == 5


@pytest.mark.usefixtures("quiet")
def test_a_callback_that_raises_as_a_request_is_taken_back_costs_nothing(deploy: Deployer, gate: Gate) -> None:
    """cancel() says what it does, and those that wait behind are run."""
    model = deploy(EVAL)
    running = model.submit(gate.expression)
    until(running.running)
    waiting = [model.submit("1") for _ in range(4)]

    def fail(_future: Future[Any]) -> None:
        raise SystemExit(3)

    for future in waiting[:2]:
        future.add_done_callback(fail)
        assert future.cancel()
    gate.open()
    assert [future.result(PATIENCE_S) for future in waiting[2:]] == [1, 1]


# -- log handlers ------------------------------------------------------------------------------------------------------


class LogHandler(logging.Handler):
    """A program's own, which raises or blocks."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self.calls = 0
        self._act = act

    def emit(self, _record: logging.LogRecord) -> None:
        self.calls += 1
        self._act()


@pytest.fixture
def log_with() -> Iterator[Callable[[Callable[[], object]], LogHandler]]:
    """Have all that the library logs go to a handler that does what is given."""
    logger = logging.getLogger("torchmgmt")
    before = logger.level, logger.propagate
    added: list[LogHandler] = []

    def add(act: Callable[[], object]) -> LogHandler:
        handler = LogHandler(act)
        added.append(handler)
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        return handler

    yield add
    for handler in added:
        logger.removeHandler(handler)
    logger.level, logger.propagate = before
    logger.setLevel(before[0])


def use(model: Model) -> None:
    """Have a worker print, fail, die and be replaced."""
    assert model.submit("[print('a line', number) for number in range(200)] and 1").result(PATIENCE_S) == 1
    assert model.submit("1 / 0").exception(PATIENCE_S) is not None
    (worker,) = model.describe().workers
    assert model.submit("os._exit(3)").exception(PATIENCE_S) is not None
    assert model.submit("os.getpid()").result(PATIENCE_S) != worker.pid
    model.scale(2)
    model.scale(1)


@pytest.mark.parametrize("error", ERRORS)
def test_a_log_handler_that_raises_costs_nothing(
    deploy: Deployer, log_with: Callable[[Callable[[], object]], LogHandler], error: type[BaseException]
) -> None:
    """Neither what serves requests nor what reads output ends; each record is tried."""

    def fail() -> None:
        raise error("no")

    handler = log_with(fail)
    model = deploy(EVAL)
    use(model)
    calls = handler.calls
    assert calls > 3
    use(model)
    until(lambda: handler.calls > calls, "it is still called")
    model.unregister()


def test_a_log_handler_that_blocks_for_ever_costs_nothing(
    tmp_path: Path,
    light_torch: Path,
    log_with: Callable[[Callable[[], object]], LogHandler],
) -> None:
    """Answers go on, no healthy worker is killed however much it prints, dead ones are replaced, and close() returns."""
    before, may_go_on = {*threading.enumerate()}, threading.Event()
    handler = log_with(lambda: may_go_on.wait(60))
    try:
        with ModelManager() as manager:
            model = Deployer(tmp_path, manager)(EVAL)
            use(model)
            pid = model.predict("os.getpid()")
            flood = "[print('x' * 1000) for _ in range(2000)] and os.getpid()"
            assert [model.submit(flood).result(PATIENCE_S) for _ in range(2)] == [pid] * 2
            assert handler.calls <= 2, "it is asked once, for the first record of each relay"
            began = time.monotonic()
        assert time.monotonic() - began < 10
    finally:
        may_go_on.set()
    until(lambda: {*threading.enumerate()} <= before, "the threads are gone")


# -- signal handlers ---------------------------------------------------------------------------------------------------

SIGNALS = """
import os, signal, sys, threading, time
from torchmgmt import ModelManager
from torchmgmt.errors import TorchmgmtError
what = sys.argv[2]
manager = ModelManager()
model = manager.register(sys.argv[1], model_name="m", handler="handler.py", max_batch_delay=0)
handled = []
def handle(*_):
    if what == "close":
        handled.append(manager.close(2).clean)
    elif what == "unregister":
        handled.append(model.unregister(timeout=2) is not None)
    elif what == "submit":
        handled.append(model.submit("'from the handler'"))
    else:
        sys.exit("as usual")
    if what == "submit" and len(handled) < 50:
        again.release()
signal.signal(signal.SIGTERM, handle)
again = threading.Semaphore(0)
def nuisance():
    while again.acquire():
        time.sleep(0.003)
        os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=nuisance, daemon=True).start()
again.release()
end = time.monotonic() + 20
try:
    while time.monotonic() < end and len(handled) < 50:
        list(model.map(["1"] * 50))
        model.predict("1")
except TorchmgmtError as error:
    print(type(error).__name__)
if what == "submit":
    print({each.result(10) for each in handled}, model.predict("2"))
else:
    print(handled)
manager.close()
"""


@pytest.mark.parametrize(
    "what, said, status",
    [
        ("close", ("ManagerClosed\n[True]\n", "ManagerClosed\n[False]\n"), 0),
        ("unregister", ("ModelNotFound\n[True]\n",), 0),
        ("submit", ("{'from the handler'} 2\n",), 0),
        ("exit", ("",), 1),
    ],
)
def test_real_signal_handlers_use_the_manager(
    tmp_path: Path, light_torch: Path, what: str, said: Sequence[str], status: int
) -> None:
    """In a program of its own, during map and predict: it goes on, or ends, as the handler says."""
    began = time.monotonic()
    program = run_program(SIGNALS, write_folder(tmp_path / "model", EVAL), what)
    assert program.stdout in said, program.stderr
    assert program.returncode == status, program.stderr
    assert program.stderr == ("as usual\n" if what == "exit" else "")
    assert time.monotonic() - began < 30


def test_a_name_that_is_gone_is_not_found_from_a_handler(deploy: Deployer) -> None:
    """unregister() in a handler of a model that the main thread has just unregistered is an error of that call alone."""
    model = deploy(ECHO)
    model.unregister()
    raised: list[BaseException] = []

    def handle(*_: object) -> None:
        try:
            model.unregister()
        except ModelNotFound as error:
            raised.append(error)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        until(lambda: raised)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_ctrl_c_while_the_standard_library_waits(deploy: Deployer) -> None:
    """Who is interrupted in wait() or as_completed() may leave their locks held; answers to all others go on."""
    model = deploy(ECHO)

    def cell() -> None:
        while True:
            wait([model.submit(number) for number in range(10)], PATIENCE_S)
            for future in as_completed([model.submit(number) for number in range(10)], PATIENCE_S):
                future.result()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Nuisance(signal.SIGINT, seed=16) as nuisance:
            for _ in range(150):
                # Where it was interrupted just before it took its lock again, the standard library lets go of one too many.
                with pytest.raises((KeyboardInterrupt, RuntimeError)):  # noqa: PT012
                    nuisance.again()
                    cell()
                assert model.submit("next").result(PATIENCE_S) == "next"
    finally:
        signal.signal(signal.SIGINT, before)
    until(lambda: model.describe().queue_length == 0)
