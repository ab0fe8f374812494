"""Frames over a stream socket: how torchmgmt's processes talk to each other.

A frame is a kind, a small pickled head and any number of data segments. Segments travel as they are, so that a large
buffer is never copied into a pickle on its way. Both ends are processes of one program that trust each other (a worker
runs the code of its model anyway); nothing here is meant for a network.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from enum import IntEnum
from typing import Any, TypeAlias

from attrs import define, field

from torchmgmt.errors import HandlerFailed, ManagerClosed
from torchmgmt.records import Encoded, ModelKey

__all__ = ["AnswerFuture", "Buffer", "Frame", "FrameReader", "FrameSender", "Kind", "decode", "encode", "send"]

Buffer: TypeAlias = bytes | bytearray | memoryview

_HEADER = struct.Struct("<IIQ")  # kind, number of segments (the head included), bytes after this header
_LENGTH = struct.Struct("<Q")
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
    segments: Sequence[Buffer] = field(factory=tuple)


def encode(value: object, *, frozen: bool = False) -> Encoded:
    """Pickle ``value``, leaving large buffers (numpy arrays, PickleBuffer) out of the pickle. May be called anywhere.

    What was left out still belongs to whoever made it; ``frozen`` copies what could be written to in the meantime.
    """
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    raw = [buffer.raw() for buffer in buffers]
    return Encoded([data, *(bytes(view) if frozen and not view.readonly else view for view in raw)])


def decode(encoded: Encoded) -> Any:
    """Return the value that :func:`encode` was given. Runs whatever code its pickle names."""
    return pickle.loads(encoded.segments[0], buffers=encoded.segments[1:])


_UNREAD = object()


class AnswerFuture(Future[Any]):
    """The future of an :class:`Encoded` answer, or of a list of them, which gives what was encoded.

    It is unpickled by whoever asks for it, not by the thread that received it: unpickling a tensor imports torch, which
    takes seconds the first time, and no other answer may have to wait for that.
    """

    def __init__(self, key: ModelKey, keeps_alive: object = None) -> None:
        """Make the future of an answer of model version ``key``; ``keeps_alive`` is not forgotten before the future."""
        super().__init__()
        self._key = key
        self._keeps_alive = keeps_alive
        self._pid = os.getpid()
        self._answer: Any = _UNREAD

    def result(self, timeout: float | None = None) -> Any:
        """Return the answer, waiting for at most ``timeout`` seconds; raise what ended the request otherwise.

        Raises HandlerFailed, too, if the answer cannot be unpickled in this process, and ManagerClosed in one that was
        forked before the answer was read: it may never come there.
        """
        self._check_process()
        received = super().result(timeout)
        if self._answer is _UNREAD:
            self._answer = self._read(received)
        return self._answer

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what ended the request, or None if it has an answer; waits and raises as :meth:`result` does."""
        self._check_process()
        return super().exception(timeout)

    def _check_process(self) -> None:
        # No lock is asked for: in a forked copy it may be held by a thread that is not there.
        if os.getpid() != self._pid and self._answer is _UNREAD:
            raise ManagerClosed("This future", "belongs to the process that this one was forked from")

    def _read(self, received: Any) -> Any:
        try:
            return [decode(each) for each in received] if isinstance(received, list) else decode(received)
        except Exception as error:  # whatever a pickle may raise
            reason = f"its answer cannot be unpickled in this process; it should answer with plain data ({error!r})"
            raise HandlerFailed(self._key.name, self._key.version, reason, error_type=type(error).__name__) from error


def frame_parts(frame: Frame) -> list[Buffer]:
    """Return the buffers that make up ``frame`` on the wire, in order; a small frame is a single one."""
    segments: list[Buffer] = [pickle.dumps(frame.head, protocol=5), *frame.segments]
    lengths = [_size(segment) for segment in segments]
    table = struct.pack(f"<{len(lengths)}Q", *lengths)
    total = len(table) + sum(lengths)
    parts: list[Buffer] = [_HEADER.pack(frame.kind, len(segments), total) + table, *segments]
    return [b"".join(parts)] if total <= _JOIN_LIMIT else parts


def _size(part: Buffer) -> int:
    return len(part) if isinstance(part, bytes) else memoryview(part).nbytes


def advance(parts: list[Buffer], sent: int) -> list[Buffer]:
    """Return what is left of ``parts`` after their first ``sent`` bytes."""
    for index, part in enumerate(parts):
        size = _size(part)
        if sent < size:
            return [memoryview(part).cast("B")[sent:], *parts[index + 1 :]]
        sent -= size
    return []


def send(sock: socket.socket, frame: Frame, fds: Sequence[int] = ()) -> None:
    """Send a whole frame on a blocking socket; ``fds`` go with its first byte. Blocks until the kernel took all of it."""
    parts = frame_parts(frame)
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
    """

    def __init__(self, sock: socket.socket, watch_writable: Callable[[bool], object]) -> None:
        self._sock = sock
        self._watch_writable = watch_writable
        self._lock = threading.Lock()
        # guarded by _lock
        self._pending: deque[tuple[list[Buffer], list[int]]] = deque()
        self._broken = False

    def send(self, frame: Frame, fds: Sequence[int] = ()) -> None:
        """Send ``frame``; ``fds`` go with its first byte and are closed here afterwards. Does not block."""
        parts = frame_parts(frame)
        with self._lock:
            waiting = bool(self._pending)
            self._pending.append((parts, list(fds)))
            if not waiting and not self._flush_locked():
                self._watch_writable(True)

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


def _send_some(sock: socket.socket, parts: list[Buffer], fds: Sequence[int]) -> list[Buffer]:
    """Send once; return what is left."""
    if len(parts) == 1 and not fds:
        sent = sock.send(parts[0], _NO_SIGNAL)
        return [] if sent == _size(parts[0]) else advance(parts, sent)
    vector = parts[:_MAX_VECTOR]
    if fds:
        return advance(parts, socket.send_fds(sock, vector, list(fds), _NO_SIGNAL))
    return advance(parts, sock.sendmsg(vector, [], _NO_SIGNAL))


class FrameReader:
    """Takes bytes from one socket and gives frames. Not thread-safe: it belongs to the one thread that reads.

    The body of a large frame is received into a buffer of its own size, so it is copied once, by the kernel.
    """

    def __init__(self, *, max_fds: int = 0) -> None:
        self._max_fds = max_fds
        self.fds: list[int] = []
        self._pending = b""
        self._body: bytearray | None = None
        self._filled = 0
        self._head = (0, 0)  # kind and number of segments of the frame whose body is being received

    def read(self, sock: socket.socket) -> list[Frame] | None:
        """Receive once; return the frames that are complete now, or None if the other end is closed.

        Raises:
            BlockingIOError: the socket is non-blocking and nothing is there.
        """
        try:
            if self._body is not None:
                return self._read_body(sock, self._body)
            data = self._receive(sock)
        except ConnectionResetError:  # it closed its end without having read all that was sent to it
            return None
        if not data:
            return None
        return self._split(self._pending + data if self._pending else data)

    def _receive(self, sock: socket.socket) -> bytes:
        if not self._max_fds:
            return sock.recv(_READ_SIZE)
        data, fds, _flags, _address = socket.recv_fds(sock, _READ_SIZE, self._max_fds)
        self.fds += fds
        return data

    def _read_body(self, sock: socket.socket, body: bytearray) -> list[Frame] | None:
        received = sock.recv_into(memoryview(body)[self._filled :])
        if not received:
            return None
        self._filled += received
        if self._filled < len(body):
            return []
        self._body = None
        return [_parse(memoryview(body), *self._head)]

    def _split(self, data: bytes) -> list[Frame]:
        """Return the frames that are whole in ``data``, and keep the rest."""
        frames = []
        view = memoryview(bytearray(data))  # an array that arrives can be written to, as one that did not travel
        start = 0
        while len(data) - start >= _HEADER.size:
            kind, count, size = _HEADER.unpack_from(data, start)
            end = start + _HEADER.size + size
            if len(data) >= end:
                frames.append(_parse(view[start + _HEADER.size : end], kind, count))
                start = end
                continue
            if size > _READ_SIZE:
                self._head = kind, count
                self._start_body(size, view[start + _HEADER.size :])
                start = len(data)
            break
        self._pending = data[start:]
        return frames

    def _start_body(self, size: int, beginning: memoryview) -> None:
        self._body = bytearray(size)
        self._body[: len(beginning)] = beginning
        self._filled = len(beginning)


def _parse(body: memoryview, kind: int, count: int) -> Frame:
    segments = []
    start = count * _LENGTH.size
    for length in struct.unpack_from(f"<{count}Q", body):
        segments.append(body[start : start + length])
        start += length
    return Frame(_KINDS[kind], pickle.loads(segments[0]), segments[1:])
