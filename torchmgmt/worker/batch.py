"""Runs one batch on a loaded handler, and says what went wrong in words that can travel."""

from __future__ import annotations

import operator
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Any, TypeAlias

import torch
from attrs import evolve, frozen

from torchmgmt.channel import Buffer, decode
from torchmgmt.records import EXPIRED, BodyHead, Encoded, RequestHead, WorkerFault
from torchmgmt.worker.loader import Handler
from torchmgmt.worker.parts import BatchAbandoned, Parts, PartSender, encoded
from torchmgmt.worker.rows import row_of

__all__ = ["attempt", "fault_of", "own_buffers", "run_batch"]

_DEVICE_OUT_OF_MEMORY = torch.OutOfMemoryError if hasattr(torch, "OutOfMemoryError") else torch.cuda.OutOfMemoryError
"""Where it stands since torch 2.5, and where it stood before."""
_OUT_OF_MEMORY = (MemoryError, _DEVICE_OUT_OF_MEMORY)


_TAKEN_WHOLE = PartSender()

Outcome: TypeAlias = Encoded | WorkerFault
Ended: TypeAlias = "list[Outcome] | _Failure"
"""How a run of some requests ended: with an outcome for each, or raising."""


def run_batch(
    handler: Handler, requests: Sequence[RequestHead], segments: Sequence[Buffer], sender: PartSender = _TAKEN_WHOLE
) -> list[Encoded | WorkerFault]:
    """Run one batch; return an answer or a fault for each of its requests, in order. Raises nothing of the handler's.

    What the handler sends of an answer before the rest goes to ``sender``.

    A batch that raised is run again without the requests that the error names; if it names none and the handler isolates
    errors, request by request. Nothing is run again that is past its deadline, or that could take longer than
    ``handler.limit_s`` with all that was run before, and nothing of a batch of which a part was sent.
    """
    began = time.monotonic()
    end = _run(handler, requests, segments, sender, range(len(requests)))
    if isinstance(end, _Failure) and end.is_final:
        return [end.fault if outcome is None else outcome for outcome in end.outcomes]
    if isinstance(end, _Failure):
        end = _Repetition(handler, requests, segments, sender, began, end).outcomes()
    return end


@frozen
class _Failure:
    """A run of requests that raised."""

    outcomes: Sequence[Outcome | None]
    """What is settled in spite of that; None: nothing."""
    fault: WorkerFault
    names_some: bool
    """Whether the error named those that it is about; they have their faults in ``outcomes``."""
    is_final: bool
    """Whether nothing may be run again, since a part of an answer is with its caller."""


def _run(
    handler: Handler,
    requests: Sequence[RequestHead],
    segments: Sequence[Buffer],
    sender: PartSender,
    places: Sequence[int],
) -> Ended:
    """Run requests as one batch, once, but for those that are past their deadlines or cannot be read.

    ``places`` says where they stand in the batch as it came.
    """
    # What a handler writes into the arrays that it is given must not be there when they are run again.
    copies = handler.isolates_errors and len(requests) > 1
    outcomes: list[Outcome | None] = []
    rows, given = [], []
    start = 0
    for request in requests:
        _, _, count, deadline, body, _ = request
        row = EXPIRED if _is_over(deadline) else _row(segments[start : start + count], body, handler, copies)
        start += count
        if isinstance(row, WorkerFault):
            outcomes.append(row)
            continue
        given.append(len(outcomes))
        outcomes.append(None)
        rows.append(row)
    asked = [requests[index] for index in given]
    # Only the row of an inference request says something of the answer; the handler may replace it.
    wishes = [getattr(row, "asked", None) if type(row) is not dict else None for row in rows]
    parts = Parts(asked, [places[index] for index in given], sender, handler.response_properties, wishes)
    try:
        answers = iter(_answered(handler, asked, rows, parts) if rows else ())
    except BatchAbandoned:
        return [EXPIRED if outcome is None else outcome for outcome in outcomes]
    except Exception as error:
        # To be made here, and the error let go of: its frames hold what the handler had made of the batch, maybe all memory.
        return _failure_of(error, outcomes, is_final=parts.any_sent)
    return [next(answers) if outcome is None else outcome for outcome in outcomes]


def _answered(handler: Handler, requests: Sequence[RequestHead], rows: list[Any], parts: Parts) -> list[Outcome]:
    """Run the handler once, and return what came out for each row. Raises what the handler raises."""
    ids = [request[0] for request in requests]
    headers = [request[1] or {} for request in requests]
    answers = parts.drained(handler.run(rows, ids, headers, parts.send))
    properties = handler.response_properties()
    outcomes = [_outcome(parts, index, answer) for index, answer in enumerate(answers)]
    if properties is not None:
        for outcome, each in zip(outcomes, properties, strict=False):  # the handler can replace what is asked
            if isinstance(outcome, Encoded) and each is not None:
                outcome.properties = each.over(outcome.properties)
    return outcomes


def _is_over(deadline: float | None) -> bool:
    # The monotonic clock is the machine's, so that what another process said of it can be compared.
    return deadline is not None and time.monotonic() >= deadline


def _row(segments: Sequence[Buffer], body: BodyHead | None, handler: Handler, copies: bool) -> Any:
    try:
        if body is not None:
            return row_of(body, segments[0], handler.served_as)
        return decode(Encoded(own_buffers(segments) if copies else segments))
    except Exception as error:
        return fault_of(error)


def own_buffers(segments: Sequence[Buffer]) -> list[Buffer]:
    """Return the segments of one request with buffers of its own: to write into them changes nothing elsewhere."""
    return [*segments[:1], *map(bytearray, segments[1:])]


def _outcome(parts: Parts, index: int, answer: Any) -> Outcome:
    if isinstance(answer, BaseException):
        return fault_of(answer)
    try:
        return parts.outcome(index, answer)
    except Exception as error:
        return fault_of(error)


def _failure_of(error: Exception, outcomes: Sequence[Outcome | None], *, is_final: bool) -> _Failure:
    """Return what a run that raised leaves; ``outcomes`` has None for each request that the handler was given."""
    fault = fault_of(error)
    given = [position for position, outcome in enumerate(outcomes) if outcome is None]
    settled = list(outcomes)
    named = _indexes_of(error, len(given))
    for index in named:
        settled[given[index]] = _fault_at(index, error, fault)
    return _Failure(settled, fault, names_some=bool(named), is_final=is_final)


def _indexes_of(error: Exception, batch_size: int) -> Collection[int]:
    """Return the positions in the batch that ``error`` names; none if it has something else by that name."""
    indexes = _attribute(error, "indexes")
    try:
        if not isinstance(indexes, Collection) or any(isinstance(each, bool) for each in indexes):
            return ()
        named = {operator.index(each) for each in indexes}
    except Exception:  # no integers, or a collection of the handler's own making
        return ()
    return named if all(0 <= index < batch_size for index in named) else ()


def _fault_at(index: int, error: Exception, fault: WorkerFault) -> WorkerFault:
    """Return the fault of one request that ``error`` names: its own, where the error has one for each."""
    errors = _attribute(error, "errors")
    own = errors.get(index) if isinstance(errors, dict) else None
    return fault_of(own) if isinstance(own, BaseException) else fault


def _parts(requests: Sequence[RequestHead], segments: Sequence[Buffer]) -> list[Sequence[Buffer]]:
    """Return the segments of each request."""
    parts = []
    start = 0
    for _, _, count, _, _, _ in requests:
        parts.append(segments[start : start + count])
        start += count
    return parts


class _Repetition:
    """Runs what is left of a batch that raised again: what an error named is left out, or each request runs alone.

    Args:
        handler, requests, segments, sender: what raised.
        began: when it began, on the monotonic clock.
        failure: how it ended.
    """

    def __init__(
        self,
        handler: Handler,
        requests: Sequence[RequestHead],
        segments: Sequence[Buffer],
        sender: PartSender,
        began: float,
        failure: _Failure,
    ) -> None:
        self._handler = handler
        self._requests = requests
        self._parts = _parts(requests, segments)
        self._sender = sender
        self._began = began
        self._failure = failure
        self._outcomes = list(failure.outcomes)
        self._longest_s = (time.monotonic() - began) / len(requests)

    def outcomes(self) -> list[Outcome]:
        """Run again what may be, and return an outcome for each request."""
        # Each error that names some settles these, so there are no more runs than requests.
        while self._failure.names_some and not self._failure.is_final and self._may_run(left := self._left()):
            self._failure = self._run(left) or self._failure
        # What is left now failed together, and nobody was named; what failed alone would fail alone again.
        left = self._left()
        if self._handler.isolates_errors and len(left) > 1 and not self._failure.is_final:
            self._run_alone(left)
        return [self._failure.fault if outcome is None else outcome for outcome in self._outcomes]

    def _left(self) -> list[int]:
        return [position for position, outcome in enumerate(self._outcomes) if outcome is None]

    def _run_alone(self, positions: Sequence[int]) -> None:
        for position in positions:
            failure = self._run([position]) if self._may_run([position]) else None
            if failure is not None and self._outcomes[position] is None:
                self._outcomes[position] = failure.fault

    def _may_run(self, positions: Sequence[int]) -> bool:
        """Whether there is something to run, and time for it: a worker that takes too long for a batch is killed."""
        if not positions:
            return False
        expected_s = self._longest_s * len(positions)
        if time.monotonic() - self._began + expected_s < self._handler.limit_s:
            return True
        fault = self._failure.fault
        why = f"no time was left in response_timeout ({self._handler.limit_s:g} s) to run this request again"
        untried = evolve(fault, reason=f"{fault.reason}; {why}", error_code=None)
        for position in positions:
            self._outcomes[position] = untried
        return False

    def _run(self, positions: Sequence[int]) -> _Failure | None:
        """Run some requests as one batch, note what that settles, and return the failure if they raised."""
        began = time.monotonic()
        segments = [segment for position in positions for segment in self._parts[position]]
        requests = [self._requests[position] for position in positions]
        end = _run(self._handler, requests, segments, self._sender, positions)
        self._longest_s = max(self._longest_s, (time.monotonic() - began) / len(positions))
        settled = end.outcomes if isinstance(end, _Failure) else end
        for position, outcome in zip(positions, settled, strict=True):
            self._outcomes[position] = outcome
        return end if isinstance(end, _Failure) else None


def attempt(make: Callable[[], Any]) -> Encoded | WorkerFault:
    """Return what ``make`` returns, pickled; if either raises, return that as a fault."""
    try:
        return encoded(make(), None)
    except Exception as error:
        return fault_of(error)


def fault_of(error: BaseException) -> WorkerFault:
    """Return what the embedding process is to know of ``error``: text only, since its class may not exist over there."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    code = _attribute(error, "error_code")
    return WorkerFault(
        error_type=name,
        reason=f"{name}: {_text_of(error)}",
        traceback=_traceback_of(error),
        error_code=code if isinstance(code, int) else None,
        out_of_memory=isinstance(error, _OUT_OF_MEMORY),
    )


def _attribute(error: BaseException, name: str) -> Any:
    try:
        return getattr(error, name, None)
    except Exception:  # a property that fails
        return None


def _traceback_of(error: BaseException) -> str:
    """Return the traceback as text; empty if the error was made and never raised, and so has none."""
    if error.__traceback__ is None and error.__cause__ is None and error.__context__ is None:
        return ""
    return "".join(traceback.format_exception(type(error), error, _without_our_frames(error.__traceback__)))


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as reason:  # it has a __str__ of its own
        return f"(its text cannot be read: {type(reason).__name__})"


def _without_our_frames(trace: TracebackType | None) -> TracebackType | None:
    """Drop the frames above the handler's own: they are the same every time and say nothing of what went wrong."""
    inner = trace
    while inner is not None and inner.tb_frame.f_globals.get("__name__", "").startswith("torchmgmt.worker"):
        inner = inner.tb_next
    return inner or trace
