"""Writes what a handler answered as the body of a response. Rules: what TorchServe's workers send."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import torch

from torchmgmt.channel import Buffer
from torchmgmt.exchange import BodyHead, Encoded, Form
from torchmgmt.segments import size_of

if TYPE_CHECKING:
    from torchmgmt.worker.open_inference import Asked

__all__ = ["JSON", "OCTETS", "TEXT", "AnswerTooLarge", "rendered"]

JSON = "application/json"
OCTETS = "application/octet-stream"
TEXT = "text/plain; charset=utf-8"
_KEYS = {int(Form.V1): "predictions", int(Form.V1_EXPLAIN): "explanations"}


class AnswerTooLarge(Exception):
    """An answer is larger than whoever asked takes; ``error_code`` is the HTTP status of that."""

    error_code = 413

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(
            f"the answer has {size} bytes, more than the {limit} that the setting max_response_size allows"
        )


def rendered(answer: Any, head: BodyHead, asked: Asked | None = None) -> Encoded:
    """Return the body for ``answer`` in one segment; ``head`` is that of the request's body.

    bytes and str go out as they are, a tensor as ``torch.save`` writes it, anything else as JSON; what is wrapped for the
    protocol that the request came in is wrapped. ``asked`` is what an inference request (``Form.V2``) said of the answer.

    Raises:
        TypeError: it has something in it that JSON has not.
        AnswerTooLarge: it is larger than ``head`` allows.
        InputRefused: an inference request asked for something that is not in it.
    """
    if asked is not None:
        from torchmgmt.worker.open_inference import written

        encoded = written(answer, asked)
    else:
        key = _KEYS.get(head[0])
        body, content_type = _body_of(answer if key is None else _keyed(answer, key))
        encoded = Encoded([body], content_type=content_type)
    limit = head[5]
    if limit and (size := size_of(encoded.segments[0])) > limit:
        raise AnswerTooLarge(size, limit)
    return encoded


def _keyed(answer: Any, key: str) -> Any:
    """Return the answer as KServe's version 1 has it; what an envelope, or a handler that knows it, has made stays."""
    if isinstance(answer, (dict, str, bytes, bytearray, memoryview)):
        return answer
    return {key: answer}


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
