"""Locks between programs: they end with who holds them, however it ends, which no file that says "mine" does.

``flock`` belongs to the open file, so two objects of one program exclude each other, too, and a forked child keeps its
parent's lock until both have ended or one of them released it.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from attrs import define, field

__all__ = ["FileLock", "KeyLock", "KeyLocks", "hold_folder"]

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


class KeyLock(Protocol):
    """The lock of one key; as :class:`FileLock`, also in that it is for one thread at a time."""

    def share(self, keep_on: Callable[[], None]) -> None:
        """Wait until nobody holds it alone, then hold it with others."""

    def own(self, keep_on: Callable[[], None]) -> None:
        """Wait until nobody else holds it, then hold it alone."""

    def try_own(self) -> bool:
        """Hold it alone if nobody else holds it, and say whether that is so. If not, what was held may be given up."""

    def release(self, *, remove: bool = False) -> None:
        """Give up what is held. Idempotent."""


class KeyLocks:
    """Locks between programs, one for each key, that need one descriptor together however many are held. Thread-safe.

    Each is a byte of one file (open file description locks, Linux). They belong to the open file, so two objects of one
    program exclude each other; of the locks that one object gave, this object sees to it. Where the system has none there
    is a file, and a descriptor while it is held, for each key.

    Args:
        path: the file, which is made when it is first needed, in a folder that is there by then, and stays.
        folder: where the files for each key are instead.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self._path = path
        self._folder = folder
        self._lock = threading.Lock()
        # guarded by _lock
        self._file: _LockFile | None = None
        self._held: dict[int, _Held] = {}  # by place

    def of(self, digest: str) -> KeyLock:
        """Return the lock of a key, in hexadecimal; not held yet."""
        if not _HAS_RANGES:
            return FileLock(self._folder / f"{digest}.lock")
        return _RangeLock(self, int(digest[:15], 16))  # 60 bits: what has them in common waits for each other, no more

    def take(self, place: int, user: object, *, alone: bool) -> bool:
        """Hold a place, together with others or alone, if nobody stands against it; whether that is so. For the locks."""
        with self._lock:
            held = self._held.get(place)
            if held is None:
                held = _Held(self._open_locked())
            others = held.users - {user}
            if others and (alone or held.is_owned):
                return False
            try:
                if held.is_owned is not alone or not held.users:
                    _set(held.file.fd, fcntl.F_WRLCK if alone else fcntl.F_RDLCK, place)
            except (BlockingIOError, PermissionError):  # which of them, the system may choose
                if not held.users:
                    self._leave_locked(held.file)
                return False
            except BaseException:
                if not held.users:
                    self._leave_locked(held.file)
                raise
            self._held[place] = held
            held.is_owned = alone
            held.users.add(user)
            return True

    def give_back(self, place: int, user: object) -> None:
        """Hold a place no more. Idempotent. For the locks."""
        with self._lock:
            held = self._held.get(place)
            if held is None or user not in held.users:
                return
            held.users.discard(user)
            if held.users:
                return
            del self._held[place]
            try:
                _set(held.file.fd, fcntl.F_UNLCK, place)  # closing alone would leave it to a forked child
            finally:
                self._leave_locked(held.file)

    def _open_locked(self) -> _LockFile:
        if self._file is None or not _is_at(self._file.fd, self._path):  # else somebody has cleaned the folder
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            self._file = _LockFile(fd)
        self._file.places += 1
        return self._file

    def _leave_locked(self, file: _LockFile) -> None:
        file.places -= 1
        if not file.places:
            if self._file is file:
                self._file = None
            os.close(file.fd)


@define(eq=False)
class _LockFile:
    """An open file whose bytes are locks, and how many of them are held."""

    fd: int
    places: int = 0


@define(eq=False)
class _Held:
    """A place that is held, by one user alone or by all of them."""

    file: _LockFile
    users: set[object] = field(factory=set)
    is_owned: bool = False


_HAS_RANGES = hasattr(fcntl, "F_OFD_SETLK") and struct.calcsize("P") == 8


class _RangeLock:
    """One place of a :class:`KeyLocks` as a :class:`KeyLock`."""

    def __init__(self, locks: KeyLocks, place: int) -> None:
        self._locks = locks
        self._place = place

    def share(self, keep_on: Callable[[], None]) -> None:
        self._wait(keep_on, alone=False)

    def own(self, keep_on: Callable[[], None]) -> None:
        self.release()  # two who hold it with each other, and wait to hold it alone, would wait for ever
        self._wait(keep_on, alone=True)

    def try_own(self) -> bool:
        return self._locks.take(self._place, self, alone=True)

    def release(self, *, remove: bool = False) -> None:
        self._locks.give_back(self._place, self)

    def _wait(self, keep_on: Callable[[], None], *, alone: bool) -> None:
        try:
            while not self._locks.take(self._place, self, alone=alone):
                keep_on()
                time.sleep(POLL_S)
        except BaseException:
            self.release()
            raise


def _set(fd: int, mode: int, place: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", mode, os.SEEK_SET, place, 1, 0))  # struct flock


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
