"""Memory that two processes share, so that large segments need not be copied through a socket.

Each end of a channel owns one memory file for what it *receives*: it makes it when the first large frame comes through
the socket, maps it, and sends its descriptor along with the next frame that it sends anyway. From then on the other end
writes large segments into it, and the frame only says where they are. Where the file cannot be made there is no offer,
and everything goes through the socket; where the file is full, that frame does. Nothing here has a name in the file
system: the kernel frees the memory with the last mapping and descriptor, however the processes end. Its size is sealed:
no end can take memory away that the other one touches, which the system would kill for it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import pickle
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from torchmgmt.errors import TorchmgmtError
from torchmgmt.system_calls import fix_size, has_fixed_size, memory_file

__all__ = ["SHARED_FROM", "BrokenSegment", "Buffer", "SegmentReader", "SegmentWriter", "SharedSegments", "size_of"]

Buffer: TypeAlias = bytes | bytearray | memoryview

SHARED_FROM = 1 << 16
"""From how many bytes on the segments of a frame are written to shared memory. Round trips between two processes, bytes
body and array body, socket against shared memory (µs, medians; two cores, Linux 6.18, Python 3.11):

==========  ==========  ===========
     32 KB    44 / 49     66 / 76
     64 KB    72 / 52     96 / 78
    128 KB    97 / 70    122 / 87
      1 MB  2324 / 180   459 / 144
     16 MB    95 / 20     11 / 4 (ms)
==========  ==========  ===========
"""
ARENA_BYTES = 1 << 28
"""The length of a memory file. It costs addresses only: a page takes memory once it has been written to."""
KEPT_BYTES = 1 << 25
"""How much of a memory file stays in memory when nobody uses it: reused pages are written five times as fast as new
ones. What lies further up is given back to the system as soon as it is free."""
MAX_BLOCKS = 8
"""How many frames may lie in one memory file. A program that keeps answers for ever has its later ones through the
socket, and no frame costs more than this many looks at what is free again."""

_ALIGNMENT = 64  # a cache line, and what vector instructions want
# Linux 5.14; the mmap module does not name them.
_POPULATE_READ = 22
_POPULATE_WRITE = 23


class BrokenSegment(TorchmgmtError, ConnectionError):
    """What arrived names memory that is not there: the two ends of the channel disagree, and it is of no use any more."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The channel is broken: {reason}.")
        self.reason = reason


def size_of(buffer: Buffer) -> int:
    """Return how many bytes ``buffer`` has, whatever its item size and shape."""
    return len(buffer) if isinstance(buffer, bytes) else memoryview(buffer).nbytes


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _places(offset: int, lengths: Sequence[int]) -> tuple[list[int], int]:
    """Return where each of the segments in a block begins, and where the block ends. Both ends reckon alike."""
    starts = []
    for length in lengths:
        starts.append(offset)
        offset += _round_up(length, _ALIGNMENT)
    return starts, _round_up(offset, mmap.PAGESIZE)


@contextlib.contextmanager
def _not_as_standard_streams() -> Iterator[None]:
    """Have no descriptor that is made meanwhile become 0, 1 or 2, should these be closed.

    What a handler then prints would be written into the memory in which requests and answers travel.
    """
    with contextlib.ExitStack() as taken:
        while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
            taken.callback(os.close, fd)
        os.close(fd)
        yield


class _Mapping:
    """A memory file in this process's address space. It is unmapped when nothing refers to it any more."""

    def __init__(self, fd: int, advice: int) -> None:
        self.size = os.fstat(fd).st_size
        if sys.version_info >= (3, 13):
            self._mmap = mmap.mmap(fd, self.size, trackfd=False)
        else:  # it keeps a copy of the descriptor
            with _not_as_standard_streams():
                self._mmap = mmap.mmap(fd, self.size)
        self.view = memoryview(self._mmap)
        self._advice = advice
        self._present = 0  # up to here pages have been asked for; those above KEPT_BYTES come and go

    def prepare(self, start: int, end: int) -> None:
        """Have the pages from ``start`` to ``end`` there: in one call it takes a quarter of what page faults do.

        Raises:
            OSError: there is no memory for them; found here, it is no SIGBUS when they are written to.
        """
        start = max(start, self._present)
        if start >= end:
            return
        try:
            self._mmap.madvise(self._advice, start, end - start)
        except OSError as error:
            if error.errno != errno.EINVAL:  # an older kernel does it page by page as they are touched
                raise
        self._present = max(self._present, min(end, KEPT_BYTES))

    def trim(self, start: int, end: int) -> None:
        """Give back the memory between ``start`` and ``end``, unless it is to be kept."""
        start = max(start, KEPT_BYTES)
        if start < end:
            with contextlib.suppress(OSError):  # a sandbox may not know it; it only spares memory
                self._mmap.madvise(mmap.MADV_REMOVE, start, end - start)


class SegmentReader:
    """The receiving end of a memory file: hands out views of what was written, and finds out when they are gone.

    A block is free when nothing refers to its memory any more, be it a slice, an array that was unpickled over it or a
    tensor over that. Python keeps that count itself: the views are exports of one memoryview per block (the lease), and
    a memoryview with exports refuses to be released. So there is no finalizer that could run too early, within a
    garbage collection or in a forked copy of the process. :meth:`views` is for one thread, :meth:`collect` for any.
    """

    def __init__(self, fd: int) -> None:
        """Map the memory file ``fd``, which stays the caller's."""
        self._mapping = _Mapping(fd, _POPULATE_READ)
        self._leases: deque[tuple[memoryview, int, int]] = deque()

    def views(self, offset: int, lengths: Sequence[int]) -> list[memoryview]:
        """Return writable views of the segments that were written at ``offset``.

        Raises:
            BrokenSegment: there is no such place.
        """
        starts, end = _places(offset, lengths)
        if offset % mmap.PAGESIZE or end > self._mapping.size:
            raise BrokenSegment(f"no segments of {list(lengths)} bytes can be at {offset}")
        with contextlib.suppress(OSError):  # they are there; this only spares page faults
            self._mapping.prepare(offset, end)
        lease = self._mapping.view[offset:end]
        self._leases.append((lease, offset, end))
        # A PickleBuffer is an export of the lease, where a slice would be its sibling.
        block = pickle.PickleBuffer(lease).raw()
        return [block[start - offset : start - offset + length] for start, length in zip(starts, lengths, strict=True)]

    def collect(self) -> list[int]:
        """Return the places of blocks whose last view is gone, each once. Does not block."""
        free = []
        for _ in range(len(self._leases)):
            try:
                lease, offset, end = entry = self._leases.popleft()
            except IndexError:  # another thread has it
                break
            try:
                lease.release()
            except BufferError:
                self._leases.append(entry)
                continue
            self._mapping.trim(offset, end)
            free.append(offset)
        return free


class SegmentWriter:
    """The sending end of a memory file. Any thread; blocks for as long as copying takes."""

    def __init__(self, fd: int) -> None:
        """Map the memory file ``fd``, which stays the caller's."""
        self._mapping = _Mapping(fd, _POPULATE_WRITE)
        self._lock = threading.Lock()
        # guarded by _lock
        self._blocks: dict[int, int] = {}  # where each begins and ends

    def write(self, segments: Sequence[Buffer], lengths: Sequence[int]) -> int | None:
        """Copy ``segments``, of ``lengths`` bytes, to a free place and return it; None if there is none."""
        starts, size = _places(0, lengths)
        offset = self._allocate(size)
        if offset is None:
            return None
        try:
            self._mapping.prepare(offset, offset + size)
            self._copy(segments, [offset + start for start in starts], lengths)
        except OSError:
            self.release(offset)
            return None
        except BaseException:
            self.release(offset)
            raise
        return offset

    def release(self, offset: int) -> None:
        """Use the place of a block again.

        Raises:
            BrokenSegment: no block is there.
        """
        with self._lock:
            known = self._blocks.pop(offset, None)
        if known is None:
            raise BrokenSegment(f"segments at {offset} were released, but none were written there")

    def _allocate(self, size: int) -> int | None:
        """Return the first gap that is large enough: the lower, the more often it was used."""
        with self._lock:
            start = 0
            for taken, end in sorted(self._blocks.items()):
                if taken - start >= size:
                    break
                start = end
            if len(self._blocks) == MAX_BLOCKS or start + size > self._mapping.size:
                return None
            self._blocks[start] = start + size
            return start

    def _copy(self, segments: Sequence[Buffer], starts: Sequence[int], lengths: Sequence[int]) -> None:
        view = self._mapping.view
        for segment, start, length in zip(segments, starts, lengths, strict=True):
            if length:  # what has no bytes may have a shape that cannot be cast
                view[start : start + length] = memoryview(segment).cast("B")


class SharedSegments:
    """What one end of a channel shares with the other: a memory file for each direction, made when it is first needed.

    The reader and the sender of the channel are given the same object. What concerns received frames belongs to the
    thread that reads; the rest may be called from any thread.
    """

    def __init__(self, arena_bytes: int = ARENA_BYTES) -> None:
        """Share nothing yet. ``arena_bytes`` (0 or more) is how much this end lets the other one write."""
        self.expects_offer = False
        """Whether a descriptor may come with the next frame: it does only after a large frame was sent."""
        self._arena_bytes = arena_bytes
        self._offers: deque[int] = deque()
        self._reader: SegmentReader | None = None
        self._writer: SegmentWriter | None = None
        self._answered = False  # the other end has made its offer

    @property
    def is_unused(self) -> bool:
        """Whether nothing has come this way, and there is nothing to be said about it."""
        return self._reader is None and not self._offers

    # -- for the sender ------------------------------------------------------------------------------------------------

    def write(self, segments: Sequence[Buffer], lengths: Sequence[int]) -> int | None:
        """Copy ``segments`` to where the other end sees them and return the place; None: send them yourself."""
        writer = self._writer
        if writer is None:
            self.expects_offer = not self._answered
            return None
        return writer.write(segments, lengths)

    def collect(self) -> Sequence[int]:
        """Return the places that the other end may write to again; it must be told."""
        reader = self._reader
        return reader.collect() if reader is not None else ()

    def take_offer(self) -> int | None:
        """Return the descriptor that the next frame is to carry, if any. It is the caller's."""
        try:
            return self._offers.popleft() if self._offers else None
        except IndexError:  # another thread has it
            return None

    # -- for the reader ------------------------------------------------------------------------------------------------

    def views(self, offset: int, lengths: Sequence[int]) -> list[memoryview]:
        """Return views of what the other end has written at ``offset``.

        Raises:
            BrokenSegment: it cannot have written there.
        """
        if self._reader is None:
            raise BrokenSegment("segments came in a memory file that nobody made")
        return self._reader.views(offset, lengths)

    def release(self, offsets: Sequence[int]) -> None:
        """Use again what the other end does not look at any more.

        Raises:
            BrokenSegment: it was not written.
        """
        writer = self._writer
        if writer is None:
            raise BrokenSegment("segments were released, but none were written")
        for offset in offsets:
            writer.release(offset)

    def accept(self, fd: int | None) -> None:
        """Write large segments to ``fd`` from now on; it is closed. None: it came, but this process has no room for it.

        What the other end could truncate is not written to: that would kill this process (SIGBUS).
        """
        self._answered, self.expects_offer = True, False
        if fd is None:
            return
        try:
            self._writer = SegmentWriter(fd) if has_fixed_size(fd) else None
        except (OSError, ValueError):  # no address space: everything goes through the socket, as before
            self._writer = None
        finally:
            os.close(fd)

    def offer(self) -> None:
        """Have the next frame carry an offer, unless one was made. To be called when a large frame came by the socket."""
        if not self._arena_bytes:
            return
        size, self._arena_bytes = self._arena_bytes, 0
        try:
            with _not_as_standard_streams():
                fd = memory_file("torchmgmt-segments")
        except OSError:
            return
        if fd is None:
            return
        try:
            os.ftruncate(fd, size)
            if fix_size(fd):
                self._reader = SegmentReader(fd)
        except (OSError, ValueError):
            pass
        if self._reader is None:
            os.close(fd)
        else:
            self._offers.append(fd)

    def close(self) -> None:
        """Let go of both memory files; views that live keep theirs. Idempotent; for the thread that reads."""
        self._arena_bytes, self._answered = 0, True
        self.expects_offer = False
        self._reader = self._writer = None
        while (fd := self.take_offer()) is not None:
            os.close(fd)
