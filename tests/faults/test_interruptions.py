"""Ctrl-C, and whatever else interrupts a thread of the program: at every point of every call nothing is lost or left over."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.handlers import ECHO, EVAL, PATIENCE_S, Deployer, Gate, until
from tests.interruptions import Nuisance, interruptions
from torchmgmt import Batcher, Model, ModelManager, ProcessBackend
from torchmgmt.errors import ManagerClosed, ModelNotFound, TorchmgmtError
from torchmgmt.lifecycle import WorkerState
from torchmgmt.records import CloseReport

REQUESTS: dict[str, Callable[[Model], object]] = {
    "predict": lambda model: model.predict(1),
    "predict with a limit": lambda model: model.predict(1, timeout=30, wait_timeout=20, priority=3),
    "submit": lambda model: model.submit(1),
    "result": lambda model: model.submit(1).result(PATIENCE_S),
    "cancel": lambda model: model.submit(1).cancel(),
    "abandon": lambda model: model.submit(1).abandon(),
    "callback": lambda model: model.submit(1).add_done_callback(bool),
    "map": lambda model: list(model.map([1, 2, 3])),
    "stream": lambda model: list(model.stream(1)),
    "close a stream": lambda model: model.stream(1).close(),
    "describe": lambda model: model.describe(customized=True),
}


STEP = 4
"""Where each run takes half a second: as many points between two that are interrupted."""

MANY_SIGNALS = 150


def at_rest(model: Model) -> bool:
    """Whether nothing waits, and nothing runs."""
    info = model.describe()
    return info.queue_length == 0 and all(worker.state is WorkerState.READY for worker in info.workers)


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("options", [{}, {"batch_size": 4, "max_batch_delay": 5}], ids=["one by one", "in batches"])
def test_a_request_that_is_interrupted_harms_no_other(name: str, options: dict[str, int], deploy: Deployer) -> None:
    """Whatever point of a request it meets: the next one is answered at once, and nothing of it stays in the queue."""
    model = deploy(ECHO, **options)
    call = REQUESTS[name]
    for interruption in interruptions():
        interruption.of(lambda: call(model))
        assert model.submit("next").result(PATIENCE_S) == "next", interruption.where
        until(lambda: at_rest(model), f"rest after an interruption {interruption.where}")


def test_a_batcher_of_its_own_survives_it_as_well() -> None:
    """Also where a plain function runs, and the first item starts the threads."""
    for interruption in interruptions():
        with Batcher(lambda items: items, max_batch_delay=0) as batcher:
            interruption.of(lambda: batcher.submit(1, timeout=30))
            assert batcher.submit(2).result(PATIENCE_S) == 2, interruption.where
            until(lambda: not len(batcher), interruption.where)


# -- management --------------------------------------------------------------------------------------------------------


class Scene:
    """A manager, and what the program has beside it."""

    def __init__(self, manager: ModelManager, folder: Path) -> None:
        self.manager = manager
        self._folder = folder
        self._source = Deployer(folder, manager)
        self._me = psutil.Process()
        self.deploy("keep").predict(1)
        self.deploy("model").predict(1)
        manager.unregister("model")
        self._before = self._things()

    def deploy(self, name: str, **options: object) -> Model:
        folder = self._folder / "model"
        if not folder.exists():
            folder.mkdir()
            (folder / "handler.py").write_text(ECHO)
        return self.manager.register(folder, model_name=name, handler="handler.py", **options)  # type: ignore[arg-type]

    def check_well(self, where: str) -> None:
        """All that is registered answers; without it, nothing is left."""
        assert self.manager.predict("keep", "x", timeout=PATIENCE_S) == "x", where
        with contextlib.suppress(ModelNotFound):  # what was interrupted may go on, and remove it
            assert self.manager.predict("model", "x", timeout=PATIENCE_S) == "x", where
        with contextlib.suppress(ModelNotFound):
            self.manager.unregister("model")
        until(lambda: self._things() <= self._before, f"what there was before, after an interruption {where}")

    def _things(self) -> set[tuple[str, object]]:
        processes = {("process", process.pid) for process in self._me.children(recursive=True)}
        return processes | {("descriptors", count) for count in range(len(os.listdir("/proc/self/fd")))}  # noqa: PTH208


@pytest.fixture
def scene(manager: ModelManager, tmp_path: Path) -> Scene:
    return Scene(manager, tmp_path)


def test_register_interrupted(scene: Scene) -> None:
    """It is not registered then, and nothing of it is left."""
    for interruption in interruptions():
        if interruption.of(lambda: scene.deploy("model")):
            assert "model" not in scene.manager, interruption.where
        scene.check_well(interruption.where)


def test_register_of_a_further_version_interrupted(scene: Scene) -> None:
    """The version that was there before stays as it was."""
    for interruption in interruptions():
        scene.deploy("model")
        if interruption.of(lambda: scene.deploy("model", version="2.0", initial_workers=0)):
            assert [info.version for info in scene.manager.versions("model")] == ["1.0"], interruption.where
        if "2.0" in [info.version for info in scene.manager.versions("model")]:
            scene.manager.unregister("model", "2.0")
        scene.check_well(interruption.where)


def test_unregister_interrupted(scene: Scene) -> None:
    """It is there, and serves, or it is gone with all that it had."""
    for interruption in interruptions():
        scene.deploy("model")
        interruption.of(lambda: scene.manager.unregister("model"))
        scene.check_well(interruption.where)  # where it is still going on it is soon done


def test_scale_interrupted(scene: Scene) -> None:
    """It is as it was, or as it was to be, and serves."""
    for interruption in interruptions():
        scene.deploy("model")
        interruption.of(lambda: scene.manager.scale("model", 2))
        wanted = scene.manager.describe("model").scale.min_workers
        until(lambda: len(scene.manager.describe("model").workers) == wanted, interruption.where)  # noqa: B023
        scene.check_well(interruption.where)


def test_set_default_interrupted(scene: Scene) -> None:
    """One of the two is the default."""
    for interruption in interruptions():
        scene.deploy("model")
        scene.deploy("model", version="2.0", initial_workers=0)
        interruption.of(lambda: scene.manager.set_default("model", "2.0"))
        assert sum(info.is_default for info in scene.manager.versions("model")) == 1, interruption.where
        scene.manager.set_default("model", "1.0")
        scene.manager.unregister("model", "2.0")
        scene.check_well(interruption.where)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # where it meets a finalizer
@pytest.mark.usefixtures("light_torch")
def test_close_interrupted(tmp_path: Path) -> None:
    """The next close() ends it all, soon."""
    me = psutil.Process()
    before = set(me.children(recursive=True))
    for number, interruption in enumerate(interruptions(STEP)):
        manager = ModelManager()
        Deployer(tmp_path / str(number), manager)(ECHO).predict(1)
        interruption.of(lambda: manager.close(1))  # noqa: B023
        manager.close(1)
        until(lambda: set(me.children(recursive=True)) <= before, interruption.where)
        with pytest.raises(ManagerClosed):
            manager.predict("m", 1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # where it meets a finalizer
@pytest.mark.usefixtures("light_torch")
def test_the_first_registration_of_a_program_interrupted(tmp_path: Path) -> None:
    """The threads and the process that it starts serve the next one, or end with close()."""
    me = psutil.Process()
    before = set(me.children(recursive=True))
    for number, interruption in enumerate(interruptions(STEP)):
        with ModelManager() as manager:
            deploy = Deployer(tmp_path / str(number), manager)
            if interruption.of(lambda: deploy(ECHO)):  # noqa: B023
                assert "m" not in manager
                deploy(ECHO)
            assert manager.predict("m", 1, timeout=PATIENCE_S) == 1, interruption.where
        until(lambda: set(me.children(recursive=True)) <= before, interruption.where)


# -- real signals ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def handling(number: signal.Signals, handler: Callable[..., object]) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def test_ctrl_c_while_a_notebook_maps(deploy: Deployer) -> None:
    """Real SIGINTs at random moments of map, predict and stream: each ends the cell, and the next one runs."""
    model = deploy(ECHO)

    def cell() -> None:
        while True:
            list(model.map(range(20)))
            model.predict(1)
            list(model.stream(1))

    with handling(signal.SIGINT, signal.default_int_handler), Nuisance(signal.SIGINT, seed=16) as nuisance:
        for _ in range(MANY_SIGNALS):
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012
                nuisance.again()
                cell()
            assert model.submit("next").result(PATIENCE_S) == "next"
    until(lambda: at_rest(model))


HANDLERS: dict[str, Callable[[Model], object]] = {
    "submit": lambda model: model.submit(2),
    "predict": lambda model: model.predict(2),
    "stream": lambda model: list(model.stream(2)),
    "describe": lambda model: model.describe(),
    "scale": lambda model: model.scale(1, synchronous=False),
    "cancel": lambda model: model.submit(2).cancel(),
}


@pytest.mark.parametrize("name", HANDLERS)
def test_signal_handlers_use_the_manager(name: str, deploy: Deployer) -> None:
    """Whatever the main thread is in the midst of, a handler may call."""
    model = deploy(ECHO)
    handled: list[object] = []

    with Nuisance(signal.SIGUSR1, seed=14) as nuisance:

        def handle(*_: object) -> None:
            handled.append(HANDLERS[name](model))
            if len(handled) < MANY_SIGNALS:
                nuisance.again()

        with handling(signal.SIGUSR1, handle):
            nuisance.again()
            end = time.monotonic() + PATIENCE_S
            while len(handled) < MANY_SIGNALS and time.monotonic() < end:
                assert list(model.map([1, 2])) == [1, 2]
                assert model.predict(1) == 1
    assert len(handled) == MANY_SIGNALS
    until(lambda: at_rest(model))


@pytest.mark.parametrize("what", ["predict", "map", "register", "scale", "unregister"])
def test_close_from_a_signal_handler(tmp_path: Path, backend: ProcessBackend, what: str) -> None:
    """The usual SIGTERM handler: it closes, and what runs on the main thread ends with an error, or well."""
    for attempt in range(8):
        with ModelManager(backend=backend) as manager:
            model = Deployer(tmp_path / str(attempt), manager)(ECHO)

            def work(model: Model = model, manager: ModelManager = manager, attempt: int = attempt) -> None:
                while True:
                    if what == "predict":
                        model.predict(1)
                    elif what == "map":
                        list(model.map(range(50)))
                    elif what == "scale":
                        model.scale(2)
                        model.scale(1)
                    else:
                        Deployer(tmp_path / f"{attempt} {time.monotonic()}", manager)(ECHO, model_name="other")
                        manager.unregister("other")

            reports: list[CloseReport] = []

            def close(*_: object, manager: ModelManager = manager, reports: list[CloseReport] = reports) -> None:
                reports.append(manager.close(1))

            with handling(signal.SIGTERM, close), Nuisance(signal.SIGTERM, seed=attempt) as nuisance:
                nuisance.again()
                with pytest.raises((TorchmgmtError, RuntimeError)):
                    work()
            assert len(reports) == 1
            assert manager.closed


def test_unregister_from_a_signal_handler(deploy: Deployer) -> None:
    """It returns once the model is gone, although its requests are being made by the thread that it interrupts."""
    for attempt in range(8):
        model = deploy(ECHO)

        def unregister(*_: object, model: Model = model) -> None:
            model.unregister(timeout=1)

        with handling(signal.SIGTERM, unregister), Nuisance(signal.SIGTERM, seed=attempt) as nuisance:
            nuisance.again()
            with pytest.raises(TorchmgmtError):  # noqa: PT012
                while True:
                    list(model.map(range(50)))
        assert "m" not in deploy.manager


def test_an_exception_that_another_thread_sets(deploy: Deployer) -> None:
    """As Celery's and pytest's time limits do it: it ends the waiting, and harms nobody."""
    model = deploy(ECHO)
    ended: list[BaseException] = []

    def work() -> None:
        try:
            while True:
                list(model.map(range(20)))
        except BaseException as error:
            ended.append(error)

    for _ in range(20):
        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.005)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TimeoutError))
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        assert model.submit("next").result(PATIENCE_S) == "next"
    assert [type(error) for error in ended] == [TimeoutError] * 20
    until(lambda: at_rest(model))


def test_a_limit_of_time_ends_a_predict_that_runs(deploy: Deployer, gate: Gate) -> None:
    """What interrupted the caller comes out of predict(), and its request is given up."""
    model = deploy(EVAL)

    def late(*_: object) -> None:
        raise TimeoutError("too late")

    with handling(signal.SIGUSR1, late), Nuisance(signal.SIGUSR1, seed=1) as nuisance:
        nuisance.again()
        with pytest.raises(TimeoutError, match="too late"):
            model.predict(gate.expression)
    gate.open()
    assert model.predict("1", timeout=PATIENCE_S) == 1
