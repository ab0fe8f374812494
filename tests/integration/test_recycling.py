"""Recycling: a worker that has served or grown as much as it may is replaced, and nobody notices but the system."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.handlers import EVAL, TOOLS, Deployer, Gate, is_gone, until
from torchmgmt import Model
from torchmgmt.backends import process as process_backend
from torchmgmt.lifecycle import WorkerState

PID = "os.getpid()"


def pids(model: Model) -> set[int]:
    return {worker.pid or 0 for worker in model.describe().workers}


class Crowd:
    """Threads that ask until told to stop, and what they were answered."""

    def __init__(self, model: Model, threads: int) -> None:
        self.answers: list[int] = []
        self.errors: list[BaseException] = []
        self.most_workers = 0
        self._model = model
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]

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
                self.answers.append(self._model.predict(PID, timeout=30))
            except BaseException as error:
                self.errors.append(error)
            states = [worker.state for worker in self._model.describe().workers]
            kept = sum(state not in {WorkerState.DRAINING, WorkerState.STOPPING} for state in states)
            self.most_workers = max(self.most_workers, kept)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("share_weights", ["auto", "never"])
def test_workers_are_replaced_under_load_without_a_lost_request(
    deploy: Deployer, workers: int, share_weights: str
) -> None:
    """With max_requests workers come and go while threads ask; every request is answered, and none counts as failed."""
    model = deploy(initial_workers=workers, max_requests=50, share_weights=share_weights)
    with Crowd(model, 4) as crowd:
        until(lambda: len(set(crowd.answers)) >= 4 * workers, "many workers have served", 40)
    assert crowd.errors == []
    assert crowd.most_workers <= workers + 1
    info = model.describe()
    assert info.last_error == ""
    until(lambda: len(model.describe().workers) == workers, "there are as many as wanted")
    gone = set(crowd.answers) - pids(model)
    until(lambda: all(map(is_gone, gone)), "those that were replaced are gone")


def test_there_is_no_moment_without_a_worker(deploy: Deployer, gate: Gate) -> None:
    """A worn worker serves on until its successor is ready, however long that takes to load."""
    gate.open()
    source = f"{TOOLS}\nwait_for({gate.path!r})\n" + EVAL.removeprefix(TOOLS)
    model = deploy(source, max_requests=2, share_weights="never")
    old = model.predict(PID)
    gate.file.unlink()
    assert [model.predict(PID) for _ in range(6)] == [old] * 6
    assert len(model.describe().workers) == 2
    gate.open()
    until(lambda: pids(model) != {old} and len(pids(model)) == 1, "it has been replaced")
    assert model.predict(PID) != old


def test_a_worn_worker_finishes_what_it_runs(deploy: Deployer, gate: Gate, tmp_path: Path) -> None:
    """A batch of a worker that is being replaced is not cut off, whatever time an earlier scale call gave to others."""
    gate.open()
    source = f"{TOOLS}\nwait_for({gate.path!r})\n" + EVAL.removeprefix(TOOLS)
    model = deploy(source, max_requests=1, initial_workers=2, share_weights="never", batches_in_flight=1)
    model.scale(1, timeout=0)
    gate.file.unlink()
    old = model.predict(PID)
    until(lambda: len(pids(model)) == 2, "a successor is on its way")
    begun, done = tmp_path / "begun", Gate(tmp_path / "done")
    future = model.submit(f"note({str(begun)!r}) or wait_for({done.path!r}) or os.getpid()")
    until(begun.exists, "the request runs")
    gate.open()
    until(lambda: [worker.state.name for worker in model.describe().workers] == ["DRAINING", "READY"], "it is replaced")
    assert model.predict(PID) != old
    done.open()
    assert future.result(20) == old


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have memory sampled several times a second."""
    monkeypatch.setattr(process_backend, "_LOOK_PERIOD_S", 0.05)
    monkeypatch.setattr(process_backend, "_SETTLED_S", 0.1)
    monkeypatch.setattr(process_backend, "_SAMPLE_PERIOD_S", 0.15)


HOARDER = (
    TOOLS
    + """
class Handler:
    def initialize(self, context):
        import torch
        self.weights = torch.ones(60 << 18)
        self.hoard = []

    def handle(self, data, context):
        return [eval(row["body"], {**globals(), "self": self}) for row in data]
"""
)


def once_sampled(model: Model) -> Callable[[], bool]:
    return lambda: all(worker.memory_bytes for worker in model.describe().workers)


@pytest.mark.usefixtures("looks_often")
def test_a_worker_that_has_grown_too_large_is_replaced(deploy: Deployer) -> None:
    """A worker with more private memory than max_memory is replaced after its next request, and none is lost."""
    model = deploy(HOARDER, max_memory=150 << 20)
    old = model.predict(PID)
    assert model.predict("[self.hoard.append(bytearray(os.urandom(1) * (200 << 20))), 1][1]", timeout=30) == 1

    def replaced() -> bool:
        return model.predict(PID, timeout=30) != old

    until(replaced, "the large one is replaced")
    until(lambda: is_gone(old), "the large one is gone")
    assert model.describe().last_error == ""


@pytest.mark.usefixtures("looks_often")
def test_what_workers_share_does_not_count(deploy: Deployer) -> None:
    """Weights that are larger than max_memory wear no worker out: its end would free none of them."""
    model = deploy(HOARDER, max_memory=50 << 20, initial_workers=2)
    before = pids(model)
    assert all(psutil.Process(pid).memory_info().rss > 60 << 20 for pid in before)
    until(once_sampled(model), "their memory is known")
    for _ in range(20):
        model.predict(PID)
    assert pids(model) == before
    assert model.predict("float(self.weights.sum())") == 60 << 18


def test_without_limits_nobody_is_replaced(deploy: Deployer) -> None:
    """By default a worker serves for as long as it lives."""
    model = deploy()
    assert len({model.predict(PID) for _ in range(300)}) == 1
