"""How many threads one operation of a worker may use: the call says, else the archive, the settings, the cores' share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.handlers import EVAL, TOOLS, Deployer
from torchmgmt import ModelManager, ProcessBackend, Settings
from torchmgmt.pool import starter as starter_module

THREADS = "__import__('torch').get_num_threads()"


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have pools divide eight cores, whatever this machine has."""
    monkeypatch.setattr(starter_module, "_cores", lambda: 8)


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize("share_weights", ["auto", "never"])
@pytest.mark.parametrize("most, threads", [(1, 8), (2, 4), (3, 2), (5, 1), (20, 1)])
def test_the_cores_are_divided_by_the_most_workers(
    deploy: Deployer, most: int, threads: int, share_weights: str
) -> None:
    """By default all workers that there may be have as many threads together as there are cores, and one at least."""
    model = deploy(initial_workers=1, max_workers=most, share_weights=share_weights)
    assert model.predict(THREADS) == threads


@pytest.mark.usefixtures("eight_cores")
def test_a_worker_that_is_started_after_scaling_divides_anew(deploy: Deployer) -> None:
    """What may be at most now counts for those that are started now."""
    model = deploy()
    assert model.predict(THREADS) == 8
    model.scale(0)
    model.scale(1, 4)
    assert model.predict(THREADS) == 2


def test_the_cores_are_those_that_the_program_may_use() -> None:
    """Cores that the system withholds from this program are not counted."""
    assert starter_module._cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("share_weights", ["auto", "never"])
def test_the_call_goes_before_the_archive_and_that_before_the_settings(
    tmp_path: Path, backend: ProcessBackend, share_weights: str
) -> None:
    """threads_per_worker of the call, threadsPerWorker of the archive, threads_per_worker of the settings: in this order."""
    with ModelManager(backend=backend, settings=Settings(threads_per_worker=5)) as manager:
        deploy = Deployer(tmp_path, manager)
        both = deploy(
            config="threadsPerWorker: 6\n", threads_per_worker=7, model_name="both", share_weights=share_weights
        )
        archive = deploy(config="threadsPerWorker: 6\n", model_name="archive", share_weights=share_weights)
        neither = deploy(model_name="neither", share_weights=share_weights)
        assert [model.predict(THREADS) for model in (both, archive, neither)] == [7, 6, 5]


@pytest.mark.parametrize("share_weights", ["auto", "never"])
@pytest.mark.parametrize("where", ["import", "initialize", "handle"])
def test_what_a_handler_sets_itself_counts_more(deploy: Deployer, where: str, share_weights: str) -> None:
    """A handler that calls torch.set_num_threads, wherever it does, computes with so many threads."""
    sets = "import torch; torch.set_num_threads(3)"
    places = {"import": sets + "\n" + EVAL, "handle": EVAL}
    places["initialize"] = (
        TOOLS
        + f"class Handler:\n    def initialize(self, context):\n        {sets}\n"
        + "    def handle(self, data, context):\n        return [eval(row['body']) for row in data]\n"
    )
    model = deploy(places[where], threads_per_worker=2, share_weights=share_weights)
    if where == "handle":
        assert model.predict(THREADS) == 2
        model.predict("__import__('torch').set_num_threads(3)")
    assert model.predict(THREADS) == 3


def test_so_many_threads_compute(deploy: Deployer) -> None:
    """The number is not only told: an operation that is large enough runs on so many threads."""
    model = deploy(threads_per_worker=3)
    count = "len(os.listdir('/proc/self/task'))"
    before = model.predict(count)
    tensor = "__import__('torch').rand(1 << 22)"
    assert model.predict(f"({tensor}.sin().sum(), {count})[1]", timeout=30) >= max(before, 3)


def test_the_threads_variables_are_the_programs(deploy: Deployer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the program says in OMP_NUM_THREADS, or that it says nothing, is what a handler's libraries find."""
    model = deploy()
    assert model.predict("os.environ.get('OMP_NUM_THREADS')") == os.environ.get("OMP_NUM_THREADS")
