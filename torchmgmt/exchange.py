"""What a caller over HTTP asks with and is answered with, as it travels: whoever carries it reads and writes none of it.

The worker makes the handler's row of a body, and the body of the handler's answer. So an event loop parses no JSON and
unpickles nothing, however large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import TypeAlias

from attrs import define, field

from torchmgmt.records import BodyHead, Encoded

__all__ = ["Form", "HttpBody", "Response"]

Buffer: TypeAlias = bytes | bytearray | memoryview


class Form(IntEnum):
    """How a body is read, and the answer to it written."""

    HTTP = 1
    """By its content type, as TorchServe's handlers expect it: raw, text, JSON, form or multipart."""
    V2 = 2
    """As an inference request of the Open Inference Protocol, version 2, with or without binary tensors."""
    V1 = 3
    """As HTTP, the answer as version 1 of KServe's protocol has predictions."""
    V1_EXPLAIN = 4
    """The same for explanations."""


@define(eq=False)
class HttpBody:
    """The body of a request over HTTP, as it came. Given to ``submit`` as ``data``, it is answered with a :class:`Response`."""

    content: Buffer = b""
    """Its bytes; nobody may write to them before the answer is there."""
    content_type: str = ""
    """The header's value; "" if there was none."""
    query: Sequence[tuple[str, str]] = ()
    """Fields from the query of the URL; those of the body count more."""
    form: Form = Form.HTTP
    decodes: bool = True
    """Whether the worker parses JSON and text; if not, the handler gets bytes (``decode_input_request``)."""
    json_bytes: int = -1
    """Of V2: how many of its bytes are JSON; binary tensors come after that. -1: all are."""
    max_answer_bytes: int = 0
    """How large the answer, or a part of it, may be; a larger one does not leave the worker. 0: any."""

    def head(self) -> BodyHead:
        """Return what the worker needs to know of it beside its bytes."""
        query = tuple(self.query) if self.query else ()
        return (int(self.form), self.content_type, query, self.decodes, self.json_bytes, self.max_answer_bytes)


@define(eq=False)
class Response:
    """The answer to an :class:`HttpBody`, or the first part of one: what is to be sent over HTTP."""

    status: int = 200
    phrase: str = ""
    """What goes with the status; "" if the handler set none."""
    headers: Mapping[str, str] = field(factory=dict)
    """What the handler set, without the content type."""
    content_type: str = ""
    body: Buffer = b""

    @classmethod
    def of(cls, answer: Encoded) -> Response:
        """Return the answer to an :class:`HttpBody`; raise TypeError for that to anything else."""
        if answer.content_type is None:
            raise TypeError("only the answer to an HttpBody is a Response; this request was a Python object")
        body = answer.segments[0] if answer.segments else b""
        properties = answer.properties
        if properties is None:
            return cls(content_type=answer.content_type, body=body)
        headers = {name: value for name, value in properties.headers.items() if name.lower() != "content-type"}
        content_type = properties.content_type or answer.content_type
        return cls(properties.status, properties.phrase, headers, content_type, body)
