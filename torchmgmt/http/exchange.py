"""One request and its answer on a connection of uvicorn, and what serves it without a task of the event loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from torchmgmt.http.asgi import ASGIApp, Scope

__all__ = ["EXCHANGE", "Connection", "Exchange", "WholeRequest"]

Headers: TypeAlias = Sequence[tuple[bytes, bytes]]
EXCHANGE = "torchmgmt.exchange"
"""Where in the scope of a request its :class:`Exchange` is."""


class WholeRequest(Protocol):
    """Serves a request once all of it is there."""

    @property
    def max_body_bytes(self) -> int:
        """How large the body may be; a larger one is served as other requests are."""

    def serve(self, content: bytes, exchange: Exchange, /) -> None:
        """Serve it. On the event loop; must not block, nor raise."""

    def again(self, scope: Scope, /) -> WholeRequest:
        """Return what serves another request, which has the same head."""


class Connection(Protocol):
    """What an exchange asks of its connection."""

    on_disconnect: Callable[[], object] | None
    """Called if the client goes before it has its answer."""

    def hand_over(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:
        """Have ``app`` answer, in a task, a request that is there."""


class Exchange:
    """One request on its connection, for an application that is asked often: what ASGI has no, or only a costly, way for."""

    __slots__ = ("_connection", "_cycle", "on_answer")

    def __init__(
        self, connection: Connection, cycle: RequestResponseCycle, on_answer: Callable[[int], object] | None = None
    ) -> None:
        self._connection = connection
        self._cycle = cycle
        self.on_answer = on_answer
        """Told the code of a whole answer."""

    @property
    def has_begun(self) -> bool:
        """Whether an answer is on its way."""
        return self._cycle.response_started

    def on_disconnect(self, callback: Callable[[], object] | None) -> None:
        """Have ``callback`` called, on the event loop, if the client goes before it has its answer; None: nothing any more."""
        self._connection.on_disconnect = callback
        if callback is not None and self._cycle.disconnected:
            callback()

    def hand_over(self, app: ASGIApp) -> None:
        """Have ``app`` answer, in a task, what was to be answered without one."""
        self._connection.hand_over(self._cycle, app)

    async def has_room(self) -> None:
        """Wait until the client has taken most of what it was sent before, or is gone."""
        if self._cycle.flow.write_paused and not self._cycle.disconnected:
            await self._cycle.flow.drain()

    def respond(self, status: int, phrase: str, headers: Headers, body: bytes | bytearray | memoryview) -> None:
        """Send a whole answer. ``headers`` have its length, and nothing in them that HTTP forbids."""
        cycle = self._cycle
        if cycle.disconnected:
            return
        if cycle.response_started:
            raise RuntimeError("this request has been answered already")
        if cycle.waiting_for_100_continue:
            # The client may or may not send its body now: only on a new connection is that clear.
            cycle.keep_alive = cycle.waiting_for_100_continue = False
        if cycle.scope["method"] == "HEAD":
            body = b""
        first = f"HTTP/1.1 {status} {phrase}\r\n".encode("latin-1") if phrase else STATUS_LINE[status]
        end = b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n"
        head = (first, *map(_line_of, cycle.default_headers), *map(_line_of, headers), end)
        if len(body) <= _JOINED_UP_TO:
            cycle.transport.write(b"".join((*head, body)))
        else:
            cycle.transport.write(b"".join(head))
            cycle.transport.write(body)
        cycle.response_started = cycle.response_complete = True
        if self.on_answer is not None:
            self.on_answer(status)
        cycle.message_event.set()
        if not cycle.keep_alive:
            cycle.transport.close()
        on_response, cycle.on_response = cycle.on_response, _nothing  # which refers to what has the cycle
        on_response()

    def cut(self) -> None:
        """End the connection in the middle of the answer, so that nobody takes it for a whole one."""
        self._connection.on_disconnect = None
        self._cycle.disconnected = True
        self._cycle.transport.close()


def _nothing() -> None:
    """Do what is to be done a second time."""


_line_of = b"%b: %b\r\n".__mod__
# Two writes cost a system call more, joining them a copy.
_JOINED_UP_TO = 1 << 16
