"""Ways to have a file in a second place: another name for it, a clone that shares its blocks, a copy of its bytes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

__all__ = ["can_clone", "clone", "clone_file", "copy_file", "is_write_protected", "link", "protect", "set_time"]

CHUNK_BYTES = 1 << 20
# Python has it since 3.12. The number is that of all machines but MIPS, PowerPC and SPARC, where nothing is cloned then.
_FICLONE = getattr(fcntl, "FICLONE", 0x40049409)
# O_NONBLOCK: a pipe that took the file's place must not block us for ever.
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_CANNOT_BE_KEPT = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_MAKE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


def link(source: Path, target: Path) -> bool:
    """Give a file another name, if the file system can; whether it has it. Raises FileNotFoundError if it is not there."""
    try:
        target.hardlink_to(source)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without such names, or too many of them
        return False
    return True


def clone(source: int, target: int) -> bool:
    """Have an empty file share the blocks of another one, each until one of the two writes to it; whether that is so."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:  # whatever is wrong: who copies instead meets it again
        return False
    return True


def can_clone(folder: Path) -> bool:
    """Whether the file system of a folder can clone files."""
    import tempfile  # brings shutil and random: 10 ms

    with tempfile.TemporaryFile(dir=folder) as one, tempfile.TemporaryFile(dir=folder) as other:
        return clone(one.fileno(), other.fileno())


def protect(path: Path) -> bool:
    """Make a file read-only, if that keeps this program from opening it for writing; whether it does."""
    mode = stat.S_IMODE(path.lstat().st_mode)
    with _as_far_as_can_be_kept():
        path.chmod(mode & ~0o222)
        if is_write_protected(path):
            return True
        path.chmod(mode)
    return False


def set_time(path: Path, mtime_ns: int) -> bool:
    """Set the time stamp of a file, if the file system keeps it; whether it does."""
    status = path.lstat()
    with _as_far_as_can_be_kept():
        os.utime(path, ns=(status.st_atime_ns, mtime_ns))
    return path.lstat().st_mtime_ns == mtime_ns


def is_write_protected(path: Path) -> bool:
    """Whether this program may not open a file for writing: not as root, and not on a file system that knows no modes."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
    except OSError as error:
        return error.errno in {errno.EACCES, errno.EPERM}
    return False


def clone_file(source: Path, target: Path) -> bool:
    """As :func:`copy_file`, but by sharing the blocks; whether the file system can. If not, nothing is made."""
    with _opened(source, target) as (given, made):
        is_cloned = clone(given.fileno(), made.fileno())
    if not is_cloned:
        target.unlink()
    return is_cloned


def copy_file(source: Path, target: Path, keep_on: Callable[[], None]) -> None:
    """Make a file that has the content, the time stamp and the mode of another one, but that its owner may write to.

    The time stamp is that of the other one at the end. Blocks. After an error the caller removes what is at ``target``.

    Args:
        source: a regular file, and no link to one.
        target: must not exist yet.
        keep_on: called before each MiB; copying ends with what it raises.

    Raises:
        OSError: the source is gone, is no file or may not be read, or the disk is full or fails.
    """
    with _opened(source, target) as (given, made):
        # As quick as the calls that copy within the kernel, on any system, and it can be ended in the middle.
        while chunk := given.read(CHUNK_BYTES):
            keep_on()
            rest = memoryview(chunk)
            while rest:  # a raw file may write less than it was given
                rest = rest[made.write(rest) :]


@contextlib.contextmanager
def _opened(source: Path, target: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open the one and make the other, which gets the mode and the time stamp at the end of the block."""
    with os.fdopen(os.open(source, _READ), "rb", buffering=0) as given:
        if not stat.S_ISREG(os.fstat(given.fileno()).st_mode):
            raise FileNotFoundError(errno.ENOENT, "It is no file any more", str(source))
        with os.fdopen(os.open(target, _MAKE, 0o600), "wb", buffering=0) as made:
            yield given, made
            status = os.fstat(given.fileno())
            mode = stat.S_IMODE(status.st_mode) & 0o777 | stat.S_IRUSR | stat.S_IWUSR
            with _as_far_as_can_be_kept():
                os.fchmod(made.fileno(), mode)
            with _as_far_as_can_be_kept():
                os.utime(made.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))


@contextlib.contextmanager
def _as_far_as_can_be_kept() -> Iterator[None]:
    """Some file systems have neither modes nor time stamps, or not all of them, and refuse to be told."""
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_BE_KEPT:
            raise
