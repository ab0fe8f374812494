"""Runner: the thread on which a Batcher without a pool runs its own function."""

from __future__ import annotations

import errno
import queue
import threading
from collections.abc import Callable

from torchmgmt.thread_call import on_new_thread

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
        # What a caller does to it is one call of C code, which nothing interrupts, and which a signal handler may make, too.
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._start_lock = threading.Lock()
        self._thread: threading.Thread | None = None  # guarded by _start_lock
        self._is_ending = False

    def wake(self) -> None:
        """Look what is due, starting the thread if there is none. Does not block.

        Raises OSError if it cannot be started: there is no more of something.
        """
        self._wakes.put(None)
        if self._thread is None and not self._is_ending:
            on_new_thread(self._start)

    def join(self, timeout: float | None) -> None:
        """End the thread when nothing is due any more; block for at most ``timeout`` seconds, but not on that thread."""
        self._is_ending = True
        self._wakes.put(None)
        with self._start_lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _start(self) -> None:
        with self._start_lock:
            if self._thread is not None:
                return
            thread = threading.Thread(target=self._run, name="torchmgmt-batcher", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise OSError(errno.EAGAIN, str(error)) from error
            self._thread = thread

    def _run(self) -> None:
        while self._run_next() or self._wait():
            pass

    def _wait(self) -> bool:
        """Wait until something may be due; False when the thread is to end."""
        due = self._next_due()
        timeout = None if due is None else min(max(0.0, due - self._clock()), threading.TIMEOUT_MAX)
        is_ending = self._is_ending
        try:
            self._wakes.get(not is_ending, timeout)
        except queue.Empty:
            return not is_ending
        while not self._wakes.empty():  # one look is enough for all of them
            self._wakes.get_nowait()
        return True
