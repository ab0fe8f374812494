"""Batcher: the bounded queue of one model version, which cuts what waits in it into batches.

Two ways to use one. Around a plain function it runs batches on a thread of its own. Without a function it is the queue
that a WorkerPool takes batches from: it says ``on_ready`` when there may be one, and the pool calls :meth:`Batcher.take`.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from torchmgmt.arrivals import Arrivals
from torchmgmt.batch import Batch, Promise, Waiting, answers_of, settle
from torchmgmt.checks import check_number
from torchmgmt.deadlines import Deadlines
from torchmgmt.errors import DeadlineExceeded, InvalidArgument, ManagerClosed, QueueFull, TorchmgmtError
from torchmgmt.runner import Runner

__all__ = ["Batcher"]

T = TypeVar("T")
R = TypeVar("R")

Clock = Callable[[], float]

_PRIORITY_IS_WORTH_S = 1.0
"""For so many seconds of waiting stands one step of priority. So priorities age without anybody looking at the queue."""
_HIGHEST_PRIORITY = 10


class Batcher(Generic[T, R]):
    """A bounded queue that cuts batches of at most ``batch_size`` items, waiting at most ``max_batch_delay`` ms for them.

    >>> with Batcher(lambda items: [item * 2 for item in items], batch_size=8, max_batch_delay=5) as batcher:
    ...     answers = [batcher.submit(number) for number in (1, 2, 3)]
    ...     [answer.result(timeout=10) for answer in answers]
    [2, 4, 6]

    Items of one priority leave in the order in which they came. Thread-safe throughout; no method blocks but
    :meth:`close`.

    Args:
        function: takes a list of items and returns as many answers, in order; an answer that is an exception fails its
            item alone. It runs on one daemon thread, started by the first item. None: somebody else takes the batches.
        batch_size: the most items in a batch, at least 1.
        max_batch_delay: the longest that an item waits for others to join its batch, in ms, at least 0.
        cuts_early: whether a batch does not wait for that long where nobody is likely to join it in time, to judge by
            what came lately (:mod:`torchmgmt.arrivals`).
        capacity: the most items that may wait, at least 1; one more is refused with QueueFull.
        name: what errors call this queue.
        clock: a monotonic clock in seconds.
        on_ready: called, with no lock held, when :meth:`take` may have a batch. Only without ``function``.
        call_at: ``call_at(when, callback)`` runs a callback at a time of ``clock``. Only without ``function``.
        on_expired: called, with no lock held, with the number of items whose deadline has passed, after they failed.

    Raises:
        InvalidArgument: one of the numbers is out of its range.
    """

    def __init__(
        self,
        function: Callable[[list[T]], Sequence[R | BaseException]] | None = None,
        *,
        batch_size: int = 1,
        max_batch_delay: int = 100,
        cuts_early: bool = True,
        capacity: int = 100,
        name: str = "this Batcher",
        clock: Clock = time.monotonic,
        on_ready: Callable[[], object] | None = None,
        call_at: Callable[[float, Callable[[], object]], object] | None = None,
        on_expired: Callable[[int], object] | None = None,
    ) -> None:
        check_number("batch_size", batch_size, minimum=1)
        check_number("max_batch_delay", max_batch_delay, minimum=0, unit="milliseconds")
        check_number("capacity", capacity, minimum=1)
        self._on_ready: Callable[[], object]
        self._call_at: Callable[[float, Callable[[], object]], object]
        self._runner: Runner | None = None
        if function is not None:
            self._runner = Runner(functools.partial(self._run_next, function), self._sleep_until, clock)
            self._on_ready, self._call_at = self._runner.wake, self._runner.call_at
        elif on_ready is not None and call_at is not None:
            self._on_ready, self._call_at = on_ready, call_at
        else:
            raise InvalidArgument("function", function, "callable, unless on_ready and call_at are both given")
        self.batch_size = batch_size
        self.capacity = capacity
        self.name = name
        self.clock = clock
        self._on_expired = on_expired
        self._delay_s = max_batch_delay / 1000
        waits = batch_size > 1 and self._delay_s > 0
        self._arrivals = Arrivals(self._delay_s) if cuts_early and waits else None  # guarded by _lock
        self._lock = threading.Lock()
        # guarded by _lock
        self._queue: deque[Waiting[T, R]] = deque()  # by rank
        self._is_by_age = True  # whether the first one is the oldest: nobody has asked for a priority that still waits
        self._running = 0
        self._deadlines = Deadlines[R]()
        # The times at which somebody is going to look, the latest first: another is only added if it is earlier.
        self._armed: list[float] = []
        self._closed: TorchmgmtError | None = None
        self._draining = False

    def __repr__(self) -> str:
        return f"<Batcher of {self.name}: {len(self)} of {self.capacity} waiting, batch_size={self.batch_size}>"

    def __len__(self) -> int:
        """The number of items that wait."""
        with self._lock:
            return sum(not entry.future.done() for entry in self._queue)

    def __enter__(self) -> Batcher[T, R]:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def submit(
        self,
        item: T,
        *,
        timeout: float | None = None,
        wait_timeout: float | None = None,
        priority: int = 0,
    ) -> Future[R]:
        """Queue ``item`` and return the future of its answer. Does not block; any thread.

        Args:
            item: what the function gets in its list.
            timeout: seconds, at least 0. An item without an answer by then fails with DeadlineExceeded and, if it was
                not started, never runs. None: no limit.
            wait_timeout: the same for an item that has not been started by then. None: no limit but ``timeout``.
            priority: from -10 to 10. An item goes before those that have waited for fewer seconds more than it has less
                priority than they: 3 more are worth 3 seconds of waiting, so what has little priority waits longer, but not
                for ever.

        ``Future.cancel`` takes a waiting item back.

        Raises:
            QueueFull: ``capacity`` items wait already.
            ManagerClosed: it was closed.
            InvalidArgument: a timeout is not a number of seconds, or ``priority`` is out of its range.
        """
        future: Future[R] = Future()
        self.queue(item, future, timeout, wait_timeout, priority)
        return future

    def queue(
        self, item: T, promise: Promise[R], timeout: float | None, wait_timeout: float | None, priority: int
    ) -> None:
        """Queue ``item``, whose answer goes to ``promise``, which is pending; else as :meth:`submit`."""
        if timeout is not None or wait_timeout is not None or priority != 0 or priority is False:
            _check_wishes(timeout, wait_timeout, priority)
        now = self.clock()
        entry = Waiting(item, promise, now, now - priority * _PRIORITY_IS_WORTH_S)
        with self._lock:
            if self._closed is not None or len(self._queue) >= self.capacity:
                self._make_room_locked()
            self._queue_locked(entry)
            waiting = len(self._queue)
            if self._arrivals is not None:
                self._arrivals.came(now, waiting + self._running)
            if timeout is not None or wait_timeout is not None:
                entry.start_by = self._deadlines.add(entry.future, now, timeout, wait_timeout)
                entry.wait_s = wait_timeout
            ready, wake_at = False, None
            # A full batch was announced when it became full; whoever could not take it then comes back for it.
            if waiting <= self.batch_size or self._draining or self._deadlines:
                ready, wake_at = self._outlook_locked(now)
                ready = ready and (waiting <= self.batch_size or self._draining)
        if wake_at is not None:
            self._arm(wake_at)
        if ready:
            self._on_ready()

    def may_have_some(self) -> bool:
        """Whether something may wait, cancelled or not: a quick look that takes no lock."""
        return bool(self._queue)

    def waited_s(self) -> float:
        """For how many seconds the oldest item has waited; 0 if none does."""
        with self._lock:
            return max(0.0, self.clock() - self._oldest_locked()) if self._queue else 0.0

    def take(self, *, full: bool = False) -> Batch[T, R] | None:
        """Cut the next batch if one is due: full, or its oldest item has waited long enough, or the queue drains.

        With ``full``, only the first of these counts: for a taker that is in no hurry.

        Cancelled and expired items are left out; the latter are failed by the timer that watches their deadlines, not
        here: a caller may hold a lock, and failing one runs its callbacks. Does not block; any thread.
        """
        now = self.clock()
        entries: list[Waiting[T, R]] = []
        with self._lock:
            if len(self._queue) >= self.batch_size or (not full and self._is_ready_locked(now)):
                if self._arrivals is not None:
                    self._arrivals.cut(now, len(self._queue) + self._running)
                while self._queue and len(entries) < self.batch_size:
                    entry = self._queue.popleft()
                    if entry.begin(now):
                        entries.append(entry)
                self._running += len(entries)
            wake_at = self._outlook_locked(now)[1] if self._queue or self._deadlines else None
        if wake_at is not None:
            self._arm(wake_at)
        return Batch(entries, self._ended, self._take_back) if entries else None

    def drain(self, error: TorchmgmtError | None = None) -> None:
        """Refuse new items with ``error`` from now on, and make what waits due at once. Does not block; idempotent."""
        with self._lock:
            self._closed = self._closed or error or ManagerClosed(self.name)
            self._draining = True
        self._on_ready()

    def fail_waiting(self, error: BaseException) -> int:
        """Answer all that waits with ``error``; return how many that were. Does not block; any thread."""
        with self._lock:
            waiting = list(self._queue)
            self._queue.clear()
        return sum(settle(entry.future, error) for entry in waiting)

    def close(self, timeout: float | None = 30) -> int:
        """Refuse new items, run what waits for at most ``timeout`` seconds, fail the rest; return how many failed.

        Blocks until that is done, when there is a function to run them; idempotent.
        """
        self.drain()
        if self._runner is not None:
            self._runner.join(timeout)
        return self.fail_waiting(ManagerClosed(self.name))

    def tick(self) -> None:
        """Do what is due by now: fail items past their deadline, announce a batch that is due."""
        self.expire()
        now = self.clock()
        with self._lock:
            ready, wake_at = self._outlook_locked(now)
        if wake_at is not None:
            self._arm(wake_at)
        if ready:
            self._on_ready()

    def expire(self) -> None:
        """Fail the items whose deadline has passed, waiting or running. Does not block, but runs their callbacks."""
        with self._lock:
            expired = self._deadlines.claim_expired(self.clock())
        count = sum(
            settle(future, DeadlineExceeded(f"The request to {self.name}", timeout_s)) for future, timeout_s in expired
        )
        if count and self._on_expired is not None:
            self._on_expired(count)

    def _make_room_locked(self) -> None:
        """Raise why nothing is taken, if that is so."""
        if self._closed is not None:
            # The same error every time: without this it would collect the frames, and so the items, of all callers.
            raise self._closed.with_traceback(None)
        # What was cancelled while it waited takes no place.
        self._queue = deque(entry for entry in self._queue if not entry.future.done())
        if len(self._queue) >= self.capacity:
            raise QueueFull(self.name, self.capacity, max(1.0, self._delay_s))

    def _queue_locked(self, entry: Waiting[T, R]) -> None:
        if not self._queue:
            self._is_by_age = True
        self._is_by_age = self._is_by_age and entry.rank == entry.since
        if self._is_by_age:
            self._queue.append(entry)
        else:
            bisect.insort_right(self._queue, entry, key=_rank)

    def _oldest_locked(self) -> float:
        """Return since when the item has waited that has waited longest; there is one."""
        return self._queue[0].since if self._is_by_age else min(entry.since for entry in self._queue)

    def _ended(self, count: int) -> None:
        if self._arrivals is not None:
            now = self.clock()
            with self._lock:
                self._running -= count
                self._arrivals.answered(now)

    def _take_back(self, count: int, entries: Sequence[Waiting[T, R]]) -> None:
        """Queue ``entries`` again, of a batch of ``count``: they waited here before, and were not begun."""
        with self._lock:
            self._running -= count
            for entry in reversed(entries):
                self._is_by_age = (self._is_by_age or not self._queue) and entry.rank == entry.since
                bisect.insort_left(self._queue, entry, key=_rank)  # before those of the same rank
                if entry.wait_s is not None:  # what watched for it may have seen that it was begun
                    self._deadlines.add(entry.future, entry.since, None, entry.wait_s)
            wake_at = self._outlook_locked(self.clock())[1]
        if wake_at is not None:
            self._arm(wake_at)

    def _is_ready_locked(self, now: float) -> bool:
        if not self._queue:
            return False
        return self._draining or len(self._queue) >= self.batch_size or now >= self._cut_at_locked()

    def _cut_at_locked(self) -> float:
        """Return when what waits is to be cut, even if nobody joins it."""
        since = self._oldest_locked()
        if self._arrivals is None:
            return since + self._delay_s
        return self._arrivals.wait_until(since, len(self._queue) + self._running)

    def _outlook_locked(self, now: float) -> tuple[bool, float | None]:
        """Return whether a batch is due, and when a timer is needed that is not set yet, which is noted as set.

        A batch that is due already needs none: it was announced, or whoever takes batches comes back for it.
        """
        is_ready, due = False, self._deadlines.next_at
        if self._queue:
            is_ready = self._draining or len(self._queue) >= self.batch_size
            if not is_ready:
                cut_at = self._cut_at_locked()
                is_ready = now >= cut_at
                if not is_ready and (due is None or cut_at < due):
                    due = cut_at
        if due is None or (self._armed and self._armed[-1] <= due):
            return is_ready, None
        self._armed.append(due)
        return is_ready, due

    def _arm(self, wake_at: float) -> None:
        # Whoever closed the timers before the queue has ended those who would run what waits.
        with contextlib.suppress(ManagerClosed):
            self._call_at(wake_at, functools.partial(self._look, wake_at))

    def _run_next(self, function: Callable[[list[T]], Sequence[R | BaseException]]) -> bool:
        """Run the next batch if one is due; return whether one was. On the thread of the runner."""
        self.expire()
        batch = self.take()
        if batch is None:
            return False
        try:
            batch.finish(answers_of(function(batch.items)))
        except BaseException as error:  # whatever it is, it belongs to those who wait
            batch.fail(error)
        return True

    def _sleep_until(self) -> float | None:
        """Return when the thread that runs the function is to look again; None if nothing waits.

        It has no timers, so it says here when it will look; ``call_at`` wakes it if something is due before that.
        """
        with self._lock:
            due = self._deadlines.next_at
            if self._queue:
                due = self._cut_at_locked() if due is None else min(due, self._cut_at_locked())
            self._armed = [] if due is None else [due]
            return due

    def _look(self, armed_for: float) -> None:
        with self._lock:
            self._armed.remove(armed_for)
        self.tick()


def _check_wishes(timeout: float | None, wait_timeout: float | None, priority: object) -> None:
    for name, seconds in (("timeout", timeout), ("wait_timeout", wait_timeout)):
        if seconds is not None:
            check_number(name, seconds, minimum=0, unit="seconds", whole=False)
    if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > _HIGHEST_PRIORITY:
        raise InvalidArgument("priority", priority, f"a whole number from {-_HIGHEST_PRIORITY} to {_HIGHEST_PRIORITY}")


def _rank(entry: Waiting[Any, Any]) -> float:
    return entry.rank
