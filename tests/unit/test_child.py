"""A process of ours: signals reach it and no other, whether they come before, during or after its life."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from tests.unit.clocks import FakeClock, FakeTimers
from torchmgmt.backends import child as child_module
from torchmgmt.backends.child import Child, describe_exit

SLEEP = "import signal, sys; print('up', flush=True); signal.pause()"


@pytest.fixture
def timers() -> FakeTimers:
    return FakeTimers(FakeClock(0.0))


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for signals."""
    with subprocess.Popen([sys.executable, "-c", SLEEP], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


@pytest.fixture
def child(timers: FakeTimers) -> Iterator[Child]:
    child = Child(timers.call_at)
    yield child
    child.forget()


def run(child: Child, process: subprocess.Popen[bytes]) -> None:
    child.forked(process.pid, os.pidfd_open(process.pid))


def test_a_signal_for_one_that_is_not_there_yet_waits_for_it(child: Child, process: subprocess.Popen[bytes]) -> None:
    """What is sent before the process is known is not lost, and not said to have been sent."""
    assert child.send(signal.SIGTERM) is False
    run(child, process)
    assert process.wait(20) == -signal.SIGTERM


def test_the_last_signal_counts_for_one_that_is_not_there_yet(
    child: Child, process: subprocess.Popen[bytes], timers: FakeTimers
) -> None:
    """One that is killed before it is there is killed at once when it comes, without last words."""
    assert child.kill() is False
    assert len(timers) == 0
    run(child, process)
    assert process.wait(20) == -signal.SIGKILL


def test_one_that_was_forgotten_before_it_came_is_signalled_and_forgotten(
    child: Child, process: subprocess.Popen[bytes]
) -> None:
    """A process that was given up while it did not exist yet gets what waited for it, and keeps no descriptor open."""
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    child.kill()
    child.forget()
    run(child, process)
    assert process.wait(20) == -signal.SIGKILL
    assert child.is_gone
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_killed_one_gets_a_moment_for_its_last_words(
    child: Child, process: subprocess.Popen[bytes], timers: FakeTimers
) -> None:
    """SIGUSR2 comes first, and SIGKILL when the moment is over, whatever the process does about the first."""
    run(child, process)
    assert child.kill() is True
    assert len(timers) == 1
    assert process.wait(20) == -signal.SIGUSR2  # which this one does not handle
    timers.advance(float("inf"))  # harms nobody


def test_no_signal_reaches_one_that_is_gone(child: Child, process: subprocess.Popen[bytes]) -> None:
    """After ``forget`` nothing is sent, so no other process that got the pid is ever signalled."""
    run(child, process)
    child.forget()
    child.forget()
    assert child.send(signal.SIGKILL) is False
    assert child.kill() is False
    assert child.copy_pidfd() is None
    assert process.poll() is None


def test_a_signal_to_one_that_has_ended_raises_nothing(child: Child, process: subprocess.Popen[bytes]) -> None:
    """A process that was reaped a moment ago is no error."""
    run(child, process)
    process.kill()
    process.wait(20)
    child.send(signal.SIGTERM)
    child.sample_memory()
    assert not child.is_stopped_for_long()


def test_without_a_pidfd_the_pid_serves(child: Child, process: subprocess.Popen[bytes]) -> None:
    """Where the system has no pidfds, or none is left, signals go by the pid."""
    child.forked(process.pid, None)
    assert child.send(signal.SIGTERM) is True
    assert process.wait(20) == -signal.SIGTERM


def test_a_pidfd_can_be_given_away(child: Child, process: subprocess.Popen[bytes]) -> None:
    """Who takes a process over has its pidfd; the first owner signals it no more."""
    run(child, process)
    pidfd = child.take_pidfd()
    assert pidfd is not None
    assert child.send(signal.SIGKILL) is False
    heir = Child(lambda _when, _callback: None)
    heir.forked(process.pid, pidfd)
    assert heir.send(signal.SIGTERM) is True
    heir.forget()
    assert process.wait(20) == -signal.SIGTERM


def test_its_memory_is_what_the_system_says(child: Child, process: subprocess.Popen[bytes]) -> None:
    """The proportional and the unique set size are sampled when asked to; before that both are 0."""
    assert (child.memory_bytes, child.private_bytes) == (0, 0)
    run(child, process)
    child.sample_memory()
    assert 0 < child.private_bytes <= child.memory_bytes <= psutil.Process(process.pid).memory_info().rss


def test_one_that_is_stopped_is_found_out_only_after_a_while(
    child: Child, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process counts as hung at the second look past the limit, and not if it went on in between."""
    clock = FakeClock(100.0)
    monkeypatch.setattr(child_module.time, "monotonic", clock)
    run(child, process)
    assert not child.is_stopped_for_long()
    process.send_signal(signal.SIGSTOP)
    until_stopped(process.pid, stopped=True)
    assert not child.is_stopped_for_long()
    clock.now += child_module.STOPPED_LIMIT_S - 0.01
    assert not child.is_stopped_for_long()
    clock.now += 0.02
    assert child.is_stopped_for_long()
    process.send_signal(signal.SIGCONT)
    until_stopped(process.pid, stopped=False)
    assert not child.is_stopped_for_long()
    process.send_signal(signal.SIGSTOP)
    until_stopped(process.pid, stopped=True)
    assert not child.is_stopped_for_long()


def until_stopped(pid: int, *, stopped: bool) -> None:
    # Without ``until``: the clock stands still.
    while (psutil.Process(pid).status() == psutil.STATUS_STOPPED) is not stopped:
        pass


@pytest.mark.parametrize(
    "exitcode, words",
    [
        (None, "not known"),
        (0, "status 0"),
        (3, "status 3"),
        (-9, "SIGKILL (probably the system's out-of-memory killer"),
        (-11, "SIGSEGV (a crash in native code"),
        (-15, "SIGTERM"),
        (-7, "SIGBUS (a mapped file shrank"),
        (-50, "signal 50"),
        (-40, "it was told to end"),
        (-1, "SIGHUP"),
    ],
)
def test_an_exit_is_told_in_words(exitcode: int | None, words: str) -> None:
    """The status or the signal's name is in the text, with the likely cause where there is one."""
    assert words in describe_exit(exitcode)
