"""What is remembered of URLs that were fetched, and the archives that are kept of them: by one program, or by several."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

from attrs import asdict, field, frozen

from torchmgmt.archive.locks import FileLock
from torchmgmt.archive.shelves import PrivateShelf
from torchmgmt.archive.transfer import Validators

__all__ = ["OwnMemory", "Record", "SharedMemory", "UrlMemory"]

_log = logging.getLogger(__name__)

MAX_REMEMBERED = 1000
_DIGEST = re.compile(r"[0-9a-f]{64}")


@frozen
class Record:
    """What one URL had when it was last asked."""

    digest: str
    validators: Validators
    number: str = field(factory=lambda: os.urandom(8).hex())
    """Another one each time, so that two records tell whether somebody asked in between."""


class UrlMemory(Protocol):
    """Keeps a record for each key, which stands for a URL. Thread-safe."""

    def turn(self, key: str) -> AbstractContextManager[bool]:
        """Keep other programs from the key inside the block; the value is whether one of them was waited for."""

    def read(self, key: str) -> Record | None:
        """Return the record of a key; None if there is none."""

    def write(self, key: str, record: Record) -> None:
        """Set the record of a key."""

    def partial(self, key: str) -> AbstractContextManager[Path]:
        """Give a path to download to, at which nothing is. It is removed at the end of the block, however it ends."""

    def keep(self, digest: str, path: Path) -> None:
        """Move an archive to where archives are kept, if they are."""

    def kept(self, digest: str) -> Path | None:
        """Return where an archive is kept; None if it is not. Its content must be checked: disks fail."""


class OwnMemory:
    """What one program remembers while it runs. It keeps no archives.

    Args:
        shelf: where files on their way may lie.
    """

    def __init__(self, shelf: PrivateShelf) -> None:
        self._shelf = shelf
        self._lock = threading.Lock()
        self._records: dict[str, Record] = {}  # guarded by _lock

    def turn(self, key: str) -> AbstractContextManager[bool]:
        """See :class:`UrlMemory`."""
        return nullcontext(False)

    def read(self, key: str) -> Record | None:
        """See :class:`UrlMemory`."""
        with self._lock:
            return self._records.get(key)

    def write(self, key: str, record: Record) -> None:
        """See :class:`UrlMemory`."""
        with self._lock:
            self._records.pop(key, None)
            while len(self._records) >= MAX_REMEMBERED:
                del self._records[next(iter(self._records))]
            self._records[key] = record

    def partial(self, key: str) -> AbstractContextManager[Path]:
        """See :class:`UrlMemory`."""
        return self._shelf.scratch_file()

    def keep(self, digest: str, path: Path) -> None:
        """See :class:`UrlMemory`."""

    def kept(self, digest: str) -> Path | None:
        """See :class:`UrlMemory`."""
        return None


class SharedMemory:
    """Records and archives in a folder that programs share.

    ``urls/KEY.json`` is a record, ``urls/KEY.lock`` is held while it is a program's turn, ``urls/KEY.partial`` is what
    that one downloads. ``archives/DIGEST`` is an archive that came whole; it is replaced and removed, never written to.

    Args:
        folder: on a file system with locks; made when it is first needed.
        max_bytes: how large the archives may be together; those not used for longest are removed first.
        keep_on: called often while another program is waited for; raises to end that.
    """

    def __init__(self, folder: Path, max_bytes: int, keep_on: Callable[[], None]) -> None:
        self._urls = folder / "urls"
        self._archives = folder / "archives"
        self._max_bytes = max_bytes
        self._keep_on = keep_on
        self._lock = threading.Lock()
        self._is_swept = False  # guarded by _lock

    @contextmanager
    def turn(self, key: str) -> Iterator[bool]:
        """See :class:`UrlMemory`. Blocks while it is another program's turn."""
        self._prepare()
        lock = self._lock_of(key)
        is_free = lock.try_own()
        if not is_free:
            lock.own(self._keep_on)
        try:
            yield not is_free
        finally:
            lock.release(remove=True)

    def read(self, key: str) -> Record | None:
        """See :class:`UrlMemory`. A record that makes no sense is none."""
        try:
            found = json.loads((self._urls / f"{key}.json").read_bytes())
            if not _DIGEST.fullmatch(found["digest"]):
                raise ValueError("its digest is none")
            return Record(found["digest"], Validators(**found["validators"]), str(found["number"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            _log.warning("What is remembered of a URL in %s cannot be read: %s", self._urls, error)
            return None

    def write(self, key: str, record: Record) -> None:
        """See :class:`UrlMemory`."""
        partial = self._urls / f"{key}.partial"
        partial.write_text(json.dumps(asdict(record)))
        partial.replace(self._urls / f"{key}.json")

    @contextmanager
    def partial(self, key: str) -> Iterator[Path]:
        """See :class:`UrlMemory`."""
        path = self._urls / f"{key}.partial"
        path.unlink(missing_ok=True)  # of a program that was killed in its turn
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def keep(self, digest: str, path: Path) -> None:
        """See :class:`UrlMemory`. Blocks until it is on the disk."""
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.replace(self._archives / digest)
        self.kept(digest)  # the system's own time stamps are too coarse to tell two in a row apart
        self._trim()

    def kept(self, digest: str) -> Path | None:
        """See :class:`UrlMemory`. Makes it the last one to be removed."""
        path = self._archives / digest
        try:
            # Not the time of its last change: who unpacks it takes a new one for a file that is being written to.
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        except OSError:
            return None
        return path

    def _trim(self) -> None:
        """Remove what is too much, the one not used for longest first."""
        found = sorted(_last_use(path) for path in self._archives.iterdir())
        total = sum(size for _, size, _ in found)
        for _, size, path in found:
            if total <= self._max_bytes:
                return
            path.unlink(missing_ok=True)  # who reads it has it open
            total -= size

    def _prepare(self) -> None:
        with self._lock:
            for folder in (self._urls, self._archives):  # each time: somebody may have removed it
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._is_swept:
                return
            self._is_swept = True
            for key in {path.name.partition(".")[0] for path in self._urls.iterdir()}:
                self._sweep(key)

    def _sweep(self, key: str) -> None:
        """Remove what a killed program left of its turn, and a record whose archive is gone."""
        lock = self._lock_of(key)
        if not lock.try_own():
            lock.release()
            return
        try:
            (self._urls / f"{key}.partial").unlink(missing_ok=True)
            record = self.read(key)
            if record is None or not (self._archives / record.digest).exists():
                (self._urls / f"{key}.json").unlink(missing_ok=True)
        finally:
            lock.release(remove=True)

    def _lock_of(self, key: str) -> FileLock:
        return FileLock(self._urls / f"{key}.lock")


def _last_use(path: Path) -> tuple[int, int, Path]:
    try:
        found = path.stat()
    except FileNotFoundError:  # another program removed it in this moment
        return 0, 0, path
    return max(found.st_atime_ns, found.st_mtime_ns), found.st_size, path
