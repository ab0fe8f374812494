"""What becomes of the batches of a pool: an answer for each request, or the error that says why not."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias, cast

from torchmgmt.backends import Outcome
from torchmgmt.errors import DeadlineExceeded, HandlerFailed, WorkerDied, WorkerStartFailed, WorkerTraceback
from torchmgmt.events import NO_FAILURES, BatchFinished, Listener, RequestsDropped
from torchmgmt.exchange import Encoded, WorkerRequest
from torchmgmt.pool.jobs import Job, size_of
from torchmgmt.pool.workers import PoolWorker
from torchmgmt.records import EXPIRED, ModelKey, WorkerExit, WorkerFault

__all__ = ["Ran", "Results", "answers_of", "error_of_death"]

Ran: TypeAlias = tuple[float, float, "float | None"]
"""When a batch began and ended (``time.monotonic``), and how long its worker took; None if that did not end well."""


class Results:
    """Gives requests what became of them, and tells the listener of it. For the dispatcher's thread.

    Args:
        key: the model version that was asked.
        listener: called with each event, and must not raise; while it is false, what is told of each batch is not made.
    """

    def __init__(self, key: ModelKey, listener: Listener | None) -> None:
        self._key = key
        self._listener = listener

    def answer(self, worker: PoolWorker, job: Job, outcomes: Sequence[Outcome], ran: Ran) -> None:
        """Give the requests of a batch what its worker says became of them."""
        has_faults = WorkerFault in map(type, outcomes)
        items = job.items
        answers: Sequence[Encoded | BaseException]
        if has_faults:
            lines = worker.handle.last_lines() if worker.handle is not None else ()
            answers = answers_of(self._key, items, outcomes, lines)
        else:
            answers = cast("Sequence[Encoded]", outcomes)
        abandoned = job.finish(answers)
        if self._listener and items:
            failed = _failures_of(answers, abandoned) if has_faults else NO_FAILURES
            self._listener(BatchFinished(self._key, worker.id, items, job.arrived, *ran, failed, abandoned))

    def lose(self, worker: PoolWorker, jobs: Iterable[Job], error: BaseException) -> None:
        """Fail batches that were with a worker."""
        for job in jobs:
            abandoned = job.fail(error)
            items = job.items
            if self._listener and items:
                failed = _failures_of([error] * len(items), abandoned)
                ran = (worker.began_at, time.monotonic(), None)
                self._listener(BatchFinished(self._key, worker.id, items, job.arrived, *ran, failed, abandoned))

    def drop(self, jobs: Sequence[Job], error: BaseException, *, further: int = 0) -> int:
        """Fail batches that no worker has begun; return how many requests they, and ``further`` that failed already, are."""
        for job in jobs:
            job.fail(error)
        count = sum(len(job.items) for job in jobs) + further
        if self._listener and count:
            self._listener(RequestsDropped(self._key, type(error).__name__, count))
        return size_of(jobs) + further


def _failures_of(outcomes: Sequence[object], abandoned: Sequence[int]) -> Mapping[int, str]:
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
    error = HandlerFailed(
        key.name,
        key.version,
        fault.reason,
        error_type=fault.error_type,
        error_code=fault.error_code,
        out_of_memory=fault.out_of_memory,
        traceback=fault.traceback,
        last_lines=tuple(last_lines),
    )
    error.__cause__ = WorkerTraceback(fault.traceback) if fault.traceback else None
    return error


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
