"""What a pool hands to a worker, and what becomes of it: an answer for each request, or the error that says why not."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import InvalidStateError
from typing import Protocol

from torchmgmt.backends import Outcome
from torchmgmt.channel import AnswerFuture
from torchmgmt.errors import HandlerFailed, WorkerDied, WorkerStartFailed
from torchmgmt.records import Encoded, ModelKey, WorkerExit, WorkerFault, WorkerRequest

__all__ = ["Job", "JobSource", "OwnJob", "answers_of", "error_of_death"]


class Job(Protocol):
    """Requests that a worker runs together. Exactly one of ``finish`` and ``fail`` is called, once."""

    @property
    def items(self) -> Sequence[WorkerRequest]:
        """The requests."""

    def finish(self, outcomes: Sequence[Encoded | BaseException]) -> None:
        """Take one outcome for each request, in order."""

    def fail(self, error: BaseException) -> None:
        """Take the error that ended all of them."""


class JobSource(Protocol):
    """Where a pool gets its batches from; a :class:`torchmgmt.Batcher` is one. None of its methods may block."""

    def take(self) -> Job | None:
        """Return the next batch if one is due. Called with the pool's lock held."""

    def fail_waiting(self, error: BaseException) -> int:
        """Answer all that waits with ``error``; return how many requests that were."""

    def __len__(self) -> int:
        """The number of requests that wait."""


class OwnJob:
    """A batch that was given to the pool itself, or (``items`` is None) the wish to have the model described."""

    def __init__(self, key: ModelKey, items: Sequence[WorkerRequest] | None) -> None:
        self.is_description = items is None
        self.items = items or ()
        self.future = AnswerFuture(key)

    def begin(self) -> bool:
        """Mark it as running; False if it was cancelled."""
        return self.future.set_running_or_notify_cancel()

    def finish(self, outcomes: Sequence[Encoded | BaseException]) -> None:
        """Answer with the list of all outcomes, or fail with the first that is an error."""
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if errors:
            self.future.set_exception(errors[0])
        else:
            self.future.set_result(outcomes[0] if self.is_description else list(outcomes))

    def fail(self, error: BaseException) -> None:
        """Fail, unless it was cancelled."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)


def answers_of(key: ModelKey, outcomes: Sequence[Outcome], last_lines: Sequence[str]) -> list[Encoded | BaseException]:
    """Return the worker's outcomes as answers: what it says went wrong becomes an error of ours."""
    return [
        _handler_failed(key, outcome, last_lines) if isinstance(outcome, WorkerFault) else outcome
        for outcome in outcomes
    ]


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
    if not was_loading:
        return WorkerDied(key.name, key.version, exit.pid, exit.exitcode, reason, lines)
    fault = exit.fault
    if fault is None or end_reason:
        return WorkerStartFailed(key.name, key.version, reason, "", lines)
    return WorkerStartFailed(key.name, key.version, fault.reason, fault.traceback, lines, fault.out_of_memory)
