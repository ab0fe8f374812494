"""The asking side of a process that forks: whoever asks for a child is told of its end exactly once, whatever dies when."""

from __future__ import annotations

import itertools
import os
import pickle
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import pytest

from torchmgmt.backends import forker as forker_module
from torchmgmt.backends.child import Child
from torchmgmt.backends.forker import Forker
from torchmgmt.channel import Frame, FrameReader, Kind, send
from torchmgmt.errors import ManagerClosed
from torchmgmt.records import ModelKey, ModelSpec, WorkerJob

JOB = WorkerJob(ModelSpec(key=ModelKey("m", "1.0"), model_dir="/", handler="handler"), "9000", 1)


class FakeDispatcher:
    """Runs what is soon, readable or due when a test says so."""

    def __init__(self) -> None:
        self.is_closed = False
        self.soon: deque[Callable[[], object]] = deque()
        self.timers: list[tuple[float, Callable[[], object]]] = []
        self.readable: Callable[[], object] | None = None

    def call_soon(self, callback: Callable[[], object]) -> None:
        if self.is_closed:
            raise ManagerClosed("The dispatcher")
        self.soon.append(callback)

    def call_at(self, when: float, callback: Callable[[], object]) -> None:
        self.timers.append((when, callback))

    def watch(self, _source: object, on_readable: Callable[[], object]) -> None:
        self.readable = on_readable

    def unwatch(self, _source: object, then: Callable[[], object] | None = None) -> None:
        if self.is_closed:
            raise ManagerClosed("The dispatcher")
        self.readable = None
        if then is not None:
            self.soon.append(then)

    def watch_writable(self, *_: object) -> None:
        pass

    def log(self, *_args: object, **_kwargs: object) -> None:
        pass

    def run_soon(self) -> None:
        while self.soon:
            self.soon.popleft()()

    def run_timers(self) -> None:
        timers, self.timers = self.timers, []
        for _, callback in timers:
            callback()


@attrs.define(eq=False)
class Listener:
    """Notes what it is told."""

    child: Child = attrs.field(factory=lambda: Child(lambda _when, _callback: None))
    told: list[tuple[Any, ...]] = attrs.field(factory=list)

    def forked(self, pid: int, pidfd: int | None) -> None:
        self.told.append(("forked", pid, pidfd is not None))
        if pidfd is not None:
            os.close(pidfd)

    def fork_failed(self, reason: str, _last_lines: Sequence[str], *, is_retryable: bool = False) -> None:
        self.told.append(("fork_failed", reason))

    def process_exited(self, exitcode: int | None) -> None:
        self.told.append(("exited", exitcode))

    def orphaned(self) -> None:
        self.told.append(("orphaned",))


@attrs.define
class Scene:
    """A Forker, and the other end of its socket, which a test plays."""

    dispatcher: FakeDispatcher
    forker: Forker
    process: socket.socket
    ends: list[str]
    waits_on: bool = True

    def says(self, kind: Kind, head: Any, fds: Sequence[int] = (), *, number: int = 0) -> None:
        send(self.process, Frame(kind, head, number=number), fds)
        assert self.dispatcher.readable is not None
        self.dispatcher.readable()

    def was_told(self) -> list[Frame]:
        reader = FrameReader(max_fds=16)
        frames = reader.read(self.process) or []
        reader.close()
        return frames


@pytest.fixture
def scene() -> Iterator[Scene]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(5)
    dispatcher = FakeDispatcher()
    ends: list[str] = []
    made: list[Scene] = []
    forker = Forker(
        ours,
        dispatcher,  # type: ignore[arg-type]
        itertools.count(1),
        on_message=lambda frame: ends.append(f"message {frame.kind.name}"),
        on_end=lambda: ends.append("end"),
        on_stuck=lambda: bool(ends.append("stuck")) or made[0].waits_on,
    )
    forker.listen()
    made.append(Scene(dispatcher, forker, theirs, ends))
    with theirs:
        yield made[0]
        dispatcher.is_closed = False
        forker.close()
        dispatcher.run_soon()


def pipe_end() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_child_is_told_of_from_its_fork_to_its_end(scene: Scene) -> None:
    """Who asked for a child is told its pid, with its pidfd, and then how it ended; what went along is closed here."""
    listener, fd = Listener(), pipe_end()
    number = scene.forker.fork(JOB, [fd], listener)
    (frame,) = scene.was_told()
    pickled, count = frame.head
    assert (frame.kind, frame.number, pickle.loads(pickled), count) == (Kind.FORK, number, (JOB, False), 1)
    assert not is_open(fd)
    pidfd = pipe_end()
    scene.says(Kind.FORKED, (77, True), [pidfd], number=number)
    scene.says(Kind.EXITED, -9, number=number)
    os.close(pidfd)
    assert listener.told == [("forked", 77, True), ("exited", -9)]


def test_a_fork_that_failed_is_told_with_its_reason(scene: Scene) -> None:
    """NOT_FORKED ends the matter: the reason is told, and nothing follows."""
    listener = Listener()
    number = scene.forker.fork(JOB, [], listener)
    scene.says(Kind.NOT_FORKED, "no memory", number=number)
    assert listener.told == [("fork_failed", "no memory")]
    assert scene.forker.take_listeners() == {}


def test_a_pidfd_that_got_lost_on_its_way_is_none(scene: Scene) -> None:
    """In a program that has no descriptor left a pidfd does not arrive; its child is known all the same."""
    first, second = Listener(), Listener()
    one, two = (scene.forker.fork(JOB, [], each) for each in (first, second))
    scene.says(Kind.FORKED, (77, True), number=one)  # without the descriptor that it speaks of
    pidfd = pipe_end()
    scene.says(Kind.FORKED, (78, True), [pidfd], number=two)
    os.close(pidfd)
    assert (first.told, second.told) == ([("forked", 77, False)], [("forked", 78, True)])


def test_a_pidfd_for_nobody_is_closed(scene: Scene) -> None:
    """A descriptor that comes for a child whose listener has been taken away does not stay open."""
    number = scene.forker.fork(JOB, [], Listener())
    scene.forker.take_listeners()
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    pidfd = pipe_end()
    scene.says(Kind.FORKED, (77, True), [pidfd], number=number)
    os.close(pidfd)
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_who_asks_a_process_that_is_gone_is_told_so(scene: Scene) -> None:
    """A wish that comes after the process's end was dealt with fails soon, not on the caller's thread, and keeps no fd."""
    assert scene.forker.take_listeners() == {}
    scene.forker.close()
    late, fd = Listener(), pipe_end()
    scene.forker.fork(JOB, [fd], late)
    assert late.told == []
    assert not is_open(fd)
    scene.dispatcher.run_soon()
    assert late.told == [("fork_failed", "the process that was to fork it ended")]


def test_who_asks_when_nobody_can_tell_any_more_gets_an_error(scene: Scene) -> None:
    """Without a dispatcher that could tell of it, the wish itself raises ManagerClosed."""
    scene.forker.take_listeners()
    scene.dispatcher.is_closed = True
    fd = pipe_end()
    with pytest.raises(ManagerClosed):
        scene.forker.fork(JOB, [fd], Listener())
    assert not is_open(fd)


def test_one_that_becomes_what_was_asked_for_is_told_of_as_what_it_was(scene: Scene) -> None:
    """In place nothing is forked: the listener is not told by this number, nor looked for when time passes."""
    listener = Listener()
    scene.forker.fork(JOB, [], listener, in_place=True)
    assert pickle.loads(scene.was_told()[0].head[0]) == (JOB, True)
    assert scene.forker.take_listeners() == {}
    scene.dispatcher.run_timers()
    assert scene.ends == []


def test_who_answers_others_is_not_taken_for_stuck(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many forks that are wanted at once the last ones may take long: stuck is who answers nobody for so long."""
    clock = [100.0]
    monkeypatch.setattr(forker_module.time, "monotonic", lambda: clock[0])
    one, _ = (scene.forker.fork(JOB, [], Listener()) for _ in range(2))
    clock[0] += forker_module.FORK_LIMIT_S - 1
    scene.says(Kind.FORKED, (77, False), number=one)
    clock[0] += 2
    scene.dispatcher.run_timers()
    assert scene.ends == []
    clock[0] += forker_module.FORK_LIMIT_S
    scene.dispatcher.run_timers()
    assert scene.ends == ["stuck"]


def test_an_unanswered_wish_is_asked_about_until_nobody_waits(scene: Scene) -> None:
    """A fork without an answer is asked about after each limit, for as long as the asked says to wait on."""
    scene.forker.fork(JOB, [], Listener())
    scene.dispatcher.run_timers()
    scene.dispatcher.run_timers()
    scene.waits_on = False
    scene.dispatcher.run_timers()
    assert scene.ends == ["stuck"] * 3
    assert scene.dispatcher.timers == []


def test_an_answered_wish_is_not_asked_about(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that was forked, or not, in time is not taken for one whose parent hangs."""
    monkeypatch.setattr(forker_module, "FORK_LIMIT_S", 0.0)
    one, two = (scene.forker.fork(JOB, [], Listener()) for _ in range(2))
    scene.says(Kind.FORKED, (77, False), number=one)
    scene.says(Kind.NOT_FORKED, "why", number=two)
    scene.dispatcher.run_timers()
    assert scene.ends == []


def test_orphans_are_told_of_by_who_adopts_them(scene: Scene) -> None:
    """An adopted child's end is told by the process that was asked to adopt it, under its old number."""
    orphan = Listener()
    scene.forker.adopt(5, {33: (77, orphan)})
    (frame,) = scene.was_told()
    assert (frame.kind, frame.head) == (Kind.ADOPT, (5, {77: 33}))
    scene.says(Kind.EXITED, 1, number=33)
    assert orphan.told == [("exited", 1)]


def test_what_the_process_said_before_its_end_is_dealt_with(scene: Scene) -> None:
    """Frames that lie in the socket of a dead process are read before anybody is told that it is gone."""
    listener = Listener()
    number = scene.forker.fork(JOB, [], listener)
    send(scene.process, Frame(Kind.FORKED, (77, False), number=number))
    send(scene.process, Frame(Kind.READY, None))
    scene.process.close()
    scene.forker.read_the_rest()
    assert listener.told == [("forked", 77, False)]
    assert scene.ends == ["message READY"]


def test_a_job_that_cannot_be_written_down_is_an_error_of_who_asks(scene: Scene) -> None:
    """It raises what pickling raises, keeps no descriptor and no listener, and the process hears nothing."""
    job, fd = attrs.evolve(JOB, spec=attrs.evolve(JOB.spec, config={"lock": threading.Lock()})), pipe_end()
    with pytest.raises(TypeError, match="lock"):
        scene.forker.fork(job, [fd], Listener())
    assert not is_open(fd)
    assert scene.forker.take_listeners() == {}
    scene.process.setblocking(False)
    with pytest.raises(BlockingIOError):
        scene.process.recv(1)


def test_nonsense_is_the_end_of_the_process(scene: Scene) -> None:
    """Nobody knows what follows it, so what the process says is read no more, as if it had hung up."""
    scene.process.send(bytes(range(256)) * 4)
    assert scene.dispatcher.readable is not None
    scene.dispatcher.readable()
    assert scene.ends == ["end"]
    assert scene.dispatcher.readable is None


def test_the_end_of_the_process_is_told_once(scene: Scene) -> None:
    """A closed socket is the end, told once; reading stops."""
    scene.process.close()
    assert scene.dispatcher.readable is not None
    scene.dispatcher.readable()
    assert scene.ends == ["end"]
    assert scene.dispatcher.readable is None


def test_a_descriptor_that_nobody_took_is_closed_with_the_forker(scene: Scene) -> None:
    """What came with frames that were not understood is closed in the end."""
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    pidfd = pipe_end()
    scene.says(Kind.READY, None, [pidfd])
    os.close(pidfd)
    scene.forker.close()
    scene.dispatcher.run_soon()
    assert len(set(os.listdir("/proc/self/fd")) - before) == 0  # noqa: PTH208
