"""uvicorn's protocol, made to end what takes too long or too much, and to speak JSON about what it refuses by itself.

By itself uvicorn waits for ever for the rest of a request, holds a header of any length, and reads requests ahead
without end. Each part here is replaced by uvicorn's own seam: the protocol class, and the flow control in it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from enum import Enum
from typing import Any

import httptools
import uvicorn
from attrs import field, frozen
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from torchmgmt.http.asgi import ASGIApp, Scope
from torchmgmt.http.errors import Answer, answer_for_code
from torchmgmt.http.exchange import EXCHANGE, Exchange, WholeRequest
from torchmgmt.http.known_heads import KnownHead, KnownHeads
from torchmgmt.http.limits import (
    LONG_LENGTH,
    MANY_HOSTS,
    MOST_LENGTH_DIGITS,
    NOT_HTTP_1,
    SLOW,
    TOO_MUCH_HEAD,
    UNREADABLE_TARGET,
    Limits,
)
from torchmgmt.http.middleware import request_id_of, response_headers

__all__ = ["LimitedProtocol", "Serving", "raw_headers"]

# uvicorn's own loggers would print through logging's last resort in a program that configured none.
logger = logging.getLogger("torchmgmt.http.server")

MOST_WAITING_REQUESTS = 100
"""Of one connection; who sends more of them ahead is told to close, and sends them again on another."""
OVERHEAD_PER_BODY_BYTE = 8
"""A body sent in chunks of one byte takes five bytes of framing for each."""
MOST_PIECES = 1000
"""Of a body, that are kept one by one: an object for each byte would take forty times as much memory as its sender has sent."""


class Phase(Enum):
    """What of a request has come."""

    NOTHING = "nothing"
    HEAD = "part of its head"
    BODY = "its head, and part of its body"


class _Refused(Exception):
    """Ends the parsing of what was refused; the parser hands it on as an error of a callback."""


class _Flow(FlowControl):
    """Reads nothing further while requests that were read ahead wait for their turn."""

    def __init__(self, transport: asyncio.Transport, is_ahead: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._is_ahead = is_ahead

    def resume_reading(self) -> None:
        """Read on, unless requests are waiting."""
        if not self._is_ahead():
            super().resume_reading()


def raw_headers(answer: Answer, request_id: str, length: int) -> list[tuple[bytes, bytes]]:
    """Return the headers of an answer that no application gives, as ASGI has them."""
    headers = {
        "content-type": "application/json",
        "content-length": str(length),
        **response_headers(request_id),
        **answer.headers,
    }
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


@frozen
class Serving:
    """How an application is called for each request: ``begin`` may return what serves it without a task."""

    begin: Callable[[Scope], WholeRequest | None]
    on_answer: Callable[[int], object]
    """Told the code of each answer to these."""
    guard: Callable[[ASGIApp], ASGIApp]
    """What is called in a task is called through this."""
    known_heads: KnownHeads = field(factory=KnownHeads, init=False)


class LimitedProtocol(HttpToolsProtocol):
    """One connection. All of it runs on the event loop; :meth:`check_deadlines` is called every ``limits.tick_s``."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        limits: Limits,
        on_lost: Callable[[], None],
        half_sent_grace_s: float,
        serving: Serving | None = None,
    ) -> None:
        super().__init__(config, server_state, {})
        self.logger = logger
        self.limits = limits
        self._serving = serving
        self._held: WholeRequest | None = None  # what serves the request whose body comes, if that needs no task
        self._whole: tuple[WholeRequest, RequestResponseCycle] | None = None  # the same once all of it has come
        self._chunks: list[bytes | bytearray] = []  # of its body
        self._on_lost = on_lost
        self._half_sent_grace_s = half_sent_grace_s
        self._phase = Phase.NOTHING
        self._began = 0.0  # the phase, or else the last moment at which something of ours was awaited
        self._requests = 0
        self._unanswered = 0
        self._head_bytes = 0  # that came while nothing of it could be told apart
        self._head_size = 0  # of what was told apart, but for the first line
        self._hosts = 0
        self._length_digits = 0
        self._framed_bytes = self._body_bytes = 0
        self._write_paused_at = 0.0
        self._is_deaf = False  # what still comes is thrown away
        self._refusal: Answer | None = None  # to be sent when earlier requests are answered
        self._ends_at = float("inf")
        self._unsent_bytes = -1
        self._is_stopping = False
        self.on_disconnect: Callable[[], object] | None = None

    # --- the connection -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Begin."""
        super().connection_made(transport)
        self.flow = _Flow(transport, lambda: bool(self.pipeline))
        self._began = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        super().connection_lost(exc)
        self._release()
        self.pipeline.clear()
        self._on_lost()
        if self.on_disconnect is not None:
            self.on_disconnect()

    def pause_writing(self) -> None:
        """Note since when the client takes nothing."""
        self._write_paused_at = self.loop.time()
        super().pause_writing()

    def shutdown(self) -> None:
        """Take no further request; close once those that came are answered. Called once."""
        self._is_stopping = True
        self._began = self.loop.time()
        if self._ends_at < float("inf"):
            self._end_within(self._half_sent_grace_s)
        elif self.is_answering:
            if self._refusal is None:
                self.cycle.keep_alive = False
        elif self._phase is Phase.NOTHING:
            self.transport.close()
        elif self._phase is Phase.BODY:
            super().shutdown()

    def _end_within(self, seconds: float) -> None:
        self._ends_at = min(self._ends_at, self.loop.time() + seconds)

    # --- what comes ---------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        if self._is_deaf:
            return
        if self._serving is not None and self._is_free:
            known = self._serving.known_heads.find(data)
            if known is not None:
                self._serve_known(known, data)
                return
        phase, requests = self._phase, self._requests
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._is_deaf = True  # answered as what it is besides; what follows would be another protocol
        except httptools.HttpParserError as error:
            if not self._is_deaf:
                self._refuse(answer_for_code(400, f"The request is not valid HTTP: {error}"))
        else:
            if requests == self._requests and phase is self._phase:
                self._count(phase, len(data))
        if self._whole is not None:  # only now: the parser is not to be in the middle of something
            if phase is self._phase is Phase.NOTHING:
                self._learn(data, *self._whole)
            chunks, self._chunks = self._chunks, []
            self._serve_whole(*self._whole, b"".join(chunks))  # which copies nothing if there is one

    @property
    def _is_free(self) -> bool:
        """Whether nothing has come that is not answered, so that what comes now is the beginning of a request."""
        return not (self._unanswered or self._phase is not Phase.NOTHING or self._is_stopping or self.flow.write_paused)

    def _serve_known(self, known: KnownHead, data: bytes) -> None:
        """Serve a request that the parser need not see: it is between two messages, before this one and after it."""
        super().on_message_begin()
        self._requests += 1
        self._began = self.loop.time()
        self.headers += known.headers
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]  # ASGI allows more keys than its TypedDict has
        scope.update(known.fields)
        self.cycle = RequestResponseCycle(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=True,
            on_response=self.on_response_complete,
        )
        self.cycle.more_body = False
        self._unanswered += 1
        self._serve_whole(known.request.again(scope), self.cycle, data[known.head_bytes :])

    def _learn(self, data: bytes, request: WholeRequest, cycle: RequestResponseCycle) -> None:
        """Keep what the parser has found in ``data``, which begins with the request and ends with it or another."""
        if self._serving is not None and cycle.keep_alive:
            self._serving.known_heads.add(data, cycle.scope, request)

    def _serve_whole(self, request: WholeRequest, cycle: RequestResponseCycle, content: bytes) -> None:
        self._whole = None
        on_answer = self._serving.on_answer if self._serving is not None else None
        request.serve(content, Exchange(self, cycle, on_answer))

    def _count(self, phase: Phase, received: int) -> None:
        """Count what the parser may be holding back, having called nobody."""
        if phase is Phase.BODY:
            self._framed_bytes += received
            allowed = self.limits.head_bytes + OVERHEAD_PER_BODY_BYTE * self._body_bytes
            if self._framed_bytes - self._body_bytes > allowed:
                self._refuse(answer_for_code(400, "The body's framing is larger than the body"))
        elif phase is Phase.HEAD:
            self._head_bytes += received
            if self._head_bytes > self.limits.head_bytes:
                self._refuse_head()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._requests += 1
        self._phase, self._began = Phase.HEAD, self.loop.time()
        self._head_bytes = self._head_size = self._hosts = self._length_digits = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header has come, or a trailer; trailers are dropped, as nobody may take them for headers."""
        if self._phase is Phase.BODY:
            return
        name = name.lower()
        self._head_size += len(name) + len(value) + 4
        if name == b"host":
            self._hosts += 1
        elif name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        elif name == b"content-length":
            self._length_digits = len(value)
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Refuse what must not be served, and begin to serve the rest."""
        if len(self.url) + self._head_size > self.limits.head_bytes:
            self._refuse_head()
        elif self.parser.get_http_version() not in {"1.1", "1.0"}:
            self._refuse(answer_for_code(400, NOT_HTTP_1))
        elif self._hosts > 1:
            self._refuse(answer_for_code(400, MANY_HOSTS))
        elif self._length_digits > MOST_LENGTH_DIGITS:
            self._refuse(answer_for_code(400, LONG_LENGTH))
        if self._is_deaf:
            raise _Refused
        try:
            super().on_headers_complete()
        except httptools.HttpParserInvalidURLError:  # of the target, before there is a cycle of this request
            self._refuse(answer_for_code(400, UNREADABLE_TARGET))
            raise _Refused from None
        self._phase, self._began = Phase.BODY, self.loop.time()
        self._framed_bytes = self._body_bytes = 0
        self._unanswered += 1
        # The last of these uvicorn sees by itself from 0.53 on.
        if self._is_stopping or self.parser.should_upgrade() or not self.parser.should_keep_alive():
            self.cycle.keep_alive = False

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Begin to serve a request whose head has come, if it is not one that waits for its body first."""
        scope: dict[str, Any] = cycle.scope  # type: ignore[assignment]  # ASGI allows more keys than its TypedDict has
        # Not one that is told to send its body: it must be read first.
        if self._serving is not None and not (self.flow.write_paused or self.expect_100_continue):
            self._held = self._serving.begin(scope)
        if self._held is None:
            self._start_task(cycle, app)

    def _start_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        # The task has not begun yet, so it finds this.
        scope: dict[str, Any] = cycle.scope  # type: ignore[assignment]  # ASGI allows more keys than its TypedDict has
        scope[EXCHANGE] = Exchange(self, cycle)
        super()._start_asgi_task(cycle, app)

    def _release(self) -> None:
        """Have a task serve, or refuse, the request whose body comes."""
        if self._held is not None:
            self._held = None
            self.cycle.body += b"".join(self._chunks)
            self._chunks.clear()
            self._start_task(self.cycle, self.app)

    def hand_over(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:
        """Have ``app`` answer, in a task, a request that is there."""
        self.on_disconnect = None
        self._start_task(cycle, self._serving.guard(app) if self._serving is not None else app)

    def on_body(self, body: bytes) -> None:
        """Part of the body has come."""
        self._body_bytes += len(body)
        if self._held is None:
            super().on_body(body)
            return
        if len(self._chunks) < MOST_PIECES:
            self._chunks.append(body)
        elif isinstance(last := self._chunks[-1], bytearray):
            last += body
        else:
            self._chunks.append(bytearray(body))
        if self._body_bytes > self._held.max_body_bytes:
            self._release()

    def on_message_complete(self) -> None:
        """All of a request has come."""
        self._phase, self._began = Phase.NOTHING, self.loop.time()
        if self._held is not None:
            self.cycle.more_body = False
            self._whole, self._held = (self._held, self.cycle), None
            return
        super().on_message_complete()
        if len(self.pipeline) >= MOST_WAITING_REQUESTS:
            self.cycle.keep_alive = False
            self._is_deaf = True
            raise _Refused

    # --- what is refused ----------------------------------------------------------------------------------------------

    def _refuse_head(self) -> None:
        self._refuse(answer_for_code(431, TOO_MUCH_HEAD.format(self.limits.head_bytes)))

    def _refuse(self, answer: Answer) -> None:
        """Answer with ``answer``, after what came before has been answered, and end the connection."""
        self._is_deaf = True
        if self._phase is Phase.BODY:
            if self.cycle.response_started:  # an answer cannot be taken back, and there is one for each request
                self.transport.close()
                return
            self._give_up_request()
        self._phase = Phase.NOTHING
        self._refusal = answer
        if not self.is_answering:
            self._send_refusal()

    def _give_up_request(self) -> None:
        """Tell the application, if it was called already, that the rest of the request will not come."""
        if self.pipeline:
            self.pipeline.popleft()
        self._release()
        self._unanswered -= 1
        self.cycle.disconnected = True
        self.cycle.response_complete = True
        self.cycle.message_event.set()

    def _send_refusal(self) -> None:
        answer, self._refusal = self._refusal, None
        if answer is None or self.transport.is_closing():
            return
        body = answer.body()
        given = next((value for name, value in self.headers or () if name == b"x-request-id"), b"")
        request_id = request_id_of(given.decode("latin-1"))
        headers = [*self.server_state.default_headers, *raw_headers(answer, request_id, len(body))]
        lines = [f"HTTP/1.1 {answer.status}".encode(), *(name + b": " + value for name, value in headers)]
        self.transport.write(b"\r\n".join([*lines, b"connection: close", b"", body]))
        self._linger()

    def _linger(self) -> None:
        """Let the client read the answer although more of its request may come.

        Closing a connection with unread bytes makes TCP reset it, and the answer is lost on the way.
        """
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._end_within(self.limits.linger_s)
        self.flow.resume_reading()

    # --- what is answered, and what takes too long --------------------------------------------------------------------

    @property
    def is_answering(self) -> bool:
        """Whether there is a request, all of which has come, without its answer."""
        is_receiving = self._phase is Phase.BODY and not self.cycle.response_complete
        return self._unanswered > is_receiving

    def on_response_complete(self) -> None:
        """An answer is given."""
        self.on_disconnect = None
        self._unanswered -= 1
        self._began = self.loop.time()
        self.server_state.total_requests += 1
        if not self.transport.is_closing():
            # As uvicorn has it, but for its timer: check_deadlines ends idle connections, and a timer for each request is dear.
            if self.flow.read_paused:
                self.flow.resume_reading()
            if self.pipeline:
                self._start_task(*self.pipeline.pop())
        if self._refusal is not None and not self.is_answering:
            self._send_refusal()

    def check_deadlines(self, now: float) -> None:
        """End the connection, or refuse its request, if what it is at takes too long. ``now`` is the loop's."""
        if self.transport.is_closing():
            self._check_closing(now)
        elif now >= self._ends_at or (self.flow.write_paused and now - self._write_paused_at >= self.limits.write_s):
            self.transport.abort()
        elif self.flow.write_paused or self.is_answering or self._is_deaf:
            self._began = now
        elif self._phase is Phase.NOTHING:
            if now - self._began >= (self.limits.idle_s if self._requests else self.limits.head_s):
                self.transport.close()
        else:
            self._check_receiving(now)

    def _check_closing(self, now: float) -> None:
        unsent = self.transport.get_write_buffer_size()
        if unsent != self._unsent_bytes:
            self._unsent_bytes = unsent
            self._ends_at = now + (self.limits.write_s if unsent else self.limits.linger_s)
        elif now >= self._ends_at:
            self.transport.abort()

    def _check_receiving(self, now: float) -> None:
        if self._phase is Phase.BODY and self.flow.read_paused:  # it is us who are slow
            self._began = now
            return
        is_answered = self._phase is Phase.BODY and self.cycle.response_complete
        if now - self._began < self._time_to_receive(is_answered):
            return
        if is_answered or self._is_stopping:
            self.transport.abort()
        else:
            self._refuse(answer_for_code(408, SLOW))

    def _time_to_receive(self, is_answered: bool) -> float:
        if self._is_stopping:
            return self._half_sent_grace_s
        if is_answered:
            return self.limits.linger_s
        if self._phase is Phase.HEAD:
            return self.limits.head_s
        return self.limits.body_deadline_s(self._body_bytes)
