"""Pristine copies of archives, one for each content, and what else is made once, for as long as somebody uses it."""

from __future__ import annotations

import itertools
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, cast

from attrs import define, field

from torchmgmt.archive.names import Refused, refusing
from torchmgmt.archive.pristine import FILES, is_intact, seal
from torchmgmt.archive.shelves import Place, PrivateShelf, Shelf
from torchmgmt.archive.unpack import UnpackLimits, unpack
from torchmgmt.errors import InvalidArchive, ManagerClosed, SourceNotFound

__all__ = ["Lease", "UnpackedArchives"]

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
    """What a key stands for. ``users`` is guarded by the owner's lock, ``place`` by ``building``."""

    key: str
    users: int = 0
    # Held while the copy is made or removed: whoever comes second waits here, and finds it made,
    # or, after a failure, tries for itself.
    building: threading.Lock = field(factory=threading.Lock)
    place: Place | None = None


class Lease:
    """The right to use a folder that was made, until it is released.

    ``digest`` is the SHA-256 of the archive that it was unpacked from, and the key of what was made of anything else.
    """

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

    Args:
        limits: what an archive may unpack to.
        shelf: where the copies lie, closed with this; None: in a temporary folder.
        now_ns: the time of the file system's clock, in ns.
    """

    def __init__(
        self,
        limits: UnpackLimits | None = None,
        *,
        shelf: Shelf | None = None,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._limits = limits or UnpackLimits()
        self._shelf: Shelf = PrivateShelf() if shelf is None else shelf
        self._now_ns = now_ns
        self._pid = os.getpid()
        self._lock = threading.Lock()
        # guarded by _lock
        self._closed = False
        self._copies: dict[str, _Copy] = {}
        self._digests: dict[_Stamp, str] = {}

    def acquire(self, path: Path, source: str, *, digest: str | None = None, wanted: str | None = None) -> Lease:
        """Return a lease on the pristine copy of the archive at ``path``.

        Blocks while it hashes and unpacks, or while another thread or program unpacks the same content. What is unpacked
        is what was hashed, even if the file is replaced meanwhile. Raises what :func:`torchmgmt.archive.unpack.unpack`
        does, SourceNotFound, and ManagerClosed; after an error nothing is left on the disk.

        Args:
            path: the archive.
            source: how messages call it.
            digest: its SHA-256, if the caller computed it from this very file.
            wanted: the only SHA-256 that is accepted; None: any.
        """
        self.check_open()
        with refusing(source), _open_archive(path, source) as file:
            found = digest or self._digest_of(file)
            if wanted not in {None, found}:
                raise Refused(f"its SHA-256 is {found}, but #sha256={wanted} was asked for")

            def build(into: Path) -> None:
                stamp = _stamp(file)
                into.mkdir()
                unpack(file, into / FILES, self._limits, source=source, keep_on=self.check_open)
                _refuse_change(file, stamp)
                seal(into / FILES)

            # take returns a copy or raises
            return cast("Lease", self._pristine(found, lambda key: self._shelf.take(key, build, self.check_open)))

    def acquire_known(self, digest: str) -> Lease | None:
        """Return a lease on the pristine copy of the archive of this SHA-256, if somebody uses one now; else None.

        Blocks while another thread or program unpacks or removes it. Raises ManagerClosed.
        """
        self.check_open()
        return self._pristine(digest, lambda key: self._shelf.find(key, self.check_open))

    def acquire_made(self, key: str, build: Callable[[Path], None]) -> Lease:
        """Return a lease on what ``build`` makes in the folder that it is given, which is not there yet: once for each key.

        Blocks while it is made, here or by another thread or program. Raises what ``build`` raises, and ManagerClosed; after
        an error nothing is left on the disk.

        Args:
            key: 64 hexadecimal digits that stand for what is made.
            build: calls :meth:`check_open` often.
        """
        self.check_open()
        return cast("Lease", self._lease(key, lambda: self._shelf.take(key, build, self.check_open)))

    def _pristine(self, digest: str, take: Callable[[str], Place | None]) -> Lease | None:
        """Return a lease on a copy of this content that nobody has written to, by the first key that has one or none."""
        lease: Lease | None = None
        try:
            for key in _keys(digest):
                lease = self._lease(key, partial(take, key))
                if lease is None:
                    break
                if is_intact(lease.folder / FILES):
                    return Lease(lease.folder / FILES, digest, lease.release)
                lease.release()
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        return None

    def _lease(self, key: str, take: Callable[[], Place | None]) -> Lease | None:
        copy = self._join(key)
        try:
            with copy.building:
                if copy.place is None:
                    copy.place = take()
                place = copy.place
            if place is not None:
                return Lease(place.folder, key, lambda: self._leave(copy))
        except BaseException:
            self._leave(copy)
            raise
        self._leave(copy)
        return None

    def close(self, then: Callable[[], None] = lambda: None) -> None:
        """Remove all copies, leased or not, and end the unpacking under way. Idempotent.

        ``then`` is called once nothing more can be acquired, before anything is waited for.
        """
        if self._is_forked():
            return
        with self._lock:
            self._closed = True
            copies = list(self._copies.values())
            self._copies.clear()
        then()
        for copy in copies:
            _clear(copy)  # waits for who unpacks, who ends at the next chunk: check_open raises
        self._shelf.close()

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

    def _join(self, key: str) -> _Copy:
        with self._lock:
            self.check_open()
            copy = self._copies.setdefault(key, _Copy(key))
            copy.users += 1
            return copy

    def _leave(self, copy: _Copy) -> None:
        if self._is_forked():
            return
        with self._lock:
            copy.users -= 1
            if copy.users:
                return
            if self._copies.get(copy.key) is copy:
                del self._copies[copy.key]
        _clear(copy)  # nobody can join it any more: who wants this content now takes it anew

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


def _keys(digest: str) -> Iterator[str]:
    """Give the places at which copies of a content may lie: one after the other is spoiled by a version that writes to it."""
    yield digest
    import hashlib

    for number in itertools.count(1):
        yield hashlib.sha256(f"{digest} {number}".encode()).hexdigest()


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
        place, copy.place = copy.place, None
        if place is not None:
            place.give_back()
