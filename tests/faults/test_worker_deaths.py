"""Workers that die: the batch that ran says how, everything else goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.faults.processes import SEGFAULT, forkers_of, only_pid, pids_of, wait_for_another, wait_for_others
from tests.handlers import EVAL, TOOLS, Deployer, Gate, is_gone, lines_of, until
from torchmgmt.errors import WorkerDied


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_an_idle_worker_that_dies_is_replaced(deploy: Deployer, number: signal.Signals) -> None:
    """A worker that dies while idle fails no request; another one takes its place, and describe says how it died."""
    model = deploy()
    old = only_pid(model)

    os.kill(old, number)

    new = wait_for_another(model, old)
    assert model.predict("os.getpid()") == new
    assert number.name in model.describe().last_error or model.describe().last_error == ""
    assert is_gone(old)


@pytest.mark.parametrize(
    "how, exitcode, words",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, "SIGKILL"),
        (SEGFAULT, -11, "SIGSEGV"),
        ("os.abort()", -6, "SIGABRT"),
        ("os._exit(3)", 3, "status 3"),
        ("os._exit(0)", 0, "status 0"),
        ("sys.exit(4)", 4, "status 4"),
        ("fail(KeyboardInterrupt())", 1, "status 1"),
    ],
)
def test_a_request_whose_worker_dies_says_how(deploy: Deployer, how: str, exitcode: int, words: str) -> None:
    """The request that ran in a worker that died fails with its pid, exit code, cause and last lines; the next works."""
    model = deploy()
    pid = only_pid(model)

    with pytest.raises(WorkerDied) as caught:
        model.predict(f"print('last words') or {how}")

    error = caught.value
    assert (error.name, error.version, error.pid, error.exitcode) == ("m", "1.0", pid, exitcode)
    assert words in error.reason
    assert "last words" in error.last_lines
    assert words in str(error)
    assert model.predict("1 + 1") == 2


def test_a_segfault_leaves_its_stack(deploy: Deployer) -> None:
    """After a crash in native code the Python stack is among the last lines."""
    model = deploy()
    with pytest.raises(WorkerDied) as caught:
        model.predict(SEGFAULT)
    assert any("Segmentation fault" in line for line in caught.value.last_lines)
    assert any("string_at" in line for line in caught.value.last_lines)


def test_only_the_running_batch_fails_when_its_worker_dies(deploy_both: Deployer, gate: Gate) -> None:
    """When a busy worker dies, those that wait are not harmed: the replacement serves them."""
    model = deploy_both()
    running = model.submit(gate.expression)
    until(gate.reached, "the request runs")
    waiting = [model.submit(str(number)) for number in range(10)]

    os.kill(only_pid(model), signal.SIGKILL)

    assert isinstance(running.exception(20), WorkerDied)
    assert [future.result(20) for future in waiting] == list(range(10))


def test_one_dead_worker_does_not_disturb_the_others(deploy: Deployer, gate: Gate) -> None:
    """A worker that dies takes no other one's batch with it."""
    model = deploy(initial_workers=2)
    futures = [model.submit(f"{gate.expression} or os.getpid()") for _ in range(2)]
    until(lambda: len(gate.reached()) == 2, "both requests run")
    dead, alive = pids_of(model)
    os.kill(dead, signal.SIGKILL)
    until(lambda: any(future.done() for future in futures), "one request failed")
    gate.open()
    outcomes = [future.exception(20) or future.result() for future in futures]
    (error,) = (outcome for outcome in outcomes if isinstance(outcome, WorkerDied))
    assert error.pid == dead
    assert alive in outcomes


def test_all_workers_of_a_version_may_die_at_once(deploy_both: Deployer) -> None:
    """After all workers were killed together there are as many as before again, and all is served."""
    model = deploy_both(initial_workers=3)
    old = pids_of(model)
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    futures = [model.submit("os.getpid()") for _ in range(12)]
    answers = [future.exception(20) or future.result() for future in futures]
    assert all(isinstance(answer, WorkerDied) or answer not in old for answer in answers)
    wait_for_others(model, 3, old)


def test_an_end_that_coincides_with_a_start_is_not_overlooked(deploy_own: Deployer) -> None:
    """A worker that dies while the process that forked it is about to fork another is reported like any other."""
    model = deploy_own()
    old = only_pid(model)
    forker = forkers_of(old)[0]
    forker.suspend()
    os.kill(old, signal.SIGKILL)
    model.scale(2, synchronous=False)
    forker.resume()
    wait_for_others(model, 2, [old])


def test_a_hung_worker_is_killed_and_says_where_it_hung(deploy: Deployer) -> None:
    """A batch that runs past response_timeout fails, its worker is replaced, and its Python stack is in the last lines."""
    source = TOOLS + "def stuck_here():\n    threading.Event().wait()\n\n" + EVAL.removeprefix(TOOLS)
    model = deploy(source, response_timeout=1)
    old = only_pid(model)

    with pytest.raises(WorkerDied) as caught:
        model.predict("stuck_here()")

    assert caught.value.pid == old
    assert "response_timeout" in caught.value.reason
    assert "1 s" in caught.value.reason
    assert any("stuck_here" in line for line in caught.value.last_lines), caught.value.last_lines
    assert model.predict("os.getpid()") != old


def test_a_hung_worker_that_ignores_signals_is_killed_too(deploy: Deployer) -> None:
    """Ignoring SIGTERM and SIGUSR2 does not save a worker whose time is over."""
    model = deploy(response_timeout=0.5)
    old = only_pid(model)
    ignore = "[signal.signal(each, signal.SIG_IGN) for each in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)]"
    with pytest.raises(WorkerDied, match="response_timeout"):
        model.predict(f"{ignore} and threading.Event().wait()")
    assert is_gone(old)
    assert model.predict("1") == 1


def test_a_stopped_worker_is_killed_when_its_time_is_over(deploy: Deployer) -> None:
    """A busy worker that somebody suspended (SIGSTOP) is killed and replaced when response_timeout is over."""
    model = deploy(response_timeout=0.5)
    old = only_pid(model)
    with pytest.raises(WorkerDied, match="response_timeout"):
        model.predict("os.kill(os.getpid(), signal.SIGSTOP)")
    assert is_gone(old)
    assert model.predict("1") == 1


@pytest.mark.parametrize("share_weights, expected", [("auto", 1), ("never", 5)])
def test_a_worker_is_replaced_after_each_of_many_deaths(
    deploy: Deployer, tmp_path: Path, share_weights: str, expected: int
) -> None:
    """However often a worker dies, the version serves again; each death is one failed request, and only without a
    template one more load."""
    loads = tmp_path / "loads"
    model = deploy(share_weights=share_weights, source=f"{TOOLS}note({str(loads)!r})\n{EVAL}")
    for _ in range(4):
        with pytest.raises(WorkerDied):
            model.predict("os._exit(1)", timeout=30)
        assert model.predict("1", timeout=30) == 1
    assert len(lines_of(loads)) == expected


def test_a_busy_worker_that_is_stopped_is_replaced(deploy_both: Deployer, gate: Gate) -> None:
    """A worker that somebody stopped (SIGSTOP) is killed soon, whatever its limits; its batch fails and says why."""
    model = deploy_both()
    running = model.submit(gate.expression)
    (pid,) = until(gate.reached, "the request runs")
    waiting = [model.submit("os.getpid()") for _ in range(5)]
    os.kill(pid, signal.SIGSTOP)
    error = running.exception(20)
    assert isinstance(error, WorkerDied)
    assert (error.pid, error.exitcode) == (pid, -9)
    assert "SIGSTOP" in error.reason
    assert pid not in [future.result(20) for future in waiting]


def test_what_was_sent_to_a_stopped_worker_is_handed_on(deploy_both: Deployer) -> None:
    """A batch that a stopped worker was handed and has not begun is run by the next one: no request fails."""
    model = deploy_both()
    pid = only_pid(model)
    os.kill(pid, signal.SIGSTOP)
    futures = [model.submit("os.getpid()") for _ in range(5)]
    assert pid not in [future.result(20) for future in futures]
    assert is_gone(pid)
