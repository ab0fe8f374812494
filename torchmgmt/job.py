"""What a pool hands to a worker, and what becomes of it: an answer for each request, or the error that says why not."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import InvalidStateError
from typing import Protocol, TypeAlias

from torchmgmt.answer_future import AnswerFuture
from torchmgmt.backends import Outcome
from torchmgmt.errors import DeadlineExceeded, HandlerFailed, WorkerDied, WorkerStartFailed
from torchmgmt.exchange import Encoded, WorkerRequest
from torchmgmt.records import EXPIRED, ModelKey, WorkerExit, WorkerFault

__all__ = [
    "Job",
    "JobQueue",
    "JobSource",
    "OwnJob",
    "Ran",
    "answers_of",
    "error_of_death",
    "failures_of",
    "size_of",
]


Ran: TypeAlias = tuple[float, float, "float | None"]
"""When a batch began and ended (``time.monotonic``), and how long its worker took; None if that did not end well."""


class Job(Protocol):
    """Requests that a worker runs together. Exactly one of ``finish`` and ``fail`` is called, once."""

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


class JobSource(Protocol):
    """Where a pool gets its batches from; a :class:`torchmgmt.Batcher` is one. None of its methods may block."""

    def take(self, *, full: bool = False) -> Job | None:
        """Return the next batch if one is due; with ``full``, only one as large as may be.

        Called with the pool's lock held.
        """

    def fail_waiting(self, error: BaseException) -> int:
        """Answer all that waits with ``error``; return how many requests that were."""

    def may_have_some(self) -> bool:
        """Whether something may wait; False only if nothing does. Called with the pool's lock held."""

    def waited_s(self) -> float:
        """For how many seconds the oldest request has waited; 0 if none does."""

    def __len__(self) -> int:
        """The number of requests that wait."""


class JobQueue:
    """What a pool has to run, in this order: what a dead worker gave back, what it was given itself, what its source has.

    Guarded by the pool's lock.
    """

    def __init__(self) -> None:
        self.source: JobSource | None = None
        self._returned: deque[Job] = deque()
        self._own: deque[OwnJob] = deque()

    def add(self, job: OwnJob) -> None:
        """Queue a batch of the pool's own."""
        self._own.append(job)

    def give_back(self, jobs: Iterable[Job]) -> None:
        """Queue batches that were taken and not begun; they go before all others, in their order."""
        self._returned.extendleft(reversed(list(jobs)))

    def take(self, *, full: bool = False) -> Job | None:
        """Return the next batch if there is one; with ``full``, from the source only one as large as may be."""
        if self._returned:
            return self._returned.popleft()
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

    def finish(self, outcomes: Sequence[Encoded | BaseException]) -> Sequence[int]:
        """Answer with the list of all outcomes, or fail with the first that is an error."""
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
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


def failures_of(outcomes: Sequence[object], abandoned: Sequence[int]) -> Mapping[int, str]:
    """Return the class of each outcome that is an error, by its place, but for those that nobody got."""
    return {
        place: type(outcome).__name__
        for place, outcome in enumerate(outcomes)
        if isinstance(outcome, BaseException) and place not in abandoned
    }


def answers_of(
    key: ModelKey, items: Sequence[WorkerRequest], outcomes: Sequence[Outcome], last_lines: Sequence[str]
) -> list[Encoded | BaseException]:
    """Return the worker's outcomes to ``items`` as answers: what it says went wrong becomes an error of ours."""
    return [
        _error_of(key, items[index : index + 1], outcome, last_lines) if isinstance(outcome, WorkerFault) else outcome
        for index, outcome in enumerate(outcomes)
    ]


def _error_of(
    key: ModelKey, request: Sequence[WorkerRequest], fault: WorkerFault, last_lines: Sequence[str]
) -> HandlerFailed | DeadlineExceeded:
    """Return what a fault is to the caller; ``request`` is empty if it was the wish for a description."""
    if fault == EXPIRED and request:  # and the worker was quicker to say so than whoever watches the deadlines here
        return DeadlineExceeded(f"The request to model {key.name} version {key.version}", request[0].limit_s)
    return _handler_failed(key, fault, last_lines)


def _handler_failed(key: ModelKey, fault: WorkerFault, last_lines: Sequence[str]) -> HandlerFailed:
    return HandlerFailed(
        key.name,
        key.version,
        fault.reason,
        error_type=fault.error_type,
        error_code=fault.error_code,
        out_of_memory=fault.out_of_memory,
        traceback=fault.traceback,
        last_lines=tuple(last_lines),
    )


def error_of_death(
    key: ModelKey, exit: WorkerExit, *, end_reason: str, was_loading: bool
) -> WorkerStartFailed | WorkerDied:
    """Return the error that tells of a worker's end; ``end_reason`` is why we ended it, if we did."""
    lines = tuple(exit.last_lines)
    reason = end_reason or exit.reason
    if end_reason and exit.is_final:
        reason = f"{end_reason}; {exit.reason}"
    if not was_loading:
        return WorkerDied(key.name, key.version, exit.pid, exit.exitcode, reason, lines)
    traceback, out_of_memory = "", False
    if exit.fault is not None and not end_reason:
        reason, traceback, out_of_memory = exit.fault.reason, exit.fault.traceback, exit.fault.out_of_memory
    return WorkerStartFailed(
        key.name, key.version, reason, traceback, lines, out_of_memory, pid=exit.pid, exitcode=exit.exitcode
    )
