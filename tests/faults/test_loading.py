"""Models that cannot be loaded: whoever loads them, the error says all that is known, and nothing is left or hangs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.faults.conftest import both_ways
from tests.faults.processes import SEGFAULT, states_of, template_of
from tests.handlers import ECHO, EVAL, TOOLS, Deployer, Gate, is_gone, lines_of, until
from torchmgmt import ModelManager
from torchmgmt.errors import NoWorker, WorkerStartFailed
from torchmgmt.lifecycle import VersionState

AT_IMPORT = TOOLS + "\nprint('about to load')\n{crash}\n" + ECHO
IN_INITIALIZE = (
    TOOLS
    + """
class Handler:
    def initialize(self, context):
        note({pids!r}, os.getpid())
        print("about to load")
        {crash}
    def handle(self, data, context):
        return [eval(row["body"]) for row in data]
"""
)


@pytest.mark.parametrize("place", ["import", "initialize"])
@pytest.mark.parametrize(
    "crash, exitcode, words",
    [
        ("raise OSError('no weights')", 1, "OSError: no weights"),
        ("sys.exit(4)", 4, "status 4"),
        ("os._exit(3)", 3, "status 3"),
        ("os._exit(0)", 0, "status 0"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, "SIGKILL (probably the system's out-of-memory killer"),
        (SEGFAULT, -11, "SIGSEGV (a crash in native code"),
        ("raise KeyboardInterrupt", 1, "status 1"),
    ],
)
def test_a_crash_while_loading_says_how(
    deploy_both: Deployer, manager: ModelManager, place: str, crash: str, exitcode: int, words: str, tmp_path: Path
) -> None:
    """A model whose loading ends its process fails to register with pid, exit status, likely cause and last lines."""
    pids = tmp_path / "pids"
    source = (AT_IMPORT if place == "import" else IN_INITIALIZE).format(crash=crash, pids=str(pids))
    with pytest.raises(WorkerStartFailed) as caught:
        deploy_both(source)
    error = caught.value
    assert words in error.reason
    assert error.exitcode == exitcode
    assert is_gone(error.pid)
    if place == "initialize":
        assert str(error.pid) in lines_of(pids)
    assert "about to load" in error.last_lines
    assert len(manager) == 0
    if crash is SEGFAULT:
        assert any("string_at" in line for line in error.last_lines)


@pytest.mark.parametrize("place", ["import", "initialize"])
def test_what_does_not_load_in_time_is_killed(
    deploy_both: Deployer, manager: ModelManager, place: str, tmp_path: Path
) -> None:
    """Who is not ready within startup_timeout, a template too, is killed; the error names the limit, shows the stack."""
    pids = tmp_path / "pids"
    source = (AT_IMPORT if place == "import" else IN_INITIALIZE).format(crash="load_for_ever()", pids=str(pids))
    hang = f"def load_for_ever():\n    note({str(pids)!r}, os.getpid())\n    threading.Event().wait()\n"
    source = source.replace(TOOLS, TOOLS + hang)
    deploy_both(model_name="first").unregister()  # so that torch is there, and the time is the load's
    with pytest.raises(WorkerStartFailed) as caught:
        deploy_both(source, startup_timeout=0.7)
    assert "startup_timeout" in caught.value.reason
    assert "0.7 s" in caught.value.reason
    assert any("load_for_ever" in line for line in caught.value.last_lines), caught.value.last_lines
    assert all(is_gone(int(pid)) for pid in lines_of(pids))
    assert len(manager) == 0


def test_a_hang_outside_of_python_is_killed_too(deploy_both: Deployer) -> None:
    """A load that holds the interpreter lock for ever is ended like any other, and shows its stack."""
    # No Python function: faulthandler may crash where it meets a frame that is just being made.
    source = IN_INITIALIZE.format(crash="sum(iter(int, 1))", pids=os.devnull)
    deploy_both(model_name="first").unregister()  # so that torch is there, and the time is the load's
    with pytest.raises(WorkerStartFailed, match="startup_timeout") as caught:
        deploy_both(source, startup_timeout=0.7)
    assert any("in initialize" in line for line in caught.value.last_lines), caught.value.last_lines


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
def test_who_is_killed_or_stopped_while_it_loads_is_replaced(
    deploy_both: Deployer, gate: Gate, number: signal.Signals, tmp_path: Path
) -> None:
    """A process that dies or is stopped while it loads a model is replaced, and requests that wait for it are answered."""
    source = IN_INITIALIZE.format(crash=f"wait_for({gate.path!r})", pids=str(tmp_path / "pids"))
    model = deploy_both(source, synchronous=False)
    waiting = [model.submit(str(number)) for number in range(5)]
    (loading,) = until(lambda: lines_of(tmp_path / "pids"), "it loads")

    os.kill(int(loading), number)

    until(lambda: len(lines_of(tmp_path / "pids")) > 1, "another one loads")
    assert is_gone(int(loading))
    assert ("SIGSTOP" if number is signal.SIGSTOP else number.name) in model.describe().last_error
    gate.open()
    assert [future.result(20) for future in waiting] == list(range(5))
    until(lambda: states_of(model) == ["READY"], "the worker is ready")


@both_ways
def test_one_crash_at_loading_fails_one_attempt_and_not_one_per_worker(
    deploy: Deployer, tmp_path: Path, share_weights: str
) -> None:
    """Several workers that wait for one load are not several failures: scaled again, the version recovers by itself."""
    flag = tmp_path / "flag"
    source = IN_INITIALIZE.format(crash=f"os.path.exists({str(flag)!r}) or os._exit(3)", pids=os.devnull)
    model = deploy(source, initial_workers=3, synchronous=False, share_weights=share_weights)
    until(lambda: model.describe().last_error, "a start failed")
    flag.touch()
    until(lambda: states_of(model) == ["READY"] * 3, "all three are ready")
    assert model.predict("1") == 1


def test_loading_that_keeps_failing_is_given_up_and_recovers(deploy_both: Deployer, tmp_path: Path) -> None:
    """When loads fail for longer than the retry time the version is FAILED, refuses, says why; scaling revives it."""
    flag = tmp_path / "flag"
    source = f"{TOOLS}\nif os.path.exists({str(flag)!r}):\n    os._exit(7)\n{EVAL}"
    model = deploy_both(source, config="maxRetryTimeoutInSec: 1\n")
    flag.touch()
    (worker,) = model.describe().workers
    assert worker.pid is not None
    if deploy_both.options["share_weights"] == "auto":
        template_of(worker.pid).kill()
    os.kill(worker.pid, signal.SIGKILL)
    until(lambda: model.state is VersionState.FAILED, "the version failed")
    with pytest.raises(NoWorker) as caught:
        model.predict("1")
    assert "status 7" in str(caught.value)
    assert "given up" in str(caught.value)
    flag.unlink()
    model.scale(1)
    assert model.predict("1") == 1
