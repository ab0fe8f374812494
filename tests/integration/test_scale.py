"""Scaling: what is wanted is listed at once, reached soon, and kept."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.faults.processes import kill, template_of
from tests.handlers import ECHO, TOOLS, Deployer, Gate, is_gone, lines_of, until
from torchmgmt import Model, ModelManager
from torchmgmt.errors import ManagerClosed, NoWorker, WorkerDied, WorkerStartFailed
from torchmgmt.lifecycle import VersionState

GATED_START = TOOLS + "\nwait_for(os.environ.get('NOTHING') or {gate!r})\n" + ECHO
FAILS_WHEN_TOLD = (
    TOOLS
    + """
class Handler:
    def initialize(self, context):
        print("about to load")
        if os.path.exists({flag!r}):
            raise RuntimeError("the weights are gone")
    def handle(self, data, context):
        return [os.getpid() for row in data]
"""
)


def statuses(model: Model) -> list[str]:
    return [worker["status"] for worker in model.describe().to_dict()["workers"]]


def pids(model: Model) -> list[int]:
    return [worker.pid or 0 for worker in model.describe().workers]


@pytest.mark.parametrize("synchronous", [True, False])
def test_any_number_of_workers_can_follow_any_other(deploy: Deployer, synchronous: bool) -> None:
    """1, 4, 1, 0 and again 1: after each call there are as many workers as wanted, and no process too many."""
    model = deploy(ECHO)
    seen = set(pids(model))
    for wanted in (4, 1, 0, 1):
        info = model.scale(wanted, synchronous=synchronous)
        assert (info.scale.min_workers, info.scale.max_workers) == (wanted, wanted)
        if not synchronous:
            model.wait_ready(20)
        assert statuses(model) == ["READY"] * wanted
        if wanted:
            assert model.predict(wanted) == wanted
        seen |= set(pids(model))
        assert sum(not is_gone(pid) for pid in seen) == wanted
    assert len(seen) == 5


def test_wanted_workers_are_listed_at_once_as_loading(deploy: Deployer, tmp_path: Path, gate: Gate) -> None:
    """A worker is listed from when it is wanted, as LOADING, while the others are READY and serve."""
    source = GATED_START.format(gate=gate.path)
    gate.open()
    model = deploy(source)
    Path(gate.path).unlink()

    info = model.scale(3, synchronous=False)

    assert [worker["status"] for worker in info.to_dict()["workers"]] == ["READY", "LOADING", "LOADING"]
    assert model.predict("meanwhile") == "meanwhile"
    gate.open()
    model.wait_ready(20)
    assert statuses(model) == ["READY"] * 3


def test_ids_of_workers_are_not_used_twice(deploy: Deployer) -> None:
    """Worker ids are texts of numbers from 9000, each given once in a manager."""
    model = deploy(ECHO, initial_workers=2)
    first = [worker.id for worker in model.describe().workers]
    model.scale(0)
    model.scale(2)
    second = [worker.id for worker in model.describe().workers]
    assert [*first, *second] == ["9000", "9001", "9002", "9003"]


def test_scaled_to_zero_refuses_at_once(deploy: Deployer) -> None:
    """A version that may have no worker refuses requests with NoWorker, and takes them again once it may."""
    model = deploy(ECHO)
    model.scale(0)
    assert model.state is VersionState.REGISTERED
    with pytest.raises(NoWorker, match="scaled to 0"):
        model.submit("x")
    model.scale(1)
    assert model.predict("x") == "x"


def test_one_request_wakes_a_version_that_may_have_a_worker(deploy: Deployer) -> None:
    """With min 0 and max 1 there is no worker before the first request, which starts one and is answered by it."""
    model = deploy(ECHO, initial_workers=0, max_workers=1)
    assert statuses(model) == []
    assert model.predict("wake up", timeout=30) == "wake up"
    assert statuses(model) == ["READY"]


def test_what_waits_when_scaled_to_zero_is_refused_not_forgotten(deploy: Deployer, gate: Gate) -> None:
    """Scaling to 0 lets the running request finish and answers the waiting ones, with their answer or NoWorker."""
    model = deploy()
    running = model.submit(f"wait_for({gate.path!r}) or 'done'")
    until(running.running, "the request runs")
    waiting = [model.submit("1") for _ in range(3)]
    model.scale(0, synchronous=False)
    gate.open()
    assert running.result(20) == "done"
    for future in waiting:
        assert isinstance(future.exception(20), NoWorker) or future.result() == 1


def test_scaling_down_waits_for_running_work(deploy: Deployer, gate: Gate) -> None:
    """With timeout -1 a busy worker that is to go finishes its request first, as UNLOADING."""
    model = deploy()
    future = model.submit(f"wait_for({gate.path!r}) or os.getpid()")
    until(future.running, "the request runs")
    pid = pids(model)[0]

    model.scale(0, synchronous=False, timeout=-1)

    assert statuses(model) == ["UNLOADING"]
    gate.open()
    assert future.result(20) == pid
    until(lambda: is_gone(pid), "the worker is gone")
    assert model.describe().last_error == ""


def test_scaling_down_without_time_ends_running_work(deploy: Deployer, gate: Gate) -> None:
    """With timeout 0 a busy worker that is to go is ended at once, and its request says why it has no answer."""
    model = deploy()
    future = model.submit(f"wait_for({gate.path!r})")
    until(future.running, "the request runs")
    pid = pids(model)[0]

    model.scale(0, timeout=0)

    assert is_gone(pid)
    error = future.exception(20)
    assert isinstance(error, WorkerDied)
    assert error.pid == pid
    assert "scaled down" in error.reason


def test_idle_workers_go_before_busy_ones(deploy: Deployer, gate: Gate) -> None:
    """Scaling down lets idle workers go first: the one that runs a request keeps its place."""
    model = deploy(initial_workers=3)
    future = model.submit(f"wait_for({gate.path!r}) or os.getpid()")
    until(future.running, "the request runs")
    model.scale(1, timeout=0)
    gate.open()
    assert pids(model) == [future.result(20)]


def test_scaling_up_again_needs_no_wait_for_those_that_go(deploy: Deployer, gate: Gate) -> None:
    """While a worker drains, scaling up again starts another one that serves beside it."""
    model = deploy()
    slow = model.submit(f"wait_for({gate.path!r}) or os.getpid()")
    until(slow.running, "the request runs")
    model.scale(0, synchronous=False)
    model.scale(1, synchronous=False)
    other = model.predict("os.getpid()", timeout=30)
    gate.open()
    assert other != slow.result(20)
    until(lambda: pids(model) == [other], "the drained worker is gone")


@pytest.mark.parametrize("share_weights", ["auto", "never"], ids=["forked", "alone"])
def test_workers_that_cannot_start_fail_the_call_but_stay_wanted(
    deploy: Deployer, tmp_path: Path, share_weights: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A synchronous scale whose workers cannot start raises why; what was wanted stays wanted, and is tried again."""
    flag = tmp_path / "flag"
    model = deploy(FAILS_WHEN_TOLD.format(flag=str(flag)), share_weights=share_weights)
    flag.touch()
    if share_weights == "auto":
        kill(template_of(pids(model)[0]))  # the next worker needs another one, which loads the model again
        until(lambda: "The template" in caplog.text, "its end is known")

    with pytest.raises(WorkerStartFailed) as caught:
        model.scale(2)

    assert "RuntimeError: the weights are gone" in caught.value.reason
    assert "raise RuntimeError" in caught.value.traceback
    assert "about to load" in caught.value.last_lines
    info = model.describe()
    assert (info.scale.min_workers, info.state) == (2, VersionState.READY)
    assert "raise RuntimeError" in info.to_dict()["lastError"]
    assert len(info.workers) == 2
    assert model.predict("x") in pids(model)
    flag.unlink()
    model.wait_ready(30)
    assert statuses(model) == ["READY", "READY"]


def test_what_is_loaded_once_cannot_fail_again(deploy: Deployer, tmp_path: Path) -> None:
    """Scaling up from a template loads nothing, so that weights which are gone meanwhile fail nothing."""
    flag = tmp_path / "flag"
    model = deploy(FAILS_WHEN_TOLD.format(flag=str(flag)))
    flag.touch()
    model.scale(3)
    assert statuses(model) == ["READY"] * 3
    assert model.describe().last_error == ""


def test_last_error_is_forgotten_when_all_is_well_again(deploy: Deployer, tmp_path: Path) -> None:
    """``last_error`` is empty again once a version that had failed has all its workers and has served."""
    flag = tmp_path / "flag"
    model = deploy(FAILS_WHEN_TOLD.format(flag=str(flag)), share_weights="never")
    flag.touch()
    with pytest.raises(WorkerStartFailed):
        model.scale(2)
    flag.unlink()
    model.wait_ready(30)
    for _ in range(4):
        model.predict("x")
    assert model.describe().last_error == ""


def test_concurrent_scale_calls_leave_what_one_of_them_wanted(deploy: Deployer) -> None:
    """Scale calls from many threads end with a number of workers that is what the last one wanted."""
    model = deploy(ECHO)
    barrier = threading.Barrier(4)

    def scale(wanted: int) -> None:
        barrier.wait()
        for _ in range(3):
            model.scale(wanted, synchronous=False)

    threads = [threading.Thread(target=scale, args=(wanted,)) for wanted in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    model.wait_ready(30)
    info = model.describe()
    assert len(info.workers) == info.scale.min_workers
    assert len(set(pids(model))) == info.scale.min_workers


def test_scaling_a_version_that_goes_meanwhile_is_told(deploy: Deployer, gate: Gate, manager: ModelManager) -> None:
    """A synchronous scale that waits while its version is unregistered ends with an error instead of waiting on."""
    gate.open()
    model = deploy(GATED_START.format(gate=gate.path))
    Path(gate.path).unlink()
    errors: list[BaseException] = []

    def scale() -> None:
        try:
            model.scale(2)
        except (ManagerClosed, LookupError) as error:
            errors.append(error)

    thread = threading.Thread(target=scale)
    thread.start()
    until(lambda: len(model.describe().workers) == 2, "the second worker is wanted")
    model.unregister()
    thread.join(20)
    assert not thread.is_alive()
    assert [isinstance(error, LookupError) for error in errors] == [True], errors
    assert len(manager) == 0


def test_a_scale_call_can_run_a_model_with_its_number_of_threads(deploy: Deployer) -> None:
    """Each worker computes with its share of the processors, at least one."""
    model = deploy("import torch\ndef handle(data, context):\n    return data and [torch.get_num_threads()]\n")
    assert model.predict() == os.cpu_count()


NOTES_ITS_LOAD = (
    TOOLS
    + """
def handle(data, context):
    if data is None:
        return note({loads!r}, os.getpid())
    return data
"""
)


def test_workers_without_a_template_load_once_each(deploy: Deployer, tmp_path: Path) -> None:
    """Where weights are not shared, the handler is initialised exactly once in each worker."""
    loads = tmp_path / "loads"
    model = deploy(NOTES_ITS_LOAD.format(loads=str(loads)), initial_workers=3, share_weights="never")
    assert sorted(lines_of(loads)) == sorted(map(str, pids(model)))


def test_a_template_loads_once_for_all_workers(deploy: Deployer, tmp_path: Path) -> None:
    """The handler is initialised once, in the template, whatever number of workers is forked from it later."""
    loads = tmp_path / "loads"
    model = deploy(NOTES_ITS_LOAD.format(loads=str(loads)), initial_workers=3)
    model.scale(1)
    model.scale(5)
    assert [int(pid) for pid in lines_of(loads)] == [template_of(pid).pid for pid in pids(model)][:1]
    assert len({template_of(pid).pid for pid in pids(model)}) == 1
