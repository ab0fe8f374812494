"""The entries of an archive, read one after the other, alike for zip (``.mar``) and ``.tar.gz``.

Nothing is believed because a header says it. What the standard library's parsers would read at
once is bounded before they read it: a zip's directory by its size, a tar's extended headers by
theirs. What an entry unpacks to is for the consumer to count as it comes.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

from attrs import frozen

from torchmgmt.archive.names import Refused, quote
from torchmgmt.errors import TorchmgmtError

# zipfile, tarfile and gzip bring bz2, lzma and struct along (10 ms): only who unpacks pays that.
if TYPE_CHECKING:
    import tarfile
    import zipfile

__all__ = ["Entry", "read_entries"]

T = TypeVar("T")

CHUNK_BYTES = 1 << 20
# More than this for each entry of a zip's directory is no longer a name and its bookkeeping.
DIRECTORY_ENTRY_BYTES = 256
MAX_EXTENDED_HEADER_BYTES = 16 << 10
# Over all entries; headers of one block are not counted, tarfile itself writes one for each entry.
# Both bounds also limit what a header can cost on a Python whose tarfile matches them with a
# quadratic regular expression (CVE-2024-6232).
MAX_EXTENDED_HEADERS_BYTES = 4 << 20
# tar writers pad to records of 10 KiB, some to larger ones.
MAX_TRAILER_BYTES = 1 << 20
BLOCK_BYTES = 512


@frozen
class Entry:
    """One file or folder of an archive; ``chunks`` must be used up before the next entry is read."""

    name: str
    is_folder: bool
    executable: bool
    chunks: Iterator[bytes]


def read_entries(file: IO[bytes], max_entries: int) -> Iterator[Entry]:
    """Yield the entries of an open archive, whose format its first bytes tell.

    Raises :class:`Refused` for what is damaged, encrypted, neither file nor folder, or no archive.
    An OSError of the file itself (EIO) is passed on.
    """
    file.seek(0)
    magic = file.read(4)
    file.seek(0)
    if magic in {b"PK\x03\x04", b"PK\x05\x06"}:
        return _with_damage_named(_zip_entries(file, max_entries))
    if magic.startswith(b"\x1f\x8b"):
        return _with_damage_named(_tar_entries(file))
    found = f"it begins with {magic!r}" if magic else "it is empty"
    raise Refused(f"{found}; archives are zip files (.mar) or gzipped tar files (.tgz, .tar.gz)")


def _with_damage_named(entries: Iterator[Entry]) -> Iterator[Entry]:
    for entry in _damage_as_refusal(entries, ""):
        where = f" (at {quote(entry.name)})"
        chunks = _damage_as_refusal(entry.chunks, where)
        yield Entry(entry.name, entry.is_folder, entry.executable, chunks)


def _damage_as_refusal(items: Iterator[T], where: str) -> Iterator[T]:
    # What the parsers raise for hostile bytes is no closed list (struct.error, KeyError and
    # RecursionError were seen), so all but what is certainly something else counts as damage.
    # The consumer's own exceptions never come through here.
    try:
        yield from items
    except (Refused, TorchmgmtError, MemoryError):
        raise
    except OSError as error:
        if error.errno is not None:  # the disk's; gzip's own have none
            raise
        raise Refused(f"it is damaged{where}: {error}") from error
    except Exception as error:
        what = str(error) or type(error).__name__
        raise Refused(f"it is damaged{where}: {what}") from error


# ---------------------------------------------------------------------------------------- zip


def _zip_entries(file: IO[bytes], max_entries: int) -> Iterator[Entry]:
    import zipfile

    directory_bytes = max(CHUNK_BYTES, max_entries * DIRECTORY_ENTRY_BYTES)
    # zipfile asks for no more than read and seek, as its annotation in typeshed says too.
    with zipfile.ZipFile(cast("IO[bytes]", _BoundedReads(file, directory_bytes))) as archive:
        infos = archive.infolist()
        if len(infos) > max_entries:
            raise Refused(f"it has {len(infos)} entries; at most {max_entries} are allowed")
        for info in infos:
            _refuse_zip_kind(info)
            mode = info.external_attr >> 16
            yield Entry(info.filename, info.is_dir(), bool(mode & 0o111), _zip_chunks(archive, info))


def _zip_chunks(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    with archive.open(info) as member:
        while chunk := member.read(CHUNK_BYTES):
            yield chunk


def _refuse_zip_kind(info: zipfile.ZipInfo) -> None:
    import zipfile

    # ``filename`` ends at the first NUL, ``orig_filename`` is the whole of it.
    name = quote(info.orig_filename)
    kind = stat.S_IFMT(info.external_attr >> 16)
    if "\0" in info.orig_filename:
        raise Refused(f"the name {name} holds a NUL character")
    if info.flag_bits & 0x1:
        raise Refused(f"{name} is encrypted; only plain entries are allowed")
    if info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        # Among them lzma, whose headers may ask for gigabytes of memory.
        method = info.compress_type
        raise Refused(f"{name} is compressed by method {method}; only stored and deflated may be")
    if kind not in {0, stat.S_IFDIR if info.is_dir() else stat.S_IFREG}:
        raise Refused(f"{name} is {_KINDS.get(kind, 'of unknown kind')}; {_ALLOWED}")


class _BoundedReads:
    """A file that refuses to read more than so much at once, or anywhere but in a file.

    zipfile reads the whole directory of an archive in one read, and then makes an object of some
    500 bytes for each 46 bytes of it, before anybody could count them.
    """

    def __init__(self, file: IO[bytes], most_bytes: int) -> None:
        self._file = file
        self._most_bytes = most_bytes
        self.tell = file.tell
        self.seekable = file.seekable

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        try:
            return self._file.seek(position, whence)
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.EOVERFLOW}:  # the disk's
                raise
            raise Refused("it is damaged: it points to where no file reaches") from error

    def read(self, size: int = -1) -> bytes:
        most = self._most_bytes
        data = self._file.read(most + 1 if size < 0 else min(size, most + 1))
        if len(data) > most:
            raise Refused(f"its directory is larger than the allowed {most} bytes")
        return data


# ---------------------------------------------------------------------------------------- tar


def _tar_entries(file: IO[bytes]) -> Iterator[Entry]:
    import gzip
    import tarfile

    with gzip.GzipFile(fileobj=file, mode="rb") as plain:
        stream = _TarStream(cast("IO[bytes]", plain))
        with tarfile.TarFile(fileobj=cast("IO[bytes]", stream), encoding="utf-8") as tar:
            # Of one without entries the constructor knows that, and Python 3.10 would, if asked again,
            # seek to before the beginning.
            info = tar.next() if cast("Any", tar).firstmember is not None else None
            while info is not None:
                cast("Any", tar).members.clear()  # or it keeps every one of them
                _refuse_tar_kind(info)
                size = 0 if info.isdir() else info.size
                chunks = stream.take(info.offset_data, size)
                yield Entry(info.name, info.isdir(), bool(info.mode & 0o111), chunks)
                info = tar.next()
            stream.finish()


def _refuse_tar_kind(info: tarfile.TarInfo) -> None:
    import tarfile

    if info.isdir() or (info.isreg() and not info.issparse() and info.size >= 0):
        return
    kinds = {
        tarfile.SYMTYPE: stat.S_IFLNK,
        tarfile.CHRTYPE: stat.S_IFCHR,
        tarfile.BLKTYPE: stat.S_IFBLK,
        tarfile.FIFOTYPE: stat.S_IFIFO,
    }
    what = "a hard link" if info.islnk() else _KINDS.get(kinds.get(info.type, 0), "of unknown kind")
    raise Refused(f"{quote(info.name)} is {what}; {_ALLOWED}")


class _TarStream:
    """What tarfile reads headers from: forward only, and in amounts that an honest header needs.

    tarfile itself would read an extended header of any length into memory, and follow a negative
    size backwards for ever. The data of the entries does not pass through tarfile at all.
    """

    def __init__(self, plain: IO[bytes]) -> None:
        self._plain = plain
        self._position = 0
        self._extended_bytes = 0
        self._last_block = b""

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        # All that is ever skipped is the padding of a file to a whole block.
        if not 0 <= position - self._position <= BLOCK_BYTES:
            raise Refused("it is damaged: a header gives a size that cannot be")
        self.read(position - self._position)
        return self._position

    def read(self, size: int) -> bytes:
        if size > BLOCK_BYTES:
            self._extended_bytes += size
            total = self._extended_bytes
            if size > MAX_EXTENDED_HEADER_BYTES or total > MAX_EXTENDED_HEADERS_BYTES:
                raise Refused(
                    f"its extended headers are too long; at most {MAX_EXTENDED_HEADER_BYTES} bytes"
                    f" in one, {MAX_EXTENDED_HEADERS_BYTES} in all are allowed"
                )
        self._last_block = self._plain.read(size)
        self._position += len(self._last_block)
        return self._last_block

    def take(self, position: int, size: int) -> Iterator[bytes]:
        """Yield the ``size`` bytes at ``position``."""
        self.seek(position)
        while size:
            chunk = self._plain.read(min(size, CHUNK_BYTES))
            if not chunk:
                raise EOFError("it ends in the middle of an entry")
            self._position += len(chunk)
            size -= len(chunk)
            yield chunk

    def finish(self) -> None:
        """Make sure that tarfile stopped at the end, and read on to what gzip checks there."""
        if self._last_block.strip(b"\0"):  # tarfile takes a damaged header for the end
            raise Refused("it is damaged: what should be the next entry's header is none")
        left = MAX_TRAILER_BYTES
        while left > 0 and (chunk := self._plain.read(left)):
            left -= len(chunk)
        if left <= 0:
            raise Refused(f"more than {MAX_TRAILER_BYTES} bytes follow the end of its last entry")


_ALLOWED = "only files and folders are allowed"
_KINDS = {
    stat.S_IFREG: "a file by its mode but a folder by its name",
    stat.S_IFDIR: "a folder by its mode but a file by its name",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}
