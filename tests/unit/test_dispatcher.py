"""The dispatcher: one thread, in order, on time, and never ended by what it calls."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import uvloop

from tests.handlers import until
from tests.unit.clocks import FakeClock
from torchmgmt.dispatcher import Dispatcher
from torchmgmt.errors import ManagerClosed

WAIT_S = 30

# From its first loop on it keeps a pipe, once for the whole process, which is no leak of a test.
uvloop.run(asyncio.sleep(0))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@contextlib.contextmanager
def visiting(dispatcher: Dispatcher, make: Callable[[], asyncio.AbstractEventLoop]) -> Iterator[None]:
    """Have an event loop, in a thread of its own, do the dispatcher's work."""
    loop = make()
    begun, ended = threading.Event(), asyncio.Event()

    async def host() -> None:
        end = dispatcher.run_on(loop)
        begun.set()
        await ended.wait()
        end()
        end()

    thread = threading.Thread(target=lambda: loop.run_until_complete(host()))
    thread.start()
    assert begun.wait(WAIT_S)
    try:
        until(lambda: dispatcher.owner.host is not None, "a loop has taken over")
        yield
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(WAIT_S)
        assert not thread.is_alive()
        loop.close()


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


@pytest.fixture
def threaded() -> Iterator[Dispatcher]:
    """A dispatcher whose work its own thread does."""
    dispatcher = Dispatcher()
    yield dispatcher
    dispatcher.close()


@pytest.fixture(params=["thread", *LOOPS])
def dispatcher(request: pytest.FixtureRequest) -> Iterator[Dispatcher]:
    """A dispatcher whose work its own thread does, or an event loop."""
    dispatcher = Dispatcher()
    with visiting(dispatcher, LOOPS[request.param]) if request.param in LOOPS else contextlib.nullcontext():
        yield dispatcher
    dispatcher.close()


@pytest.fixture
def timed(clock: FakeClock) -> Iterator[Dispatcher]:
    """A dispatcher whose time stands still."""
    dispatcher = Dispatcher(clock=clock)
    yield dispatcher
    dispatcher.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    left.setblocking(False)
    right.setblocking(False)
    with left, right:
        yield left, right


def rounds(dispatcher: Dispatcher, count: int = 2) -> None:
    """Wait until the dispatcher has looked at everything ``count`` times."""
    for _ in range(count):
        looked = threading.Event()
        dispatcher.call_soon(looked.set)
        assert looked.wait(WAIT_S)


def run(dispatcher: Dispatcher, call: Any) -> Any:
    """Call on the dispatcher's thread and return what came back."""
    results: list[Any] = []
    dispatcher.call_soon(lambda: results.append(call()))
    rounds(dispatcher)
    return results[0]


@contextlib.contextmanager
def held(dispatcher: Dispatcher, first: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Keep the dispatcher's thread busy, so that all that is asked for inside is due at once afterwards."""
    entered, release = threading.Event(), threading.Event()
    dispatcher.call_soon(lambda: (first(), entered.set(), release.wait(WAIT_S)))
    assert entered.wait(WAIT_S)
    yield
    release.set()


# -- the thread --------------------------------------------------------------------------------------------------------


def test_there_is_no_thread_and_no_descriptor_before_the_first_call():
    """A dispatcher that nobody uses costs nothing, to make and to close."""
    threads, descriptors = threading.active_count(), psutil.Process().num_fds()
    dispatcher = Dispatcher()
    assert (threading.active_count(), psutil.Process().num_fds()) == (threads, descriptors)
    dispatcher.close()
    assert (threading.active_count(), psutil.Process().num_fds()) == (threads, descriptors)


def test_closing_gives_everything_back(pair):
    """After close there is no thread and no descriptor of the dispatcher's left."""
    threads, descriptors = threading.active_count(), psutil.Process().num_fds()
    dispatcher = Dispatcher()
    dispatcher.watch(pair[0], lambda: None)
    dispatcher.call_at(dispatcher.clock() + 1000, lambda: None)
    rounds(dispatcher)
    assert threading.active_count() == threads + 1
    dispatcher.close()
    assert (threading.active_count(), psutil.Process().num_fds()) == (threads, descriptors)


def test_everything_runs_on_one_daemon_thread(threaded: Dispatcher, pair):
    """Callbacks of all kinds share one thread, which keeps no program alive and knows itself."""
    seen: list[tuple[threading.Thread, bool]] = []

    def note() -> None:
        seen.append((threading.current_thread(), threaded.on_thread()))

    left, right = pair
    readable = threading.Event()
    threaded.call_soon(note)
    threaded.call_at(0, note)
    threaded.watch(left, lambda: (left.recv(10), note(), readable.set()))
    right.send(b"x")
    assert readable.wait(WAIT_S)
    threaded.unwatch(left, note)
    rounds(threaded)
    (thread,) = {thread for thread, _ in seen}
    assert len(seen) == 4
    assert all(is_on for _, is_on in seen)
    assert thread is not threading.current_thread()
    assert thread.daemon
    assert not threaded.on_thread()


# -- soon --------------------------------------------------------------------------------------------------------------


def test_soon_keeps_the_order(dispatcher: Dispatcher):
    """Callbacks run in the order in which they were asked for."""
    ran: list[int] = []
    for number in range(1000):
        dispatcher.call_soon(lambda number=number: ran.append(number))
    rounds(dispatcher)
    assert ran == list(range(1000))


def test_soon_of_many_threads_keeps_the_order_of_each(dispatcher: Dispatcher):
    """Nothing that a thread asks for is lost or overtakes what it asked for before."""
    ran: list[tuple[int, int]] = []

    def ask(caller: int) -> None:
        for number in range(500):
            dispatcher.call_soon(lambda number=number: ran.append((caller, number)))

    threads = [threading.Thread(target=ask, args=(caller,)) for caller in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rounds(dispatcher)
    for caller in range(8):
        assert [number for who, number in ran if who == caller] == list(range(500))


def test_a_callback_may_ask_for_another(dispatcher: Dispatcher):
    """What a callback asks for runs, after it and not within it."""
    ran: list[str] = []
    dispatcher.call_soon(lambda: (dispatcher.call_soon(lambda: ran.append("second")), ran.append("first")))
    rounds(dispatcher, 3)
    assert ran == ["first", "second"]


# -- timers ------------------------------------------------------------------------------------------------------------


def test_timers_run_in_the_order_of_their_times(timed: Dispatcher, clock: FakeClock):
    """The earlier time goes first; of equal times, the one that was asked for first."""
    ran: list[str] = []
    for when, name in [(3, "c"), (1, "a1"), (2, "b"), (1, "a2"), (1, "a3")]:
        timed.call_at(clock.now + when, lambda name=name: ran.append(name))
    rounds(timed)
    clock.now += 10
    rounds(timed)
    assert ran == ["a1", "a2", "a3", "b", "c"]


def test_no_timer_runs_before_its_time(timed: Dispatcher, clock: FakeClock):
    """A timer runs when the clock shows its time, and not a moment earlier."""
    ran: list[float] = []
    start = clock.now
    for when in (1, 2, 3):
        timed.call_at(start + when, lambda: ran.append(clock.now))
    for now in (0.5, 1, 1.999, 2, 2.5, 3, 9):
        clock.now = start + now
        rounds(timed)
    assert ran == [start + 1, start + 2, start + 3]


def test_an_earlier_timer_wakes_a_sleeping_dispatcher(dispatcher: Dispatcher):
    """A timer that is due before the one that is slept for is not late."""
    ran = threading.Event()
    dispatcher.call_at(dispatcher.clock() + 3600, lambda: None)
    rounds(dispatcher)
    dispatcher.call_at(dispatcher.clock() + 0.01, ran.set)
    assert ran.wait(WAIT_S)


def test_a_cancelled_timer_never_runs(timed: Dispatcher, clock: FakeClock):
    """A timer that was cancelled before its time does not run; cancelling it again is nothing."""
    ran: list[int] = []
    timers = [timed.call_at(clock.now + 1, lambda n=n: ran.append(n)) for n in range(4)]
    timers[1].cancel()
    timers[1].cancel()
    timers[3].cancel()
    clock.now += 1
    rounds(timed)
    assert ran == [0, 2]
    timers[0].cancel()


def test_a_timer_can_be_cancelled_by_one_that_is_due_with_it(timed: Dispatcher, clock: FakeClock):
    """Cancelling from a callback is in time for every timer that has not run yet, even if its time has come."""
    ran: list[str] = []
    with held(timed):
        second = None
        timed.call_at(clock.now - 1, lambda: (ran.append("first"), second.cancel()))
        second = timed.call_at(clock.now - 1, lambda: ran.append("second"))
        third = timed.call_at(clock.now - 1, lambda: ran.append("third"))
        timed.call_soon(third.cancel)
    rounds(timed)
    assert ran == ["first"]


@pytest.mark.parametrize("far_s", [30 * 24 * 3600, 1e9, 1e15, 1e300])
def test_a_timer_may_be_as_far_away_as_one_likes(dispatcher: Dispatcher, far_s: float):
    """A request with a limit of years does not end the thread that serves all others."""
    timer = dispatcher.call_at(dispatcher.clock() + far_s, lambda: None)
    rounds(dispatcher)
    timer.cancel()


# -- descriptors -------------------------------------------------------------------------------------------------------


def test_a_watched_source_is_called_for_until_unwatched(dispatcher: Dispatcher, pair):
    """on_readable runs each time that there is something, and never after unwatch."""
    left, right = pair
    received: list[bytes] = []
    got = threading.Semaphore(0)
    dispatcher.watch(left, lambda: (received.append(left.recv(10)), got.release()))
    for text in (b"a", b"b", b"c"):
        right.send(text)
        assert got.acquire(timeout=WAIT_S)
    gone = threading.Event()
    dispatcher.unwatch(left, gone.set)
    assert gone.wait(WAIT_S)
    right.send(b"d")
    rounds(dispatcher)
    assert received == [b"a", b"b", b"c"]


def test_what_was_readable_before_it_was_watched_counts(dispatcher: Dispatcher, pair):
    """Nothing that arrived early is missed."""
    left, right = pair
    right.send(b"early")
    received = threading.Event()
    dispatcher.watch(left, lambda: (left.recv(10), received.set()))
    assert received.wait(WAIT_S)


def test_a_closed_peer_is_readable(dispatcher: Dispatcher, pair):
    """The end of the other side is an event, too."""
    left, right = pair
    ended = threading.Event()
    dispatcher.watch(left, lambda: (not left.recv(10)) and (dispatcher.unwatch(left), ended.set()))
    right.close()
    assert ended.wait(WAIT_S)


def fill(sock: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(1 << 16))


def test_writable_is_called_when_there_is_room_and_only_while_wanted(dispatcher: Dispatcher, pair):
    """on_writable waits for room in the socket; None ends it; reading goes on meanwhile."""
    left, right = pair
    fill(left)
    events: list[str] = []
    readable, writable = threading.Event(), threading.Event()
    dispatcher.watch(left, lambda: (left.recv(10), events.append("readable"), readable.set()))

    def on_writable() -> None:
        events.append("writable")
        dispatcher.watch_writable(left, None)
        writable.set()

    dispatcher.watch_writable(left, on_writable)
    rounds(dispatcher)
    assert events == []
    right.send(b"x")
    assert readable.wait(WAIT_S)
    assert events == ["readable"]
    with contextlib.suppress(BlockingIOError):
        while right.recv(1 << 20):
            pass
    assert writable.wait(WAIT_S)
    rounds(dispatcher)
    before = events.count("writable")
    rounds(dispatcher, 5)
    assert events.count("writable") == before
    readable.clear()
    right.send(b"y")
    assert readable.wait(WAIT_S)


def test_unwatch_is_the_place_to_close(dispatcher: Dispatcher, pair):
    """then runs after the source was forgotten, so its descriptor can be closed and used again at once."""
    left, right = pair
    fd = left.fileno()
    dispatcher.watch(left, lambda: None)
    closed = threading.Event()
    dispatcher.unwatch(left, lambda: (left.close(), closed.set()))
    assert closed.wait(WAIT_S)
    new, far = sorted(socket.socketpair(), key=lambda sock: sock.fileno() != fd)
    with new, far:
        assert new.fileno() == fd
        readable = threading.Event()
        dispatcher.watch(new, lambda: (new.recv(10), readable.set()))
        far.send(b"x")
        assert readable.wait(WAIT_S)
        gone = threading.Event()
        dispatcher.unwatch(new, gone.set)
        assert gone.wait(WAIT_S)
    assert right.recv(10) == b""


def test_a_source_that_was_closed_or_never_watched_is_no_error(
    dispatcher: Dispatcher, pair, caplog: pytest.LogCaptureFixture
):
    """Watching what is closed and forgetting what is unknown are nothing; then is called all the same."""
    left, right = pair
    called: list[str] = []
    dispatcher.unwatch(right, lambda: called.append("unknown"))
    left.close()
    dispatcher.watch(left, lambda: called.append("never"))
    dispatcher.watch_writable(left, lambda: called.append("never"))
    dispatcher.unwatch(left, lambda: called.append("closed"))
    rounds(dispatcher)
    assert called == ["unknown", "closed"]
    assert caplog.records == []


# -- what callbacks raise ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(1), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_what_a_callback_raises_is_logged_and_the_others_go_on(
    dispatcher: Dispatcher, pair, error: BaseException, caplog: pytest.LogCaptureFixture
):
    """No callback of any kind, whatever it raises, ends or delays what serves all models."""
    left, right = pair

    def fail() -> None:
        raise error

    ran: list[str] = []
    with held(dispatcher):
        dispatcher.call_soon(fail)
        dispatcher.call_soon(lambda: ran.append("soon"))
        dispatcher.call_at(0, fail)
        dispatcher.call_at(0, lambda: ran.append("timer"))
        dispatcher.unwatch(right, fail)
        dispatcher.watch(left, lambda: (dispatcher.unwatch(left), left.recv(10), fail()))
        right.send(b"x")
    until(lambda: sorted(ran) == ["soon", "timer"])
    failures = until(
        lambda: [each for each in caplog.records if each.name == "torchmgmt.dispatcher"][3:] and caplog.records
    )
    assert len(failures) == 4
    for record in failures:
        assert record.levelno == logging.ERROR
        assert type(error).__name__ in (record.exc_text or "")


# -- closing -----------------------------------------------------------------------------------------------------------


def test_what_is_due_runs_before_the_end(dispatcher: Dispatcher):
    """close ends after the callbacks that were asked for before it."""
    ran: list[int] = []
    with held(dispatcher):
        for number in range(10):
            dispatcher.call_soon(lambda number=number: ran.append(number))
        closing = threading.Thread(target=dispatcher.close)
        closing.start()
    closing.join(WAIT_S)
    assert ran == list(range(10))


def test_what_is_not_due_never_runs(timed: Dispatcher, clock: FakeClock):
    """A timer whose time has not come when the dispatcher is closed is dropped."""
    ran: list[int] = []
    timed.call_at(clock.now + 1, lambda: ran.append(1))
    rounds(timed)
    timed.close()
    assert ran == []


@pytest.mark.parametrize("used", [False, True])
def test_a_closed_dispatcher_says_so(pair, used: bool):
    """Every call after close raises ManagerClosed, whether there ever was a thread or not; closing again is nothing."""
    dispatcher = Dispatcher()
    if used:
        rounds(dispatcher)
    dispatcher.close()
    dispatcher.close()
    for call in (
        lambda: dispatcher.call_soon(lambda: None),
        lambda: dispatcher.call_at(0, lambda: None),
        lambda: dispatcher.watch(pair[0], lambda: None),
        lambda: dispatcher.watch_writable(pair[0], lambda: None),
        lambda: dispatcher.unwatch(pair[0]),
    ):
        with pytest.raises(ManagerClosed, match="dispatcher is closed"):
            call()


def test_it_can_be_closed_from_its_own_thread(threaded: Dispatcher):
    """A callback may close the dispatcher without waiting for itself; who closes it elsewhere waits for the thread."""
    thread = run(threaded, threading.current_thread)
    alive_after: list[bool] = []
    with held(threaded, first=threaded.close):
        closing = threading.Thread(target=lambda: (threaded.close(), alive_after.append(thread.is_alive())))
        closing.start()
        closing.join(0.05)  # would be over if it did not wait
    closing.join(WAIT_S)
    assert alive_after == [False]


def test_everybody_who_closes_waits_for_the_end(threaded: Dispatcher):
    """Of several threads that close at once, none goes on before the dispatcher's thread has ended."""
    thread = run(threaded, threading.current_thread)
    alive_after: list[bool] = []
    with held(threaded):
        closing = [
            threading.Thread(target=lambda: (threaded.close(), alive_after.append(thread.is_alive()))) for _ in range(4)
        ]
        for each in closing:
            each.start()
        for each in closing:
            each.join(0.02)  # would be over if it did not wait
    for each in closing:
        each.join(WAIT_S)
    assert alive_after == [False] * 4


def test_closing_within_a_readable_callback_is_fine(threaded: Dispatcher, pair):
    """The end of a peer may be what ends the threaded."""
    left, right = pair
    thread = run(threaded, threading.current_thread)
    threaded.watch(left, threaded.close)
    right.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_a_dispatcher_survives_a_flood_of_wake_ups(dispatcher: Dispatcher):
    """More wake-ups than a pipe holds block nobody and lose nothing."""
    ran: list[int] = []
    total = 100_000 if sys.platform == "linux" else 20_000
    with held(dispatcher):
        for number in range(total):
            dispatcher.call_soon(lambda number=number: ran.append(number))
    rounds(dispatcher)
    assert len(ran) == total


# -- visits of an event loop -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOOPS)
def test_a_loop_that_visits_runs_all_and_gives_it_back(kind: str, pair):
    """Sources, timers and callbacks that were there before, come during or after the visit are all served."""
    left, right = pair
    dispatcher = Dispatcher()
    ran: list[object] = []
    came = threading.Semaphore(0)

    def note(what: object) -> None:
        ran.append((what, threading.get_ident()))
        came.release()

    def wait() -> int:
        assert came.acquire(timeout=WAIT_S)
        return ran[-1][1]

    dispatcher.watch(left, lambda: (left.recv(10), note("read")))
    dispatcher.call_soon(lambda: note("before"))
    own = wait()
    timer_at = dispatcher.clock() + 0.2
    dispatcher.call_at(timer_at, lambda: note("timer"))
    with visiting(dispatcher, LOOPS[kind]):
        right.send(b"x")
        host = wait()
        assert wait() == host != own
        assert dispatcher.clock() >= timer_at
        dispatcher.call_at(dispatcher.clock(), lambda: note("due"))
        assert wait() == host
        dispatcher.call_soon(lambda: dispatcher.call_at(dispatcher.clock() + 0.01, lambda: note("from within")))
        assert wait() == host
        assert not dispatcher.on_thread()
        dispatcher.call_at(dispatcher.clock() + 0.1, lambda: note("after"))
    assert wait() == own
    right.send(b"x")
    assert wait() == own
    dispatcher.close()


@pytest.mark.parametrize("kind", LOOPS)
def test_a_loop_sleeps_until_a_timer_that_is_close(kind: str, monkeypatch):
    """Loops count in milliseconds: what is left of the last one is no reason to look again and again."""
    dispatcher = Dispatcher()
    rounds: list[float | None] = []
    run_round = Dispatcher.run_round
    monkeypatch.setattr(
        Dispatcher, "run_round", lambda self, timeout: (rounds.append(timeout), run_round(self, timeout))
    )
    came = threading.Semaphore(0)
    with visiting(dispatcher, LOOPS[kind]):
        for _ in range(20):
            dispatcher.call_soon(lambda: dispatcher.call_at(dispatcher.clock() + 0.0004, came.release))
            assert came.acquire(timeout=WAIT_S)
    assert len(rounds) < 200
    dispatcher.close()


def test_only_one_loop_visits_at_a_time():
    """A second one is told so by nothing: it changes nothing, and undoing it does not either."""
    dispatcher = Dispatcher()
    with visiting(dispatcher, asyncio.new_event_loop):
        host = run(dispatcher, threading.get_ident)
        with visiting(dispatcher, asyncio.new_event_loop):
            assert run(dispatcher, threading.get_ident) == host
        assert run(dispatcher, threading.get_ident) == host
    assert run(dispatcher, threading.get_ident) != host
    dispatcher.close()


@pytest.mark.parametrize("kind", LOOPS)
def test_what_is_asked_for_on_the_visiting_loop_itself_is_done(kind: str):
    """The loop's own tasks may set timers and ask for callbacks, with nobody to wake it."""
    dispatcher = Dispatcher()
    loop = LOOPS[kind]()

    async def host() -> list[str]:
        end = dispatcher.run_on(loop)
        ran: list[str] = []
        done = asyncio.Event()
        await asyncio.sleep(0.02)  # it has nothing to do, and nothing that wakes it
        dispatcher.call_at(dispatcher.clock() + 0.02, lambda: (ran.append("later"), done.set()))
        dispatcher.call_at(dispatcher.clock() + 0.0103, lambda: ran.append("sooner"))
        dispatcher.call_soon(lambda: ran.append("soon"))
        assert dispatcher.on_thread()
        await asyncio.wait_for(done.wait(), WAIT_S)
        end()
        return ran

    assert loop.run_until_complete(host()) == ["soon", "sooner", "later"]
    loop.close()
    dispatcher.close()


def test_a_dispatcher_that_is_closed_during_a_visit_lets_both_go():
    """Whoever closes waits for the dispatcher's own thread; the loop goes on without it."""
    dispatcher = Dispatcher()
    thread = run(dispatcher, threading.current_thread)
    with visiting(dispatcher, asyncio.new_event_loop):
        dispatcher.close()
        assert not thread.is_alive()
        with pytest.raises(ManagerClosed):
            dispatcher.call_soon(lambda: None)
