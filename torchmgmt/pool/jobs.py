"""What a pool hands to a worker, and what waits for one."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import InvalidStateError
from typing import Any, Protocol

from torchmgmt.answer_future import AnswerFuture
from torchmgmt.exchange import Encoded, WorkerRequest
from torchmgmt.records import ModelKey
from torchmgmt.seat import Seat

__all__ = ["Job", "JobQueue", "JobSource", "OwnJob", "Seating", "size_of"]


class Job(Protocol):
    """Requests that a worker runs together. One of ``finish``, ``fail`` and a ``give_back`` that can be is called, once."""

    @property
    def items(self) -> Sequence[WorkerRequest]:
        """The requests."""

    @property
    def arrived(self) -> Sequence[float]:
        """When each was accepted (``time.monotonic``)."""

    def is_over(self) -> bool:
        """Whether nobody waits for any of them any more."""

    def finish(self, outcomes: Sequence[Encoded | BaseException]) -> Sequence[int]:
        """Take one outcome for each request, in order; return the places of those that nobody waits for any more."""

    def fail(self, error: BaseException) -> Sequence[int]:
        """Take the error that ended all of them; return as ``finish`` does."""

    def give_back(self) -> bool:
        """Have its requests wait where they were taken from, as if they had never been; False if there is no such place."""

    def split(self) -> Sequence[Job]:
        """Return a job for each of its requests; it is not to be used any more."""


class JobSource(Protocol):
    """Where a pool gets its batches from; a :class:`torchmgmt.Batcher` is one. None of its methods may block."""

    def take(self, *, full: bool = False) -> Job | None:
        """Return the next batch if one is due; with ``full``, only one as large as may be."""

    def fail_waiting(self, error: BaseException) -> int:
        """Answer all that waits with ``error``; return how many requests that were."""

    def may_have_some(self) -> bool:
        """Whether something may wait; False only if nothing does."""

    def waited_s(self) -> float:
        """For how many seconds the oldest request has waited; 0 if none does."""

    def __len__(self) -> int:
        """The number of requests that wait."""


class Seating(Protocol):
    """A source whose callers can hand an idle worker their request themselves."""

    @property
    def is_immediate(self) -> bool:
        """Whether a request that comes alone is a batch at once."""

    def offer(self, seat: Seat | None) -> None:
        """Have the next caller take ``seat``; None: there is none."""

    def need_not_ask(self, below: float) -> None:
        """Have callers not ask for a look while fewer than ``below`` requests wait."""

    def take_seated(self, entry: Any) -> Job:
        """Return the batch of who has taken a seat."""


class JobQueue:
    """What a pool has to run, in this order: what was given back to it, what it was given itself, what its source has.

    What came from a source that takes it back waits there again, in its place. For the dispatcher's thread, but for
    :meth:`add`.
    """

    def __init__(self) -> None:
        self.source: JobSource | None = None
        self._returned: deque[Job] = deque()
        self._own: deque[OwnJob] = deque()

    def add(self, job: OwnJob) -> None:
        """Queue a batch of the pool's own. Any thread: one step, which nothing interrupts."""
        self._own.append(job)

    def give_back(self, jobs: Iterable[Job]) -> None:
        """Queue batches that were taken and not begun: where they waited before, else before all others, in their order."""
        self.put_first([job for job in jobs if not job.give_back()])

    def put_first(self, jobs: Sequence[Job]) -> None:
        """Queue batches before all others, in their order."""
        self._returned.extendleft(reversed(jobs))

    def take(self, *, full: bool = False) -> Job | None:
        """Return the next batch if there is one; with ``full``, from the source only one as large as may be."""
        while self._returned:
            returned = self._returned.popleft()
            if not returned.is_over():
                return returned
            returned.finish([Encoded(())] * len(returned.items))  # it hears that it has ended; nobody hears it
        while self._own:
            job = self._own.popleft()
            if job.begin():
                return job
        return self.source.take(full=full) if self.source is not None else None

    def may_have_some(self) -> bool:
        """Whether something may wait; False only if nothing does. Cheaper than to count it."""
        return bool(self._returned or self._own) or (self.source is not None and self.source.may_have_some())

    def waited_s(self) -> float:
        """For how many seconds the oldest request has waited at the source; 0 if none does."""
        return self.source.waited_s() if self.source is not None else 0.0

    def clear(self) -> list[Job]:
        """Take away all but what the source has, and return it."""
        jobs = [*self._returned, *self._own]
        self._returned.clear()
        self._own.clear()
        return jobs

    def __len__(self) -> int:
        """The number of requests that wait."""
        return size_of((*self._returned, *self._own)) + (len(self.source) if self.source is not None else 0)


def size_of(jobs: Iterable[Job]) -> int:
    """Return how many requests these batches hold; the wish for a description counts as one."""
    return sum(max(1, len(job.items)) for job in jobs)


class OwnJob:
    """A batch that was given to the pool itself, or (``items`` is None) the wish to have the model described."""

    def __init__(self, key: ModelKey, items: Sequence[WorkerRequest] | None) -> None:
        self.is_description = items is None
        self.items = items or ()
        self.arrived = [time.monotonic()] * len(self.items)
        self.future = AnswerFuture(key)

    def begin(self) -> bool:
        """Mark it as running; False if it was cancelled."""
        return self.future.set_running_or_notify_cancel()

    def is_over(self) -> bool:
        """Whether it was ended before there was an answer."""
        return self.future.done()

    def give_back(self) -> bool:
        """Do nothing: it is the pool's own."""
        return False

    def split(self) -> Sequence[OwnJob]:
        """Return itself: it has one answer."""
        return (self,)

    def finish(self, outcomes: Sequence[Encoded | BaseException]) -> Sequence[int]:
        """Answer with the list of all outcomes, or fail with the first that is an error."""
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        with contextlib.suppress(InvalidStateError):  # nobody waits for it any more
            if errors:
                self.future.set_exception(errors[0])
            else:
                self.future.set_result(outcomes[0] if self.is_description else list(outcomes))
        return ()

    def fail(self, error: BaseException) -> Sequence[int]:
        """Fail, unless it was cancelled."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)
        return ()
