"""The batcher: nothing lost, nothing twice, nothing out of order, nothing too late, never too much at once."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any

import pytest
from attrs import define, field
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.clocks import FakeClock, FakeTimers
from torchmgmt.answer_future import AnswerFuture
from torchmgmt.batch import Batch
from torchmgmt.batcher import Batcher
from torchmgmt.errors import (
    DeadlineExceeded,
    InvalidArgument,
    ManagerClosed,
    ModelNotFound,
    QueueFull,
    WrongNumberOfAnswers,
)
from torchmgmt.records import ModelKey

WAIT_S = 30


def double(items: list[int]) -> list[int]:
    return [2 * item for item in items]


class Bench:
    """A Batcher on a fake clock. What it cuts is taken at once if ``eager``, else when the test says so."""

    def __init__(self, *, eager: bool = True, cuts_early: bool = False, **options: Any) -> None:
        self.clock = FakeClock()
        self.timers = FakeTimers(self.clock)
        self.eager = eager
        self.announced = 0
        self.batches: list[Batch[Any, Any]] = []
        self.on_batch: Callable[[Batch[Any, Any]], None] = self.batches.append
        self.batcher: Batcher[Any, Any] = Batcher(
            clock=self.clock,
            dispatcher=self.timers,
            on_ready=self._on_ready,
            cuts_early=cuts_early,
            **options,
        )

    def _on_ready(self) -> None:
        self.announced += 1
        if self.eager:
            self.take_all()

    def take_all(self) -> None:
        while (batch := self.batcher.take()) is not None:
            self.on_batch(batch)

    def submit(self, item: Any = None, **options: Any) -> Future[Any]:
        return self.batcher.submit(item, **options)

    def taken(self) -> list[list[Any]]:
        return [batch.items for batch in self.batches]


# -- cutting -----------------------------------------------------------------------------------------------------------


def test_a_full_batch_does_not_wait():
    """When batch_size items are there, they leave at once."""
    bench = Bench(batch_size=3, max_batch_delay=100)
    for item in range(7):
        bench.submit(item)
    assert bench.taken() == [[0, 1, 2], [3, 4, 5]]
    assert len(bench.batcher) == 1


def test_an_item_waits_exactly_as_long_as_it_may():
    """A batch that does not fill leaves when its oldest item has waited max_batch_delay, not earlier and not later."""
    bench = Bench(batch_size=3, max_batch_delay=100)
    bench.submit("a")
    bench.timers.advance(0.06)
    bench.submit("b")
    bench.timers.advance(0.03)
    assert bench.taken() == []
    bench.timers.advance(0.02)
    assert bench.taken() == [["a", "b"]]


def test_without_delay_nothing_waits():
    """max_batch_delay=0 sends each item on as it comes."""
    bench = Bench(batch_size=8, max_batch_delay=0)
    for item in range(3):
        bench.submit(item)
    assert bench.taken() == [[0], [1], [2]]
    assert len(bench.timers) == 0


def test_what_is_left_over_is_timed_from_its_own_arrival():
    """An item that did not fit into the last batch waits its own delay, no longer."""
    bench = Bench(batch_size=2, max_batch_delay=100, eager=False)
    bench.submit("a")
    bench.timers.advance(0.05)
    bench.submit("b")
    bench.submit("c")
    bench.take_all()
    bench.eager = True
    assert bench.taken() == [["a", "b"]]
    bench.timers.advance(0.099)
    assert bench.taken() == [["a", "b"]]
    bench.timers.advance(0.002)
    assert bench.taken() == [["a", "b"], ["c"]]


def test_a_consumer_that_was_busy_finds_what_has_waited():
    """take gives what is due whenever it is called, not only when it was announced."""
    bench = Bench(batch_size=4, max_batch_delay=10, eager=False)
    for item in range(6):
        bench.submit(item)
    bench.timers.advance(1)
    bench.take_all()
    assert bench.taken() == [[0, 1, 2, 3], [4, 5]]


def test_nothing_due_is_no_batch():
    """take never gives an empty batch, nor one that should still wait."""
    bench = Bench(batch_size=2, eager=False)
    assert bench.batcher.take() is None
    bench.submit(1)
    assert bench.batcher.take() is None


def test_draining_cuts_what_waits_and_refuses_more():
    """After drain what was accepted leaves at once, and new items get the given error."""
    bench = Bench(batch_size=8)
    bench.submit(1)
    bench.batcher.drain(ModelNotFound("noop"))
    bench.batcher.drain()
    assert bench.taken() == [[1]]
    with pytest.raises(ModelNotFound, match="noop"):
        bench.submit(2)


def test_refusing_for_ever_costs_nothing():
    """The error of a closed batcher does not collect the frames, and with them the items, of all who were refused."""
    bench = Bench()
    bench.batcher.drain(ModelNotFound("noop"))
    lengths = set()
    for item in range(20):
        with pytest.raises(ModelNotFound) as caught:
            bench.submit(item)
        lengths.add(len(caught.traceback))
    assert len(lengths) == 1


# -- capacity ----------------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_says_when_to_come_back():
    """One item more than capacity is refused with QueueFull, and nothing else changes."""
    bench = Bench(batch_size=10, capacity=3, max_batch_delay=2500, name="noop:1.0")
    for item in range(3):
        bench.submit(item)
    with pytest.raises(QueueFull) as caught:
        bench.submit(3)
    assert (caught.value.queue, caught.value.capacity) == ("noop:1.0", 3)
    assert caught.value.retry_after_s >= 2.5
    bench.timers.advance(2.5)
    assert bench.taken() == [[0, 1, 2]]
    bench.submit(3)


def test_there_is_always_a_time_to_come_back_after():
    """retry_after_s is at least a second, the smallest that Retry-After can say."""
    bench = Bench(eager=False, capacity=1, max_batch_delay=0)
    bench.submit(1)
    with pytest.raises(QueueFull) as caught:
        bench.submit(2)
    assert caught.value.retry_after_s >= 1


def test_what_was_cancelled_takes_no_place():
    """A waiting item that was taken back makes room, is not counted, and never runs."""
    bench = Bench(batch_size=10, capacity=2)
    first, _second = bench.submit(1), bench.submit(2)
    assert first.cancel()
    assert len(bench.batcher) == 1
    bench.submit(3)
    bench.batcher.drain()
    assert bench.taken() == [[2, 3]]


# -- time limits -------------------------------------------------------------------------------------------------------


def test_a_waiting_item_fails_at_its_deadline_and_never_runs():
    """What was not started in its time ends with DeadlineExceeded at that time, and makes room."""
    bench = Bench(batch_size=10, capacity=1, max_batch_delay=1000, name="noop")
    future = bench.submit(1, timeout=0.5)
    bench.timers.advance(0.499)
    assert not future.done()
    bench.timers.advance(0.002)
    with pytest.raises(DeadlineExceeded) as caught:
        future.result(0)
    assert caught.value.limit_s == 0.5
    assert "noop" in str(caught.value)
    bench.submit(2)
    bench.timers.advance(1)
    assert bench.taken() == [[2]]


def test_a_running_item_fails_at_its_deadline_too():
    """Who gave a limit is answered by then, even if the batch runs on; its late answer is dropped."""
    bench = Bench()
    slow, other = bench.submit(1, timeout=1), bench.submit(2)
    assert bench.taken() == [[1], [2]]
    bench.timers.advance(1)
    assert isinstance(slow.exception(0), DeadlineExceeded)
    for batch in bench.batches:
        batch.finish(["late"])
    assert isinstance(slow.exception(0), DeadlineExceeded)
    assert other.result(0) == "late"


def test_a_limit_of_zero_is_over_at_once():
    """timeout=0 never runs."""
    bench = Bench(batch_size=1)
    future = bench.submit(1, timeout=0)
    bench.timers.advance(0)
    assert isinstance(future.exception(0), DeadlineExceeded)
    assert bench.taken() == []


def test_a_limit_for_waiting_ends_only_what_waits():
    """wait_timeout fails an item that was not started by then, names itself as the limit, and does not hurry the rest."""
    bench = Bench(batch_size=1, eager=False)
    started, waiting = bench.submit(1, wait_timeout=1, timeout=5), bench.submit(2, wait_timeout=1)
    bench.batches.append(bench.batcher.take())
    bench.timers.advance(1)
    assert waiting.exception(0).limit_s == 1
    assert not started.done()
    bench.take_all()
    assert bench.taken() == [[1]]
    bench.timers.advance(4)
    assert started.exception(0).limit_s == 5


def test_more_priority_goes_first():
    """Of what waits, the highest priority leaves first, and what has the same in the order in which it came."""
    bench = Bench(batch_size=10, eager=False)
    for item, priority in [("a", 0), ("b", 5), ("c", -1), ("d", 5), ("e", 0)]:
        bench.submit(item, priority=priority)
    bench.timers.advance(1)
    bench.take_all()
    assert bench.taken() == [["b", "d", "a", "e", "c"]]


def test_priority_ages():
    """What has little priority is passed for as many seconds as it has less of it, and then no more."""
    bench = Bench(batch_size=1, eager=False)
    bench.submit("low", priority=-2)
    for second in range(4):
        bench.submit(f"normal {second}")
        bench.timers.advance(1)
    bench.take_all()
    assert [items[0] for items in bench.taken()] == ["normal 0", "normal 1", "low", "normal 2", "normal 3"]


def test_the_oldest_is_timed_wherever_it_stands():
    """An item that others have passed is still cut when it has waited max_batch_delay."""
    bench = Bench(batch_size=3, max_batch_delay=100)
    bench.submit("first")
    bench.timers.advance(0.09)
    bench.submit("urgent", priority=10)
    bench.timers.advance(0.01)
    assert bench.taken() == [["urgent", "first"]]


@pytest.mark.parametrize("priority", [11, -11, True, 1.5, "1", None])
def test_a_priority_out_of_its_range_is_refused(priority: Any):
    """A wrong priority is an error that says what is allowed."""
    with pytest.raises(InvalidArgument, match="from -10 to 10"):
        Bench().submit(1, priority=priority)


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), "1", True, 10**400])
def test_a_limit_that_is_no_number_of_seconds_is_refused(timeout: Any):
    """A wrong timeout is an error that names it, and the item is not accepted."""
    bench = Bench(batch_size=2)
    with pytest.raises(InvalidArgument) as caught:
        bench.submit(1, timeout=timeout)
    assert caught.value.argument == "timeout"
    assert len(bench.batcher) == 0


@pytest.mark.parametrize(
    "options, argument",
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"max_batch_delay": -1}, "max_batch_delay"),
        ({"max_batch_delay": 0.5}, "max_batch_delay"),
        ({"max_batch_delay": 10**400}, "max_batch_delay"),
        ({"capacity": 0}, "capacity"),
        ({"capacity": None}, "capacity"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(options: dict[str, Any], argument: str):
    """A Batcher that could never work cannot be made."""
    with pytest.raises(InvalidArgument) as caught:
        Batcher(double, **options)
    assert caught.value.argument == argument


def test_without_a_function_somebody_else_has_to_take():
    """A queue that nobody would empty cannot be made."""
    with pytest.raises(InvalidArgument, match="on_ready and dispatcher"):
        Batcher()


def test_deadlines_do_not_keep_answers_alive():
    """A request that was answered leaves nothing behind, long before its limit."""

    class Item:
        pass

    bench = Bench()
    item, answer = Item(), Item()
    future = bench.submit(item, timeout=1000)
    bench.batches.pop().finish([answer])
    assert future.result(0) is answer
    gone = [weakref.ref(each) for each in (item, answer, future)]
    del item, answer, future
    gc.collect()
    assert [each() for each in gone] == [None, None, None]


def test_the_deadlines_of_ended_requests_are_swept_out():
    """A flood of answered requests with long limits does not grow the batcher."""
    bench = Bench()
    for item in range(20_000):
        bench.submit(item, timeout=1000)
        bench.batches.pop().finish([item])
    assert len(bench.batcher._deadlines) <= 1000


def test_a_steady_load_needs_few_timers():
    """However many requests run with however long limits, a timer or two are pending, not one for each."""
    bench = Bench(batch_size=2, max_batch_delay=10)
    requests = 2000
    most = 0
    for item in range(requests):
        bench.submit(item, timeout=1.0)  # never answered: they all run into their limits
        bench.timers.advance(0.02)
        most = max(most, len(bench.timers))
    assert most <= 3
    assert bench.timers.armed_in_all <= 3 * requests


class CancelledWhileLookedAt(Future[Any]):
    """A future whose owner takes it back just after somebody has seen that it is not done."""

    meddle = False

    def done(self) -> bool:
        was_done = super().done()
        if self.meddle:
            self.meddle = False
            self.cancel()
        return was_done


def test_cancelling_at_the_moment_of_the_deadline_harms_nobody():
    """If a request is taken back just as its time is over, the others of its batch still run."""
    bench = Bench(batch_size=2, eager=False)
    meddled = CancelledWhileLookedAt()
    bench.batcher.queue(1, meddled, 1, None, 0)
    other = bench.submit(2)
    bench.timers.advance(0.5)
    meddled.meddle = True
    bench.timers.advance(0.5)
    assert meddled.cancelled()
    bench.take_all()
    assert bench.taken() == [[2]]
    bench.batches[0].finish(["fine"])
    assert other.result(0) == "fine"
    with pytest.raises(CancelledError):
        meddled.result(0)


# -- outcomes ----------------------------------------------------------------------------------------------------------


def test_an_exception_among_the_answers_fails_its_item_alone():
    """Each item gets its own outcome."""
    bench = Bench(batch_size=3)
    futures = [bench.submit(n) for n in range(3)]
    error = KeyError("second")
    bench.batches[0].finish(["first", error, "third"])
    assert futures[0].result(0) == "first"
    assert futures[1].exception(0) is error
    assert futures[2].result(0) == "third"


@pytest.mark.parametrize("answers", [[], ["one"], ["one", "two", "three"]], ids=len)
def test_a_wrong_number_of_answers_fails_all_and_names_both_numbers(answers: list[str]):
    """When nobody can tell whose answer is whose, nobody gets one."""
    bench = Bench(batch_size=2)
    futures = [bench.submit(n) for n in range(2)]
    bench.batches[0].finish(answers)
    for future in futures:
        error = future.exception(0)
        assert isinstance(error, WrongNumberOfAnswers)
        assert (error.expected, error.got) == (2, len(answers))


def test_failing_what_waits_counts_what_it_failed():
    """fail_waiting answers those who wait, spares those who run or were taken back, and says how many it answered."""
    bench = Bench(batch_size=10, eager=False)
    futures = [bench.submit(n) for n in range(4)]
    futures[0].cancel()
    error = ManagerClosed()
    assert bench.batcher.fail_waiting(error) == 3
    assert bench.batcher.fail_waiting(error) == 0
    errors = [each.exception(0) for each in futures[1:]]
    assert [str(each) for each in errors] == [str(error)] * 3
    assert len({id(each) for each in errors}) == 3, "what one caller raises would be seen in another's traceback"
    assert len(bench.batcher) == 0


def test_a_caller_may_bring_the_future():
    """The future that was given is the one that is answered."""
    bench = Bench()
    future: Future[Any] = Future()
    bench.batcher.queue(1, future, None, None, 0)
    bench.batches[0].finish(["answer"])
    assert future.result(0) == "answer"


def test_callbacks_run_without_a_lock_held():
    """Whoever is told of an end, an expiry or a batch may use the batcher."""
    bench = Bench(batch_size=2, max_batch_delay=1000)
    seen: list[str] = []

    def submit(why: str, **options: Any) -> None:
        def use(_future: Future[Any]) -> None:
            assert bench.batcher.take() is None
            seen.append(f"{why}, {len(bench.batcher)} waiting")

        bench.submit(why, **options).add_done_callback(use)

    submit("answered")
    bench.submit("another")
    bench.batches.pop().finish(["yes", "yes"])
    submit("failed")
    bench.batcher.fail_waiting(ManagerClosed())
    submit("expired", timeout=0.1)
    bench.timers.advance(0.1)
    assert seen == ["answered, 0 waiting", "failed, 0 waiting", "expired, 0 waiting"]


# -- any interleaving --------------------------------------------------------------------------------------------------


@define(eq=False)
class Request:
    """What the model of the rules knows of one accepted request."""

    number: int
    since: float
    priority: int
    deadline: float | None
    start_by: float | None
    future: Future[Any]
    started: bool = False
    ends: list[str] = field(factory=list)

    @property
    def waits(self) -> bool:
        return not self.started and not self.future.done()

    @property
    def rank(self) -> tuple[float, int]:
        """A step of priority is worth a second of waiting."""
        return self.since - self.priority, self.number


class BatcherRules(RuleBasedStateMachine):
    """Random calls on a fake clock whose timers are exact, against the laws of the queue.

    An eager consumer calls take() from on_ready and at no other time: the announcements have to suffice. A lazy one
    takes when it likes.
    """

    @initialize(
        eager=st.booleans(),
        cuts_early=st.booleans(),
        batch_size=st.integers(1, 4),
        delay_ms=st.integers(0, 50),
        capacity=st.integers(1, 8),
    )
    def begin(self, batch_size: int, delay_ms: int, **options: Any) -> None:
        self.bench = Bench(batch_size=batch_size, max_batch_delay=delay_ms, **options)
        self.bench.on_batch = self.started
        self.delay_s = delay_ms / 1000
        self.requests: list[Request] = []
        self.running: list[Batch[Any, Any]] = []
        self.drained = False

    @property
    def waiting(self) -> list[Request]:
        return [request for request in self.requests if request.waits]

    def started(self, batch: Batch[Any, Any]) -> None:
        assert 1 <= len(batch) <= self.bench.batcher.batch_size
        for request in batch.items:
            assert not request.started, "an item was cut twice"
            assert not request.future.done(), "an item runs although it has ended"
            assert request.deadline is None or self.bench.clock.now < request.deadline, "an expired item runs"
            assert request.start_by is None or self.bench.clock.now < request.start_by, "one that waited too long runs"
            request.started = True
        ranks = [request.rank for request in batch.items]
        assert ranks == sorted(ranks), "items were reordered"
        assert all(request.rank > ranks[-1] for request in self.waiting), "an item was passed over"
        self.running.append(batch)

    @rule(
        timeout_ms=st.none() | st.integers(0, 80),
        wait_ms=st.none() | st.integers(0, 80),
        priority=st.just(0) | st.integers(-10, 10),
    )
    def submit(self, timeout_ms: int | None, wait_ms: int | None, priority: int) -> None:
        now = self.bench.clock.now
        timeout = None if timeout_ms is None else timeout_ms / 1000
        wait_timeout = None if wait_ms is None else wait_ms / 1000
        future: Future[Any] = Future()
        deadline = None if timeout is None else now + timeout
        start_by = None if wait_timeout is None else now + wait_timeout
        request = Request(len(self.requests), now, priority, deadline, start_by, future)
        waiting = len(self.waiting)
        if self.drained:
            with pytest.raises(ModelNotFound):
                self.bench.batcher.queue(request, future, timeout, wait_timeout, priority)
            return
        if waiting == self.bench.batcher.capacity:
            with pytest.raises(QueueFull):
                self.bench.batcher.queue(request, future, timeout, wait_timeout, priority)
            return
        future.add_done_callback(lambda done: request.ends.append("cancelled" if done.cancelled() else "answered"))
        self.requests.append(request)
        self.bench.batcher.queue(request, future, timeout, wait_timeout, priority)
        self.bench.timers.advance(0)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        could = request.waits or request.future.cancelled()
        assert request.future.cancel() is could

    @rule(ms=st.integers(0, 60))
    def advance(self, ms: int) -> None:
        self.bench.timers.advance(ms / 1000)

    @precondition(lambda self: not self.bench.eager)
    @rule()
    def take(self) -> None:
        batch = self.bench.batcher.take()
        if batch is not None:
            self.started(batch)

    @rule()
    def tick(self) -> None:
        self.bench.batcher.tick()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), how=st.sampled_from(["answers", "some fail", "too few", "all fail"]))
    def finish(self, data: st.DataObject, how: str) -> None:
        batch = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        late = [request.future.done() for request in batch.items]
        errors = [KeyError(request.number) for request in batch.items]
        if how == "too few":
            batch.finish([0] * (len(batch) - 1))
        elif how == "all fail":
            batch.fail(errors[0])
        else:
            batch.finish(
                [
                    error if how == "some fail" and request.number % 2 else request.number
                    for request, error in zip(batch.items, errors, strict=True)
                ]
            )
        for request, error, was_late in zip(batch.items, errors, late, strict=True):
            outcome = request.future.exception(0) or request.future.result(0)
            if was_late:
                assert isinstance(outcome, DeadlineExceeded)
            elif how == "too few":
                assert isinstance(outcome, WrongNumberOfAnswers)
            elif how == "all fail":
                assert repr(outcome) == repr(errors[0])
            else:
                assert outcome is (error if how == "some fail" and request.number % 2 else request.number)

    @rule()
    def fail_waiting(self) -> None:
        waiting = self.waiting
        assert self.bench.batcher.fail_waiting(ManagerClosed()) == len(waiting)
        assert all(isinstance(request.future.exception(0), ManagerClosed) for request in waiting)

    @precondition(lambda self: len(self.requests) > 10 and not self.drained)
    @rule()
    def drain(self) -> None:
        self.drained = True
        self.bench.batcher.drain(ModelNotFound("m"))

    @invariant()
    def it_counts_what_waits_and_never_holds_too_much(self) -> None:
        if hasattr(self, "bench"):
            assert len(self.bench.batcher) == len(self.waiting) <= self.bench.batcher.capacity

    @invariant()
    def nobody_is_kept_past_a_limit(self) -> None:
        if not hasattr(self, "bench"):
            return
        now = self.bench.clock.now
        for request in self.requests:
            assert request.deadline is None or now < request.deadline or request.future.done()
            assert not request.waits or request.start_by is None or now < request.start_by
        if self.bench.eager:
            waiting = self.waiting
            assert len(waiting) < self.bench.batcher.batch_size
            assert not (waiting and self.drained)
            assert all(now < request.since + self.delay_s for request in waiting)

    @invariant()
    def no_more_timers_are_pending_than_are_of_use(self) -> None:
        if hasattr(self, "bench"):
            times = self.bench.timers.times()
            assert len(set(times)) == len(times)

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.bench.batcher.drain()
        self.bench.take_all()
        for batch in self.running:
            batch.finish(batch.items)
        assert self.bench.batcher.close() == 0
        for request in self.requests:
            assert request.future.done()
            assert len(request.ends) == 1, "a request ended more than once, or never"
            assert request.started or request.future.cancelled() or request.future.exception(0) is not None
        self.bench.timers.advance(10)
        assert len(self.bench.timers) == 0


class TestBatcherRules(BatcherRules.TestCase):
    """Whatever callers, consumers and the clock do, the laws of the queue hold."""

    settings = settings(max_examples=150, stateful_step_count=50)


@given(
    gaps_ms=st.lists(st.integers(0, 30), min_size=1, max_size=60),
    batch_size=st.integers(1, 5),
    delay_ms=st.integers(0, 40),
)
def test_every_batch_is_cut_by_size_or_by_time(gaps_ms: list[int], batch_size: int, delay_ms: int):
    """Without limits and cancellations, a batch is full, or its oldest item has waited exactly the delay."""
    bench = Bench(batch_size=batch_size, max_batch_delay=delay_ms, capacity=1000)
    cut_at: list[float] = []
    since: list[float] = []
    bench.on_batch = lambda batch: (bench.batches.append(batch), cut_at.append(bench.clock.now))
    for number, gap_ms in enumerate(gaps_ms):
        bench.timers.advance(gap_ms / 1000)
        since.append(bench.clock.now)
        bench.submit(number)
    bench.timers.advance(1)
    assert [item for items in bench.taken() for item in items] == list(range(len(gaps_ms)))
    for items, when in zip(bench.taken(), cut_at, strict=True):
        if len(items) < batch_size:
            assert when == since[items[0]] + delay_ms / 1000
        else:
            assert when == since[items[-1]]


# -- around a function -------------------------------------------------------------------------------------------------


class Gate:
    """A function for a Batcher that stops before each batch until it is let through, and remembers what it ran."""

    def __init__(self, function: Callable[[list[Any]], Sequence[Any]] = double) -> None:
        self.entered = threading.Semaphore(0)
        self.let_through = threading.Semaphore(0)
        self.ran: list[list[Any]] = []
        self.threads: set[threading.Thread] = set()
        self._function = function

    def __call__(self, items: list[Any]) -> Sequence[Any]:
        self.threads.add(threading.current_thread())
        self.ran.append(items)
        self.entered.release()
        assert self.let_through.acquire(timeout=WAIT_S)
        return self._function(items)

    def open(self, times: int = 1000) -> None:
        self.let_through.release(times)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


def test_many_callers_are_all_answered_in_their_order():
    """8 threads with 200 items each get every answer, their own, and each caller's items run in its order."""
    ran: list[tuple[int, int]] = []
    sizes: list[int] = []

    def answer(items: list[tuple[int, int]]) -> list[tuple[int, int]]:
        ran.extend(items)
        sizes.append(len(items))
        return items

    def call(caller: int) -> list[Future[tuple[int, int]]]:
        return [batcher.submit((caller, number)) for number in range(200)]

    with Batcher(answer, batch_size=16, max_batch_delay=1, capacity=1600) as batcher, ThreadPoolExecutor(8) as callers:
        futures = list(callers.map(call, range(8)))
        for caller, mine in enumerate(futures):
            assert [future.result(WAIT_S) for future in mine] == [(caller, number) for number in range(200)]
    assert len(ran) == 1600
    for caller in range(8):
        assert [number for who, number in ran if who == caller] == list(range(200))
    assert max(sizes) <= 16


def test_callers_with_limits_and_second_thoughts_are_all_answered():
    """With time limits, cancellations and a full queue at once, every accepted item ends, and runs at most once."""
    ran: list[int] = []

    def answer(items: list[int]) -> list[int]:
        ran.extend(items)
        return items

    def call(caller: int) -> list[tuple[int, Future[int]]]:
        rng = random.Random(caller)
        accepted = []
        for number in range(caller * 1000, caller * 1000 + 200):
            try:
                future = batcher.submit(number, timeout=rng.choice([None, 0, 0.001, 10]))
            except QueueFull:
                continue
            accepted.append((number, future))
            if rng.random() < 0.3:
                future.cancel()
        return accepted

    with Batcher(answer, batch_size=4, max_batch_delay=1, capacity=20) as batcher, ThreadPoolExecutor(8) as callers:
        accepted = [each for some in callers.map(call, range(8)) for each in some]
    assert len(set(ran)) == len(ran)
    assert all(future.done() for _, future in accepted)
    for number, future in accepted:
        if not future.cancelled() and future.exception(0) is None:
            assert future.result(0) == number
        elif not future.cancelled():
            assert isinstance(future.exception(0), DeadlineExceeded)
        if future.cancelled():
            assert number not in ran


def test_a_function_that_raises_fails_its_batch_only():
    """The items of the batch get what the function raised; the next batch runs."""
    error = ValueError("odd")

    def answer(items: list[int]) -> list[int]:
        if items[0] % 2:
            raise error
        return items

    with Batcher(answer) as batcher:
        futures = [batcher.submit(n) for n in range(6)]
        assert [future.exception(WAIT_S) for future in futures] == [None, error] * 3


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_not_even_an_exit_ends_the_thread(error: BaseException):
    """What a function raises to end the program reaches who asked, and the thread lives on."""
    threads: list[threading.Thread] = []

    def answer(items: list[int]) -> list[int]:
        threads.append(threading.current_thread())
        if len(threads) == 1:
            raise error
        return items

    with Batcher(answer) as batcher:
        assert batcher.submit(1).exception(WAIT_S) is error
        assert batcher.submit(2).result(WAIT_S) == 2
    assert threads[0] is threads[1]


@pytest.mark.parametrize("got", [0, 1, 3])
def test_a_function_with_a_wrong_number_of_answers_is_told_so(got: int):
    """Both numbers are in the error that every item of the batch gets."""
    with Batcher(lambda items: [0] * got, batch_size=2, cuts_early=False) as batcher:
        futures = [batcher.submit(n) for n in range(2)]
        for future in futures:
            with pytest.raises(WrongNumberOfAnswers, match=f"batch of 2 was answered with {got} answers"):
                future.result(WAIT_S)


def test_a_function_without_answers_fails_its_batch():
    """A function that forgot to return is an error, not a hang."""
    with Batcher(lambda items: None) as batcher:  # type: ignore[arg-type,return-value]
        assert isinstance(batcher.submit(1).exception(WAIT_S), TypeError)


def test_an_outcome_that_is_an_exception_fails_its_item_alone():
    """A function may answer some items and fail others."""
    errors = {1: KeyError(1), 3: KeyError(3)}
    with Batcher(lambda items: [errors.get(item, item) for item in items], batch_size=4) as batcher:
        futures = [batcher.submit(n) for n in range(4)]
        assert [future.exception(WAIT_S) for future in futures] == [None, errors[1], None, errors[3]]


def test_no_thread_before_the_first_item_and_none_after_close():
    """A Batcher costs a thread only while it is used."""
    before = threading.active_count()
    batcher = Batcher(double)
    assert threading.active_count() == before
    batcher.submit(1).result(WAIT_S)
    assert threading.active_count() == before + 1
    batcher.close()
    assert threading.active_count() == before


def test_closing_runs_what_waits_and_refuses_what_comes(gate: Gate):
    """What was accepted before close is answered, however long its batch would have waited."""
    batcher = Batcher(gate, batch_size=4, max_batch_delay=1_000_000, capacity=100, cuts_early=False)
    futures = [batcher.submit(n) for n in range(10)]
    assert gate.entered.acquire(timeout=WAIT_S)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(batcher.close)
        gate.open()
        assert closing.result(WAIT_S) == 0
    assert [future.result(0) for future in futures] == [2 * n for n in range(10)]
    assert gate.ran == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    with pytest.raises(ManagerClosed):
        batcher.submit(1)
    assert batcher.close() == 0


def test_closing_at_any_moment_loses_nothing():
    """However soon after the last item a Batcher is closed, that item runs."""
    for _ in range(300):
        batcher = Batcher(double, batch_size=2, max_batch_delay=1_000_000, cuts_early=False)
        future = batcher.submit(21)
        assert batcher.close() == 0
        assert future.result(0) == 42


def test_a_close_that_may_not_wait_fails_what_waits(gate: Gate):
    """After its time close answers those who still wait with an error, and says how many; what runs is answered."""
    batcher = Batcher(gate)
    futures = [batcher.submit(n) for n in range(4)]
    assert gate.entered.acquire(timeout=WAIT_S)
    assert batcher.close(timeout=0) == 3
    assert all(isinstance(future.exception(0), ManagerClosed) for future in futures[1:])
    gate.open()
    assert futures[0].result(WAIT_S) == 0
    assert gate.ran == [[0]]
    for thread in gate.threads:
        thread.join(WAIT_S)


def test_a_function_may_close_and_feed_its_own_batcher():
    """Neither submitting nor closing from within the function waits for itself."""
    later: list[Future[int]] = []

    def answer(items: list[int]) -> list[int]:
        if items == [1]:
            later.append(batcher.submit(2))
        else:
            batcher.close()
        return items

    batcher = Batcher(answer)
    assert batcher.submit(1).result(WAIT_S) == 1
    assert later[0].result(WAIT_S) == 2
    assert batcher.close() == 0


def test_a_full_queue_of_a_busy_function_refuses(gate: Gate):
    """Capacity counts what waits, not what runs; QueueFull says when to try again."""
    with Batcher(gate, capacity=2, name="digits") as batcher:
        running = batcher.submit(0)
        assert gate.entered.acquire(timeout=WAIT_S)
        waiting = [batcher.submit(n) for n in (1, 2)]
        with pytest.raises(QueueFull, match="digits is full: 2 requests") as caught:
            batcher.submit(3)
        assert caught.value.retry_after_s > 0
        waiting[0].cancel()
        waiting.append(batcher.submit(3))
        gate.open()
        assert [future.result(WAIT_S) for future in (running, *waiting[1:])] == [0, 4, 6]
    assert gate.ran == [[0], [2], [3]]


def test_time_limits_hold_while_the_function_idles():
    """A waiting item fails at its limit by itself, with nobody else calling."""
    with Batcher(double, batch_size=2, max_batch_delay=1_000_000, cuts_early=False) as batcher:
        assert isinstance(batcher.submit(1, timeout=0.01).exception(WAIT_S), DeadlineExceeded)


def test_an_earlier_end_wakes_the_waiting_thread():
    """An item with a nearer limit than all others is not late because the thread sleeps for them."""
    with Batcher(double, batch_size=3, max_batch_delay=1_000_000, cuts_early=False) as batcher:
        far = batcher.submit(1, timeout=3600)
        near = batcher.submit(2, timeout=0.01)
        assert isinstance(near.exception(WAIT_S), DeadlineExceeded)
        assert not far.done()


def test_items_that_come_one_by_one_each_leave_in_time():
    """Batches that never fill are cut by the clock, over and over, without anybody's help."""
    with Batcher(double, batch_size=1000, max_batch_delay=1) as batcher:
        for item in range(300):
            assert batcher.submit(item, timeout=3600 if item % 3 else None).result(WAIT_S) == 2 * item


def test_delays_of_centuries_are_fine():
    """Waiting longer than the system can count does not end the thread."""
    with Batcher(double, batch_size=2, max_batch_delay=10**14, cuts_early=False) as batcher:
        futures = [batcher.submit(1, timeout=1e15)]
        for thread in threading.enumerate():
            if thread.name == "torchmgmt-batcher":
                thread.join(0.05)  # it would die of it
        futures.append(batcher.submit(2))
        assert [future.result(WAIT_S) for future in futures] == [2, 4]


def test_waiting_costs_no_work():
    """A thread that waits for a batch to fill sleeps: it looks at the clock a few times, not all the time."""
    looks = 0
    enough = threading.Event()
    clock = FakeClock()

    def counting_clock() -> float:
        nonlocal looks
        looks += 1
        if looks > 1000:
            enough.set()
        return clock.now

    with Batcher(double, batch_size=2, clock=counting_clock) as batcher:
        batcher.submit(1)
        assert not enough.wait(0.2)
        clock.now += 1000


def test_a_batcher_with_a_function_forgets_what_it_has_answered():
    """Between two batches nothing of the last one is kept."""

    class Item:
        pass

    with Batcher(lambda items: items) as batcher:
        item = Item()
        gone = weakref.ref(item)
        future = batcher.submit(item, timeout=1000)
        assert future.result(WAIT_S) is item
        del item, future
        assert batcher.submit("another").result(WAIT_S) == "another"
        gc.collect()
        assert gone() is None


def test_taking_back_and_running_never_both_happen(gate: Gate):
    """cancel says True exactly for those who never run."""
    gate.open()
    with Batcher(gate, batch_size=3, max_batch_delay=0, capacity=10_000) as batcher:
        futures = {n: batcher.submit(n) for n in range(500)}
        cancelled = {n for n, future in futures.items() if n % 2 and future.cancel()}
        wait(futures.values(), WAIT_S)
    ran = {item for items in gate.ran for item in items}
    assert ran == set(futures) - cancelled


def test_it_says_what_it_is():
    """repr names the queue and counts."""
    bench = Bench(batch_size=8, capacity=5, name="noop:1.0")
    bench.submit(1)
    assert repr(bench.batcher) == "<Batcher of noop:1.0: 1 of 5 waiting, batch_size=8>"


# -- given back --------------------------------------------------------------------------------------------------------

KEY = ModelKey("m", "1.0")


def ask(
    bench: Bench, item: str, *, timeout: float | None = None, wait: float | None = None, priority: int = 0
) -> AnswerFuture:
    future = AnswerFuture(KEY)
    bench.batcher.queue(item, future, timeout, wait, priority)
    return future


def test_what_is_given_back_waits_in_its_place():
    """Before what came later and behind what has more priority; it counts as waiting again."""
    bench = Bench(batch_size=2, eager=False)
    first = [ask(bench, "a"), ask(bench, "b")]
    batch = bench.batcher.take()
    bench.timers.advance(0.01)
    ask(bench, "c")
    ask(bench, "urgent", priority=10)
    assert all(future.running() for future in first)
    assert batch.give_back()
    assert not any(future.running() for future in first)
    assert len(bench.batcher) == 4
    bench.take_all()
    bench.timers.advance(1)
    assert bench.taken() == [["urgent", "a"], ["b", "c"]]


def test_what_is_given_back_can_be_cancelled_and_is_then_never_run():
    """As before it was cut; what was abandoned meanwhile does not come back."""
    bench = Bench(batch_size=3, eager=False)
    one, two, _ = [ask(bench, item) for item in "abc"]
    batch = bench.batcher.take()
    one.abandon()
    assert batch.give_back()
    assert two.cancel()
    bench.timers.advance(1)
    bench.take_all()
    assert bench.taken() == [["c"]]


def test_what_is_given_back_waits_no_longer_than_it_may():
    """The time with a worker that did not begin it counts, also if it was over there."""
    bench = Bench(batch_size=2, eager=False)
    late, later = ask(bench, "a", wait=1), ask(bench, "b", wait=3)
    batch = bench.batcher.take()
    bench.timers.advance(2)
    assert not late.done()
    assert batch.give_back()
    bench.timers.advance(0.1)
    assert isinstance(late.exception(), DeadlineExceeded)
    assert not later.done()
    bench.timers.advance(2)
    assert isinstance(later.exception(), DeadlineExceeded)
    bench.take_all()
    assert bench.taken() == []


def test_what_is_abandoned_at_the_moment_of_being_given_back_is_not_run(caplog: pytest.LogCaptureFixture):
    """It waits again when it gets its outcome; the standard library logs it as a defect if such a one is begun."""
    bench = Bench(batch_size=1, eager=False)

    class Racing(AnswerFuture):
        def cancel(self) -> bool:
            is_cancelled = super().cancel()
            assert batch.give_back()
            return is_cancelled

    bench.batcher.queue("a", future := Racing(KEY), None, None, 0)
    batch = bench.batcher.take()
    future.abandon()
    assert isinstance(future.exception(), CancelledError)
    ask(bench, "b")
    bench.take_all()
    assert bench.taken() == [["b"]]
    assert not caplog.records


def test_plain_futures_cannot_be_given_back():
    """The standard library's have no way back from running; the batch stays with who has it."""
    bench = Bench(batch_size=1, eager=False)
    future: Future[str] = Future()
    bench.batcher.queue("a", future, None, None, 0)
    batch = bench.batcher.take()
    assert not batch.give_back()
    assert future.running()
    batch.finish(["answer"])
    assert future.result() == "answer"
