"""What goes to a worker and comes back, as it travels: whoever carries it reads and writes none of it.

Of what a caller over HTTP asks, the worker makes the handler's row, and of the handler's answer the body to be sent. So an
event loop parses no JSON and unpickles nothing, however large.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any, TypeAlias

from attrs import define, field, frozen

__all__ = [
    "AnswerHead",
    "BodyHead",
    "Encoded",
    "Form",
    "HttpBody",
    "RequestHead",
    "Response",
    "ResponseProperties",
    "WorkerRequest",
]

Buffer: TypeAlias = bytes | bytearray | memoryview


@frozen
class ResponseProperties:
    """What a handler has set for the answer to one request beside its body, through its context. Plain values, unchecked."""

    status: int = 200
    """The status that the answer is to have over HTTP."""
    phrase: str = ""
    """What goes with the status; "" if the handler set none."""
    headers: Mapping[str, str] = field(factory=dict)
    """By name as the handler wrote it, the content type included."""

    @property
    def content_type(self) -> str | None:
        """The content type that the handler set; None if it set none."""
        return next((value for name, value in self.headers.items() if name.lower() == "content-type"), None)

    def over(self, beneath: ResponseProperties | None) -> ResponseProperties:
        """Return these, with the headers of ``beneath`` that are not among them."""
        if beneath is None:
            return self
        return ResponseProperties(self.status, self.phrase, {**beneath.headers, **self.headers})


# What follows is not frozen, as other facts are: to make a frozen one costs a microsecond more, for each request thrice.


@define(eq=False)
class Encoded:
    """A pickled object and the buffers that its pickle left out (:pep:`574`): what travels to and from a worker.

    With a :class:`HttpBody` it is that body, and the body of the answer to it, in one segment. An answer without segments
    is the end of one that came in parts.
    """

    segments: Sequence[bytes | bytearray | memoryview]
    properties: ResponseProperties | None = None
    """Of an answer: what the handler has set beside it, if anything."""
    content_type: str | None = None
    """Of the body of an answer: its type; None: this is no body but a pickle."""


BodyHead: TypeAlias = tuple[int, str, tuple[tuple[str, str], ...], bool, int, int]
"""Of a body: its form, content type, query, whether it is to be parsed, how much of it is JSON, and how large the answer may
be (:class:`HttpBody`)."""
RequestHead: TypeAlias = tuple[str, "Mapping[str, str] | None", int, "float | None", "BodyHead | None", bool]
"""What a worker is told of a request: its id, its headers, the number of its segments, its deadline, what it is if it is a
body, and whether its answer may come in parts."""

AnswerHead: TypeAlias = "int | tuple[int, ResponseProperties | None, str | None]"
"""Of an answer on its way: the number of its segments; if there is more to say, what was set beside it and its content type."""


@define(eq=False)
class WorkerRequest:
    """One request as a worker gets it: the row for the handler, its id and its headers."""

    row: Encoded
    request_id: str
    headers: Mapping[str, str] | None = None
    deadline: float | None = None
    """When nobody waits for it any more, on the monotonic clock of the machine (s); it is not begun after that."""
    limit_s: float = 0.0
    """How long after the request was made that is."""
    body: BodyHead | None = None
    """What the row is to be made of, if it is a body."""
    on_part: Callable[[Encoded], object] | None = None
    """Takes a part of the answer that came before the rest, and must not block; None: the answer is wanted whole."""
    handovers: int = 0
    """With how many workers it was that ended before they had begun it, and perhaps because of it."""
    span: Any = None
    """Its span, if it is traced and that has not ended."""
    code: str = ""
    """A class or function in the row that goes along by its code; "" if none does."""

    def head(self) -> RequestHead:
        """Return what the worker is told of it beside its row."""
        return (
            self.request_id,
            self.headers,
            len(self.row.segments),
            self.deadline,
            self.body,
            self.on_part is not None,
        )


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
