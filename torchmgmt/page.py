"""The memory that a worker process shares with the embedding process: four numbers of batches, each written by one side."""

from __future__ import annotations

import mmap
import os
import threading
from typing import Protocol

from torchmgmt.system_calls import has_fixed_size

__all__ = ["PAGE_BYTES", "Page"]

_BYTES = 8
PAGE_BYTES = 4 * _BYTES
"""How large it is at least."""


class Page:
    """What each side has to know at once, whatever the other one does. Numbers of batches grow; 0 is none's.

    A number is written in one piece, and seen by the other side within microseconds.
    """

    def __init__(self, fd: int) -> None:
        """Share the file ``fd``, which stays the caller's: mapped, or, if the other side could truncate it, as a file.

        To touch a page of a mapped file that was truncated ends a process (SIGBUS). To read and write a file takes a
        microsecond more.
        """
        self._memory: _Memory = _Mapped(fd) if has_fixed_size(fd) else _File(fd)

    @property
    def started(self) -> int:
        """The batch that the worker began last, or skipped: if it dies, those behind it are run elsewhere."""
        return self._read(0)

    def start(self, number: int) -> None:
        """Note, in the worker, that it begins a batch."""
        self._write(0, number)

    @property
    def abandoned(self) -> int:
        """A batch for which nobody waits any more: a handler that sends parts can be stopped there."""
        return self._read(1)

    def abandon(self, number: int) -> None:
        """Note, in the embedding process, that nobody waits for a batch."""
        self._write(1, number)

    def is_recalled(self, number: int) -> bool:
        """Return whether a batch is not to be begun any more; the worker asks after :meth:`start`, and so never too early."""
        return number <= self._read(2) and number != self._read(3)

    def recall(self, number: int, *, but: int) -> None:
        """Note, in the embedding process, that batches up to ``number`` are run elsewhere if they are not begun.

        ``but`` is not one of them: it may be on its way yet. What was recalled once stays so, in whatever order this is
        called; calls must not overlap.
        """
        recalled = self._read(2)
        if but > recalled:
            self._write(3, but)  # first, or the worker might take it for recalled
        if number > recalled:
            self._write(2, number)

    def close(self) -> None:
        """Unmap it; all else raises ValueError afterwards. Idempotent."""
        self._memory.close()

    def _read(self, place: int) -> int:
        return int.from_bytes(self._memory.read(place * _BYTES), "little")

    def _write(self, place: int, number: int) -> None:
        self._memory.write(place * _BYTES, number.to_bytes(_BYTES, "little"))


class _Memory(Protocol):
    """Where the numbers are. Any thread."""

    def read(self, start: int) -> bytes:
        """Return the bytes of the number that begins there."""

    def write(self, start: int, number: bytes) -> None:
        """Write a number there, in one piece."""

    def close(self) -> None:
        """Let go of it; all else raises ValueError afterwards. Idempotent."""


class _Mapped:
    """A file in memory that nobody can truncate."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, PAGE_BYTES)

    def read(self, start: int) -> bytes:
        return self._map[start : start + _BYTES]

    def write(self, start: int, number: bytes) -> None:
        self._map[start : start + _BYTES] = number

    def close(self) -> None:
        self._map.close()


class _File:
    """Any other file. What is not there any more is 0."""

    def __init__(self, fd: int) -> None:
        self._file = os.fdopen(os.dup(fd), "r+b", buffering=0)
        self._lock = threading.Lock()  # its descriptor is not to become another file's between two calls

    def read(self, start: int) -> bytes:
        with self._lock:
            return os.pread(self._file.fileno(), _BYTES, start)

    def write(self, start: int, number: bytes) -> None:
        with self._lock:
            os.pwrite(self._file.fileno(), number, start)

    def close(self) -> None:
        with self._lock:
            self._file.close()
