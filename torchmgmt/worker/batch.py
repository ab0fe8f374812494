"""Runs one batch on a loaded handler, and says what went wrong in words that can travel."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias

import torch

from torchmgmt.channel import Buffer, decode, encode
from torchmgmt.records import EXPIRED, Encoded, WorkerFault
from torchmgmt.worker.loader import Handler

__all__ = ["RequestHead", "attempt", "fault_of", "run_batch"]

_DEVICE_OUT_OF_MEMORY = torch.OutOfMemoryError if hasattr(torch, "OutOfMemoryError") else torch.cuda.OutOfMemoryError
"""Where it stands since torch 2.5, and where it stood before."""
_OUT_OF_MEMORY = (MemoryError, _DEVICE_OUT_OF_MEMORY)


RequestHead: TypeAlias = tuple[str, Mapping[str, str] | None, int, float | None]
"""Of one request: its id, its headers, the number of its segments, and when nobody waits for it any more (monotonic, s)."""


def run_batch(
    handler: Handler, requests: Sequence[RequestHead], segments: Sequence[Buffer]
) -> list[Encoded | WorkerFault]:
    """Run one batch; return an answer or a fault for each of its requests, in order. Raises nothing of the handler's."""
    outcomes: list[Encoded | WorkerFault | None] = []
    rows, ids, headers = [], [], []
    start = 0
    for request_id, request_headers, count, deadline in requests:
        row = EXPIRED if _is_over(deadline) else _row(segments[start : start + count])
        start += count
        if isinstance(row, WorkerFault):
            outcomes.append(row)
            continue
        outcomes.append(None)
        rows.append(row)
        ids.append(request_id)
        headers.append(request_headers or {})
    answers = iter(_run_rows(handler, rows, ids, headers) if rows else ())
    return [outcome if outcome is not None else next(answers) for outcome in outcomes]


def _is_over(deadline: float | None) -> bool:
    # The monotonic clock is the machine's, so that what another process said of it can be compared.
    return deadline is not None and time.monotonic() >= deadline


def _row(segments: Sequence[Buffer]) -> Any:
    try:
        return decode(Encoded(segments))
    except Exception as error:
        return fault_of(error)


def _run_rows(
    handler: Handler, rows: list[Any], ids: list[str], headers: list[Mapping[str, str]]
) -> list[Encoded | WorkerFault]:
    try:
        answers = handler.run(rows, ids, headers)
        properties = handler.response_properties()
    except Exception as error:
        fault = fault_of(error)
        return [fault] * len(rows)
    outcomes = [_encoded(answer) for answer in answers]
    if properties is not None:
        for outcome, each in zip(outcomes, properties, strict=False):  # the handler can replace what is asked
            if isinstance(outcome, Encoded):
                outcome.properties = each
    return outcomes


def attempt(make: Callable[[], Any]) -> Encoded | WorkerFault:
    """Return what ``make`` returns, pickled; if either raises, return that as a fault."""
    try:
        return _encoded(make())
    except Exception as error:
        return fault_of(error)


def _encoded(answer: Any) -> Encoded | WorkerFault:
    try:
        return encode(answer)
    except Exception as error:
        return fault_of(error)


def fault_of(error: BaseException) -> WorkerFault:
    """Return what the embedding process is to know of ``error``: text only, since its class may not exist over there."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    code = getattr(error, "error_code", None)
    return WorkerFault(
        error_type=name,
        reason=f"{name}: {_text_of(error)}",
        traceback="".join(traceback.format_exception(kind, error, _without_our_frames(error.__traceback__))),
        error_code=code if isinstance(code, int) else None,
        out_of_memory=isinstance(error, _OUT_OF_MEMORY),
    )


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
