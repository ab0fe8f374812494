"""Writes what a handler answered as the body of a response. Rules: what TorchServe's workers send."""

from __future__ import annotations

import io
import json
from typing import Any

import torch

from torchmgmt.channel import Buffer
from torchmgmt.exchange import Encoded

__all__ = ["JSON", "OCTETS", "TEXT", "rendered"]

JSON = "application/json"
OCTETS = "application/octet-stream"
TEXT = "text/plain; charset=utf-8"


def rendered(answer: Any, form: int) -> Encoded:
    """Return the body for ``answer`` (form: one of :class:`torchmgmt.exchange.Form`) in one segment.

    bytes and str go out as they are, a tensor as ``torch.save`` writes it, anything else as JSON.

    Raises:
        TypeError: it has something in it that JSON has not.
    """
    body, content_type = _body_of(answer)
    return Encoded([body], content_type=content_type)


def _body_of(answer: Any) -> tuple[Buffer, str]:
    if isinstance(answer, str):
        return answer.encode(), TEXT
    if isinstance(answer, (bytes, bytearray)):
        return answer, OCTETS
    if isinstance(answer, memoryview):
        return answer.cast("B"), OCTETS
    if isinstance(answer, torch.Tensor):
        file = io.BytesIO()
        torch.save(answer, file)
        return file.getbuffer(), OCTETS
    return json.dumps(answer, default=_plain).encode(), JSON


def _plain(value: Any) -> Any:
    """Return tensors and arrays in an answer as lists: they have no other reading in JSON."""
    if callable(to_list := getattr(value, "tolist", None)):
        return to_list()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
