"""What register returns, the manager as a collection, and what listeners are told."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from tests.handlers import ECHO, EVAL, Deployer, Gate, until, write_folder
from torchmgmt import Model, ModelManager, ProcessBackend, Settings
from torchmgmt.errors import (
    DeadlineExceeded,
    HandlerFailed,
    InvalidArgument,
    ModelNotFound,
    NoWorker,
    QueueFull,
    WorkerDied,
    WorkerStartFailed,
    WouldWaitForever,
)
from torchmgmt.events import (
    DefaultVersionSet,
    Event,
    ModelRegistered,
    ModelUnregistered,
    VersionStateChanged,
    WorkerReady,
    WorkerStopped,
)
from torchmgmt.lifecycle import VersionState


def test_a_model_is_bound_to_its_version(deploy: Deployer, manager: ModelManager) -> None:
    """A Model's calls are the manager's with its name and version."""
    model = deploy(ECHO, version="2.5")
    assert (model.name, model.version, model.manager, model.state) == ("m", "2.5", manager, VersionState.READY)
    assert model.predict("x") == manager.predict("m", "x", version="2.5") == "x"
    assert model.submit("y").result(20) == "y"
    assert len(model.scale(2).workers) == 2
    assert model.describe().to_dict() == manager.describe("m", "2.5").to_dict()
    assert model == manager["m"]
    assert hash(model) == hash(manager["m"])
    assert model != deploy(ECHO, version="3.0")
    assert "m:2.5" in repr(model)


def test_a_model_as_a_context_is_unregistered_at_its_end(deploy: Deployer, manager: ModelManager) -> None:
    """``with manager.register(…) as model`` unregisters it, also after an exception; its state is GONE then."""
    model = deploy(ECHO)
    with contextlib.suppress(ZeroDivisionError), model:
        assert model.predict(1) == 1
        raise ZeroDivisionError
    assert model.state is VersionState.GONE
    assert len(manager) == 0
    for call in (model.predict, model.describe, model.wait_ready, model.unregister):
        with pytest.raises(ModelNotFound):
            call()


def test_the_manager_is_a_collection_of_names(deploy: Deployer, manager: ModelManager) -> None:
    """len, in, iteration and [] of a manager are about names, sorted, whatever number of versions each has."""
    assert (len(manager), list(manager), manager.models()) == (0, [], ())
    for name, version in (("b", "1"), ("a", "1"), ("b", "2")):
        deploy(ECHO, model_name=name, version=version, initial_workers=0)
    assert (len(manager), list(manager)) == (2, ["a", "b"])
    assert "a" in manager
    assert "c" not in manager
    assert 5 not in manager
    assert [] not in manager  # type: ignore[comparison-overlap]
    assert (manager["b"].name, manager["b"].version) == ("b", "1")
    assert [(info.name, info.version) for info in manager.models()] == [("a", "1"), ("b", "1")]
    for name in manager:
        manager.describe(name)


def test_wait_ready_waits_for_an_asynchronous_registration(deploy: Deployer, gate: Gate) -> None:
    """wait_ready returns when all wanted workers are ready, and tells when its time is over before."""
    model = deploy(
        f"import os, time\nwhile not os.path.exists({gate.path!r}):\n    time.sleep(0.002)\n{ECHO}",
        synchronous=False,
        initial_workers=2,
    )
    assert model.state is VersionState.LOADING
    with pytest.raises(DeadlineExceeded):
        model.wait_ready(0.05)
    with pytest.raises(DeadlineExceeded):
        model.wait_ready(0)
    gate.open()
    model.wait_ready(20)
    assert [worker.state.name for worker in model.describe().workers] == ["READY", "READY"]
    model.wait_ready(0)


def test_wait_ready_tells_of_a_start_that_failed_before(deploy: Deployer) -> None:
    """wait_ready of a version whose workers fail to start raises why, whenever it is called."""
    model = deploy("raise OSError('no weights')\n", synchronous=False)
    until(lambda: model.describe().last_error, "a start failed")
    with pytest.raises(WorkerStartFailed, match="no weights"):
        model.wait_ready(20)


def test_requests_wait_for_a_version_that_loads(deploy: Deployer, gate: Gate) -> None:
    """A request for a version whose workers are still starting waits in the queue and is answered."""
    model = deploy(
        f"import os, time\nwhile not os.path.exists({gate.path!r}):\n    time.sleep(0.002)\n{ECHO}", synchronous=False
    )
    futures = [model.submit(number) for number in range(3)]
    gate.open()
    assert [future.result(20) for future in futures] == [0, 1, 2]


# -- map -------------------------------------------------------------------------------------------------------------


def test_map_gives_answers_in_the_order_of_the_items(deploy: Deployer) -> None:
    """map answers each item once, in order, with several workers and batches at work."""
    model = deploy(ECHO, initial_workers=2, batch_size=4, max_batch_delay=1)
    assert list(model.map(range(300))) == list(range(300))
    assert list(model.map([])) == []


def test_map_takes_endless_items_and_no_more_than_it_needs(deploy: Deployer) -> None:
    """map takes from an endless generator only what keeps the workers busy, and cancels the rest when it is closed."""
    model = deploy(ECHO)
    taken = itertools.count()
    counter: list[int] = []

    def items() -> Iterator[int]:
        for number in taken:
            counter.append(number)
            yield number

    answers = model.map(items())
    assert counter == []
    assert list(itertools.islice(answers, 20)) == list(range(20))
    assert len(counter) <= 20 + 50
    answers.close()  # type: ignore[attr-defined]
    until(lambda: model.describe().queue_length == 0, "nothing waits")


def test_map_fails_at_the_turn_of_the_item(deploy: Deployer) -> None:
    """An item that fails raises at its turn: the answers before it came, in order."""
    model = deploy()
    answers = model.map(["1", "2", "1 / 0", "4"])
    assert [next(answers), next(answers)] == [1, 2]
    with pytest.raises(HandlerFailed, match="ZeroDivisionError"):
        next(answers)
    assert model.predict("5") == 5


def test_map_gets_along_with_a_full_queue(backend: ProcessBackend, tmp_path: Path) -> None:
    """map never fills the queue by itself, and waits for its own answers when others have filled it."""
    with ModelManager(backend=backend, settings=Settings(job_queue_size=3)) as manager:
        model = Deployer(tmp_path, manager)(ECHO)
        over = threading.Event()

        def fill() -> None:
            while not over.is_set():
                try:
                    model.submit("other")
                except QueueFull:
                    over.wait(0.001)

        filler = threading.Thread(target=fill)
        filler.start()
        try:
            answers = []
            for number in range(30):
                try:
                    answers += list(model.map([number]))
                except QueueFull:
                    answers.append(number)
        finally:
            over.set()
            filler.join()
        assert answers == list(range(30))
        until(lambda: model.describe().queue_length == 0, "the queue is empty")
        assert list(model.map(range(50))) == list(range(50))


def test_map_passes_an_error_of_its_items_on(deploy: Deployer) -> None:
    """What the items' own generator raises comes out of map, and leaves no request behind."""
    model = deploy(ECHO)

    def items() -> Iterator[int]:
        yield 1
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        list(model.map(items()))
    until(lambda: model.describe().queue_length == 0, "nothing waits")


def test_map_refuses_a_wrong_timeout_and_what_is_no_iterable(deploy: Deployer) -> None:
    """A wrong argument of map is an error of our own that names it."""
    model = deploy(ECHO)
    with pytest.raises(InvalidArgument, match="timeout"):
        list(model.map([1], timeout=-1))
    with pytest.raises(InvalidArgument, match="items"):
        list(model.map(5))  # type: ignore[arg-type]


# -- listeners -------------------------------------------------------------------------------------------------------


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def watched(backend: ProcessBackend, events: list[Event], tmp_path: Path) -> Iterator[Deployer]:
    """Deploys with a manager that notes all events, after a listener that always fails."""

    def broken(event: Event) -> None:
        raise RuntimeError("a listener that fails")

    with ModelManager(backend=backend, listeners=[broken, events.append]) as manager:
        yield Deployer(tmp_path, manager)


def of_kind(events: list[Event], *kinds: Any) -> list[Any]:
    return [event for event in events if isinstance(event, kinds)]


def test_listeners_are_told_in_the_order_of_life(watched: Deployer, events: list[Event]) -> None:
    """A version is announced, then serves; it is withdrawn before its workers stop; a broken listener harms nothing."""
    logging.getLogger("torchmgmt.announcer").disabled = True
    try:
        with watched(ECHO) as model:
            assert model.predict(1) == 1
    finally:
        logging.getLogger("torchmgmt.announcer").disabled = False
    kinds = [type(event) for event in events]
    assert kinds[:2] == [ModelRegistered, DefaultVersionSet]
    ready, withdrawn = kinds.index(WorkerReady), kinds.index(ModelUnregistered)
    stopped = kinds.index(WorkerStopped)
    assert ready < withdrawn < stopped
    states = [(event.before.name, event.after.name) for event in of_kind(events, VersionStateChanged)]
    assert states == [("REGISTERED", "LOADING"), ("LOADING", "READY"), ("READY", "RETIRING"), ("RETIRING", "GONE")]
    assert {str(event.key) for event in events} == {"m:1.0"}
    (stop,) = of_kind(events, WorkerStopped)
    assert stop.expected


def test_listeners_are_told_of_a_death(watched: Deployer, events: list[Event]) -> None:
    """A worker that dies is announced as stopped, not expected, with its exit, before its replacement is ready."""
    model = watched(EVAL)
    (worker,) = model.describe().workers
    os.kill(worker.pid or 0, signal.SIGKILL)
    until(lambda: len(of_kind(events, WorkerReady)) == 2, "it is replaced")
    told = [type(event) for event in of_kind(events, WorkerReady, WorkerStopped)]
    assert told == [WorkerReady, WorkerStopped, WorkerReady]
    (stop,) = of_kind(events, WorkerStopped)
    assert (stop.expected, stop.exit.pid, stop.exit.exitcode, stop.worker_id) == (False, worker.pid, -9, worker.id)
    first, second = of_kind(events, WorkerReady)
    assert (first.pid, first.worker_id) == (worker.pid, worker.id)
    assert second.pid not in {0, worker.pid}
    assert second.seconds > 0


def test_listeners_are_told_that_a_failed_registration_was_withdrawn(watched: Deployer, events: list[Event]) -> None:
    """A registration that fails is announced and withdrawn again: whoever counts by events counts right."""
    with pytest.raises(WorkerStartFailed):
        watched("raise ValueError\n")
    kinds = [type(event) for event in of_kind(events, ModelRegistered, ModelUnregistered)]
    assert kinds == [ModelRegistered, ModelUnregistered]


def test_a_listener_may_ask_the_manager(backend: ProcessBackend, tmp_path: Path) -> None:
    """A listener is called with no lock held: it may describe and list from within an event."""
    seen: list[Any] = []

    def listener(event: Event) -> None:
        if event.key.name in manager:
            seen.append((type(event).__name__, manager.describe(event.key.name).state.name, len(manager.models())))

    with ModelManager(backend=backend, listeners=[listener]) as manager:
        model: Model = Deployer(tmp_path, manager)(ECHO)
        model.scale(2)
    assert [name for name, _, _ in seen].count("WorkerReady") == 2


@pytest.mark.parametrize(
    "wait",
    [
        lambda model: model.predict(1),
        lambda model: model.scale(1),
        lambda model: model.wait_ready(),
        lambda model: model.describe(customized=True),
        lambda model: model.unregister(),
        lambda model: model.manager.close(),
        lambda model: model.manager.register("x", model_name="y", handler="z"),
    ],
    ids=["predict", "scale", "wait_ready", "describe", "unregister", "close", "register"],
)
def test_waiting_where_answers_are_read_is_refused(deploy: Deployer, wait: Callable[[Model], object]) -> None:
    """A call that waits for a worker, made in a future's callback, raises instead of stopping everything for ever."""
    model = deploy(EVAL)
    errors: Queue[BaseException | None] = Queue()

    def callback(_future: object) -> None:
        try:
            wait(model)
        except WouldWaitForever as error:
            errors.put(error)
        else:
            errors.put(None)

    model.submit("time.sleep(0.1)").add_done_callback(callback)
    assert isinstance(errors.get(timeout=15), WouldWaitForever)
    assert model.predict("2") == 2


def test_closing_ends_an_unregistering_that_still_waits(tmp_path: Path) -> None:
    """Closing the manager ends the wait of another thread that is unregistering a version whose batch runs on."""
    folder = write_folder(tmp_path / "model", EVAL)
    manager = ModelManager()
    model = manager.register(folder, model_name="m", handler="handler.py")
    future = model.submit("time.sleep(60)")
    until(future.running, "the batch runs")
    thread = threading.Thread(target=model.unregister)
    thread.start()
    until(lambda: "m" not in manager, "the version is being unregistered")
    manager.close(0.1)
    thread.join(20)
    assert not thread.is_alive()
    assert future.exception(timeout=5) is not None


def test_a_manager_outlives_the_backend_that_it_was_lent(tmp_path: Path) -> None:
    """A manager whose backend was closed under it closes all the same, and the request that ran there is answered."""
    folder = write_folder(tmp_path / "model", EVAL)
    backend = ProcessBackend()
    manager = ModelManager(backend=backend)
    model = manager.register(folder, model_name="m", handler="handler.py", batches_in_flight=1)
    begun = Gate(tmp_path / "begun")
    running, waiting = model.submit(begun.expression), model.submit("1")
    until(begun.reached, "the batch runs")
    backend.close()
    assert isinstance(running.exception(timeout=5), WorkerDied)
    assert isinstance(waiting.exception(timeout=5), NoWorker)
    thread = threading.Thread(target=manager.close, args=(1,))
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
