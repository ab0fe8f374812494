"""Channels that share memory for large segments: between real processes, kept or dropped, what was sent is what is there."""

from __future__ import annotations

import os
import pickle
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.patterns import pattern
from torchmgmt.channel import BrokenSegment, Channel, Frame, Kind, send
from torchmgmt.segments import ARENA_BYTES, MAX_BLOCKS, SHARED_FROM

WAIT_S = 30

needs_memory_files = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="there are memory files on Linux only")

# A worker as it is: one thread, a blocking socket, nothing but that descriptor. It answers with what it got, and with
# how many memory files it has mapped.
ECHO = """
import pathlib, socket, sys
from torchmgmt.channel import Channel, Frame, Kind

def memory_files():
    maps = pathlib.Path("/proc/self/maps")
    return maps.read_text().count("memfd:torchmgmt") if maps.exists() else 0

channel = Channel(socket.socket(fileno=int(sys.argv[1])))
while (frames := channel.read()) is not None:
    for frame in frames:
        channel.send(Frame(Kind.DONE, (frame.head, memory_files()), frame.segments))
channel.close()
"""


class Echo:
    """The embedding process's end of a channel to a process that sends everything back."""

    def __init__(self) -> None:
        self.sock, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", ECHO, str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        self.sock.setblocking(False)
        self.poller = select.poll()
        self.channel = Channel(self.sock, self.watch_writable)
        self.watch_writable(False)
        self.received: list[Frame] = []

    def watch_writable(self, on: bool) -> None:
        self.poller.register(self.sock, select.POLLIN | (select.POLLOUT if on else 0))

    def ask(self, head: object, *segments: bytes) -> Frame:
        self.channel.send(Frame(Kind.RUN, head, segments))
        return self.answer()

    def answer(self) -> Frame:
        while not self.received:
            ((_, events),) = self.poller.poll(WAIT_S * 1000)
            if events & select.POLLOUT:
                self.channel.flush()
            if events & select.POLLIN:
                frames = self.channel.read()
                assert frames is not None
                self.received += frames
        return self.received.pop(0)

    def close(self) -> None:
        self.channel.close()
        assert self.process.wait(WAIT_S) == 0


@pytest.fixture
def echo() -> Iterator[Echo]:
    echo = Echo()
    yield echo
    echo.close()


def mapped_memory_files() -> int:
    """How many memory files this process has mapped; whether a mapping keeps a descriptor, too, depends on Python."""
    return Path("/proc/self/maps").read_text().count("memfd:torchmgmt")


AROUND = st.sampled_from([0, 1, SHARED_FROM - 1, SHARED_FROM, SHARED_FROM + 1, 3 * SHARED_FROM]) | st.integers(
    0, 4 * SHARED_FROM
)


@given(batches=st.lists(st.tuples(st.lists(AROUND, max_size=3), st.booleans()), max_size=12))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_segments_of_any_size_come_back(echo: Echo, batches: list[tuple[list[int], bool]]):
    """Through the socket or through memory, with answers that are kept and answers that are not: each is what was sent."""
    kept = []
    for number, (sizes, keep) in enumerate(batches):
        sent = [pattern(size, number) for size in sizes]
        frame = echo.ask(number, *sent)
        assert [bytes(segment) for segment in frame.segments] == sent
        if keep:
            kept.append((sent, frame))
    for sent, frame in kept:
        assert [bytes(segment) for segment in frame.segments] == sent


@needs_memory_files
def test_one_memory_file_each_way_whatever_is_sent(echo: Echo):
    """The same memory is used over and over: one file for each direction, however many frames and whatever sizes."""
    for number in range(60):
        frame = echo.ask(number, pattern(SHARED_FROM * (1 + number % 7), number))
        assert bytes(frame.segments[0]) == pattern(SHARED_FROM * (1 + number % 7), number)
    _, files_there = frame.head
    assert files_there == 2
    assert mapped_memory_files() == 2


@needs_memory_files
def test_small_frames_share_nothing(echo: Echo):
    """A channel that never carries anything large has no memory file."""
    for number in range(10):
        assert echo.ask(number, bytes(SHARED_FROM - 1)).head == (number, 0)
    assert mapped_memory_files() == 0


@needs_memory_files
def test_answers_that_are_kept_never_change(echo: Echo):
    """A program may keep more answers than there is room for; later ones come through the socket, all stay as they were."""
    kept = [echo.ask(n, pattern(SHARED_FROM, n)) for n in range(3 * MAX_BLOCKS)]
    arrays = [np.frombuffer(frame.segments[0], np.uint8) for frame in kept]
    kept.clear()
    for number, array in enumerate(arrays):
        assert array.tobytes() == pattern(SHARED_FROM, number)
        array[:] = 0  # they can be written to, wherever they are
    arrays.clear()
    assert bytes(echo.ask("again", pattern(SHARED_FROM, 1)).segments[0]) == pattern(SHARED_FROM, 1)


@needs_memory_files
def test_answers_outlive_their_channel(echo: Echo):
    """What a worker answered is there after the worker and its channel are gone."""
    for number in range(3):
        frame = echo.ask(number, pattern(SHARED_FROM, number))
    assert mapped_memory_files() == 2
    echo.close()
    assert mapped_memory_files() == 1
    assert bytes(frame.segments[0]) == pattern(SHARED_FROM, 2)
    del frame
    assert mapped_memory_files() == 0


@needs_memory_files
def test_a_frame_that_is_larger_than_the_memory_goes_through_the_socket(echo: Echo):
    """There is no limit to what can be sent."""
    echo.ask("first", bytes(SHARED_FROM))
    frame = echo.ask("large", bytes(ARENA_BYTES + 1))
    assert len(frame.segments[0]) == ARENA_BYTES + 1
    assert frame.head == ("large", 2)


@needs_memory_files
def test_many_threads_send_large_frames(echo: Echo):
    """Each frame arrives whole with its own segments, in whatever order the threads write them."""
    with ThreadPoolExecutor(4) as pool:
        sending = [
            pool.submit(echo.channel.send, Frame(Kind.RUN, number, [pattern(SHARED_FROM + number, number)]))
            for number in range(60)
        ]
        for _ in range(60):
            frame = echo.answer()
            number, _files = frame.head
            assert bytes(frame.segments[0]) == pattern(SHARED_FROM + number, number)
        for each in sending:
            each.result(WAIT_S)


def test_a_frame_about_memory_that_is_not_there_is_an_error(pair):
    """Nonsense from the other end is said, as a broken connection, not taken for data."""
    left, right = pair
    head, news = pickle.dumps(None, 5), pickle.dumps(([], False, 4096), 5)
    body = struct.pack("<Q", 10) + head + news
    left.send(struct.pack("<IIIIQQ", Kind.RUN, 1, len(head), len(news), len(body), 7) + body)
    with pytest.raises(BrokenSegment), Channel(right) as channel:
        channel.read()


def test_a_channel_that_is_closed_before_its_offer_left_keeps_nothing(pair):
    """The offer of memory waits for a frame to go with; without one it is closed."""
    left, right = pair
    right.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    with Channel(right) as receiving:
        send(left, Frame(Kind.RUN, None, [bytes(SHARED_FROM)]))
        frames: list[Frame] = []
        while not frames:
            frames = receiving.read() or []
        assert frames[0].segments[0] == bytes(SHARED_FROM)


@needs_memory_files
def test_a_worker_that_cannot_take_the_offer_goes_on(pair, monkeypatch: pytest.MonkeyPatch):
    """Where there is no room for another mapping, frames go through the socket as before."""
    left, right = pair
    for sock in pair:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)

    def pass_on(sender: Channel, receiver: Channel) -> bytes:
        sender.send(Frame(Kind.RUN, None, [pattern(SHARED_FROM, 1)]))
        frames: list[Frame] = []
        while not frames:
            frames = receiving(receiver)
        return bytes(frames[0].segments[0])

    def receiving(receiver: Channel) -> list[Frame]:
        frames = receiver.read()
        assert frames is not None
        return frames

    def refuse(*arguments: object) -> None:
        raise OSError("no room")

    with Channel(left) as ours, Channel(right) as theirs:
        assert pass_on(ours, theirs) == pattern(SHARED_FROM, 1)
        theirs.send(Frame(Kind.DONE))
        monkeypatch.setattr("torchmgmt.segments.SegmentWriter", refuse)
        assert [frame.kind for frame in receiving(ours)] == [Kind.DONE]
        for _ in range(3):
            assert pass_on(ours, theirs) == pattern(SHARED_FROM, 1)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right
