"""Unpacked copies of archives, one for each content, kept for as long as somebody uses them."""

from __future__ import annotations

import itertools
import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from attrs import define, field

from torchmgmt.archive.names import Refused, refusing
from torchmgmt.archive.unpack import UnpackLimits, unpack
from torchmgmt.errors import InvalidArchive, ManagerClosed, SourceNotFound

__all__ = ["Lease", "UnpackedArchives"]

_log = logging.getLogger(__name__)

HASH_BYTES = 1 << 20
MAX_REMEMBERED = 256
# A file that changed within the last tick of the clock may change again without a new time stamp.
# Kernels tick every 1-10 ms.
SETTLED_NS = 100_000_000

# (device, inode, size, mtime in ns), and the ctime in ns. A file that is renamed over gets a new ctime
# while we read it, unchanged; but two files in a row may have all else in common: reproducible
# builds set one mtime, weights of one shape have one size, and inodes are used again.
_Stamp = tuple[tuple[int, int, int, int], int]


@define(eq=False)
class _Copy:
    """One content. ``users`` is guarded by the owner's lock, ``folder`` by ``building``."""

    digest: str
    users: int = 0
    # Held while the copy is made or removed: whoever comes second waits here, and finds it made,
    # or, after a failure, tries for itself.
    building: threading.Lock = field(factory=threading.Lock)
    folder: Path | None = None


class Lease:
    """The right to use an unpacked copy, until it is released."""

    def __init__(self, folder: Path, digest: str, give_back: Callable[[], None]) -> None:
        self.folder = folder
        self.digest = digest
        self._lock = threading.Lock()
        self._give_back: Callable[[], None] | None = give_back  # guarded by _lock

    def release(self) -> None:
        """Give the copy back; the last one to do so removes it. Idempotent; any thread."""
        with self._lock:
            give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()


class UnpackedArchives:
    """Unpacks each content once and shares it. Thread-safe; a forked copy of it is closed.

    The copies lie in one temporary folder, which exists only while there is a copy in it.
    """

    def __init__(self, limits: UnpackLimits | None = None, *, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._limits = limits or UnpackLimits()
        self._now_ns = now_ns
        self._pid = os.getpid()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        # guarded by _lock
        self._closed = False
        self._base: Path | None = None
        self._copies: dict[str, _Copy] = {}
        self._digests: dict[_Stamp, str] = {}

    def acquire(self, path: Path, source: str) -> Lease:
        """Return a lease on the unpacked content of the archive at ``path``.

        Blocks while it hashes and unpacks, or while another thread unpacks the same content. What
        is unpacked is what was hashed, even if the file is replaced meanwhile. Raises what
        :func:`torchmgmt.archive.unpack.unpack` does, SourceNotFound, and ManagerClosed; after an
        error nothing is left on the disk.
        """
        self.check_open()
        with refusing(source), _open_archive(path, source) as file:
            copy = self._join(self._digest_of(file))
            try:
                with copy.building:
                    if copy.folder is None:
                        copy.folder = self._build(file, copy.digest, source)
                    folder = copy.folder
            except BaseException:
                self._leave(copy)
                raise
        return Lease(folder, copy.digest, lambda: self._leave(copy))

    def close(self) -> None:
        """Remove all copies, leased or not, and end the unpacking under way. Idempotent."""
        if self._is_forked():
            return
        with self._lock:
            self._closed = True
            copies = list(self._copies.values())
            self._copies.clear()
        for copy in copies:
            _clear(copy)  # waits for who unpacks, who ends at the next chunk: check_open raises
        with self._lock:
            base, self._base = self._base, None
        if base is not None:
            _remove(base)  # and what models may have written beside their folders

    def check_open(self) -> None:
        """Raise :class:`ManagerClosed` if this was closed, or belongs to another process."""
        if self._is_forked():
            raise ManagerClosed("This ModelSources", "belongs to the process it was forked from")
        if self._closed:  # a bool, and who reads it a moment early ends at the next check
            raise ManagerClosed("This ModelSources")

    def _is_forked(self) -> bool:
        # A forked child must neither wait for locks that were held at the fork, nor remove its
        # parent's folders when it exits.
        return os.getpid() != self._pid

    def _join(self, digest: str) -> _Copy:
        with self._lock:
            self.check_open()
            copy = self._copies.setdefault(digest, _Copy(digest))
            copy.users += 1
            return copy

    def _leave(self, copy: _Copy) -> None:
        if self._is_forked():
            return
        with self._lock:
            copy.users -= 1
            if copy.users:
                return
            if self._copies.get(copy.digest) is copy:
                del self._copies[copy.digest]
        # Nobody can join it any more: who wants this content now makes a copy of a new name.
        _clear(copy)
        self._drop_base()

    def _build(self, file: IO[bytes], digest: str, source: str) -> Path:
        partial = self._base_folder() / f"{digest[:16]}-{next(self._numbers)}.partial"
        stamp = _stamp(file)
        try:
            unpack(file, partial, self._limits, source=source, keep_on=self.check_open)
            _refuse_change(file, stamp)
            folder = partial.with_suffix("")
            partial.rename(folder)
        except BaseException:
            _remove(partial)
            raise
        return folder

    def _base_folder(self) -> Path:
        import tempfile  # brings shutil and random: 10 ms

        with self._lock:  # two quick system calls, so that there is one folder and not two
            self.check_open()
            if self._base is None or not self._base.is_dir():  # somebody may have cleaned /tmp
                self._base = Path(tempfile.mkdtemp(prefix="torchmgmt-"))
            return self._base

    def _drop_base(self) -> None:
        with self._lock:
            if self._copies or self._base is None:
                return
            base, self._base = self._base, None
            try:
                base.rmdir()  # one quick system call
            except FileNotFoundError:
                pass
            except OSError:
                # Another thread is still removing its copy, and will come here after that.
                self._base = base

    def _digest_of(self, file: IO[bytes]) -> str:
        stamp = _stamp(file)
        with self._lock:
            known = self._digests.get(stamp)
        if known is not None:
            return known
        digest = _sha256(file)
        _refuse_change(file, stamp)
        if self._now_ns() - stamp[1] > SETTLED_NS:
            self._remember(stamp, digest)
        return digest

    def _remember(self, stamp: _Stamp, digest: str) -> None:
        with self._lock:
            while len(self._digests) >= MAX_REMEMBERED:
                del self._digests[next(iter(self._digests))]
            self._digests[stamp] = digest


def _open_archive(path: Path, source: str) -> IO[bytes]:
    # O_NONBLOCK: a pipe that took the file's place must not block us for ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        file = os.fdopen(os.open(path, flags), "rb")
    except FileNotFoundError:
        raise SourceNotFound(source) from None
    except OSError as error:
        raise InvalidArchive(source, f"it cannot be read: {error.strerror}") from error
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise InvalidArchive(source, "it is no file")


def _stamp(file: IO[bytes]) -> _Stamp:
    status = os.fstat(file.fileno())
    content = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return content, status.st_ctime_ns


def _refuse_change(file: IO[bytes], stamp: _Stamp) -> None:
    if _stamp(file)[0] != stamp[0]:
        raise Refused("it changed while it was read; put a new archive in place by renaming it")


def _sha256(file: IO[bytes]) -> str:
    import hashlib  # loads OpenSSL: 4 MB

    # hashlib.file_digest came with Python 3.11.
    hasher = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(HASH_BYTES):
        hasher.update(chunk)
    return hasher.hexdigest()


def _clear(copy: _Copy) -> None:
    with copy.building:
        folder, copy.folder = copy.folder, None
        if folder is not None:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder with all that is in it, as far as possible; what is left is logged."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        return
    # A model may have taken the write permission from folders of its own.
    for root, names, _files in os.walk(folder):
        for path in (Path(root), *(Path(root, name) for name in names)):
            if not path.is_symlink():
                path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        _log.warning("The unpacked archive %s could not be removed", folder)
