"""Frames over a stream socket: how torchmgmt's processes talk to each other.

A frame is a kind, a small pickled head and any number of data segments. Segments travel as they are, so that a large
buffer is never copied into a pickle on its way. Both ends are processes of one program that trust each other (a worker
runs the code of its model anyway); nothing here is meant for a network.
"""

from __future__ import annotations

import functools
import os
import pickle
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypeAlias

from attrs import define

from torchmgmt.encoding import decode, encode
from torchmgmt.segments import SHARED_FROM, BrokenSegment, Buffer, SharedSegments, size_of

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "BrokenSegment",
    "Buffer",
    "Channel",
    "Frame",
    "FrameReader",
    "FrameSender",
    "Kind",
    "decode",
    "encode",
    "frame_parts",
    "send",
]

# Kind, number of segments, lengths of the head and of the news, bytes after this header in all, and the frame's number. What
# follows: the sizes of the segments, the head, the news and, if they are not in shared memory, the segments. Head and news
# are each a pickle: the news is what there is to say about shared memory, mostly nothing (which places in it may be used
# again, whether a descriptor comes with the frame, where the segments are). So a head that cannot be read is a matter of its
# frame alone, which is known by its number.
_HEADER = struct.Struct("<IIIIQQ")
_Header: TypeAlias = tuple[int, int, int, int, int, int]
_News: TypeAlias = tuple[Sequence[int], bool, "int | None"]
_READ_SIZE = 1 << 16
# Below this, joining the parts costs less than a vectored call.
_JOIN_LIMIT = 1 << 14
# IOV_MAX is 1024 on Linux and macOS; a longer vector is refused by the kernel.
_MAX_VECTOR = 512
# A program may have set SIGPIPE back to its default; macOS has no such flag, and ignores SIGPIPE per socket.
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)


class Kind(IntEnum):
    """What a frame is about."""

    # to a worker
    RUN = 1
    DESCRIBE = 2
    STOP = 3
    # from a worker
    READY = 10
    FAILED = 11
    DONE = 12
    ALIVE = 13  # before begin() of a handler, or a warm-up, which may take long
    PART = 14  # of an answer, before the rest
    SKIPPED = 15  # a batch that was recalled
    REFUSED = 16  # a batch that it could not read
    # to the torch-only process
    HELLO = 19
    FORK = 20  # to a template, too
    ADOPT = 21
    # from the torch-only process, or a template
    FORKED = 30
    NOT_FORKED = 31
    EXITED = 32


_KINDS = {int(kind): kind for kind in Kind}


@define
class Frame:
    """One message. ``head`` is any picklable value; ``segments`` are the raw buffers that go with it.

    Not frozen, as other facts are: that costs a microsecond, and four of them are made for each prediction.
    """

    kind: Kind
    head: Any = None
    segments: Sequence[Buffer] = ()
    number: int = 0
    """What it is about: a batch, or a process that is to be forked."""
    error: Exception | None = None
    """Why it could not be read, where its reader forgives that; then there is nothing but its kind and its number."""


def frame_parts(frame: Frame, shared: SharedSegments | None = None, *, offers: bool = False) -> list[Buffer]:
    """Return the buffers that make up ``frame`` on the wire, in order; a small frame is a single one.

    With ``shared``, large segments are written there, and the frame tells what the other end may write over again;
    ``offers`` says that a descriptor from there goes with it. Raises whatever pickling the head raises; then nothing was
    written.
    """
    segments = frame.segments
    head = pickle.dumps(frame.head, 5)
    sizes = [len(segment) if isinstance(segment, bytes) else size_of(segment) for segment in segments]
    size = sum(sizes)
    news = b""
    if shared is not None:
        released = shared.collect()
        place = shared.write(segments, sizes) if size >= SHARED_FROM else None
        if place is not None:
            segments, size = (), 0
        if released or offers or place is not None:
            news = pickle.dumps((released, offers, place), 5)
    count = len(sizes)
    packed = _sizes(count).pack(*sizes) if count else b""
    size += len(packed) + len(head) + len(news)
    header = _HEADER.pack(frame.kind, count, len(head), len(news), size, frame.number)
    if size <= _JOIN_LIMIT:
        return [b"".join((header, packed, head, news, *segments))]
    return [b"".join((header, packed, head, news)), *segments]


@functools.cache
def _sizes(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}Q")


def advance(parts: list[Buffer], sent: int) -> list[Buffer]:
    """Return what is left of ``parts`` after their first ``sent`` bytes."""
    for index, part in enumerate(parts):
        size = size_of(part)
        if sent < size:
            return [memoryview(part).cast("B")[sent:], *parts[index + 1 :]]
        sent -= size
    return []


def send(sock: socket.socket, frame: Frame, fds: Sequence[int] = ()) -> None:
    """Send a whole frame on a blocking socket; ``fds`` go with its first byte. Blocks until the kernel took all of it."""
    _send_all(sock, frame_parts(frame), fds)


def _send_all(sock: socket.socket, parts: list[Buffer], fds: Sequence[int]) -> None:
    while parts:
        parts = _send_some(sock, parts, fds)
        fds = ()


class FrameSender:
    """Sends frames on a non-blocking socket from any thread; what the kernel does not take at once is kept for later.

    Frames leave in the order of the calls. Once the other end is gone, frames are dropped without an error: whoever
    watches the process on the other end learns of its death there, with the reason.

    Args:
        sock: a non-blocking stream socket.
        watch_writable: told True when :meth:`flush` is to be called as soon as the socket can be written to, False when
            that is no longer needed.
        shared: where large segments go; no other descriptors may be sent then.
    """

    def __init__(
        self, sock: socket.socket, watch_writable: Callable[[bool], object], shared: SharedSegments | None = None
    ) -> None:
        self._sock = sock
        self._shared = shared
        self._watch_writable = watch_writable
        self._lock = threading.Lock()
        # guarded by _lock
        self._pending: deque[tuple[list[Buffer], list[int]]] = deque()
        self._broken = False

    def send(self, frame: Frame, fds: Sequence[int] = ()) -> None:
        """Send ``frame``; ``fds`` go with its first byte and are closed here afterwards. Does not block."""
        if self._shared is None:
            parts = frame_parts(frame)
        else:
            parts, fds = _parts_and_offer(frame, self._shared)
        with self._lock:
            waiting = bool(self._pending)
            if len(parts) == 1 and not (waiting or fds or self._broken):
                parts = self._try_locked(parts[0])
            if parts:
                self._pending.append((parts, list(fds)))
                if not waiting and not self._flush_locked():
                    self._watch_writable(True)

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing left to be sent, and may send."""
        return not (self._pending or self._broken)

    def flush(self) -> None:
        """Send what is left. For the thread that was told that the socket can be written to."""
        with self._lock:
            if self._flush_locked():
                self._watch_writable(False)

    def close(self) -> None:
        """Drop what is left. Idempotent."""
        with self._lock:
            self._broken = True
            self._flush_locked()

    def _try_locked(self, part: Buffer) -> list[Buffer]:
        """Return what is left of the usual frame, small and alone, after one attempt to send it: mostly nothing."""
        try:
            sent = self._sock.send(part, _NO_SIGNAL)
        except OSError:  # the way with more bookkeeping meets it again
            sent = 0
        return [] if sent == len(part) else advance([part], sent)

    def _flush_locked(self) -> bool:
        """Send until nothing is left (True) or the kernel takes no more (False)."""
        while self._pending:
            parts, fds = self._pending.popleft()
            try:
                parts = [] if self._broken else _send_some(self._sock, parts, fds)
            except BlockingIOError:
                self._pending.appendleft((parts, fds))
                return False
            except OSError:
                self._broken, parts = True, []
            for fd in fds:
                os.close(fd)
            if parts:
                self._pending.appendleft((parts, []))
        return True


def _parts_and_offer(frame: Frame, shared: SharedSegments) -> tuple[list[Buffer], tuple[int, ...]]:
    """Return what is to be sent for ``frame``, and the descriptor that goes with it, which is then the caller's."""
    offer = shared.take_offer()
    try:
        return frame_parts(frame, shared, offers=offer is not None), () if offer is None else (offer,)
    except BaseException:
        if offer is not None:
            os.close(offer)
        raise


def _send_some(sock: socket.socket, parts: list[Buffer], fds: Sequence[int]) -> list[Buffer]:
    """Send once; return what is left."""
    if len(parts) == 1 and not fds:
        sent = sock.send(parts[0], _NO_SIGNAL)
        return [] if sent == size_of(parts[0]) else advance(parts, sent)
    vector = parts[:_MAX_VECTOR]
    if fds:
        return advance(parts, socket.send_fds(sock, vector, list(fds), _NO_SIGNAL))
    return advance(parts, sock.sendmsg(vector, [], _NO_SIGNAL))


class FrameReader:
    """Takes bytes from one socket and gives frames. Not thread-safe: it belongs to the one thread that reads.

    The body of a large frame is received into a buffer of its own size, so it is copied once, by the kernel.

    Args:
        max_fds: how many descriptors may come at once; they are appended to ``fds``, which belongs to the caller.
        shared: where large segments come; then no other descriptors may.
        forgives: whether a frame whose head cannot be unpickled, or for which there is not enough memory, is given with its
            ``error``; if not, :meth:`read` raises that, and nobody knows what follows.
    """

    def __init__(self, *, max_fds: int = 0, shared: SharedSegments | None = None, forgives: bool = False) -> None:
        self._max_fds = max_fds
        self._shared = shared
        self._forgives = forgives
        self.fds: list[int] = []
        self._pending = b""
        # Of the frame whose body is being received; without a body there was no memory for it, and it is thrown away.
        self._header: _Header | None = None
        self._body: bytearray | None = None
        self._filled = 0

    def read(self, sock: socket.socket) -> list[Frame] | None:
        """Receive once; return the frames that are complete now, or None if the other end is closed.

        Raises:
            BlockingIOError: the socket is non-blocking and nothing is there.
            BrokenSegment: a frame names shared memory that is not there.
            Exception: a frame cannot be read.
        """
        try:
            if self._header is not None:
                return self._read_body(sock, self._header)
            data = self._receive(sock)
        except ConnectionResetError:  # it closed its end without having read all that was sent to it
            return None
        if not data:
            return None
        return self._split(self._pending + data if self._pending else data)

    def _receive(self, sock: socket.socket) -> bytes:
        shared = self._shared
        if not self._max_fds and (shared is None or not shared.expects_offer):
            return sock.recv(_READ_SIZE)
        data, fds, _flags, _address = socket.recv_fds(sock, _READ_SIZE, self._max_fds or 1)
        self.fds += fds
        return data

    def _read_body(self, sock: socket.socket, header: _Header) -> list[Frame] | None:
        size = header[4]
        if self._body is None:
            received = len(sock.recv(min(_READ_SIZE, size - self._filled)))
        else:
            received = sock.recv_into(memoryview(self._body)[self._filled :])
        if not received:
            return None
        self._filled += received
        if self._filled < size:
            return []
        body, self._body, self._header = self._body, None, None
        if body is None:
            return [_unreadable(header, MemoryError(f"there is not enough memory for {size} bytes"))]
        return [self._parse(memoryview(body), 0, header)]

    def _split(self, data: bytes) -> list[Frame]:
        """Return the frames that are whole in ``data``, and keep the rest."""
        frames = []
        view = memoryview(bytearray(data))  # an array that arrives can be written to, as one that did not travel
        start, stop = 0, len(data)
        while stop - start >= _HEADER.size:
            header: _Header = _HEADER.unpack_from(data, start)
            body = start + _HEADER.size
            size = header[4]
            if stop - body >= size:
                frames.append(self._parse(view, body, header))
                start = body + size
                continue
            if size > _READ_SIZE:
                self._start_body(header, view[body:])
                start = stop
            break
        self._pending = data[start:]
        return frames

    def _start_body(self, header: _Header, beginning: memoryview) -> None:
        self._filled = len(beginning)
        try:
            self._body = bytearray(header[4])
            self._body[: len(beginning)] = beginning
        except MemoryError:
            if not self._forgives:
                raise
            self._body = None
        self._header = header

    def _parse(self, data: memoryview, start: int, header: _Header) -> Frame:
        """Return the frame whose body begins at ``start``."""
        kind, count, head_length, news_length, size, number = header
        sizes: Sequence[int] = _sizes(count).unpack_from(data, start) if count else ()
        head_at = start + 8 * count
        news_at = head_at + head_length
        segments_at = news_at + news_length
        segments = self._heed(sizes, pickle.loads(data[news_at:segments_at])) if news_length else None
        try:
            head = pickle.loads(data[head_at:news_at])
        except Exception as error:
            if not self._forgives:
                raise
            return _unreadable(header, error)
        if segments is None:
            if start + size - segments_at >= SHARED_FROM and self._shared is not None:
                self._shared.offer()
            segments = []
            for each in sizes:
                segments.append(data[segments_at : segments_at + each])
                segments_at += each
        return Frame(_KINDS[kind], head, segments, number)

    def _heed(self, sizes: Sequence[int], news: _News) -> list[memoryview] | None:
        """Take what a frame says about shared memory; return the segments if they are there."""
        released, offers, place = news
        shared = self._shared
        if shared is None:
            raise BrokenSegment("a frame is about shared memory, but this end shares none")
        if offers:
            # It is lost where this process has no descriptor left.
            shared.accept(self.fds.pop(0) if self.fds else None)
        if released:
            shared.release(released)
        return None if place is None else shared.views(place, sizes)

    def close(self) -> None:
        """Close the descriptors that came and were not taken. Idempotent."""
        while self.fds:
            os.close(self.fds.pop())


def _unreadable(header: _Header, error: Exception) -> Frame:
    return Frame(_KINDS[header[0]], number=header[5], error=error)


class Channel:
    """Both directions of one worker's socket, with memory that its two ends share for large segments.

    What the reading side finds out (which memory is free again, where to write) leaves with the next frame that is sent,
    and costs no system call of its own. Both ends have to be a Channel. One thread reads; any may send.

    A large segment (at least :data:`~torchmgmt.segments.SHARED_FROM` bytes in a frame) arrives as a view of shared
    memory that stays as it is for as long as anything refers to it; drop frames as soon as they are dealt with.

    Args:
        sock: a connected stream socket; the channel closes it.
        watch_writable: for a non-blocking socket, as for :class:`FrameSender`; without it :meth:`send` blocks, and has
            to be called on the thread that reads.
        forgives: as for :class:`FrameReader`.
    """

    def __init__(
        self,
        sock: socket.socket,
        watch_writable: Callable[[bool], object] | None = None,
        *,
        forgives: bool = False,
    ) -> None:
        self._sock = sock
        self._shared = SharedSegments()
        self._reader = FrameReader(shared=self._shared, forgives=forgives)
        self._sender = FrameSender(sock, watch_writable, self._shared) if watch_writable is not None else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the socket's descriptor, -1 after :meth:`close`."""
        return self._sock.fileno()

    def read(self) -> list[Frame] | None:
        """Receive once; return the frames that are complete now, or None if the other end is closed.

        Raises:
            BlockingIOError: the socket is non-blocking and nothing is there.
            BrokenSegment: the other end sent nonsense (a ConnectionError: the channel is of no use any more).
            Exception: a frame cannot be read; the same.
        """
        return self._reader.read(self._sock)

    def send(self, frame: Frame) -> None:
        """Send ``frame``, as :meth:`FrameSender.send` or, on a blocking socket, as :func:`send` does."""
        if self._sender is not None:
            self._sender.send(frame)
            return
        parts, fds = _parts_and_offer(frame, self._shared)
        try:
            _send_all(self._sock, parts, fds)
        finally:
            for fd in fds:
                os.close(fd)

    @property
    def is_plain(self) -> bool:
        """Whether a small frame can be sent past this object: there is nothing to go before it, or along with it."""
        sender = self._sender
        return sender is not None and sender.is_idle and self._shared.is_unused

    @property
    def send_raw(self) -> Callable[[bytes, int], int]:
        """What sends bytes past this object; for who sends a whole frame while nobody else sends."""
        return self._sock.send

    def flush(self) -> None:
        """Send what a non-blocking socket did not take at once. For the thread that was told that it can be written to."""
        if self._sender is not None:
            self._sender.flush()

    def close_sending(self) -> None:
        """Drop what was not sent yet, and all that is sent later. Idempotent; any thread. Reading goes on."""
        if self._sender is not None:
            self._sender.close()

    def close(self) -> None:
        """Close the socket and let go of the shared memory. Idempotent; for the thread that reads.

        Segments that somebody still holds stay valid. In a forked copy of the process it closes that copy's descriptors
        and touches nothing that the original one uses.
        """
        self.close_sending()
        self._reader.close()
        self._shared.close()
        self._sock.close()
