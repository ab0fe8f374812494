"""A process that another one forked for us: signals that reach it and no other, and what the system tells of it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from torchmgmt.process_signals import HURRY, LAST_WORDS
from torchmgmt.system_calls import send_signal

if TYPE_CHECKING:
    import psutil

__all__ = ["STOPPED_LIMIT_S", "Child", "describe_exit"]

STOPPED_LIMIT_S = 1.0
"""A process of ours that somebody has stopped (SIGSTOP) for longer than this counts as hung."""

# What a hung process's faulthandler gets to write down where it was, before it is killed.
_LAST_WORDS_S = 0.05


class Child:
    """A process by its pid and pidfd. Thread-safe; nothing blocks.

    Args:
        call_at: runs a callback at a time of the monotonic clock.
    """

    def __init__(self, call_at: Callable[[float, Callable[[], object]], object]) -> None:
        self.pid: int | None = None
        self.memory_bytes = 0
        """Its proportional (else resident) set size when last sampled."""
        self.private_bytes = 0
        """Its unique set size when last sampled."""
        self._call_at = call_at
        self._stopped_since: float | None = None
        self._facts: psutil.Process | None = None
        self._lock = threading.Lock()
        # guarded by _lock
        self._pidfd: int | None = None
        self._signal: int | None = None  # to be sent as soon as the process is known
        self._gone = False

    @property
    def is_gone(self) -> bool:
        """Whether it has ended, or will never have been."""
        return self._gone

    def forked(self, pid: int, pidfd: int | None) -> None:
        """Note that it runs; own ``pidfd`` from now on, and send the signal that waits for it."""
        with self._lock:
            self.pid, self._pidfd = pid, pidfd
            was_given_up, self._gone = self._gone, False
            waiting = self._signal
        if waiting is not None:
            self.send(waiting)
        if was_given_up:
            self.forget()

    def send(self, number: int) -> bool:
        """Signal the process and no other that got its pid since; False if it is not there (any more).

        One that is not there yet gets the signal as soon as it is.
        """
        with self._lock:
            if self._gone:
                return False
            if self.pid is None:
                self._signal = number
                return False
            with contextlib.suppress(ProcessLookupError):
                send_signal(self.pid, self._pidfd, number)
        return True

    def kill(self) -> bool:
        """Have it write down where it is, then end it; False if it is not there (any more), or not yet."""
        if not self.send(LAST_WORDS):
            self.send(signal.SIGKILL)
            return False
        self._call_at(time.monotonic() + _LAST_WORDS_S, lambda: self.send(signal.SIGKILL))
        return True

    def forget(self) -> None:
        """Signal it no more: its pid may soon be another's. Idempotent."""
        with self._lock:
            self._gone = True
            pidfd, self._pidfd = self._pidfd, None
        if pidfd is not None:
            os.close(pidfd)

    def take_pidfd(self) -> int | None:
        """Give the pidfd away to who has taken the process over; then as after :meth:`forget`."""
        with self._lock:
            self._gone = True
            pidfd, self._pidfd = self._pidfd, None
        return pidfd

    def copy_pidfd(self) -> int | None:
        """Return a pidfd of the caller's own; None where there is none."""
        with self._lock:
            return None if self._pidfd is None else os.dup(self._pidfd)

    def sample_memory(self) -> None:
        """Read how much memory it uses. Takes milliseconds; not for a thread that carries answers."""
        import psutil  # not needed before there is a process

        with contextlib.suppress(psutil.Error):
            if (facts := self._process()) is not None:
                info = facts.memory_full_info()
                # A page that n processes share is one nth in each; where only Linux tells that, the resident set size.
                self.memory_bytes = int(getattr(info, "pss", 0) or info.rss)
                self.private_bytes = int(getattr(info, "uss", 0))

    def is_stopped_for_long(self) -> bool:
        """Whether it was stopped at two looks that lie further apart than the limit. One under a debugger is not."""
        import psutil

        with contextlib.suppress(psutil.Error):
            facts = self._process()
            if facts is not None and facts.status() == psutil.STATUS_STOPPED:
                now = time.monotonic()
                self._stopped_since = self._stopped_since or now
                return now - self._stopped_since >= STOPPED_LIMIT_S
        self._stopped_since = None
        return False

    def _process(self) -> psutil.Process | None:
        import psutil

        if self._facts is None and self.pid is not None and not self._gone:
            self._facts = psutil.Process(self.pid)
        return None if self._gone else self._facts


_LIKELY_CAUSES = {
    signal.SIGKILL: "probably the system's out-of-memory killer, or somebody's kill -9",
    signal.SIGSEGV: "a crash in native code; the stack is in its last lines",
    signal.SIGABRT: "native code gave up; its last lines may say why",
    signal.SIGBUS: "a mapped file shrank or memory ran out",
    signal.SIGILL: "native code built for another processor",
    signal.SIGTERM: "somebody told it to end",
}


def describe_exit(exitcode: int | None) -> str:
    """Return in words how a process ended, with the likely cause; ``exitcode`` is minus the number for a signal."""
    if exitcode is None:
        return "its exit status is not known"
    if exitcode >= 0:
        return f"it exited with status {exitcode}"
    if -exitcode == HURRY:
        return "it was told to end"
    try:
        number = signal.Signals(-exitcode)
    except ValueError:
        return f"it was ended by signal {-exitcode}"
    cause = _LIKELY_CAUSES.get(number)
    return f"it was ended by {number.name}" + (f" ({cause})" if cause else "")
