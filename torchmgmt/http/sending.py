"""How the answer to a prediction goes out: at once, or in parts as they come, chunked or as server-sent events."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

from attrs import define

from torchmgmt import Response
from torchmgmt.http.asgi import Scope, Send
from torchmgmt.http.errors import Answer, AnswerNotSendable, AnswerTooLarge
from torchmgmt.http.exchange import EXCHANGE, Exchange
from torchmgmt.http.middleware import NO_CACHE

if TYPE_CHECKING:
    from torchmgmt import AnswerStream

__all__ = ["EVENT_STREAM", "Message", "Sender", "Writer", "takes_parts", "wants_events"]

EVENT_STREAM = "text/event-stream"

_NO_CACHE = [(name.lower().encode(), value.encode()) for name, value in NO_CACHE.items()]
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_NOT_IN_A_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
# How a message is framed on its connection is the server's to say.
_OF_THE_CONNECTION = frozenset(
    {b"connection", b"content-length", b"date", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
)
_WITHOUT_BODY = frozenset({204, 205, 304})
_LINE_END = re.compile(r"\r\n|\r|\n")

Message: TypeAlias = "tuple[int, str, list[tuple[bytes, bytes]], bytes | bytearray | memoryview]"
"""A whole answer: status, phrase ("": the usual one), all headers of its own, body."""


@define
class Writer:
    """Writes whole answers to one request."""

    request_id: str
    more_headers: Sequence[tuple[bytes, bytes]] = ()

    def whole(self, response: Response) -> Message:
        """Return an answer that is complete.

        Raises:
            AnswerNotSendable: the handler has set a status or a header that cannot be sent.
        """
        status, body = response.status, response.body
        headers = self.headers()
        headers.append((b"content-type", _content_type(response.content_type)))
        if response.headers or response.phrase or status != 200:
            return _message(status, response.phrase, _merged(headers, response), body)
        headers.append((b"content-length", b"%d" % len(body)))
        return status, "", headers, body

    def error(self, answer: Answer, *, for_kserve: bool) -> Message:
        """Return an error."""
        headers = [*self.headers(), (b"content-type", b"application/json")]
        headers += [
            (name.lower().encode(), value.encode("latin-1", "replace")) for name, value in answer.headers.items()
        ]
        return _message(answer.code, "", headers, answer.body(for_kserve=for_kserve))

    def empty(self, headers: Sequence[tuple[bytes, bytes]]) -> Message:
        """Return 200 without a body."""
        return _message(200, "", [*self.headers(), *headers], b"")

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that every answer has."""
        return [(b"x-request-id", self.request_id.encode("latin-1")), *_NO_CACHE, *self.more_headers]


class Sender:
    """Sends the answer to one request. ``status`` is what was sent, 0 before that. For the event loop's thread."""

    def __init__(self, scope: Scope, send: Send, writer: Writer, *, as_events: bool, max_bytes: int) -> None:
        self.status = 0
        self.is_streaming = False
        self._send = send
        self._exchange: Exchange | None = scope.get(EXCHANGE)
        self._writer = writer
        self._as_events = as_events
        self._max_bytes = max_bytes
        self._takes_parts = takes_parts(scope)

    def on_disconnect(self, callback: Callable[[], object] | None) -> bool:
        """Have ``callback`` called if the client goes; return whether this connection can tell."""
        if self._exchange is None:
            return False
        self._exchange.on_disconnect(callback)
        return True

    async def answer(self, stream: AnswerStream) -> None:
        """Send an answer as it comes: whole, or in parts.

        Raises what ended the request, AnswerNotSendable as :meth:`Writer.whole` does, and AnswerTooLarge where parts have to
        be put together and are more than ``max_bytes``.
        """
        first = await stream.next_body()
        if first is not None and stream.is_complete and not (self._as_events and self._takes_parts):
            await self.whole(self._writer.whole(first))
            return
        first = first or Response()  # an answer in parts that has none
        if not self._takes_parts:
            await self.whole(self._writer.whole(await _joined(first, stream, self._max_bytes)))
            return
        await self._begin(first)
        part: Response | None = first
        while part is not None:
            await self._part(part.body)
            part = await stream.next_body()
        await self._end()

    async def error(self, answer: Answer, *, for_kserve: bool) -> None:
        """Send an error; where the answer has begun already, end it so that the error is seen."""
        if self.is_streaming:
            await self._break_off(answer, for_kserve=for_kserve)
        else:
            await self.whole(self._writer.error(answer, for_kserve=for_kserve))

    async def whole(self, message: Message) -> None:
        """Send an answer that is complete."""
        self.status, _phrase, headers, body = message
        if self._exchange is not None:
            await self._exchange.has_room()
            self._exchange.respond(*message)
            return
        await self._send({"type": "http.response.start", "status": self.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def _begin(self, first: Response) -> None:
        """Begin an answer in parts, with the first one's status and headers; send that with :meth:`_part`."""
        content_type = EVENT_STREAM.encode() if self._as_events else _content_type(first.content_type)
        headers = [*self._writer.headers(), (b"content-type", content_type)]
        headers.append((b"x-accel-buffering", b"no"))  # a proxy that collects the parts would make them one
        if first.headers or first.phrase or first.status != 200:
            headers = _merged(headers, first)
        self.status, self.is_streaming = first.status, True
        await self._send({"type": "http.response.start", "status": first.status, "headers": headers})

    async def _part(self, body: bytes | bytearray | memoryview) -> None:
        """Send a part; waits while the client takes nothing."""
        if self._as_events:
            body = _event(bytes(body).decode("utf-8", "replace"))
        if body:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def _end(self) -> None:
        """End an answer in parts."""
        await self._send({"type": "http.response.body", "body": _event("", "end") if self._as_events else b""})

    async def _break_off(self, answer: Answer, *, for_kserve: bool) -> None:
        if self._as_events:
            event = _event(json.dumps(json.loads(answer.body(for_kserve=for_kserve))), "error")
            await self._send({"type": "http.response.body", "body": event})
        elif self._exchange is not None:
            self._exchange.cut()
        else:  # whatever server this is, it must not end the body well
            raise ConnectionAbortedError(answer.message)


async def _joined(first: Response, stream: AnswerStream, max_bytes: int) -> Response:
    """Return a whole answer, for a client that takes no other."""
    bodies, size = [first.body], len(first.body)
    while (part := await stream.next_body()) is not None:
        bodies.append(part.body)
        size += len(part.body)
        if size > max_bytes:
            raise AnswerTooLarge(max_bytes)
    if len(bodies) > 1:
        first.body = b"".join(bodies)
    return first


def _message(
    status: int, phrase: str, headers: list[tuple[bytes, bytes]], body: bytes | bytearray | memoryview
) -> Message:
    if status in _WITHOUT_BODY:
        body = b""
    if status not in {204, 304}:
        headers.append((b"content-length", b"%d" % len(body)))
    return status, phrase, headers, body


@lru_cache(maxsize=64)
def _content_type(text: str) -> bytes:
    raw = text.encode("latin-1", "replace")
    if _NOT_IN_A_VALUE.search(raw):
        raise AnswerNotSendable(f"The handler has set a content type that HTTP does not have: {text!r}")
    return raw


def _merged(headers: Iterable[tuple[bytes, bytes]], response: Response) -> list[tuple[bytes, bytes]]:
    """Return ``headers`` with those of the handler, which count more; refuse what cannot be sent."""
    if not 200 <= response.status < 600:
        raise AnswerNotSendable(f"The handler has set the status {response.status}; it must be from 200 to 599")
    if _NOT_IN_A_VALUE.search(response.phrase.encode("latin-1", "replace")) or not response.phrase.isascii():
        raise AnswerNotSendable(f"The handler has set the phrase {response.phrase!r}; it must be ASCII in one line")
    return [*{**dict(headers), **dict(_handlers(response.headers))}.items()]


def _handlers(headers: Mapping[str, str]) -> Iterable[tuple[bytes, bytes]]:
    for name, value in headers.items():
        raw_name, raw_value = name.lower().encode("latin-1", "replace"), value.encode("utf-8")
        if raw_name in _OF_THE_CONNECTION:
            continue
        if not _TOKEN.fullmatch(raw_name) or _NOT_IN_A_VALUE.search(raw_value):
            raise AnswerNotSendable(f"The handler has set a header that HTTP does not have: {name!r}: {value!r}")
        yield raw_name, raw_value


def _event(text: str, kind: str = "") -> bytes:
    """Return one server-sent event: https://html.spec.whatwg.org/multipage/server-sent-events.html."""
    lines = [f"event: {kind}"] if kind else []
    lines += [f"data: {line}" for line in _LINE_END.split(text)]
    return ("\n".join(lines) + "\n\n").encode()


def takes_parts(scope: Scope) -> bool:
    """Whether a client takes an answer in parts: HTTP 1.0 has no chunks."""
    return bool(scope["http_version"] != "1.0")


def wants_events(accept: str | None) -> bool:
    """Whether a client asks for server-sent events."""
    return accept is not None and EVENT_STREAM in accept.lower()
