"""Runner: the thread on which a Batcher without a pool runs its own function."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Runner"]


class Runner:
    """A daemon thread that does what is due, one thing after the other, and sleeps in between. Thread-safe.

    It is started by the first :meth:`wake`, and ended by :meth:`join` when nothing is due any more.

    Args:
        run_next: does the next thing that is due, on the thread; returns False if nothing is. It raises nothing.
        next_due: returns when something will be due, by ``clock``; None: nothing will before the next :meth:`wake`.
        clock: a monotonic clock in seconds.
    """

    def __init__(
        self, run_next: Callable[[], bool], next_due: Callable[[], float | None], clock: Callable[[], float]
    ) -> None:
        self._run_next = run_next
        self._next_due = next_due
        self._clock = clock
        self._condition = threading.Condition()
        # guarded by _condition
        self._thread: threading.Thread | None = None
        self._awake = False
        self._ending = False

    def wake(self) -> None:
        """Look what is due, starting the thread if there is none. Does not block."""
        with self._condition:
            self._awake = True
            if self._thread is None and not self._ending:
                self._thread = threading.Thread(target=self._run, name="torchmgmt-batcher", daemon=True)
                self._thread.start()
            self._condition.notify()

    def call_at(self, _when: float, _callback: Callable[[], object]) -> None:
        """Look at the time again; the thread itself asks when something is due. Does not block."""
        self.wake()

    def join(self, timeout: float | None) -> None:
        """End the thread when nothing is due any more; block for at most ``timeout`` seconds, but not on that thread."""
        with self._condition:
            self._ending = True
            thread = self._thread
            self._condition.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _run(self) -> None:
        while self._run_next() or self._wait():
            pass

    def _wait(self) -> bool:
        """Wait until something may be due; False when the thread is to end."""
        due = self._next_due()
        with self._condition:
            if not self._awake:
                if self._ending:  # only now: what made it awake may be that the queue drains
                    return False
                self._condition.wait(None if due is None else self._seconds_until(due))
            self._awake = False
        return True

    def _seconds_until(self, due: float) -> float:
        return min(max(0.0, due - self._clock()), threading.TIMEOUT_MAX)
