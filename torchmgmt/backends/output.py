"""What a process of ours prints: read through one pipe, forwarded to logging line by line, the last lines kept."""

from __future__ import annotations

import io
import logging
import os
import re
import threading
from collections import deque

from torchmgmt.dispatcher import Dispatcher
from torchmgmt.errors import ManagerClosed

__all__ = ["Output"]

_READ_SIZE = 1 << 16
_LONGEST_LINE = 4096
_LINES_KEPT = 100
# A line may begin with <N>, the priority of syslog(3) as in sd-daemon(3): that is how a worker's logging marks its lines.
_PRIORITY = re.compile(r"<([0-7])>")
_LEVELS = {
    **dict.fromkeys("012", logging.CRITICAL),
    "3": logging.ERROR,
    "4": logging.WARNING,
    **dict.fromkeys("56", logging.INFO),
    "7": logging.DEBUG,
}


class Output:
    """The reading end of one process's stdout and stderr. Thread-safe; nothing blocks.

    Args:
        fd: a pipe's reading end; it is owned from now on, closed when the last writer closed its end, and also if this
            raises.
        dispatcher: reads it, and has it logged. Not the one that carries answers: a process may print without end.
        log: gets each line, as INFO unless the line begins with a syslog priority such as ``<4>``.

    Raises:
        ManagerClosed: the dispatcher was closed.
        OSError: the dispatcher cannot be started.
    """

    def __init__(self, fd: int, dispatcher: Dispatcher, log: logging.Logger | logging.LoggerAdapter[logging.Logger]):
        os.set_blocking(fd, False)
        self._pipe = io.FileIO(fd, "r")
        self._dispatcher = dispatcher
        self._log = log
        self._lock = threading.Lock()
        # guarded by _lock
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._rest = b""
        try:
            dispatcher.watch(self._pipe, self._read)
        except BaseException:
            self._pipe.close()
            raise

    def last_lines(self) -> list[str]:
        """Return the last lines, those included that were printed but not read yet."""
        # Bounded by what a pipe holds, so a process that prints without end cannot keep us here. Nor can whoever logs it.
        self._read()
        with self._lock:
            return [*self._lines, *([_text(self._rest)] if self._rest else [])]

    def close(self) -> None:
        """Stop reading. Idempotent."""
        try:
            self._dispatcher.unwatch(self._pipe, self._close_pipe)
        except ManagerClosed:  # then nobody waits for it any more
            self._close_pipe()

    def _close_pipe(self) -> None:
        with self._lock:  # somebody may be reading the last lines
            self._pipe.close()

    def _read(self) -> None:
        """Read once, and have what is there logged: in the order in which it was read, whoever reads."""
        with self._lock:
            if self._pipe.closed:
                return
            data = self._pipe.read(_READ_SIZE)
            if data is None:  # nothing is there now
                return
            is_over = not data
            if is_over:
                lines, self._rest = ([self._rest] if self._rest else []), b""
            else:
                *lines, self._rest = (self._rest + data).split(b"\n")
                if len(self._rest) > _LONGEST_LINE:
                    lines, self._rest = [*lines, self._rest], b""
            self._lines.extend(_PRIORITY.sub("", _text(line), count=1) for line in lines[-_LINES_KEPT:])
            for line in lines:
                self._log_line(_text(line))
        if is_over:
            self.close()

    def _log_line(self, text: str) -> None:
        mark = _PRIORITY.match(text)
        level = _LEVELS[mark[1]] if mark else logging.INFO
        self._dispatcher.log(self._log, level, "%s", text[mark.end() :] if mark else text)


def _text(line: bytes) -> str:
    return line[:_LONGEST_LINE].decode("utf-8", "replace").rstrip("\r")
