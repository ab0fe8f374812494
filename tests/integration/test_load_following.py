"""Between the least and the most number of workers a pool follows the load, and an idle one does nothing at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.handlers import EVAL, TOOLS, Deployer, Gate, is_gone, lines_of, until
from torchmgmt import Model, ModelManager, ProcessBackend
from torchmgmt.lifecycle import VersionState, WorkerState

SLEEP = "time.sleep(0.05) or os.getpid()"


def count(model: Model) -> int:
    return len(model.describe().workers)


class Crowd:
    """So many clients, each of which asks again as soon as it was answered."""

    def __init__(self, model: Model, clients: int) -> None:
        self.served = 0
        self.errors: list[BaseException] = []
        self._model = model
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        while not self._over.is_set():
            try:
                self._model.predict(SLEEP, timeout=30)
                self.served += 1
            except BaseException as error:
                self.errors.append(error)
                return


def test_workers_come_with_the_load_and_go_after_it(deploy: Deployer) -> None:
    """More clients than one worker can serve bring more, up to the most; a quiet period leaves the least; none fails."""
    model = deploy(initial_workers=1, max_workers=3, scale_down_delay=1)
    with Crowd(model, 8) as crowd:
        until(lambda: model.state is VersionState.READY and count(model) == 3, "there are as many as may be")
        until(lambda: all(each.state in {WorkerState.READY, WorkerState.BUSY} for each in model.describe().workers))
        served = crowd.served
        until(lambda: crowd.served > served + 40, "they serve")
        assert count(model) == 3
    assert crowd.errors == []
    until(lambda: count(model) == 1, "there are as few as need be")
    assert model.predict("1") == 1


def test_no_more_come_than_may(deploy: Deployer) -> None:
    """Where least and most are the same the load changes nothing."""
    model = deploy(initial_workers=1, max_workers=1)
    seen = set()
    with Crowd(model, 6) as crowd:
        until(lambda: seen.add(count(model)) or crowd.served >= 40, "they are served")
    assert seen == {1}


def test_a_light_load_brings_none(deploy: Deployer) -> None:
    """One client alone is served by one worker, however many there might be."""
    model = deploy(initial_workers=1, max_workers=4)
    seen = set()
    with Crowd(model, 1) as crowd:
        until(lambda: seen.add(count(model)) or crowd.served >= 40, "it is served")
    assert seen == {1}


def test_an_idle_version_goes_to_zero_and_comes_back(deploy: Deployer, tmp_path: Path) -> None:
    """With a least of 0 the last worker goes after the quiet period; the next request brings one and is served by it."""
    loads = tmp_path / "loads"
    source = f"{TOOLS}\nnote({str(loads)!r})\n" + EVAL.removeprefix(TOOLS)
    model = deploy(source, initial_workers=0, max_workers=2, scale_down_delay=0.5)
    assert count(model) == 0
    first = model.predict("os.getpid()", timeout=30)
    until(lambda: count(model) == 0, "the worker has gone")
    assert is_gone(first)
    assert model.state is VersionState.REGISTERED
    assert model.predict("os.getpid()", timeout=30) != first
    assert len(lines_of(loads)) == 1


def test_a_busy_worker_is_not_idle(deploy: Deployer, gate: Gate) -> None:
    """A long batch is no quiet period, however long it is beside that."""
    model = deploy(initial_workers=0, max_workers=1, scale_down_delay=0)
    future = model.submit(f"wait_for({gate.path!r}) or os.getpid()")
    until(future.running, "the request runs")
    other = model.submit("1")
    threading.Event().wait(1.5)  # that nothing happens can only be seen by waiting
    gate.open()
    assert future.result(20) > 0
    assert other.result(20) == 1


def test_a_flood_to_a_version_at_zero_is_served(deploy: Deployer) -> None:
    """Many requests that come at once to a version without workers are all answered, by no more workers than may be."""
    model = deploy(initial_workers=0, max_workers=2, scale_down_delay=1)
    futures = [model.submit(SLEEP) for _ in range(40)]
    assert len({future.result(40) for future in futures}) <= 3
    until(lambda: count(model) == 0, "they have gone")


# -- at rest -----------------------------------------------------------------------------------------------------------


class Counter:
    """Counts how often a pool's timer goes off and its policy decides."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchmgmt.pool import supervisor

        self.decisions = 0
        decide = supervisor.decide

        def counted(situation: object) -> object:
            self.decisions += 1
            return decide(situation)  # type: ignore[arg-type]

        monkeypatch.setattr(supervisor, "decide", counted)


@pytest.fixture
def own() -> Iterator[ProcessBackend]:
    """A backend whose timers are of one test only."""
    backend = ProcessBackend()
    yield backend
    backend.close()


@pytest.mark.usefixtures("light_torch")
@pytest.mark.parametrize("least, most", [(1, 1), (1, 3), (0, 2)])
def test_nothing_is_looked_at_when_nothing_happens(
    tmp_path: Path, own: ProcessBackend, monkeypatch: pytest.MonkeyPatch, least: int, most: int
) -> None:
    """A version at rest has no timer that comes again and again: its policy is not asked while nothing happens."""
    counter = Counter(monkeypatch)
    with ModelManager(backend=own) as manager:
        model = Deployer(tmp_path, manager)(initial_workers=least, max_workers=most, scale_down_delay=0.5)
        assert model.predict("1", timeout=20) == 1
        until(lambda: count(model) == least, "it is at rest")
        threading.Event().wait(1.2)  # what was set while it worked has gone off
        before = counter.decisions
        threading.Event().wait(2.5)
        assert counter.decisions - before <= 1


@pytest.mark.usefixtures("light_torch")
def test_a_version_at_zero_costs_no_timer_at_all(tmp_path: Path, own: ProcessBackend) -> None:
    """Without a worker and a template nothing is looked after: the backend sets no timer of its own."""
    with ModelManager(backend=own) as manager:
        model = Deployer(tmp_path, manager)(
            initial_workers=0, max_workers=1, scale_down_delay=0, template_idle_timeout=0
        )
        assert model.predict("1", timeout=20) == 1
        until(lambda: count(model) == 0 and model.describe().sharing.is_shared is None, "it is at rest")
        until(lambda: not own._is_looking, "nobody is looked after")
        assert own._output_dispatcher._timers.next_at() is None
