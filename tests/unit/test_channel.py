"""Frames: what is sent is what arrives, however the bytes are cut, with the descriptors that belong to it."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError  # the built-in one from Python 3.11 on
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.patterns import pattern
from torchmgmt.answer_future import AnswerFuture
from torchmgmt.channel import (
    Frame,
    FrameReader,
    FrameSender,
    Kind,
    advance,
    encode,
    frame_parts,
    send,
)
from torchmgmt.errors import HandlerFailed
from torchmgmt.exchange import Encoded
from torchmgmt.records import ModelKey

MANY = 100_000
WAIT_S = 30


HEADS = st.none() | st.integers() | st.text(max_size=20) | st.tuples(st.integers(), st.booleans())
# Around the limits of the code: joining (16 KiB) and reading (64 KiB).
SIZES = st.integers(0, MANY) | st.sampled_from([0, 1, (1 << 14) - 40, 1 << 14, (1 << 16) - 60, 1 << 16, (1 << 16) + 1])
FRAMES = st.builds(
    lambda kind, head, sizes: Frame(kind, head, tuple(pattern(size, n) for n, size in enumerate(sizes))),
    st.sampled_from(Kind),
    HEADS,
    st.lists(SIZES, max_size=4),
)


def plain(frame: Frame) -> tuple[object, ...]:
    return frame.kind, frame.head, [bytes(segment) for segment in frame.segments]


def on_the_wire(frames: Sequence[Frame]) -> bytes:
    return b"".join(part for frame in frames for part in frame_parts(frame))


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


class CutSocket:
    """Gives bytes in pieces of given sizes, whatever is asked for; then it is closed."""

    def __init__(self, data: bytes, pieces: Iterator[int]) -> None:
        self._data = memoryview(data)
        self._pieces = pieces

    def recv(self, size: int) -> bytes:
        size = min(size, next(self._pieces))
        piece, self._data = self._data[:size], self._data[size:]
        return bytes(piece)

    def recv_into(self, buffer: memoryview) -> int:
        piece = self.recv(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


def read_all(sock: Any, reader: FrameReader | None = None) -> list[Frame]:
    reader = reader or FrameReader()
    frames: list[Frame] = []
    while (some := reader.read(sock)) is not None:
        frames += some
    return frames


# -- reading -----------------------------------------------------------------------------------------------------------


@given(frames=st.lists(FRAMES, max_size=4), pieces=st.lists(st.integers(1, 70_000), min_size=1, max_size=20))
@example(frames=[Frame(Kind.RUN, None, (pattern(MANY, 0),)), Frame(Kind.STOP)], pieces=[1 << 16])
@settings(max_examples=100)
def test_frames_survive_any_cut(frames: list[Frame], pieces: list[int]):
    """However the kernel cuts the stream, the same frames come out in the same order."""
    received = read_all(CutSocket(on_the_wire(frames), itertools.cycle(pieces)))
    assert [plain(frame) for frame in received] == [plain(frame) for frame in frames]


def test_frames_survive_byte_by_byte():
    """A frame may arrive one byte at a time, its header and its body included."""
    frames = [Frame(Kind.RUN, "head", (b"", b"abc")), Frame(Kind.STOP), Frame(Kind.DONE, 7, (pattern(70_000, 3),))]
    received = read_all(CutSocket(on_the_wire(frames), itertools.repeat(1)))
    assert [plain(frame) for frame in received] == [plain(frame) for frame in frames]


def test_several_frames_come_out_of_one_read():
    """What arrived together is given together."""
    frames = [Frame(Kind.DONE, n, (b"x" * n,)) for n in range(20)]
    received = FrameReader().read(CutSocket(on_the_wire(frames), itertools.repeat(1 << 20)))
    assert received is not None
    assert [plain(frame) for frame in received] == [plain(frame) for frame in frames]


def test_the_end_within_a_frame_is_an_end():
    """A peer that died while it sent gives what was complete, and no broken frame."""
    wire = on_the_wire([Frame(Kind.READY), Frame(Kind.DONE, 1, (pattern(MANY, 0),))])
    for length in (len(wire) - 1, len(wire) - MANY, 40):
        received = read_all(CutSocket(wire[:length], itertools.repeat(1 << 16)))
        assert [frame.kind for frame in received] == [Kind.READY]


def test_a_received_segment_can_be_written_to():
    """Arrays that are made from received buffers are not read-only, in small frames and in large ones."""
    for size in (8, MANY):
        (frame,) = read_all(CutSocket(on_the_wire([Frame(Kind.RUN, None, (bytes(size),))]), itertools.repeat(1 << 20)))
        array = np.frombuffer(frame.segments[0], dtype=np.uint8)
        array[0] = 1
        assert array.flags.writeable


@given(frames=st.lists(FRAMES, min_size=1, max_size=3))
@settings(max_examples=40)
def test_frames_survive_a_real_socket(frames: list[Frame]):
    """What a blocking sender sends through a real socketpair is what arrives."""
    left, right = socket.socketpair()
    with ThreadPoolExecutor(1) as sender, left, right:

        def send_all() -> None:
            for frame in frames:
                send(left, frame)
            left.shutdown(socket.SHUT_WR)

        sent = sender.submit(send_all)
        received = read_all(right)
        sent.result(WAIT_S)
    assert [plain(frame) for frame in received] == [plain(frame) for frame in frames]


def test_a_frame_may_have_more_segments_than_the_kernel_takes_at_once(pair):
    """A batch of thousands of tensors is one frame."""
    left, right = pair
    frame = Frame(Kind.RUN, None, tuple(pattern(n % 97, n) for n in range(3000)))
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(lambda: (send(left, frame), left.shutdown(socket.SHUT_WR)))
        (received,) = read_all(right)
        sent.result(WAIT_S)
    assert plain(received) == plain(frame)


def test_nothing_there_is_said(pair):
    """A non-blocking socket with nothing in it raises BlockingIOError and costs nothing that was half received."""
    left, right = pair
    right.setblocking(False)
    reader = FrameReader()
    wire = on_the_wire([Frame(Kind.DONE, 1, (b"abc",))])
    for byte in wire[:-1]:
        left.send(bytes([byte]))
        assert reader.read(right) == []
        with pytest.raises(BlockingIOError):
            reader.read(right)
    left.send(wire[-1:])
    assert [plain(frame) for frame in reader.read(right) or []] == [(Kind.DONE, 1, [b"abc"])]


def test_an_end_with_something_unread_is_an_end(pair):
    """A peer that went without having read what was sent to it is closed, not an error."""
    left, right = pair
    send(right, Frame(Kind.STOP))  # never read
    send(left, Frame(Kind.DONE, 1))
    left.close()
    assert [frame.kind for frame in read_all(right)] == [Kind.DONE]


@given(
    parts=st.lists(st.binary(max_size=5), max_size=6),
    data=st.data(),
)
def test_what_was_sent_is_not_sent_again(parts: list[bytes], data: st.DataObject):
    """advance leaves exactly the bytes that the kernel did not take."""
    whole = b"".join(parts)
    sent = data.draw(st.integers(0, len(whole)))
    left = advance(list(parts), sent)
    assert b"".join(left) == whole[sent:]
    assert bool(left) == (sent < len(whole))


def test_an_array_of_any_shape_is_a_segment(pair):
    """A segment is counted in bytes, whatever its item size and shape."""
    left, right = pair
    array = np.arange(60, dtype=np.float64).reshape(3, 4, 5)
    empty = np.zeros((0, 3))
    send(left, Frame(Kind.RUN, None, (memoryview(array), memoryview(empty))))
    left.close()
    (frame,) = read_all(right)
    assert np.array_equal(np.frombuffer(frame.segments[0]).reshape(3, 4, 5), array)
    assert len(frame.segments[1]) == 0


# -- descriptors -------------------------------------------------------------------------------------------------------


def pipe_with(text: bytes) -> int:
    """The reading end of a pipe that has ``text`` in it and no writer."""
    reader, writer = os.pipe()
    os.write(writer, text)
    os.close(writer)
    return reader


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def read_and_close(fd: int) -> bytes:
    with open(fd, "rb") as file:
        return file.read()


@pytest.mark.parametrize("size", [0, 10, MANY])
def test_descriptors_arrive_with_their_frame(pair, size: int):
    """Each frame's descriptors are there when it is, in the order of the frames, among frames that have none."""
    left, right = pair
    counts = [1, 0, 2, 0, 0, 3, 1]

    def send_all() -> None:
        for number, fd_count in enumerate(counts):
            fds = [pipe_with(b"%d.%d" % (number, n)) for n in range(fd_count)]
            send(left, Frame(Kind.FORK, (number, fd_count), (pattern(size, number),)), fds)
            for fd in fds:
                os.close(fd)
        left.shutdown(socket.SHUT_WR)

    reader = FrameReader(max_fds=16)
    contents: list[list[bytes]] = []
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send_all)
        while (frames := reader.read(right)) is not None:
            for frame in frames:
                _, fd_count = frame.head
                mine, reader.fds = reader.fds[:fd_count], reader.fds[fd_count:]
                contents.append([read_and_close(fd) for fd in mine])
        sent.result(WAIT_S)
    assert contents == [[b"%d.%d" % (number, n) for n in range(count)] for number, count in enumerate(counts)]
    assert reader.fds == []


def test_a_sender_closes_what_it_has_sent(pair):
    """Descriptors that were given to a FrameSender are its own: closed once they are on their way."""
    left, right = pair
    left.setblocking(False)
    fd = pipe_with(b"hello")
    FrameSender(left, lambda wanted: None).send(Frame(Kind.FORK), [fd])
    assert not is_open(fd)
    reader = FrameReader(max_fds=4)
    assert reader.read(right) == [Frame(Kind.FORK, None, [])]
    assert [read_and_close(each) for each in reader.fds] == [b"hello"]


# -- sending without blocking ------------------------------------------------------------------------------------------


class Watching:
    """Stands for the dispatcher: remembers whether the sender wants to hear of a writable socket."""

    def __init__(self) -> None:
        self.calls: list[bool] = []

    def __call__(self, wanted: bool) -> None:
        self.calls.append(wanted)

    @property
    def wanted(self) -> bool:
        return bool(self.calls) and self.calls[-1]


@given(frames=st.lists(FRAMES, min_size=1, max_size=5))
@settings(max_examples=50)
def test_a_full_socket_delays_and_keeps_the_order(frames: list[Frame]):
    """What the kernel does not take is sent by flush, in the order of the calls, and watched for only so long."""
    left, right = socket.socketpair()
    with left, right:
        left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        left.setblocking(False)
        right.setblocking(False)
        watching = Watching()
        sender = FrameSender(left, watching)
        for frame in frames:
            sender.send(frame)
        reader = FrameReader()
        received: list[Frame] = []
        while watching.wanted or len(received) < len(frames):
            with contextlib.suppress(BlockingIOError):
                while True:
                    received += reader.read(right) or []
            if watching.wanted:
                sender.flush()
        assert [plain(frame) for frame in received] == [plain(frame) for frame in frames]
        assert watching.calls in ([], [True, False])


def test_nothing_is_watched_for_when_the_kernel_takes_all(pair):
    """The usual case costs no call of the dispatcher."""
    left, _ = pair
    left.setblocking(False)
    watching = Watching()
    FrameSender(left, watching).send(Frame(Kind.STOP))
    assert watching.calls == []


def fill(sock: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(1 << 16))


def test_descriptors_wait_with_their_frame(pair):
    """In a full socket the descriptors stay open and leave with the frame that they belong to."""
    left, right = pair
    left.setblocking(False)
    fill(left)
    watching = Watching()
    sender = FrameSender(left, watching)
    fd = pipe_with(b"later")
    sender.send(Frame(Kind.FORK), [fd])
    assert is_open(fd)
    right.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while right.recv(1 << 20):
            pass
    sender.flush()
    assert not is_open(fd)
    reader = FrameReader(max_fds=4)
    assert reader.read(right) == [Frame(Kind.FORK, None, [])]
    assert [read_and_close(each) for each in reader.fds] == [b"later"]
    assert watching.calls == [True, False]


def test_a_closed_peer_is_no_error_and_costs_no_descriptor(pair):
    """Frames to a process that is gone are dropped, and what they carried is closed."""
    left, right = pair
    left.setblocking(False)
    right.close()
    sender = FrameSender(left, Watching())
    for _ in range(3):
        fd = pipe_with(b"")
        sender.send(Frame(Kind.FORK, None, (bytes(MANY),)), [fd])
        assert not is_open(fd)


def test_a_peer_that_goes_while_frames_wait_is_no_error(pair):
    """What waited for a peer is dropped when it is gone, and nobody watches the socket any more."""
    left, right = pair
    left.setblocking(False)
    fill(left)
    watching = Watching()
    sender = FrameSender(left, watching)
    fd = pipe_with(b"")
    sender.send(Frame(Kind.FORK), [fd])
    right.close()
    sender.flush()
    assert not is_open(fd)
    assert not watching.wanted


def test_closing_drops_what_waits_and_closes_descriptors(pair):
    """A closed sender holds nothing; closing it again and sending to it are nothing."""
    left, _ = pair
    left.setblocking(False)
    fill(left)
    sender = FrameSender(left, Watching())
    fds = [pipe_with(b"") for _ in range(3)]
    for fd in fds[:2]:
        sender.send(Frame(Kind.FORK), [fd])
    sender.close()
    sender.close()
    sender.send(Frame(Kind.FORK), fds[2:])
    assert not any(map(is_open, fds))


def test_frames_of_many_threads_do_not_mix(pair):
    """Each frame arrives whole, and those of one thread in its order, while another thread flushes."""
    left, right = pair
    left.setblocking(False)
    watching = Watching()
    sender = FrameSender(left, watching)
    done = threading.Event()

    def send_some(caller: int) -> None:
        for number in range(50):
            sender.send(Frame(Kind.RUN, (caller, number), (pattern(5000, caller + number),)))

    def flush() -> None:
        while not done.is_set():
            sender.flush()

    reader = FrameReader()
    received: list[Frame] = []
    with ThreadPoolExecutor(5) as pool:
        flushing = pool.submit(flush)
        sending = [pool.submit(send_some, caller) for caller in range(4)]
        while len(received) < 200:
            received += reader.read(right) or []
        done.set()
        for each in [*sending, flushing]:
            each.result(WAIT_S)
    for caller in range(4):
        assert [frame.head[1] for frame in received if frame.head[0] == caller] == list(range(50))
    for frame in received:
        assert bytes(frame.segments[0]) == pattern(5000, sum(frame.head))


# -- answers -----------------------------------------------------------------------------------------------------------

_decoded_on: list[int] = []


def _note_decoding(value: object) -> object:
    _decoded_on.append(threading.get_ident())
    return [value]


class NotesItsDecoding:
    """Remembers which thread unpickled it; becomes a list of its value."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return _note_decoding, (self.value,)


@pytest.fixture(autouse=True)
def nothing_decoded() -> None:
    _decoded_on.clear()


def test_an_answer_is_decoded_once_by_whoever_asks():
    """The thread that receives an answer never unpickles it; who asks twice gets the same object."""
    future = AnswerFuture(ModelKey("m", "1.0"))
    with ThreadPoolExecutor(1) as receiver:
        receiver.submit(future.set_result, encode(NotesItsDecoding(42))).result(WAIT_S)
    assert future.done()
    assert _decoded_on == []
    answer = future.result(WAIT_S)
    assert answer == [42]
    assert future.result() is answer
    assert _decoded_on == [threading.get_ident()]


def test_a_list_of_answers_is_a_list_of_values():
    """What gathers several answers gives all of them, in order."""
    future = AnswerFuture(ModelKey("m", "1.0"))
    future.set_result([encode(n) for n in range(5)])
    assert future.result() == [0, 1, 2, 3, 4]


def test_asking_for_the_error_decodes_nothing():
    """exception() and callbacks may run anywhere: they leave the answer alone."""
    future = AnswerFuture(ModelKey("m", "1.0"))
    called: list[object] = []
    future.add_done_callback(called.append)
    future.set_result(encode(NotesItsDecoding(1)))
    assert future.exception() is None
    assert called == [future]
    assert _decoded_on == []


def test_what_ended_the_request_is_raised():
    """Errors, cancellation and a time that is over are those of any future."""
    failed, cancelled, pending = (
        AnswerFuture(ModelKey("m", "1.0")),
        AnswerFuture(ModelKey("m", "1.0")),
        AnswerFuture(ModelKey("m", "1.0")),
    )
    failed.set_exception(KeyError("no"))
    with pytest.raises(KeyError):
        failed.result()
    cancelled.cancel()
    with pytest.raises(CancelledError):
        cancelled.result()
    with pytest.raises(FutureTimeoutError):
        pending.result(timeout=0)


def test_an_answer_that_cannot_be_decoded_says_so_each_time():
    """A broken answer is an error for who asks, not for who received it."""
    future = AnswerFuture(ModelKey("m", "1.0"))
    future.set_result(Encoded([b"\x80\x05not a pickle"]))
    for _ in range(2):
        with pytest.raises(HandlerFailed):
            future.result()
