"""Batcher: the bounded queue of one model version, which cuts what waits in it into batches.

Two ways to use one. Around a plain function it runs batches on a thread of its own. Without a function it is the queue
that a WorkerPool takes batches from: it says ``on_ready`` when there is one, and the pool calls :meth:`Batcher.take`.

Callers only put items in, which nothing interrupts (:mod:`torchmgmt.admission`). All that follows, such as to sort them in, to
cut batches and to fail what is late, is done by the owner of the queue: the dispatcher of the pool, or the Batcher's own
threads.
"""

from __future__ import annotations

import bisect
import functools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from torchmgmt import forks
from torchmgmt.admission import Admission, Admitted
from torchmgmt.arrivals import Arrivals
from torchmgmt.batch import Batch, Promise, Waiting, answers_in, is_placed, settle
from torchmgmt.checks import check_number
from torchmgmt.deadlines import Deadlines
from torchmgmt.dispatcher import Alarm, Dispatcher
from torchmgmt.errors import DeadlineExceeded, InvalidArgument, ManagerClosed, QueueFull, TorchmgmtError, copy_of
from torchmgmt.owned_future import SEATED_S, OwnedFuture
from torchmgmt.runner import Runner
from torchmgmt.seat import Seat

__all__ = ["Batcher"]

T = TypeVar("T")
R = TypeVar("R")

Clock = Callable[[], float]

_PRIORITY_IS_WORTH_S = 1.0
"""For so many seconds of waiting stands one step of priority. So priorities age without anybody looking at the queue."""
_HIGHEST_PRIORITY = 10
_MANY_LEFT = 64
"""So many items that were taken back or have expired may lie in the queue, however few wait."""


class Batcher(Generic[T, R]):
    """A bounded queue that cuts batches of at most ``batch_size`` items, waiting at most ``max_batch_delay`` ms for them.

    >>> with Batcher(lambda items: [item * 2 for item in items], batch_size=8, max_batch_delay=5) as batcher:
    ...     answers = [batcher.submit(number) for number in (1, 2, 3)]
    ...     [answer.result(timeout=10) for answer in answers]
    [2, 4, 6]

    Items of one priority leave in the order in which they came. Thread-safe throughout; no method blocks but
    :meth:`close`. A copy in a forked process raises ManagerClosed.

    Args:
        function: takes a list of items and returns as many answers, in order, as a list or tuple; an answer that is an
            exception fails its item alone. It runs on one daemon thread, started by the first item; another one is started
            by the first item with a time limit. None: somebody else takes the batches.
        batch_size: the most items in a batch, at least 1.
        max_batch_delay: the longest that an item waits for others to join its batch, in ms, at least 0.
        cuts_early: whether a batch does not wait for that long where nobody is likely to join it in time, to judge by
            what came lately (:mod:`torchmgmt.arrivals`).
        capacity: the most items that may wait, at least 1; one more is refused with QueueFull.
        name: what errors call this queue.
        clock: a monotonic clock in seconds.
        on_ready: called on the dispatcher's thread when :meth:`take` has a batch. Only without ``function``.
        dispatcher: on whose thread batches are taken and deadlines kept. Only without ``function``.
        on_expired: called with the number of items whose deadline has passed, after they failed; must not raise.

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
        dispatcher: Dispatcher | None = None,
        on_expired: Callable[[int], object] | None = None,
    ) -> None:
        check_number("batch_size", batch_size, minimum=1)
        check_number("max_batch_delay", max_batch_delay, minimum=0, unit="milliseconds")
        check_number("capacity", capacity, minimum=1)
        self.batch_size = batch_size
        self.capacity = capacity
        self.name = name
        self.clock = clock
        self._on_expired = on_expired
        self._delay_s = max_batch_delay / 1000
        self._depth = forks.depth()
        self._admission = Admission(capacity)
        self._refusal: TorchmgmtError | None = None
        self._looks = 0  # that the owner has begun
        self._asked_after = -1  # so many of them somebody has asked for the next one
        self._owner: Dispatcher | None = dispatcher
        self._seat: Seat | None = None
        self._ask_from = 1.0
        self._teller: Dispatcher  # who tells of a future that was taken back, which a caller may be interrupted in
        self._runner: Runner | None = None
        self._on_ready: Callable[[], object]
        if function is not None:
            self._runner = Runner(functools.partial(self._run_next, function), self._next_due, clock)
            self._timekeeper = self._teller = Dispatcher("torchmgmt-batcher-limits", clock)
            self._alarm = Alarm(self._timekeeper, self._keep_limits)
            self._on_ready = self._runner.wake
        elif on_ready is not None and dispatcher is not None:
            self._teller = dispatcher
            self._alarm = Alarm(dispatcher, self._look)
            self._on_ready = on_ready
        else:
            raise InvalidArgument("function", function, "callable, unless on_ready and dispatcher are both given")
        # Taken by the owner's threads alone, which nothing interrupts, but for those who close.
        self._lock = threading.RLock()
        # guarded by _lock
        waits = batch_size > 1 and self._delay_s > 0
        self._arrivals = Arrivals(self._delay_s) if cuts_early and waits else None
        self._queue: deque[Waiting[T, R]] = deque()  # by rank
        self._is_by_age = True  # whether the first one is the oldest: nobody has asked for a priority that still waits
        self._running = 0
        self._deadlines = Deadlines[R]()
        self._draining = False

    def __repr__(self) -> str:
        return f"<Batcher of {self.name}: {len(self)} of {self.capacity} waiting, batch_size={self.batch_size}>"

    def __len__(self) -> int:
        """The number of items that wait."""
        return self._admission.waiting

    def __enter__(self) -> Batcher[T, R]:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # -- for any thread ------------------------------------------------------------------------------------------------

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
            ManagerClosed: it was closed, or belongs to the process that this one was forked from.
            InvalidArgument: a timeout is not a number of seconds, or ``priority`` is out of its range.
        """
        future: OwnedFuture[R] = OwnedFuture()
        try:
            self.queue(item, future, timeout, wait_timeout, priority)
        except BaseException:
            future.cancel()  # interrupted: nobody gets the future
            raise
        return future

    def queue(
        self,
        item: T,
        promise: Promise[R],
        timeout: float | None,
        wait_timeout: float | None,
        priority: int,
        *,
        is_urgent: bool = False,
    ) -> None:
        """Queue ``item``, whose answer goes to ``promise``, which is pending; else as :meth:`submit`.

        With ``is_urgent`` it may be with a worker at once, if it is alone; one that is cancelled a moment later runs all the
        same, and whoever queued it is to wait for the promise, which sees to it that the owner looks.

        Who is interrupted in it does not know whether it is queued, and is to cancel the promise.
        """
        has_limit = timeout is not None or wait_timeout is not None
        if has_limit or priority != 0 or priority is False:
            _check_wishes(timeout, wait_timeout, priority)
        if forks.depth() != self._depth:
            raise ManagerClosed(self.name, "belongs to the process that this one was forked from")
        now = self.clock()
        rank = now - priority * _PRIORITY_IS_WORTH_S
        entry = Waiting(item, promise, now, rank, self._admission, timeout, wait_timeout, has_limit=has_limit)
        if is_placed(promise):
            promise.place, promise.owner = entry, self._teller
        else:
            promise.add_done_callback(entry.leave)
        seat = self._seat
        if is_urgent and seat is not None and self._admission.waiting == 0 and self._is_seated(entry, seat):
            return
        admitted = Admitted.YES
        try:
            admitted = self._admission.enter(entry)
            if admitted is Admitted.YES:
                self._ask_for_look(entry)
        except BaseException:
            try:
                self._ask_for_look(entry)
            except (ManagerClosed, OSError):
                pass  # what interrupted the caller is what it is told
            raise
        if admitted is not Admitted.YES:
            raise self._refused(admitted)

    def _is_seated(self, entry: Waiting[T, R], seat: Seat) -> bool:
        """Take ``seat`` for ``entry``, which does not wait then; return whether."""
        entry.is_seated, entry.ask = True, self._ask_owner  # first: who is interrupted in this does not know
        is_seated = seat.take(entry, entry.item)
        if is_seated:
            entry.begin(entry.since)  # while its worker computes; or its owner does it
            if seat.has_spare_core or (entry.timeout_s is not None and entry.timeout_s < 10 * SEATED_S):
                self._ask_owner()
        else:
            entry.is_seated = False
        return is_seated

    def _ask_owner(self) -> None:
        """Have the owner see who has taken a seat. Any thread."""
        if self._owner is not None:
            self._owner.call_soon(self._on_ready)

    def may_have_some(self) -> bool:
        """Whether something may wait, cancelled or not: a quick look that takes no lock."""
        return bool(self._queue) or self._admission.has_new()

    def drain(self, error: TorchmgmtError | None = None) -> None:
        """Refuse new items with ``error`` from now on, and make what waits due at once. Does not block; idempotent."""
        self._refusal = self._refusal or error or ManagerClosed(self.name)
        self._admission.close()
        with self._lock:
            self._draining = True
        if self._runner is not None or self.may_have_some():
            self._ask_for_look()

    def close(self, timeout: float | None = 30) -> int:
        """Refuse new items, run what waits for at most ``timeout`` seconds, fail the rest; return how many failed.

        Blocks until that is done, when there is a function to run them; idempotent.
        """
        self.drain()
        if self._runner is not None:
            self._runner.join(timeout)
        failed = self.fail_waiting(ManagerClosed(self.name))
        if self._runner is not None:
            self._timekeeper.close()
        return failed

    def fail_waiting(self, error: BaseException) -> int:
        """Answer all that waits with copies of ``error``; return how many that were. Does not block; any thread."""
        with self._lock:
            self._admit_locked()
            waiting = list(self._queue)
            self._queue.clear()
        return sum(settle(entry.future, copy_of(error)) for entry in waiting)

    def waited_s(self) -> float:
        """For how many seconds the oldest item has waited; 0 if none does."""
        with self._lock:
            self._admit_locked()
            return max(0.0, self.clock() - self._oldest_locked()) if self._queue else 0.0

    # -- for the owner -------------------------------------------------------------------------------------------------

    def take(self, *, full: bool = False) -> Batch[T, R] | None:
        """Cut the next batch if one is due: full, or its oldest item has waited long enough, or the queue drains.

        With ``full``, only the first of these counts: for a taker that is in no hurry.

        Cancelled and expired items are left out; the latter are failed by the timer that watches their deadlines, not
        here: failing one runs its callbacks. Does not block.
        """
        entries: list[Waiting[T, R]] = []
        with self._lock:
            now = self.clock()
            self._admit_locked()
            if len(self._queue) >= self.batch_size or (not full and self._is_ready_locked(now)):
                if self._arrivals is not None:
                    self._arrivals.cut(now, len(self._queue) + self._running)
                while self._queue and len(entries) < self.batch_size:
                    entry = self._queue.popleft()
                    if entry.begin(now):
                        entries.append(entry)
                    entry.leave()
                self._running += len(entries)
            _, next_at = self._outlook_locked(now)
        self._set_alarm(next_at)
        return Batch(entries, self._ended, self._take_back) if entries else None

    def offer(self, seat: Seat | None) -> None:
        """Have who comes next take ``seat``, if nobody waits before it; None: there is none."""
        self._seat = seat

    def need_not_ask(self, below: float) -> None:
        """Have nobody ask for a look while fewer than ``below`` items wait: whoever takes batches will come by itself."""
        self._ask_from = below

    @property
    def is_immediate(self) -> bool:
        """Whether an item that comes alone is a batch at once."""
        return self.batch_size == 1 or self._delay_s == 0

    def take_seated(self, entry: Waiting[T, R]) -> Batch[T, R]:
        """Return the batch of an item that has taken a seat: it is with a worker already."""
        entry.is_seated = False
        if not entry.future.running():
            entry.begin(entry.since)  # unless it was cancelled: its worker has it all the same
        with self._lock:
            self._running += 1
            if entry.timeout_s is not None:
                self._deadlines.add(entry.future, entry.since, entry.timeout_s, None)
        if entry.timeout_s is not None:
            self._alarm.set(min(self._alarm.when, entry.since + entry.timeout_s))
        return Batch([entry], self._ended, self._take_back)

    def tick(self) -> None:
        """Do what is due by now: fail items past their deadline, announce a batch that is due."""
        self._look()

    def expire(self) -> None:
        """Fail the items whose deadline has passed, waiting or running. Does not block, but runs their callbacks."""
        with self._lock:
            self._admit_locked()
            expired = self._deadlines.take_expired(self.clock())
        count = sum(
            settle(future, DeadlineExceeded(f"The request to {self.name}", timeout_s)) for future, timeout_s in expired
        )
        if count and self._on_expired is not None:
            self._on_expired(count)

    def _look(self) -> None:
        """See to what has come, and to what is due."""
        self._looks += 1  # first: who asks from now on asks for another one
        with self._lock:
            self._admit_locked()
            now = self.clock()
            is_ready, next_at = self._outlook_locked(now)
        if next_at <= now:  # a limit that is over
            self.expire()
            with self._lock:
                is_ready, next_at = self._outlook_locked(self.clock())
        self._set_alarm(next_at)
        if is_ready:
            self._on_ready()

    def _set_alarm(self, next_at: float) -> None:
        if self._runner is None and next_at != self._alarm.when:
            self._alarm.set(next_at)

    def _ask_for_look(self, entry: Waiting[T, R] | None = None) -> None:
        """Have the owner see to what has come, such as ``entry``. Any thread."""
        dispatcher = self._owner
        if dispatcher is None:
            if entry is not None and entry.has_limit:
                self._timekeeper.call_soon(self._keep_limits)
            self._on_ready()
        elif entry is not None and self._admission.waiting < self._ask_from and not entry.has_limit:
            pass  # there is no worker for it
        elif dispatcher.on_thread():
            dispatcher.act_here(self._look)
        else:
            looks = self._looks
            if self._asked_after != looks:  # else one is to come that has not begun
                dispatcher.call_soon(self._look)
                self._asked_after = looks  # last: who comes in the midst of this, on whatever thread, asks as well

    def _keep_limits(self) -> None:
        """Fail what is late, also while the function runs. On the timekeeper's thread."""
        self.expire()
        with self._lock:
            next_at = self._deadlines.next_at
        self._alarm.set(math.inf if next_at is None else next_at)

    def _refused(self, why: Admitted) -> TorchmgmtError:
        if why is Admitted.FULL:
            return QueueFull(self.name, self.capacity, max(1.0, self._delay_s))
        return copy_of(self._refusal or ManagerClosed(self.name))

    def _admit_locked(self) -> None:
        """Sort in what has come."""
        if not self._admission.has_new():
            return
        if len(self._queue) > 2 * self._admission.waiting + _MANY_LEFT:
            self._queue = deque(entry for entry in self._queue if entry.is_counted)
        for entry in self._admission.take_new():
            if not entry.is_counted:
                continue  # it was taken back already
            self._sort_in_locked(entry)
            if self._arrivals is not None:
                self._arrivals.came(entry.since, len(self._queue) + self._running)
            if entry.has_limit:
                entry.start_by = self._deadlines.add(entry.future, entry.since, entry.timeout_s, entry.wait_s)

    def _sort_in_locked(self, entry: Waiting[T, R]) -> None:
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
                self._admission.reenter(entry)
                self._is_by_age = (self._is_by_age or not self._queue) and entry.rank == entry.since
                bisect.insort_left(self._queue, entry, key=_rank)  # before those of the same rank
                if entry.future.done():  # it was taken back at this moment
                    entry.leave()
                if entry.wait_s is not None:  # what watched for it may have seen that it was begun
                    self._deadlines.add(entry.future, entry.since, None, entry.wait_s)
            _, next_at = self._outlook_locked(self.clock())
        self._set_alarm(next_at)

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

    def _outlook_locked(self, now: float) -> tuple[bool, float]:
        """Return whether a batch is due, and when the owner is to look again; infinity: when it is told to.

        For a batch that is due already it need not: it is announced, or whoever takes batches comes back for it.
        """
        deadline = self._deadlines.next_at
        next_at = math.inf if deadline is None else deadline
        if not self._queue:
            return False, next_at
        if self._draining or len(self._queue) >= self.batch_size:
            return True, next_at
        cut_at = self._cut_at_locked()
        return now >= cut_at, next_at if now >= cut_at else min(cut_at, next_at)

    # -- around a function ---------------------------------------------------------------------------------------------

    def _run_next(self, function: Callable[[list[T]], Sequence[R | BaseException]]) -> bool:
        """Run the next batch if one is due; return whether one was. On the thread of the runner."""
        self.expire()
        batch = self.take()
        if batch is None:
            return False
        try:
            batch.finish(answers_in(function(batch.items)))
        except BaseException as error:  # whatever it is, it belongs to those who wait
            # Not this frame, which has the items of all of them.
            batch.fail(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
        return True

    def _next_due(self) -> float | None:
        """Return when the thread that runs the function is to look again; None if nothing waits."""
        with self._lock:
            _, next_at = self._outlook_locked(self.clock())
        return None if next_at == math.inf else next_at


def _check_wishes(timeout: float | None, wait_timeout: float | None, priority: object) -> None:
    for name, seconds in (("timeout", timeout), ("wait_timeout", wait_timeout)):
        if seconds is not None:
            check_number(name, seconds, minimum=0, unit="seconds", whole=False)
    if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > _HIGHEST_PRIORITY:
        raise InvalidArgument("priority", priority, f"a whole number from {-_HIGHEST_PRIORITY} to {_HIGHEST_PRIORITY}")


def _rank(entry: Waiting[Any, Any]) -> float:
    return entry.rank
