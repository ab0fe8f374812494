"""Locks between programs: they end with who holds them, however it ends, which no file that says "mine" does.

``flock`` belongs to the open file, so two objects of one program exclude each other, too, and a forked child keeps its
parent's lock until both have ended or one of them released it.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["FileLock", "hold_folder"]

# Nobody can be woken when a lock comes free, unless it waits in the kernel, where close() could not reach it.
POLL_S = 0.05


class FileLock:
    """A lock file that is removed by whoever holds it alone. For one thread at a time.

    The file is opened by the first call, and closed by :meth:`release`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def share(self, keep_on: Callable[[], None]) -> None:
        """Wait until nobody holds it alone, then hold it with others; ``keep_on`` is called often and may raise."""
        self._wait(fcntl.LOCK_SH, keep_on)

    def own(self, keep_on: Callable[[], None]) -> None:
        """Wait until nobody else holds it, then hold it alone. Who holds it with others gives that up meanwhile."""
        self._wait(fcntl.LOCK_EX, keep_on)

    def try_own(self) -> bool:
        """Hold it alone if nobody else holds it, and say whether that is so. If not, what was held is given up."""
        return self._try(fcntl.LOCK_EX)

    def release(self, *, remove: bool = False) -> None:
        """Give up what is held; ``remove``: the file, too, which only who holds it alone may do. Idempotent."""
        fd, self._fd = self._fd, None
        if fd is None:
            return
        try:
            if remove:
                self._path.unlink(missing_ok=True)
            fcntl.flock(fd, fcntl.LOCK_UN)  # closing alone would leave it to a forked child that has the file open
        finally:
            os.close(fd)

    def _wait(self, mode: int, keep_on: Callable[[], None]) -> None:
        try:
            while not self._try(mode):
                keep_on()
                time.sleep(POLL_S)
        except BaseException:
            self.release()
            raise

    def _try(self, mode: int) -> bool:
        while True:
            if self._fd is None:
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            if not _flock(self._fd, mode):
                return False
            if _is_at(self._fd, self._path):
                return True
            self.release()  # it was removed while we opened it: its name is another file now, or none


def hold_folder(folder: Path) -> int | None:
    """Lock a folder and return the open descriptor that holds it; None if somebody else does, or it is not there.

    Only a real folder of this user is ever locked: nobody else may make this program hold, and then remove, a folder.

    Raises:
        OSError: the file system has no locks for folders.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        is_held = os.fstat(fd).st_uid == os.geteuid() and _flock(fd, fcntl.LOCK_EX) and _is_at(fd, folder)
    except BaseException:
        os.close(fd)
        raise
    if is_held:
        return fd
    os.close(fd)
    return None


def _flock(fd: int, mode: int) -> bool:
    try:
        fcntl.flock(fd, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: Path) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return not stat.S_ISLNK(found.st_mode) and os.path.samestat(os.fstat(fd), found)
