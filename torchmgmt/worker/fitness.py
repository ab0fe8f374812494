"""Whether a process that has loaded a model may be forked: what loading it left behind that two must not share.

Two workers that share a socket get each other's answers without an error; two that share an open file move each other's
position in it; a thread does not exist in the child, but the locks that it held do. So a template is compared with itself
before and after the handler's ``initialize``, by what Linux tells in ``/proc/self``.
"""

from __future__ import annotations

import contextlib
import gc
import io
import operator
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

__all__ = [
    "Marks",
    "accelerators_in_use",
    "findings",
    "has_threads",
    "marks",
    "marks_after",
    "postponed_thread_settings",
]

_PROC = Path("/proc/self")
_HARMLESS = frozenset({"/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"})
_FLAGS = re.compile(r"^flags:\s*([0-7]+)", re.MULTILINE)
# What ends a thread after Python has let go of it takes microseconds, on a busy machine milliseconds.
_THREADS_END_S = 0.2
_ACCELERATORS = ("cuda", "xpu", "mtia")


@frozen
class Marks:
    """What a process has at one moment, each thing by a name that can be compared."""

    threads: frozenset[str]
    descriptors: frozenset[tuple[int, str]]
    shared_mappings: frozenset[str]
    children: frozenset[str]


def can_tell() -> bool:
    """Whether this system shows what a process has open."""
    return sys.platform == "linux" and _PROC.is_dir()


def marks() -> Marks:
    """Return what this process has now."""
    return Marks(
        frozenset(task.name for task in (_PROC / "task").iterdir()),
        frozenset(_descriptors()),
        frozenset(_writable_shared_mappings()),
        frozenset(_children()),
    )


def marks_after(before: Marks) -> Marks:
    """Return what this process has now that loading is over; blocks for a moment if threads are about to vanish.

    The system has a thread a little longer than whoever waited for its end.
    """
    until = time.monotonic() + _THREADS_END_S
    while True:
        after = marks()
        alive = {str(thread.native_id) for thread in threading.enumerate()}
        if after.threads <= before.threads | alive or time.monotonic() >= until:
            return after
        time.sleep(0.001)


def has_threads() -> bool:
    """Whether this process has more than one thread now, of whatever kind."""
    return can_tell() and len([*(_PROC / "task").iterdir()]) > 1


def findings(before: Marks, after: Marks) -> list[str]:
    """Return, in words, all that is there after and was not before and that forked processes must not share."""
    new_threads = after.threads - before.threads
    found = [f"the thread {_thread_name(thread)}" for thread in sorted(new_threads)]
    found += filter(None, (_finding_of(fd, target) for fd, target in sorted(after.descriptors - before.descriptors)))
    found += [f"memory shared for writing ({name})" for name in sorted(after.shared_mappings - before.shared_mappings)]
    found += [f"the child process {pid}" for pid in sorted(after.children - before.children)]
    return found


def accelerators_in_use() -> list[str]:
    """Return the accelerators that this process has a context on: such a context does not survive a fork."""
    modules = ((name, getattr(torch, name, None)) for name in _ACCELERATORS)
    return [name for name, module in modules if getattr(module, "is_initialized", bool)()]


@contextlib.contextmanager
def postponed_thread_settings() -> Iterator[list[int]]:
    """While a template loads, note what ``torch.set_num_threads`` is told instead of doing it; the last one counts.

    One operation with more than one thread would make the template unfit; a worker sets the number after the fork.
    """
    wanted: list[int] = []
    original = torch.set_num_threads
    is_loading = True

    def note(count: Any) -> None:
        # Who has imported this function by its name calls it later, too.
        if is_loading and hasattr(count, "__index__") and (number := operator.index(count)) >= 1:
            wanted.append(number)
        else:
            original(count)  # sets it, or raises what it always does

    torch.set_num_threads = note  # type: ignore[assignment]  # mypy takes the name of the parameter for a part of it
    try:
        yield wanted
    finally:
        is_loading = False
        torch.set_num_threads = original


def _children() -> Iterator[str]:
    for task in (_PROC / "task").iterdir():
        with contextlib.suppress(OSError):  # a kernel may be built without it
            yield from (task / "children").read_text().split()


def _descriptors() -> Iterator[tuple[int, str]]:
    for link in (_PROC / "fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists them is closed by now
            yield int(link.name), str(link.readlink())


def _writable_shared_mappings() -> Iterator[str]:
    for line in (_PROC / "maps").read_text(errors="replace").splitlines():
        addresses, mode, *_, name = line.split(maxsplit=5)
        if mode[1] == "w" and mode[3] == "s":
            yield f"{name.strip()} at {addresses}"


def _finding_of(fd: int, target: str) -> str | None:
    if target in _HARMLESS:
        return None
    if not target.startswith("/"):
        kind, _, rest = target.partition(":")  # socket:[1234], anon_inode:[eventfd]
        return f"an open {rest.strip('[]') if kind == 'anon_inode' else kind} (descriptor {fd})"
    try:
        status = os.fstat(fd)
        details = (_PROC / "fdinfo" / str(fd)).read_text()
    except OSError:
        return None  # closed meanwhile
    if stat.S_ISDIR(status.st_mode):
        return None
    if not stat.S_ISREG(status.st_mode):
        return f"the open device {target}"
    flags = _FLAGS.search(details)
    if flags and int(flags[1], 8) & (os.O_WRONLY | os.O_RDWR):
        return f"{target}, open for writing"
    # A mapping keeps a descriptor of its own (a copy of the file's, wherever that stood) that nothing is read through.
    if _is_mapped(status) and not _is_of_file_object(fd):
        return None
    return f"the open file {target}, in which they would move each other's position"


def _is_mapped(status: os.stat_result) -> bool:
    lines = (_PROC / "maps").read_text(errors="replace").splitlines()
    return any(line.split(maxsplit=5)[4] == str(status.st_ino) for line in lines)


def _is_of_file_object(fd: int) -> bool:
    files = (each for each in gc.get_objects() if issubclass(type(each), io.FileIO))  # no question to a lazy object
    return any(not file.closed and file.fileno() == fd for file in files)


def _thread_name(thread: str) -> str:
    names = {str(each.native_id): each.name for each in threading.enumerate()}
    if thread in names:
        return repr(names[thread])
    with contextlib.suppress(OSError):
        return repr((_PROC / "task" / thread / "comm").read_text().strip())
    return thread
