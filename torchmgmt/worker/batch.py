"""Runs one batch on a loaded handler, and says what went wrong in words that can travel."""

from __future__ import annotations

import operator
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Any, TypeAlias

import torch
from attrs import define, evolve, frozen

from torchmgmt.channel import Buffer
from torchmgmt.encoding import decode, encode, encode_answer
from torchmgmt.exchange import BodyHead, Encoded, RequestHead
from torchmgmt.handlers.faults import NO_FAULT, BatchAbandoned
from torchmgmt.records import EXPIRED, WorkerFault
from torchmgmt.worker.loader import Handler
from torchmgmt.worker.parts import Parts, PartSender
from torchmgmt.worker.rows import row_of

__all__ = ["attempt", "fault_of", "own_buffers", "run_batch"]

_DEVICE_OUT_OF_MEMORY = torch.OutOfMemoryError if hasattr(torch, "OutOfMemoryError") else torch.cuda.OutOfMemoryError
"""Where it stands since torch 2.5, and where it stood before."""
_OUT_OF_MEMORY = (MemoryError, _DEVICE_OUT_OF_MEMORY)
# A GPU that is nearly full fails in many ways that are called only this; TorchServe answers all of them alike, too.
_CUDA_ERROR = "CUDA error"
# Not all ways to write them: it is asked of each request, and a client's library writes names in one of these.
_ASKING = frozenset(form for name in ("explain", "describe") for form in (name, name.title(), name.upper()))

_TAKEN_WHOLE = PartSender()

Outcome: TypeAlias = Encoded | WorkerFault
Ended: TypeAlias = "list[Outcome] | _Failure"
"""How a run of some requests ended: with an outcome for each, or raising."""


def run_batch(
    handler: Handler, requests: Sequence[RequestHead], segments: Sequence[Buffer], sender: PartSender = _TAKEN_WHOLE
) -> list[Encoded | WorkerFault]:
    """Run one batch; return an answer or a fault for each of its requests, in order.

    Of what the handler raises, it raises SystemExit and KeyboardInterrupt alone.

    What the handler sends of an answer before the rest goes to ``sender``.

    A batch that raised is run again without the requests that the error names; if it names none and the handler isolates
    errors, request by request. Nothing is run again that is past its deadline, or that could take longer than
    ``handler.limit_s`` with all that was run before, and nothing of a batch of which a part was sent.

    A request whose headers ask for an explanation or a description is run alone: a handler looks at the first one's only, and
    answers the whole batch so.
    """
    began = time.monotonic()
    asked = _Asked(requests, _split(requests, segments), range(len(requests)), sender)
    asking = _asking(requests) if len(requests) > 1 else ()
    if not asking:
        return _run_together(handler, asked, began)
    others = [position for position in asked.places if position not in asking]
    outcomes: dict[int, Outcome] = {}
    # The others last: they may be run again, in what time is left.
    for positions in [*([position] for position in asking), *([others] if others else [])]:
        ended = _run_together(handler, asked.some(positions), began)
        outcomes.update(zip(positions, ended, strict=True))
    return [outcomes[position] for position in asked.places]


def _asking(requests: Sequence[RequestHead]) -> Collection[int]:
    """Return the positions of the requests that ask for something else than a prediction."""
    return [
        position for position, (_, headers, *_) in enumerate(requests) if headers and not _ASKING.isdisjoint(headers)
    ]


def _split(requests: Sequence[RequestHead], segments: Sequence[Buffer]) -> list[Sequence[Buffer]]:
    """Return the segments of each request."""
    parts = []
    start = 0
    for _, _, count, _, _, _ in requests:
        parts.append(segments[start : start + count])
        start += count
    return parts


@define
class _Asked:
    """Some requests of a batch. Not frozen, which would cost a microsecond for each batch."""

    heads: Sequence[RequestHead]
    segments: Sequence[Sequence[Buffer]]
    places: Sequence[int]
    """Where they stand in the batch as it came."""
    sender: PartSender

    def some(self, positions: Sequence[int]) -> _Asked:
        """Return those at ``positions`` among these."""
        heads, segments = [self.heads[at] for at in positions], [self.segments[at] for at in positions]
        return _Asked(heads, segments, [self.places[at] for at in positions], self.sender)


def _run_together(handler: Handler, asked: _Asked, began: float) -> list[Outcome]:
    """Run requests as one batch, and again what may be; ``began`` is when the worker began with all of them."""
    started = time.monotonic()
    end = _run(handler, asked)
    if not isinstance(end, _Failure):
        return end
    if end.is_final:
        return [end.fault if outcome is None else outcome for outcome in end.outcomes]
    return _Repetition(handler, asked, (began, time.monotonic() - started), end).outcomes()


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


def _run(handler: Handler, asked: _Asked) -> Ended:
    """Run requests as one batch, once, but for those that are past their deadlines or cannot be read."""
    # What a handler writes into the arrays that it is given must not be there when they are run again.
    copies = handler.isolates_errors and len(asked.heads) > 1
    outcomes: list[Outcome | None] = []
    rows, given = [], []
    for (_, _, _, deadline, body, _), segments in zip(asked.heads, asked.segments, strict=True):
        row = EXPIRED if _is_over(deadline) else _row(segments, body, handler, copies)
        if isinstance(row, WorkerFault):
            outcomes.append(row)
            continue
        given.append(len(outcomes))
        outcomes.append(None)
        rows.append(row)
    heads = [asked.heads[index] for index in given]
    places = [asked.places[index] for index in given]
    # Only the row of an inference request says something of the answer; the handler may replace it.
    wishes = [getattr(row, "asked", None) if type(row) is not dict else None for row in rows]
    parts = Parts(
        heads,
        places,
        asked.sender,
        handler.response_properties,
        wishes,
        encode_answer if handler.is_trusted else encode,
    )
    try:
        answers = iter(_answered(handler, heads, rows, parts) if rows else ())
    except BatchAbandoned:
        return [EXPIRED if outcome is None else outcome for outcome in outcomes]
    except NO_FAULT:
        raise
    except BaseException as error:
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
    except NO_FAULT:
        raise
    except BaseException as error:
        return fault_of(error)


def own_buffers(segments: Sequence[Buffer]) -> list[Buffer]:
    """Return the segments of one request with buffers of its own: to write into them changes nothing elsewhere."""
    return [*segments[:1], *map(bytearray, segments[1:])]


def _outcome(parts: Parts, index: int, answer: Any) -> Outcome:
    if isinstance(answer, BaseException):
        return fault_of(answer)
    try:
        return parts.outcome(index, answer)
    except NO_FAULT:
        raise
    except BaseException as error:
        return fault_of(error)


def _failure_of(error: BaseException, outcomes: Sequence[Outcome | None], *, is_final: bool) -> _Failure:
    """Return what a run that raised leaves; ``outcomes`` has None for each request that the handler was given."""
    fault = fault_of(error)
    given = [position for position, outcome in enumerate(outcomes) if outcome is None]
    settled = list(outcomes)
    named = _indexes_of(error, len(given))
    for index in named:
        settled[given[index]] = _fault_at(index, error, fault)
    return _Failure(settled, fault, names_some=bool(named), is_final=is_final)


def _indexes_of(error: BaseException, batch_size: int) -> Collection[int]:
    """Return the positions in the batch that ``error`` names; none if it has something else by that name."""
    indexes = _attribute(error, "indexes")
    try:
        if not isinstance(indexes, Collection) or any(isinstance(each, bool) for each in indexes):
            return ()
        named = {operator.index(each) for each in indexes}
    except NO_FAULT:
        raise
    except BaseException:  # no integers, or a collection of the handler's own making
        return ()
    return named if all(0 <= index < batch_size for index in named) else ()


def _fault_at(index: int, error: BaseException, fault: WorkerFault) -> WorkerFault:
    """Return the fault of one request that ``error`` names: its own, where the error has one for each."""
    errors = _attribute(error, "errors")
    own = errors.get(index) if isinstance(errors, dict) else None
    return fault_of(own) if isinstance(own, BaseException) else fault


class _Repetition:
    """Runs what is left of a batch that raised again: what an error named is left out, or each request runs alone.

    Args:
        asked: what raised.
        times: when the worker began with the batch, on the monotonic clock, and how long these ran, in s.
        failure: how it ended.
    """

    def __init__(self, handler: Handler, asked: _Asked, times: tuple[float, float], failure: _Failure) -> None:
        self._handler = handler
        self._asked = asked
        self._began, lasted_s = times
        self._failure = failure
        self._outcomes = list(failure.outcomes)
        self._longest_s = lasted_s / len(asked.heads)

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
        end = _run(self._handler, self._asked.some(positions))
        self._longest_s = max(self._longest_s, (time.monotonic() - began) / len(positions))
        settled = end.outcomes if isinstance(end, _Failure) else end
        for position, outcome in zip(positions, settled, strict=True):
            self._outcomes[position] = outcome
        return end if isinstance(end, _Failure) else None


def attempt(make: Callable[[], Any]) -> Encoded | WorkerFault:
    """Return what ``make`` returns, pickled; if either raises, return that as a fault."""
    try:
        return encode(make())
    except NO_FAULT:
        raise
    except BaseException as error:
        return fault_of(error)


def fault_of(error: BaseException) -> WorkerFault:
    """Return what the embedding process is to know of ``error``: text only, since its class may not exist over there."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    code = _attribute(error, "error_code")
    text = _text_of(error)
    return WorkerFault(
        error_type=name,
        reason=f"{name}: {text}",
        traceback=_traceback_of(error),
        error_code=code if isinstance(code, int) else None,
        out_of_memory=isinstance(error, _OUT_OF_MEMORY) or (isinstance(error, RuntimeError) and _CUDA_ERROR in text),
    )


def _attribute(error: BaseException, name: str) -> Any:
    try:
        return getattr(error, name, None)
    except NO_FAULT:
        raise
    except BaseException:  # a property that fails
        return None


def _traceback_of(error: BaseException) -> str:
    """Return the traceback as text; empty if the error was made and never raised, and so has none."""
    if error.__traceback__ is None and error.__cause__ is None and error.__context__ is None:
        return ""
    return "".join(traceback.format_exception(type(error), error, _without_our_frames(error.__traceback__)))


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except NO_FAULT:
        raise
    except BaseException as reason:  # it has a __str__ of its own
        return f"(its text cannot be read: {type(reason).__name__})"


def _without_our_frames(trace: TracebackType | None) -> TracebackType | None:
    """Drop the frames above the handler's own: they are the same every time and say nothing of what went wrong."""
    inner = trace
    while inner is not None and inner.tb_frame.f_globals.get("__name__", "").startswith("torchmgmt.worker"):
        inner = inner.tb_next
    return inner or trace
