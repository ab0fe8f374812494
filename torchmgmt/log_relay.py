"""Hands log records to the program's own log handlers on a thread of its own: they may be slow, hang or raise anything.

The threads that read answers and output must go on whatever a log handler does. So they put what is to be logged here.
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeAlias

__all__ = ["AnyLogger", "LogRelay", "log_guarded"]

AnyLogger: TypeAlias = "logging.Logger | logging.LoggerAdapter[logging.Logger]"

log = logging.getLogger(__name__)

MOST_WAITING = 10_000
"""So many records may wait for a log handler; further ones are dropped and counted."""
_END_TIMEOUT_S = 1.0
_LINGER_S = 0.5


class LogRelay:
    """A bounded queue of log records and the daemon thread that empties it. Any thread, and signal handlers.

    Only :meth:`close` blocks. There is a thread only while there are records, and for a moment longer. A handler that hangs
    keeps it for ever; then records are dropped, and how many is logged once the handler goes on.
    """

    def __init__(self, name: str = "torchmgmt-log") -> None:
        self._name = name
        self._records: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._dropped: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._gate = threading.Lock()  # nothing is called while it is held, so that nothing interrupts who holds it
        self._is_starting = False  # whether somebody starts the thread
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def log(self, logger: AnyLogger, level: int, message: str, *args: object, exc_info: Any = None) -> None:
        """Have ``logger`` log a message soon, as its own ``log`` does; ``exc_info`` is an exception, or None.

        After :meth:`close` it is logged by the calling thread.
        """
        if not logger.isEnabledFor(level):
            return
        record = functools.partial(log_guarded, logger, level, message, args, exc_info)
        if self._is_closed:
            record()
        elif self._records.qsize() >= MOST_WAITING:
            self._dropped.put(None)
        else:
            self._records.put(record)
            self._ensure_running()

    def close(self) -> None:
        """Log what waits, and end the thread. Blocks for at most a second: a handler that hangs is left behind."""
        self._is_closed = True
        self._records.put(None)
        deadline = time.monotonic() + _END_TIMEOUT_S
        while self._is_starting and time.monotonic() < deadline:
            time.sleep(0.001)
        thread = self._thread
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))

    def _ensure_running(self) -> None:
        # Who finds that another one starts it leaves it to that one, also where that is the same thread, interrupted.
        is_mine = False
        try:
            with self._gate:
                is_mine = self._thread is None and not self._is_starting
                if is_mine:
                    self._is_starting = True
            if is_mine:
                _thread.start_new_thread(self._start, ())
        except BaseException as error:
            if is_mine:
                self._is_starting = False  # if it is started all the same, there may be one more for a while
            if not isinstance(error, RuntimeError):
                raise
            # No thread is left in the system: what waits is logged with what comes later, or dropped.

    def _start(self) -> None:
        """Start the thread. On another one than a caller's, which may be interrupted."""
        self._thread = thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            self._thread = None
        finally:
            self._is_starting = False

    def _run(self) -> None:
        while (record := self._next()) is not None:
            record()
            dropped = 0
            while not self._dropped.empty():
                self._dropped.get()
                dropped += 1
            if dropped:
                log_guarded(log, logging.WARNING, "%d log records were dropped: log handlers took too long", (dropped,))

    def _next(self) -> Callable[[], object] | None:
        """Wait for a record; None if it is time to end."""
        try:
            return self._records.get(timeout=_LINGER_S)
        except queue.Empty:
            self._thread = None
        if not self._records.empty():
            self._ensure_running()  # who put it there may have found this one
        return None


def log_guarded(
    logger: AnyLogger, level: int, message: str, args: tuple[object, ...] = (), exc_info: Any = None
) -> None:
    """Log a message on this thread; what a log handler raises goes no further: there is nobody left to tell."""
    with contextlib.suppress(BaseException):
        logger.log(level, message, *args, exc_info=exc_info)
