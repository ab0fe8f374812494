"""The future that its owner settles: a concurrent.futures.Future to who waits, and nobody who waits can harm the owner."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import gc
import logging
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.handlers import until
from tests.interruptions import interruptions
from torchmgmt.answer_future import AnswerFuture
from torchmgmt.errors import ManagerClosed
from torchmgmt.exchange import Encoded
from torchmgmt.log_relay import AnyLogger, log_guarded
from torchmgmt.owned_future import OwnedFuture
from torchmgmt.records import ModelKey

WAIT_S = 20


class Hand:
    """An owner whose thread is whoever calls :meth:`work`."""

    def __init__(self) -> None:
        self.asked: deque[Callable[[], object]] = deque()
        self.is_gone = False

    def call_soon(self, callback: Callable[[], object]) -> None:
        if self.is_gone:
            raise ManagerClosed("The hand")
        self.asked.append(callback)

    def on_thread(self) -> bool:
        return False

    def act_here(self, act: Callable[[], Any]) -> Any:
        return act()

    def log(self, logger: AnyLogger, level: int, message: str, *args: object, exc_info: Any = None) -> None:
        log_guarded(logger, level, message, args, exc_info)

    def work(self) -> None:
        while self.asked:
            self.asked.popleft()()


class Place:
    """A place in a queue, which notes how often it was given up."""

    is_seated = False

    def __init__(self) -> None:
        self.left = 0

    def ask(self) -> None:
        """Nobody does so: it has no seat."""

    def leave(self) -> None:
        self.left += 1


def owned(hand: Hand | None = None) -> OwnedFuture[Any]:
    future: OwnedFuture[Any] = OwnedFuture()
    future.owner = hand
    return future


@contextlib.contextmanager
def running(*acts: Callable[[], object]) -> Iterator[list[object]]:
    """Call functions on a thread each; what they return, or raise, is in the list when the block is over."""
    came: list[object] = []

    def run(act: Callable[[], object]) -> None:
        try:
            came.append(act())
        except BaseException as error:
            came.append(error)

    threads = [threading.Thread(target=run, args=(act,), daemon=True) for act in acts]
    for thread in threads:
        thread.start()
    yield came
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "somebody waits for ever"


def in_time(act: Callable[[], object]) -> object:
    """Return what a function returns, or has raised; fail if it does not end, as where somebody has left a lock held."""
    with running(act) as came:
        pass
    return came[0]


# -- what ends it ------------------------------------------------------------------------------------------------------


def test_many_threads_hear_of_the_result() -> None:
    """Whoever waits, with a limit or without, and whoever comes later, gets it."""
    future = owned(Hand())
    with running(*[lambda: future.result(WAIT_S)] * 10, *[future.result] * 10) as came:
        until(lambda: future._sleepers is not None)
        future.set_result("it")
    assert came == ["it"] * 20
    assert future.result(0) == "it"
    assert future.exception(0) is None


@pytest.mark.parametrize("timeout", [0, 0.01, -1])
def test_waiting_too_long_is_an_error_and_leaves_nothing(timeout: float) -> None:
    """Who asks again and again with a limit does not add up, and others wait on."""
    future = owned(Hand())
    with running(future.result) as came:
        until(lambda: future._sleepers is not None)
        others = future._sleepers
        for ask in (future.result, future.exception):
            with pytest.raises(FutureTimeout):
                ask(timeout)
        assert future._sleepers == others
        future.set_result(1)
    assert came == [1]


def test_a_limit_of_centuries_is_none() -> None:
    """More than the system can count is no error."""
    future = owned(Hand())
    with running(lambda: future.result(1e15)) as came:
        until(lambda: future._sleepers is not None)
        future.set_result(1)
    assert came == [1]


def test_it_ends_once() -> None:
    """What has ended, in whatever way, takes nothing more, and cannot be cancelled or begun."""
    ends: list[Callable[[OwnedFuture[Any]], object]] = [
        lambda future: future.set_result(1),
        lambda future: future.set_exception(KeyError()),
        lambda future: future.cancel(),
    ]
    for end in ends:
        future = owned(Hand())
        end(future)
        for again in (
            lambda future=future: future.set_result(2),
            lambda future=future: future.set_exception(OSError()),
        ):
            with pytest.raises(InvalidStateError):
                again()
        assert not future.set_waiting()
        assert future.cancel() is future.cancelled()
        if not future.cancelled():
            with pytest.raises(RuntimeError, match="already"):
                future.set_running_or_notify_cancel()


def test_cancelling_gives_up_the_place_and_wakes_who_waits() -> None:
    """At once the one, when its owner comes to it the other; the place is the owner's no more."""
    hand, place = Hand(), Place()
    future = owned(hand)
    future.place = place
    with running(future.result, future.exception) as came:
        until(lambda: future._sleepers is not None and future._sleepers[1] is not None)
        assert future.cancel()
        assert place.left == 1
        hand.work()
    assert [type(each) for each in came] == [CancelledError] * 2
    assert future.place is None


def test_cancelling_where_the_owner_is_gone_is_told_all_the_same() -> None:
    """Nobody else is there to tell of it, so the caller does."""
    hand = Hand()
    hand.is_gone = True
    future, called = owned(hand), []
    future.add_done_callback(called.append)
    with running(future.result) as came:
        until(lambda: future._sleepers is not None)
        assert future.cancel()
    assert isinstance(came[0], CancelledError)
    assert called == [future]


def test_of_cancelling_and_settling_one_wins() -> None:
    """Who cancels is told truly whether the answer comes, and the callback is called once."""
    for _ in range(300):
        hand = Hand()
        future, called = owned(hand), []
        future.add_done_callback(called.append)
        barrier = threading.Barrier(2)

        def settle(future: OwnedFuture[Any] = future, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait(WAIT_S)
            try:
                future.set_result("it")
            except InvalidStateError:
                return False
            return True

        def cancel(future: OwnedFuture[Any] = future, barrier: threading.Barrier = barrier) -> str:
            barrier.wait(WAIT_S)
            return "cancelled" if future.cancel() else "too late"

        with running(settle, cancel) as outcomes:
            pass
        hand.work()
        assert set(outcomes) in ({True, "too late"}, {False, "cancelled"})
        assert future.cancelled() is ("cancelled" in outcomes)
        assert called == [future]


# -- what is raised ----------------------------------------------------------------------------------------------------


def fail() -> None:
    raise KeyError("no")


def failed() -> OwnedFuture[Any]:
    error = in_time(fail)  # on another thread: the frames of its traceback know those that called them
    assert isinstance(error, KeyError)
    future = owned(Hand())
    future.set_exception(error)
    return future


def test_each_who_asks_gets_an_error_of_its_own() -> None:
    """Of 100 who ask, each sees the frames of the one who failed and its own, and no others."""
    future = failed()
    errors, lengths = [], set()
    for _ in range(100):
        with pytest.raises(KeyError, match="no") as caught:
            future.result()
        errors.append(caught.value)
        lengths.add(len(traceback.extract_tb(caught.value.__traceback__)))
    assert len(lengths) == 1
    assert len({id(error) for error in errors}) == 100
    assert len(traceback.extract_tb(future.exception().__traceback__)) == 2  # type: ignore[union-attr]


def test_an_error_that_cannot_be_copied_is_raised_itself() -> None:
    """An exception with an __init__ of its own is still told."""

    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} {two}")

    future = owned(Hand())
    future.set_exception(Odd(1, 2))
    for _ in range(2):
        with pytest.raises(Odd, match="1 2"):
            future.result()


def test_it_goes_with_its_last_reference() -> None:
    """Whatever it was asked, nothing refers to itself: it waits for no garbage collection."""
    gc.collect()
    gc.disable()
    try:
        gone: list[weakref.ref[Any]] = []
        for make in (failed, lambda: owned(Hand())):
            future = make()
            future.add_done_callback(lambda done: done.done())
            with contextlib.suppress(KeyError, FutureTimeout):
                future.result(0)
            with contextlib.suppress(FutureTimeout):
                future.exception(0)
            futures.wait([future], 0)
            future.cancel()
            if future.owner is not None:
                future.owner.work()  # type: ignore[attr-defined]
            with contextlib.suppress(KeyError, CancelledError):
                future.result(0)
            gone.append(weakref.ref(future))
            del future
        assert [each() for each in gone] == [None, None]
    finally:
        gc.enable()


# -- callbacks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
@pytest.mark.parametrize("end", ["result", "cancel"])
def test_what_a_callback_raises_is_logged_and_the_others_are_called(
    error: BaseException, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In the order in which they were added; those who wait hear of it, too, and so does who adds one later."""
    hand, called = Hand(), []

    def fail(_future: Future[Any]) -> None:
        raise error

    future = owned(hand)
    for callback in (lambda _: called.append(1), fail, lambda _: called.append(2), fail, lambda _: called.append(3)):
        future.add_done_callback(callback)
    with running(future.exception) as came:
        until(lambda: future._sleepers is not None)
        if end == "result":
            future.set_result(1)
        else:
            assert future.cancel()
            assert called == []  # it is the owner's thread that calls them
            hand.work()
    assert called == [1, 2, 3]
    assert came[0] is None or isinstance(came[0], CancelledError)
    future.add_done_callback(fail)
    future.add_done_callback(lambda _: called.append(4))
    assert called[3:] == [4]
    records = [each for each in caplog.records if each.name == "torchmgmt.owned_future"]
    assert all(type(error).__name__ in (each.exc_text or "") for each in records)
    assert len(records) == 3
    assert {each.levelno for each in records} == {logging.ERROR}


def test_a_callback_may_use_the_future() -> None:
    """No lock is held while it is called."""
    future, seen = owned(Hand()), []

    def look(done: Future[Any]) -> None:
        seen.append((done.result(0), done.cancel(), done.running()))
        done.add_done_callback(lambda _: seen.append("later"))
        futures.wait([done], 0)

    future.add_done_callback(look)
    assert in_time(lambda: future.set_result(1)) is None
    assert seen == [(1, False, False), "later"]


# -- functions of the standard library ---------------------------------------------------------------------------------


def test_wait_and_as_completed_see_each_end() -> None:
    """Settled before, during and after; by a result, an error and by being cancelled; among futures of the standard kind."""
    hand = Hand()
    ended = [failed(), owned(hand)]
    ended[1].set_result(1)
    coming = [owned(hand) for _ in range(3)]
    never, plain = owned(hand), Future[Any]()
    every = [*ended, *coming, never, plain]
    done, left = futures.wait(every, 0)
    assert (done, left) == ({*ended}, {*coming, never, plain})

    with running(
        lambda: futures.wait(coming, WAIT_S).done,
        lambda: len(futures.wait(every, WAIT_S, futures.FIRST_EXCEPTION).done),
        lambda: list(futures.as_completed([*ended, *coming, plain], WAIT_S)),
        lambda: futures.wait(coming, WAIT_S, futures.FIRST_COMPLETED).done,
    ) as came:
        until(lambda: all(each._standard is not None and len(each._standard._waiters) >= 2 for each in coming))
        coming[0].set_result(1)
        coming[1].set_exception(OSError())
        assert coming[2].cancel()
        hand.work()
        plain.set_result(2)
    assert {*coming} in came
    completed = next(each for each in came if isinstance(each, list))
    assert {*completed} == {*ended, *coming, plain}
    assert len(completed) == 6
    assert sum(isinstance(each, set) and {*coming} >= each for each in came) == 2
    assert futures.wait(coming, 0).not_done == set()
    assert never._standard is not None
    assert not never._standard._waiters


def test_a_waiter_that_stays_locked_keeps_its_owner_from_nothing() -> None:
    """Who is interrupted in the standard library's wait() may leave its waiter so: others, and other futures, are told."""
    future, other = owned(Hand()), owned(Hand())
    with running(lambda: futures.wait([future], WAIT_S).done) as came:
        until(lambda: future._standard is not None and future._standard._waiters)
        assert future._standard is not None
        (waiter,) = future._standard._waiters
        with waiter.event._cond, running(lambda: futures.wait([future, other], WAIT_S).done) as others:
            until(lambda: len(future._standard._waiters) == 2)
            assert in_time(lambda: future.set_result(1)) is None
            assert in_time(lambda: other.set_result(2)) is None
            until(lambda: others, "others are told")
    assert others == [{future, other}]
    assert came == [{future}]


@pytest.mark.parametrize("end", ["result", "error", "cancel"])
def test_who_waits_as_it_ends_is_always_told(end: str) -> None:
    """At whatever moment the standard library looks and installs its waiter."""
    for _ in range(200):
        hand = Hand()
        future = owned(hand)
        barrier = threading.Barrier(2)

        def settle(future: OwnedFuture[Any] = future, barrier: threading.Barrier = barrier, hand: Hand = hand) -> None:
            barrier.wait(WAIT_S)
            if end == "cancel":
                future.cancel()
                hand.work()
            elif end == "error":
                future.set_exception(KeyError())
            else:
                future.set_result(1)

        def wait(future: OwnedFuture[Any] = future, barrier: threading.Barrier = barrier) -> int:
            barrier.wait(WAIT_S)
            return len(futures.wait([future], WAIT_S / 2).done) + len(list(futures.as_completed([future], WAIT_S / 2)))

        with running(settle, wait) as came:
            pass
        assert sorted(map(str, came)) == ["2", "None"]


def test_an_event_loop_can_wrap_it() -> None:
    """asyncio.wrap_future gives the result; a task that is cancelled cancels it."""
    hand = Hand()

    async def main() -> None:
        first, second = owned(hand), owned(hand)
        waiting = [asyncio.ensure_future(asyncio.wrap_future(each)) for each in (first, second)]
        await asyncio.sleep(0)
        threading.Thread(target=first.set_result, args=("it",)).start()
        assert await asyncio.wait_for(waiting[0], WAIT_S) == "it"
        waiting[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting[1]
        await asyncio.sleep(0)
        assert second.cancelled()

    asyncio.run(main())


# -- interruptions -----------------------------------------------------------------------------------------------------


class Kept(AnswerFuture):
    """One that counts how often its request was said to be taken back, and to be stopped."""

    def __init__(self) -> None:
        self.taken_back: list[str] = []
        super().__init__(
            ModelKey("m", "1.0"),
            on_abandon=lambda: self.taken_back.append("stopped"),
            on_cancelled=lambda: self.taken_back.append("taken back"),
        )


CALLS: dict[str, Callable[[Kept], object]] = {
    "result": lambda future: future.result(0),
    "exception": lambda future: future.exception(0),
    "cancel": lambda future: future.cancel(),
    "abandon": lambda future: future.abandon(),
    "add_done_callback": lambda future: future.add_done_callback(bool),
}


unraisable = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # where it meets a finalizer


@unraisable
@pytest.mark.parametrize("begun", [False, True], ids=["waiting", "running"])
@pytest.mark.parametrize("name", CALLS)
def test_an_interrupted_caller_keeps_the_owner_from_nothing(name: str, begun: bool) -> None:
    """At each point of each call: the owner settles it, whoever else waits hears of it, and its callbacks are called once."""
    for interruption in interruptions():
        hand, place = Hand(), Place()
        future, called = Kept(), []
        future.owner, future.place = hand, place
        future.add_done_callback(called.append)
        if begun:
            future.set_running_or_notify_cancel()
        sleeper = _thread.allocate_lock()  # as of another thread that waits
        sleeper.acquire()
        future._sleepers = (sleeper, None)

        def call(future: Kept = future) -> None:
            with contextlib.suppress(FutureTimeout, CancelledError):
                CALLS[name](future)

        interruption.of(call)

        def settle(future: Kept = future, hand: Hand = hand) -> None:
            with contextlib.suppress(InvalidStateError):
                future.set_result(Encoded(()))
            hand.work()

        assert in_time(settle) is None, interruption.where
        assert sleeper.acquire(blocking=False), interruption.where
        came = in_time(lambda: future.exception(0))  # noqa: B023
        assert called == [future], interruption.where
        assert came is None or isinstance(came, CancelledError)
        assert future.place is None, interruption.where
        if name in {"cancel", "abandon"} and isinstance(came, CancelledError):
            assert place.left, interruption.where
            stopped = ["stopped"] if begun else []
            assert future.taken_back == ["taken back", *stopped], interruption.where
        else:
            assert future.taken_back == [], interruption.where


@unraisable
@pytest.mark.parametrize("name", ["cancel", "abandon", "add_done_callback"])
def test_an_interruption_that_is_an_error_of_the_system_comes_out(name: str) -> None:
    """TimeoutError, which signal handlers like to raise, is one to Python: nobody takes it for an owner that is gone."""
    for interruption in interruptions(error=TimeoutError):
        hand = Hand()
        future, called = Kept(), []
        future.owner = hand
        future.add_done_callback(called.append)
        was_interrupted = interruption.of(lambda: CALLS[name](future))  # noqa: B023
        assert was_interrupted == bool(interruption.where), interruption.where
        assert called == [], interruption.where
        future.cancel()
        hand.work()
        assert called == [future], interruption.where


@unraisable
@pytest.mark.parametrize("name", CALLS)
def test_an_interrupted_caller_of_one_that_has_ended_changes_nothing(name: str) -> None:
    """Whoever asks next is answered."""
    for interruption in interruptions():
        future = Kept()
        future.owner = Hand()
        future.set_exception(KeyError("no"))

        def call(future: Kept = future) -> None:
            with contextlib.suppress(KeyError):
                CALLS[name](future)

        interruption.of(call)
        assert isinstance(in_time(lambda: future.result(0)), KeyError), interruption.where  # noqa: B023
        assert len(futures.wait([future], 0).done) == 1


# -- as the standard library's -----------------------------------------------------------------------------------------

outcomes = st.one_of(st.integers(), st.sampled_from([KeyError("no"), OSError("gone")]))


class AsAFuture(RuleBasedStateMachine):
    """Random calls of one future, beside one of the standard library's, which says what is to come of each.

    Where the standard library calls it a defect, as to begin twice what was cancelled, it is not asked.
    """

    @initialize(has_owner=st.booleans())
    def make(self, has_owner: bool) -> None:
        self.hand = Hand() if has_owner else None
        self.ours: Future[Any] = owned(self.hand)
        self.model: Future[Any] = Future()
        self.called: dict[str, list[int]] = {"ours": [], "model": []}
        self.added = 0
        self.was_begun = False

    def both(self, call: Callable[[Future[Any]], object]) -> None:
        came = []
        for future in (self.model, self.ours):
            try:
                came.append((call(future), None))
            except Exception as error:
                came.append((type(error), None if isinstance(error, RuntimeError) else str(error)))
            if future is self.ours and self.hand is not None:
                self.hand.work()
        model, ours = came
        is_refused = model[0] is InvalidStateError or ours[0] is InvalidStateError
        assert model[0] == ours[0] if is_refused else model == ours

    @rule()
    def cancel(self) -> None:
        self.both(lambda future: future.cancel())

    @rule()
    def begin(self) -> None:
        if not (self.was_begun and self.model.cancelled()):
            self.was_begun = True
            self.both(lambda future: future.set_running_or_notify_cancel())

    @rule(outcome=outcomes)
    def settle(self, outcome: object) -> None:
        if isinstance(outcome, BaseException):
            self.both(lambda future: future.set_exception(outcome))
        else:
            self.both(lambda future: future.set_result(outcome))

    @rule(raises=st.booleans())
    def add_callback(self, raises: bool) -> None:
        self.added += 1
        number = self.added

        def callback(future: Future[Any]) -> None:
            self.called["ours" if future is self.ours else "model"].append(number)
            if raises:
                raise ValueError("no")

        self.both(lambda future: future.add_done_callback(callback))

    @rule()
    def ask(self) -> None:
        self.both(lambda future: future.result(0))
        self.both(lambda future: repr(future.exception(0)))
        self.both(lambda future: future.done())
        if not self.model.cancelled() or self.was_begun:  # else it is told only once somebody would begin it
            self.both(lambda future: len(futures.wait([future], 0).done))
            self.both(lambda future: len([*futures.as_completed([future], 0)]))

    @invariant()
    def says_the_same(self) -> None:
        for ask in ("done", "running", "cancelled"):
            assert getattr(self.ours, ask)() == getattr(self.model, ask)(), ask
        assert self.called["ours"] == self.called["model"]


TestAsAFuture = AsAFuture.TestCase
TestAsAFuture.__doc__ = "Whatever it is asked in whatever order, it says what the standard library's says."
TestAsAFuture.settings = settings(max_examples=60, stateful_step_count=20)
