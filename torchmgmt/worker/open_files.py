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
from pathlib import Path
from typing import Any

__all__ = ["open_files"]

_DESCRIPTORS = Path("/proc/self/fd")
_UNBUFFERED = (io.RawIOBase, io.BytesIO, io.StringIO)
_OUR_MEMORY = "/memfd:torchmgmt"


def open_files(ours: Collection[int] = ()) -> list[Any]:
    """Return the file objects of this process that may hold what is to be written, those before them that write to others.

    To look for them takes tens of milliseconds in a process with many objects, and copies pages that it shares. So first it
    is asked whether anything is open that could be written to; ``ours`` are descriptors that do not count.
    """
    if sys.platform == "linux" and not any(_may_be_buffered(fd) for fd in _descriptors() if fd not in ours):
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


def _descriptors() -> Iterator[int]:
    with contextlib.suppress(OSError):
        yield from (int(name) for name in os.listdir(_DESCRIPTORS) if int(name) > 2)  # noqa: PTH208 - names alone


def _may_be_buffered(fd: int) -> bool:
    """Whether a file object may write to ``fd``: it is open for writing, and no memory of ours."""
    try:
        mode = os.fstat(fd).st_mode
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            return False
        is_ours = stat.S_ISREG(mode) and str((_DESCRIPTORS / str(fd)).readlink()).startswith(_OUR_MEMORY)
    except OSError:  # closed meanwhile
        return False
    return not is_ours and (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode))
