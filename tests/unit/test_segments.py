"""Shared segments: what is written is what is seen, for as long as anybody looks at it, and no longer."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchmgmt import segments
from torchmgmt.segments import (
    KEPT_BYTES,
    MAX_BLOCKS,
    BrokenSegment,
    SegmentReader,
    SegmentWriter,
    SharedSegments,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="there are memory files on Linux only")

ARENA = 1 << 20
PAGE = mmap.PAGESIZE


class Memory:
    """A memory file of ``size`` bytes and its two ends, here in one process."""

    def __init__(self, size: int = ARENA) -> None:
        self.fd = os.memfd_create("torchmgmt-test")
        os.ftruncate(self.fd, size)
        self.reader = SegmentReader(self.fd)
        self.writer = SegmentWriter(self.fd)

    def pass_on(self, *segments: bytes) -> list[memoryview]:
        lengths = [len(segment) for segment in segments]
        offset = self.writer.write(segments, lengths)
        assert offset is not None
        return self.reader.views(offset, lengths)

    def give_back(self) -> int:
        """Tell the writer what is free; return how many blocks."""
        free = self.reader.collect()
        for offset in free:
            self.writer.release(offset)
        return len(free)

    def close(self) -> None:
        """Let go of both ends, and so of what they have mapped."""
        os.close(self.fd)
        self.forget()

    def forget(self) -> None:
        self.reader = self.writer = None  # type: ignore[assignment]

    @property
    def resident_bytes(self) -> int:
        return os.fstat(self.fd).st_blocks * 512


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    memory.close()


# -- what is written is what is seen -----------------------------------------------------------------------------------


@given(segments=st.lists(st.binary(max_size=3 * PAGE), min_size=1, max_size=6))
@settings(max_examples=50)
def test_segments_arrive_as_they_were(segments: list[bytes]):
    """Each segment is seen whole, on a place of its own that suits any item size, and can be written to."""
    memory = Memory()
    try:
        views = memory.pass_on(*segments)
        assert [bytes(view) for view in views] == segments
        for view in views:
            assert not view.readonly
            assert not view.nbytes or np.frombuffer(view, np.uint8).ctypes.data % 64 == 0
    finally:
        memory.close()


def test_an_array_of_any_shape_is_a_segment(memory: Memory):
    """Bytes are counted and copied, whatever the item size; what is empty has a place, too."""
    array, empty = np.arange(600.0).reshape(3, 10, 20), np.zeros((0, 3))
    offset = memory.writer.write([memoryview(array), memoryview(empty), bytearray(b"abc")], [array.nbytes, 0, 3])
    assert offset is not None
    first, second, third = memory.reader.views(offset, [array.nbytes, 0, 3])
    assert np.array_equal(np.frombuffer(first).reshape(3, 10, 20), array)
    assert (len(second), bytes(third)) == (0, b"abc")


# -- whoever looks at it keeps it --------------------------------------------------------------------------------------


def unpickled_array(view: memoryview) -> object:
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(np.zeros(len(view), np.uint8), protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[view])


HOLDERS: dict[str, Callable[[memoryview], object]] = {
    "the view": lambda view: view,
    "a slice": lambda view: view[3:5],
    "an empty slice": lambda view: view[3:3],
    "a cast": lambda view: view.cast("I")[1:],
    "a read-only view": lambda view: view.toreadonly(),
    "an iterator": iter,
    "a PickleBuffer": lambda view: pickle.PickleBuffer(view[8:]),
    "the raw view of a PickleBuffer": lambda view: pickle.PickleBuffer(view).raw()[1:],
    "an array": lambda view: np.frombuffer(view, np.float32),
    "part of an array": lambda view: np.frombuffer(view, np.float32).reshape(8, -1)[1:].T,
    "an unpickled array": unpickled_array,
    "an unpickled buffer": lambda view: pickle.loads(
        pickle.dumps(pickle.PickleBuffer(b"x"), protocol=5, buffer_callback=lambda _: None), buffers=[view]
    ),
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS.keys())
def test_a_block_is_free_when_its_last_view_is_gone(memory: Memory, hold: Callable[[memoryview], object]):
    """Whatever was made of a view keeps the block; when it goes, the block is free, once."""
    (view,) = memory.pass_on(bytes(4096))
    held = hold(view)
    del view
    assert memory.reader.collect() == []
    del held
    assert memory.reader.collect() == [0]
    assert memory.reader.collect() == []


def test_one_view_keeps_its_whole_block(memory: Memory):
    """A block is given back as it was written: whole."""
    first, second = memory.pass_on(b"one", b"two")
    del first
    assert memory.give_back() == 0
    del second
    assert memory.give_back() == 1


def test_a_view_that_rises_from_a_cycle_keeps_its_block(memory: Memory):
    """An object that is collected and saves its view in __del__ has not let go of it."""
    saved: list[memoryview] = []

    class Saves:
        def __init__(self, view: memoryview) -> None:
            self.view = view
            self.myself = self

        def __del__(self) -> None:
            saved.append(self.view)

    Saves(memory.pass_on(b"data")[0])
    gc.collect()
    assert [bytes(view) for view in saved] == [b"data"]
    assert memory.give_back() == 0
    saved.clear()
    assert memory.give_back() == 1


def test_views_outlive_both_ends(memory: Memory):
    """Memory is there until the last view is gone, whatever was closed before."""
    (view,) = memory.pass_on(b"still here")
    memory.forget()
    assert bytes(view) == b"still here"


def test_a_block_is_reported_to_one_thread_only(memory: Memory):
    """However many threads ask at once, each free block is found once."""
    with ThreadPoolExecutor(4) as pool:
        for _ in range(100):
            views = [memory.pass_on(bytes([n]))[0] for n in range(MAX_BLOCKS)]
            offsets = sorted(offset for _, offset, _ in memory.reader._leases)
            views.clear()
            found = [offset for free in pool.map(lambda _: memory.reader.collect(), range(4)) for offset in free]
            assert sorted(found) == offsets
            for offset in found:
                memory.writer.release(offset)


# -- room --------------------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(st.just("write"), st.integers(1, ARENA // 3)) | st.tuples(st.just("drop"), st.integers(0, MAX_BLOCKS)),
    max_size=40,
)


def shows(view: memoryview, byte: int) -> bool:
    return view.tobytes().count(byte) == len(view)


@given(steps=STEPS)
@settings(max_examples=60)
def test_no_view_changes_while_it_lives(steps: list[tuple[str, int]]):
    """In any order of frames and of views that are dropped, each view shows what was written for it."""
    memory = Memory()
    living: list[tuple[int, memoryview]] = []
    try:
        for number, (step, argument) in enumerate(steps):
            if step == "drop":
                del living[argument : argument + 1]
            else:
                memory.give_back()
                offset = memory.writer.write([bytes([number]) * argument], [argument])
                if offset is not None:
                    living.append((number, memory.reader.views(offset, [argument])[0]))
            assert all(shows(view, made_in) for made_in, view in living)
        living.clear()
        memory.give_back()
        assert memory.writer.write([bytes(ARENA)], [ARENA]) == 0  # all of it is free again
    finally:
        memory.close()


def test_the_same_memory_is_used_again(memory: Memory):
    """What is dropped after each frame takes the room of one frame."""
    for _ in range(50):
        memory.pass_on(bytes(10 * PAGE))
        memory.give_back()
    assert memory.resident_bytes == 10 * PAGE


def test_what_has_no_room_is_not_written(memory: Memory):
    """Too large, too many: None, and nothing is lost by it."""
    assert memory.writer.write([bytes(ARENA + 1)], [ARENA + 1]) is None
    views = [memory.pass_on(b"x") for _ in range(MAX_BLOCKS)]
    assert memory.writer.write([b"x"], [1]) is None
    views.pop()
    assert memory.give_back() == 1
    memory.pass_on(b"x")


def test_a_write_that_fails_takes_no_room(memory: Memory, monkeypatch: pytest.MonkeyPatch):
    """A segment that cannot be copied, or for which there is no memory, leaves the place free."""
    with pytest.raises(TypeError):
        memory.writer.write([memoryview(np.zeros((4, 4)))[::2]], [64])

    def no_memory(start: int, end: int) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    with monkeypatch.context() as patch:
        patch.setattr(memory.writer._mapping, "prepare", no_memory)
        assert memory.writer.write([b"x"], [1]) is None
    assert memory.writer.write([bytes(ARENA)], [ARENA]) == 0


def test_memory_above_what_is_kept_goes_back_to_the_system():
    """After a very large frame, no more stays in memory than is worth keeping."""
    memory = Memory(4 * KEPT_BYTES)
    try:
        for _ in range(2):
            views = memory.pass_on(bytes(2 * KEPT_BYTES))
            assert memory.resident_bytes == 2 * KEPT_BYTES
            del views
            memory.give_back()
            assert memory.resident_bytes == KEPT_BYTES
    finally:
        memory.close()


# -- what is broken is said --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "offset, length", [(ARENA, 1), (0, ARENA + 1), (ARENA - PAGE, PAGE + 1), (64, 1), (1 << 60, 1)]
)
def test_a_place_that_is_not_there_is_an_error(memory: Memory, offset: int, length: int):
    """Nothing is shown that cannot have been written."""
    with pytest.raises(BrokenSegment):
        memory.reader.views(offset, [length])


def test_releasing_what_was_not_written_is_an_error(memory: Memory):
    """Each block is released once."""
    memory.pass_on(b"x")
    memory.give_back()
    with pytest.raises(BrokenSegment):
        memory.writer.release(0)


def test_sharing_that_was_never_agreed_on_is_an_error():
    """Without a memory file there are no places."""
    with pytest.raises(BrokenSegment):
        SharedSegments().views(0, [1])
    with pytest.raises(BrokenSegment):
        SharedSegments().release([0])


# -- where it cannot be ------------------------------------------------------------------------------------------------


def _refuse(*arguments: object) -> int:
    raise OSError(errno.EMFILE, "too many open files")


@pytest.mark.parametrize("missing", ["memfd_create", "ftruncate"])
def test_a_system_that_refuses_a_memory_file_gets_no_offer(monkeypatch: pytest.MonkeyPatch, missing: str):
    """Out of descriptors or memory, the channel goes on without, and nothing is left open."""
    shared = SharedSegments()
    monkeypatch.setattr(os, missing, _refuse)
    shared.offer()
    assert shared.take_offer() is None
    assert shared.collect() == ()


def test_a_system_without_memory_files_gets_no_offer(monkeypatch: pytest.MonkeyPatch):
    """macOS has none."""
    monkeypatch.delattr(os, "memfd_create")
    shared = SharedSegments()
    shared.offer()
    assert shared.take_offer() is None


def test_an_offer_that_cannot_be_mapped_is_closed():
    """A descriptor that is of no use is not kept, and sending goes on without it."""
    reader, writer = os.pipe()
    os.close(writer)
    shared = SharedSegments()
    shared.accept(reader)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reader)
    assert shared.write([b"x"], [1]) is None


def test_what_is_offered_cannot_be_truncated():
    """Whoever takes the offer writes to memory that stays, and cannot take it from the end that reads there."""
    ours, theirs = SharedSegments(), SharedSegments()
    ours.offer()
    offer = ours.take_offer()
    assert offer is not None
    try:
        for size in (0, 1 << 40):
            with pytest.raises(PermissionError):
                os.ftruncate(offer, size)
        theirs.accept(os.dup(offer))
        offset = theirs.write([b"here"], [4])
        assert offset is not None
        assert bytes(ours.views(offset, [4])[0]) == b"here"
    finally:
        os.close(offer)
        ours.close()
        theirs.close()


def test_an_offer_that_could_be_truncated_is_refused():
    """The other end may be a liar: what it could take away while this process writes there is not mapped, but closed."""
    fd = os.memfd_create("torchmgmt-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, ARENA)
    shared = SharedSegments()
    shared.accept(fd)
    assert shared.write([b"x"], [1]) is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_an_offer_that_cannot_be_fixed_is_not_made(monkeypatch: pytest.MonkeyPatch):
    """Where memory files cannot be sealed, everything goes through the socket."""
    monkeypatch.setattr(segments, "fix_size", lambda _fd: False)
    shared = SharedSegments()
    shared.offer()
    assert shared.take_offer() is None
    with pytest.raises(BrokenSegment):
        shared.views(0, [1])


def test_an_offer_that_was_lost_on_its_way_changes_nothing():
    """A process without a free descriptor gets frames, but not what came with them."""
    shared = SharedSegments()
    shared.accept(None)
    assert shared.write([b"x"], [1]) is None
    assert not shared.expects_offer


def test_closing_closes_the_offer_that_nobody_took():
    """The leak guard counts descriptors: one of them, on Python below 3.13, would be the mapping's."""
    shared = SharedSegments()
    shared.offer()
    shared.close()
    shared.close()
    shared.offer()
    assert shared.take_offer() is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_forked_copy_cannot_free_what_the_original_uses(memory: Memory):
    """Views that end with a child of the process say nothing to the writer, and take no memory away."""
    (view,) = memory.pass_on(b"kept")
    pid = os.fork()
    if not pid:
        del view
        memory.forget()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert bytes(view) == b"kept"
    assert memory.give_back() == 0
