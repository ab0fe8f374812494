"""PidFile: which server was started from a folder, so that it can be found again to be ended.

The server holds a lock on the file for as long as it lives, however it ends: what the file says counts only then, so a
file that was left over stands in nobody's way, and its number is never taken for another program's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

__all__ = ["PidFile"]

ATTEMPTS = 5
PAUSE_S = 0.05


@frozen
class PidFile:
    """The file in the system's folder for temporary files; one for each user and working directory."""

    path: Path

    @classmethod
    def of_working_directory(cls) -> PidFile:
        """Return the one of this process's user and folder; make nothing."""
        folder = hashlib.sha256(os.fsencode(Path.cwd().resolve())).hexdigest()[:16]
        return cls(Path(tempfile.gettempdir()) / f"{_prefix()}{folder}.pid")

    @classmethod
    def of_user(cls) -> list[PidFile]:
        """Return all of this process's user, whether their servers run or not."""
        return [cls(path) for path in sorted(Path(tempfile.gettempdir()).glob(f"{_prefix()}*.pid"))]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Be the one server while the block runs; raise :class:`OSError` with one line if another one is."""
        descriptor = self._lock()
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            yield
        finally:
            self.path.unlink(missing_ok=True)  # before the lock goes: nobody else's is removed
            os.close(descriptor)

    def running(self) -> int | None:
        """Return the process id of the server that runs; None if none does."""
        try:
            descriptor = self._open(os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _pid_in(descriptor)
        else:
            return None
        finally:
            os.close(descriptor)

    def _lock(self) -> int:
        for _ in range(ATTEMPTS):
            descriptor = self._try_lock()
            if descriptor is not None:
                return descriptor
            time.sleep(PAUSE_S)  # somebody may only be looking whether a server runs
        pid = self.running()
        who = f" (process {pid})" if pid else ""
        raise OSError(errno.EEXIST, f"A server that was started from this folder runs already{who}; --stop ends it")

    def _try_lock(self) -> int | None:
        descriptor = self._open(os.O_RDWR | os.O_CREAT)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_still(descriptor):
                return descriptor
        os.close(descriptor)  # it is held, or whoever held it has removed it meanwhile
        return None

    def _open(self, flags: int) -> int:
        # The folder is everybody's: no link of somebody else's is followed, no file of theirs believed.
        descriptor = os.open(self.path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        if os.fstat(descriptor).st_uid != os.getuid():
            os.close(descriptor)
            raise OSError(errno.EPERM, f"{self.path} belongs to another user; set TMPDIR to a folder of your own")
        return descriptor

    def _is_still(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(self.path.lstat(), os.fstat(descriptor))
        except FileNotFoundError:
            return False


def _prefix() -> str:
    return f"torchmgmt-{os.getuid()}-"


def _pid_in(descriptor: int) -> int | None:
    """Return what the file says; None if its server has not written that yet."""
    text = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
    return int(text) if text.isdecimal() else None
