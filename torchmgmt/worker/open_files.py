"""The files that a handler has open for writing: what is in their buffers is lost when the process just ends."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import io
import os
import stat
import sys
from collections.abc import Collection, Iterator
from typing import Any, TypeAlias

__all__ = ["Descriptor", "descriptors", "open_files"]

_DESCRIPTORS = "/proc/self/fd"
_UNBUFFERED = (io.RawIOBase, io.BytesIO, io.StringIO)
_OUR_MEMORY = "/memfd:torchmgmt"


Descriptor: TypeAlias = tuple[int, str]
"""A descriptor, and what it is of, by which it is told from a later one of the same number."""


def descriptors() -> frozenset[Descriptor]:
    """Return those that this process has open; none where the system does not tell."""
    return frozenset(_descriptors())


def open_files(ours: Collection[Descriptor] = ()) -> list[Any]:
    """Return the file objects of this process that may hold what is to be written, those before them that write to others.

    To look for them takes tens of milliseconds in a process with many objects, and copies pages that it shares. So first it
    is asked whether anything is open that could be written to; ``ours`` are descriptors that do not count.
    """
    if sys.platform == "linux" and not any(_may_be_buffered(*each) for each in _descriptors() if each not in ours):
        return []
    gc.unfreeze()  # what was frozen is not shown
    files = [each for each in gc.get_objects() if issubclass(type(each), io.IOBase) and _is_written(each)]
    return sorted(files, key=_depth)


def _depth(file: object) -> int:
    """How many other files may write to this one: text goes to a buffer, and compressed data to one, too."""
    return 2 if isinstance(file, io.BufferedWriter | io.BufferedRandom) else int(not isinstance(file, io.TextIOBase))


def _is_written(file: Any) -> bool:
    if issubclass(type(file), _UNBUFFERED):
        return False
    try:
        return not file.closed and bool(file.writable())
    except BaseException:  # one that was never opened, or is of the handler's own making
        return False


def _descriptors() -> Iterator[Descriptor]:
    # Not with pathlib: each start and each end of a worker asks.
    for name in os.listdir(_DESCRIPTORS) if os.path.isdir(_DESCRIPTORS) else ():  # noqa: PTH112, PTH208
        with contextlib.suppress(OSError):  # the one that lists them is closed by now
            yield int(name), os.readlink(f"{_DESCRIPTORS}/{name}")  # noqa: PTH115


def _may_be_buffered(fd: int, target: str) -> bool:
    """Whether a file object may write to ``fd``: it is open for writing, and neither our memory nor a standard stream."""
    if fd <= 2 or target.startswith(_OUR_MEMORY):
        return False
    try:
        mode = os.fstat(fd).st_mode
        is_read = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    except OSError:  # closed meanwhile
        return False
    return not is_read and (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode))
