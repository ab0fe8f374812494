"""Unpacking an archive that nobody vouched for into a folder of its own."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from attrs import Attribute, field, frozen

from torchmgmt.archive.entries import Entry, read_entries
from torchmgmt.archive.names import Refused, parts_inside, quote, refusing
from torchmgmt.checks import check_number

__all__ = ["UnpackLimits", "unpack"]

T = TypeVar("T")

# Errors of creating a file that its name is to blame for, not the disk.
_BAD_NAME = {errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ}


def _at_least(minimum: int) -> Any:
    def validate(_instance: object, attribute: Attribute[Any], value: object) -> None:
        check_number(attribute.name, value, minimum=minimum)

    return validate


@frozen(kw_only=True)
class UnpackLimits:
    """How much an archive may unpack to. All are counted while unpacking; headers are not believed.

    Raises :class:`torchmgmt.errors.InvalidArgument` for anything but whole numbers in range.
    """

    max_bytes: int = field(default=64 << 30, validator=_at_least(0))
    """Bytes of all files together."""
    max_entries: int = field(default=100_000, validator=_at_least(1))
    """Files and folders together, those included that only stand in the name of a file."""
    max_ratio: int = field(default=200, validator=_at_least(1))
    """Times the archive's own size that its files may be together, once above the floor."""
    ratio_floor_bytes: int = field(default=512 << 20, validator=_at_least(0))
    """Bytes up to which any ratio is fine: small archives of zeros or text compress a thousandfold."""


def unpack(
    file: IO[bytes],
    into: Path,
    limits: UnpackLimits | None = None,
    *,
    source: str,
    keep_on: Callable[[], None] = lambda: None,
) -> None:
    """Unpack the archive that ``file`` is open on into ``into``, a folder that this makes.

    Its parent must exist and be writable by nobody else. Files get mode 644, or 755 if the archive
    has any executable bit, less the umask. Blocks for as long as it takes; any thread.

    Args:
        file: seekable, opened for reading bytes; its content must not change meanwhile.
        into: must not exist yet. After an error the caller removes what is there.
        limits: what is unpacked at most.
        source: how messages call the archive.
        keep_on: called at least once per MiB; unpacking ends with what it raises.

    Raises:
        InvalidArchive: no archive, damaged, encrypted; an entry that leaves the folder, is neither
            file nor folder, or stands there twice; more than the limits.
        OSError: the disk is full or fails.
    """
    with refusing(source):
        size_bytes = file.seek(0, os.SEEK_END)
        placer = _Placer(into, limits or UnpackLimits(), size_bytes, keep_on)
        for entry in read_entries(file, placer.limits.max_entries):
            placer.place(entry)
        if not placer.has_files:
            raise Refused("it holds no files")


class _Placer:
    """Places entries below one folder and counts them; for one thread."""

    def __init__(self, into: Path, limits: UnpackLimits, packed_bytes: int, keep_on: Callable[[], None]) -> None:
        into.mkdir(mode=0o755)
        self.limits = limits
        self.has_files = False
        self._into = into
        self._packed_bytes = packed_bytes
        self._keep_on = keep_on
        self._unpacked_bytes = 0
        self._entries = 0
        # Key of each path so far -> whether it is a folder.
        self._placed: dict[tuple[str, ...], bool] = {}

    def place(self, entry: Entry) -> None:
        """Create the entry, and the folders above it that are missing."""
        self._keep_on()
        self._count_entry(entry.name)
        parts = parts_inside(entry.name)
        if entry.is_folder:
            self._place_folder(parts, entry.name)
            return
        if not parts:
            raise Refused(f"the name {quote(entry.name)} is no name for a file")
        self._place_folder(parts[:-1], entry.name)
        self._place_file(parts, entry)

    def _place_folder(self, parts: tuple[str, ...], name: str) -> None:
        for depth in range(1, len(parts) + 1):
            key = _key(parts[:depth])
            is_folder = self._placed.get(key)
            if is_folder is None:
                self._count_entry(name)  # or one long name could make thousands of folders
                self._placed[key] = True
                folder = self._into.joinpath(*parts[:depth])
                _creating(name, partial(folder.mkdir, mode=0o755))
            elif not is_folder:
                raise Refused(f"{quote(name)} needs a folder where there is a file already")

    def _place_file(self, parts: tuple[str, ...], entry: Entry) -> None:
        key = _key(parts)
        if key in self._placed:
            what = "a folder of that name" if self._placed[key] else "it"
            raise Refused(f"{quote(entry.name)} cannot be added: the archive has {what} already")
        self._placed[key] = False
        self.has_files = True
        # O_EXCL: never through a link, never onto a file. The mode is ours: no setuid from outside.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        path = self._into.joinpath(*parts)
        mode = 0o755 if entry.executable else 0o644
        fd = _creating(entry.name, partial(os.open, path, flags, mode))
        with os.fdopen(fd, "wb", buffering=0) as out:
            for chunk in entry.chunks:
                self._keep_on()
                self._count_bytes(len(chunk), entry.name)
                _write_all(out, chunk)

    def _count_entry(self, name: str) -> None:
        self._entries += 1
        most = self.limits.max_entries
        if self._entries > most:
            raise Refused(f"it has too many files and folders (at {quote(name)}); at most {most} are allowed")

    def _count_bytes(self, count: int, name: str) -> None:
        self._unpacked_bytes += count
        limits = self.limits
        total, packed = self._unpacked_bytes, self._packed_bytes
        if total > limits.max_bytes:
            raise Refused(f"it unpacks to more than the allowed {limits.max_bytes} bytes (at {quote(name)})")
        if total > max(limits.ratio_floor_bytes, limits.max_ratio * packed):
            raise Refused(
                f"it unpacks to over {limits.max_ratio} times its own {packed} bytes"
                f" (at {quote(name)}); allowed is that ratio beyond {limits.ratio_floor_bytes} bytes"
            )


def _key(parts: tuple[str, ...]) -> tuple[str, ...]:
    # Some file systems hold one file for names that differ only in how an accent is written. (For
    # those that also ignore case, O_EXCL finds the second one.)
    import unicodedata  # a megabyte that nobody needs who only imports the package

    return tuple(unicodedata.normalize("NFC", part) for part in parts)


def _creating(name: str, create: Callable[[], T]) -> T:
    try:
        return create()
    except FileExistsError as error:
        what = "the archive has it already, by a name that this file system takes for the same"
        raise Refused(f"{quote(name)} cannot be added: {what}") from error
    except OSError as error:
        if error.errno not in _BAD_NAME:
            raise
        raise Refused(f"{quote(name)} cannot be created here: {error.strerror}") from error


def _write_all(out: IO[bytes], chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:  # a raw file may write less than it was given
        rest = rest[out.write(rest) :]
