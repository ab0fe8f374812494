"""Templates that die: their workers serve on, no batch is lost, ends are still told truly, the next worker gets another."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.faults.processes import kill, only_pid, pids_of, states_of, template_of, wait_for_another, wait_for_others
from tests.handlers import EVAL, TOOLS, Deployer, Gate, is_gone, lines_of, until
from torchmgmt.errors import WorkerDied


@pytest.fixture
def loads(tmp_path: Path) -> Path:
    """Where a model deployed from ``NOTED`` writes the pid of who loads it."""
    return tmp_path / "loads"


def noted(loads: Path) -> str:
    """The source of EVAL that notes who loads it."""
    return f"{TOOLS}\nnote({str(loads)!r}, os.getpid())\n{EVAL.removeprefix(TOOLS)}"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGSTOP])
def test_an_idle_template_that_dies_harms_no_worker(deploy: Deployer, loads: Path, number: signal.Signals) -> None:
    """When an idle template dies or is stopped its worker serves on; the next worker comes from another template."""
    model = deploy(noted(loads))
    worker = only_pid(model)
    template = template_of(worker)

    template.send_signal(number)
    until(lambda: is_gone(template.pid), "the template is gone")

    assert model.predict("os.getpid()") == worker
    model.scale(3)
    first, *others = pids_of(model)
    assert first == worker
    (successor,) = {template_of(pid).pid for pid in others}
    assert lines_of(loads) == [str(template.pid), str(successor)]
    # A start that met the template's end is noted until a worker has served again.
    assert [model.predict("1") for _ in range(2)] == [1, 1]
    assert model.describe().last_error == ""


def test_busy_workers_outlive_their_template(deploy: Deployer, gate: Gate) -> None:
    """When a template is killed, the batches that its workers run and hold end as if nothing had happened."""
    model = deploy(initial_workers=2)
    futures = [model.submit(f"{gate.expression} or 'finished'") for _ in range(6)]
    until(lambda: len(gate.reached()) == 2, "both workers are busy")
    kill(template_of(gate.reached()[0]))
    gate.open()
    assert [future.result(20) for future in futures] == ["finished"] * 6
    assert sorted(pids_of(model)) == sorted({*gate.reached()})


@pytest.mark.parametrize(
    "how, exitcode", [("os._exit(42)", 42), ("os._exit(0)", 0), ("os.kill(os.getpid(), signal.SIGKILL)", -9)]
)
def test_how_a_worker_ends_is_known_after_its_template_died(deploy: Deployer, how: str, exitcode: int) -> None:
    """A worker whose template is gone is adopted: it still fails its batch at once, with its true exit status."""
    model = deploy()
    worker = only_pid(model)
    kill(template_of(worker))
    with pytest.raises(WorkerDied) as caught:
        model.predict(f"print('last words') or {how}")
    assert (caught.value.pid, caught.value.exitcode) == (worker, exitcode)
    assert "last words" in caught.value.last_lines
    assert wait_for_another(model, worker)
    assert model.predict("1") == 1


def test_a_template_and_its_workers_may_die_at_once(deploy: Deployer, loads: Path) -> None:
    """When a template is killed together with all of its workers, all are there again after one more load."""
    model = deploy(noted(loads), initial_workers=3)
    old = pids_of(model)
    template = template_of(old[0])
    for pid in (template.pid, *old):
        os.kill(pid, signal.SIGKILL)
    answers = [future.exception(20) or future.result() for future in [model.submit("os.getpid()") for _ in range(9)]]
    assert all(isinstance(answer, WorkerDied) or answer not in old for answer in answers)
    wait_for_others(model, 3, old)
    assert len(lines_of(loads)) <= 3  # one by itself if it was asked for just before the template's end was known


def test_a_template_that_dies_while_it_forks_is_replaced(deploy: Deployer) -> None:
    """Workers that a template was asked for and did not fork any more come from another one."""
    model = deploy()
    worker = only_pid(model)
    template = template_of(worker)
    template.suspend()
    model.scale(4, synchronous=False)
    until(lambda: len(model.describe().workers) == 4, "four workers are wanted")
    template.kill()
    until(lambda: states_of(model) == ["READY"] * 4, "four workers are ready")
    assert worker in pids_of(model)
    assert {model.predict("1") for _ in range(8)} == {1}


def test_a_template_that_is_stopped_while_it_forks_is_replaced(deploy: Deployer) -> None:
    """A template that somebody stopped (SIGSTOP) holds up the workers that it was asked for no longer than a moment."""
    model = deploy()
    template = template_of(only_pid(model))
    template.suspend()
    model.scale(3, synchronous=False)
    assert model.predict("1") == 1
    until(lambda: states_of(model) == ["READY"] * 3, "three workers are ready")
    assert is_gone(template.pid)


def test_what_a_worker_started_dies_with_it_after_its_template(deploy: Deployer) -> None:
    """What a handler started is ended with its worker also when the template is gone, and not before."""
    model = deploy()
    worker = only_pid(model)
    start = "__import__('subprocess').Popen(['sleep', '1000'], start_new_session={}).pid"
    children = [model.predict(start.format(own_session)) for own_session in (False, True)]
    kill(template_of(worker))
    assert model.predict("1") == 1
    deploy(model_name="other").unregister()  # by now the template's end has been dealt with
    assert not any(map(is_gone, children))
    os.kill(worker, signal.SIGKILL)
    for pid in children:
        until(lambda pid=pid: is_gone(pid), f"process {pid} is gone")


def test_a_version_whose_template_died_leaves_nothing(deploy: Deployer) -> None:
    """A version can be unregistered after its template was killed; its workers end as they should."""
    model = deploy(initial_workers=2)
    workers = pids_of(model)
    kill(template_of(workers[0]))
    model.unregister()
    assert all(map(is_gone, workers))
