"""Console: what the program says to whoever started it."""

from __future__ import annotations

import sys
from typing import TextIO

__all__ = ["FROM_ERROR", "STARTED", "Console"]

STARTED = "Model server started"
"""The line after which everything is loaded and served."""
FROM_ERROR = "\x15"
"""What begins a line for stderr on its way from a server in the background to its starter."""


class Console:
    """Writes to stdout and stderr, and, in the background, also to the process that waits for the start.

    One thread at a time.
    """

    def __init__(self, starter: TextIO | None = None) -> None:
        self._starter = starter

    def say(self, line: str) -> None:
        """Write a line to stdout at once."""
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        self._tell_starter(line)

    def fail(self, line: str, code: int) -> int:
        """Write why the program ends to stderr; return ``code``."""
        text = f"torchmgmt: error: {line}"
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
        self._tell_starter(FROM_ERROR + text)
        return code

    def let_go(self) -> None:
        """Have the starter wait no longer."""
        starter, self._starter = self._starter, None
        if starter is not None:
            try:
                starter.close()
            except OSError:  # it did not wait
                pass

    def _tell_starter(self, line: str) -> None:
        if self._starter is not None:
            try:
                self._starter.write(line + "\n")
                self._starter.flush()
            except OSError:  # it did not wait
                self.let_go()
