"""Hands log records to the program's own log handlers on a thread of its own: they may be slow, hang or raise anything.

The threads that read answers and output must go on whatever a log handler does. So they put what is to be logged here.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import threading
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
    """A bounded queue of log records and the daemon thread that empties it. Thread-safe; only :meth:`close` blocks.

    There is a thread only while there are records, and for a moment longer. A handler that hangs keeps it for ever; then
    records are dropped, and how many is logged once the handler goes on.
    """

    def __init__(self, name: str = "torchmgmt-log") -> None:
        self._name = name
        self._records: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        # guarded by _lock
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._dropped = 0

    def log(self, logger: AnyLogger, level: int, message: str, *args: object, exc_info: Any = None) -> None:
        """Have ``logger`` log a message soon, as its own ``log`` does; ``exc_info`` is an exception, or None.

        After :meth:`close` it is logged by the calling thread.
        """
        if not logger.isEnabledFor(level):
            return
        record = functools.partial(log_guarded, logger, level, message, args, exc_info)
        with self._lock:
            is_late = self._is_closed
            if not is_late and self._records.qsize() >= MOST_WAITING:
                self._dropped += 1
                return
            if not is_late:
                self._records.put(record)
                self._ensure_running_locked()
        if is_late:
            record()

    def close(self) -> None:
        """Log what waits, and end the thread. Blocks for at most a second: a handler that hangs is left behind."""
        with self._lock:
            self._is_closed = True
            thread = self._thread
        self._records.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join(_END_TIMEOUT_S)

    def _ensure_running_locked(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            # Without a thread left in the system, what waits is logged with what comes later, or dropped.
            with contextlib.suppress(RuntimeError):
                thread.start()
                self._thread = thread

    def _run(self) -> None:
        while (record := self._next()) is not None:
            record()
            with self._lock:
                dropped, self._dropped = self._dropped, 0
            if dropped:
                log_guarded(log, logging.WARNING, "%d log records were dropped: log handlers took too long", (dropped,))

    def _next(self) -> Callable[[], object] | None:
        """Wait for a record; None if it is time to end."""
        try:
            return self._records.get(timeout=_LINGER_S)
        except queue.Empty:
            pass
        with self._lock:
            if self._records.empty():
                self._thread = None
                return None
        return self._records.get()


def log_guarded(
    logger: AnyLogger, level: int, message: str, args: tuple[object, ...] = (), exc_info: Any = None
) -> None:
    """Log a message on this thread; what a log handler raises goes no further: there is nobody left to tell."""
    with contextlib.suppress(BaseException):
        logger.log(level, message, *args, exc_info=exc_info)
