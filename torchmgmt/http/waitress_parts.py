"""waitress, made to speak JSON about what it refuses by itself, and to end without cutting a request off.

waitress answers some requests before any application sees them (a malformed header, a body too large) in plain text; a
client of the Management API parses JSON. Each class here replaces one part of waitress by its own seam: the
class attributes ``parser_class``, ``task_class``, ``error_task_class`` and ``channel_class``.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import quote

from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import TcpWSGIServer
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask
from waitress.utilities import Error, InternalServerError, RequestEntityTooLarge, RequestHeaderFieldsTooLarge

from torchmgmt.http.access_log import log_request
from torchmgmt.http.errors import INTERNAL, Answer, BodyTooLarge, answer_for, answer_for_code
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

__all__ = ["Channel", "Dispatcher", "Server"]

# waitress' own loggers would print through logging's last resort in a program that configured none.
logger = logging.getLogger("torchmgmt.http.server")

DISCARD_BYTES = 2**18


class Parser(HTTPRequestParser):
    """Refuses what two programs could understand differently: one of them might take a body for the next request."""

    def parse_header(self, header_plus: bytes) -> None:
        """Read the request line and the headers; raise ParsingError, which becomes a 400."""
        try:
            super().parse_header(header_plus)
        except ValueError:  # of ``int`` or ``urlsplit``: all else that is wrong has an error of its own
            is_long = len(self.headers.get("CONTENT_LENGTH", "")) > MOST_LENGTH_DIGITS
            raise ParsingError(LONG_LENGTH if is_long else UNREADABLE_TARGET) from None
        headers = cast("dict[str, str]", self.headers)
        if self.version not in {"1.0", "1.1"}:
            raise ParsingError(NOT_HTTP_1)
        # waitress took Transfer-Encoding out of the headers where it heeded it.
        if "TRANSFER_ENCODING" in headers or (self.chunked and "CONTENT_LENGTH" in headers):
            raise ParsingError("Transfer-Encoding is not allowed with Content-Length, nor in HTTP/1.0")
        if "," in headers.get("HOST", ""):
            raise ParsingError(MANY_HOSTS)


class RequestTimeout(Error):
    """The request took too long to arrive."""

    code = 408
    reason = "Request Timeout"


class JSONErrorTask(ErrorTask):
    """Answers what waitress refused, as the Management API words its errors."""

    def execute(self) -> None:
        """Write the answer and close the connection."""
        request = cast("Any", self.request)  # the stubs take it for an Error
        channel = cast("Channel", self.channel)
        server = channel.server
        answer = _answer_for(request.error, server.max_request_size, server.limits.head_bytes)
        body = answer.body()
        request_id = request_id_of(request.headers.get("X_REQUEST_ID"))
        self.status = answer.status
        headers = {"Content-Type": "application/json", **response_headers(request_id)}
        cast("list[tuple[str, str]]", self.response_headers).extend(headers.items())
        self.set_close_on_finish()
        self.content_length = len(body)
        channel.linger()
        self.write(body)
        self._log(request, answer.code, request_id)

    def _log(self, request: Any, code: int, request_id: str) -> None:
        client = cast("Any", self.channel).addr[:2]
        method, path, query = (getattr(request, name, "") for name in ("command", "path", "query"))
        seconds = time.time() - self.start_time
        raw_path, raw_query = quote(path or "-").encode(), (query or "").encode("latin-1", "replace")
        log_request(client, method or "-", raw_path, raw_query, code, seconds, request_id)


def _answer_for(error: Any, max_body_bytes: int, max_head_bytes: int) -> Answer:
    if isinstance(error, RequestEntityTooLarge):
        return answer_for(BodyTooLarge(max_body_bytes))
    if isinstance(error, RequestHeaderFieldsTooLarge):
        return answer_for_code(error.code, TOO_MUCH_HEAD.format(max_head_bytes))
    if isinstance(error, InternalServerError):
        return answer_for_code(500, INTERNAL)
    return answer_for_code(error.code, str(error.body))


class Task(WSGITask):
    """Tells the client that the connection will be closed while the server is being stopped."""

    def build_response_header(self) -> bytes:
        """Return the head of the response."""
        if cast("Channel", self.channel).server.stopping:
            self.set_close_on_finish()
        return super().build_response_header()


class Server(TcpWSGIServer):
    """waitress' server, with what its channels need to know."""

    logger = logger
    stopping = False
    """No further request is taken; connections are closed after their answer."""
    max_request_size = 0
    """The largest body, in bytes, that the settings allow."""
    limits: Limits


class Channel(HTTPChannel):
    """One connection."""

    server: Server
    parser_class = Parser
    task_class = Task
    error_task_class = JSONErrorTask
    logger = logger
    _lingers = False
    _lingers_until = 0.0
    _phase: tuple[object, ...] = ()
    _phase_began = 0.0

    def send_continue(self) -> None:
        """Ask a client that waits for it to send its body, unless that is too large anyway."""
        request: Any = self.request
        if request.content_length > self.server.max_request_size:
            request.error = RequestEntityTooLarge("")
            request.expect_continue = False
            request.completed = True
        else:
            super().send_continue()

    def linger(self) -> None:
        """Let the client read the answer that is being written although more of its request may come.

        Closing a connection with unread bytes makes TCP reset it, and the answer is lost on the way. So once the answer
        is sent, only our side is closed, and what still comes is thrown away: until the client is done, or for ``linger_s``.
        Called on a thread of the dispatcher; the rest is for the server's own thread.
        """
        self._lingers = True

    def writable(self) -> bool:
        """Whether :meth:`handle_write` has something to do."""
        if self._lingers_until:
            return time.monotonic() >= self._lingers_until
        return bool(super().writable())

    def readable(self) -> bool:
        """Whether :meth:`handle_read` would take something."""
        return bool(self._lingers_until) or super().readable()

    def handle_write(self) -> None:
        """Send what is to be sent; close what is to be closed."""
        if self._lingers_until:
            self.handle_close()
        elif self._lingers and self.close_when_flushed:
            self._flush_then_linger()
        else:
            super().handle_write()

    def handle_read(self) -> None:
        """Take what came."""
        if self._lingers_until:
            self.recv(DISCARD_BYTES)  # closes the channel once the client is done
        else:
            super().handle_read()

    def _flush_then_linger(self) -> None:
        channel: Any = self  # the stubs leave out what is used here
        if self.total_outbufs_len:
            channel._flush_exception(channel._flush_some)
        if self.will_close:
            self.handle_close()
        elif not self.total_outbufs_len:
            self._lingers_until = time.monotonic() + self.server.limits.linger_s
            try:
                channel.socket.shutdown(socket.SHUT_WR)
            except OSError:  # the client is gone already
                self.handle_close()

    def check_deadlines(self, now: float) -> None:
        """End the connection, or refuse its request, if what it is at takes too long. ``now`` is monotonic."""
        phase, limit_s = self._current_phase()
        if phase != self._phase:
            self._phase, self._phase_began = phase, now
        elif now - self._phase_began < limit_s:
            return
        elif phase[0] in {"head", "body"}:
            self._refuse_slow_request()
        else:
            self.handle_close()

    def _current_phase(self) -> tuple[tuple[object, ...], float]:
        """What the connection is at, and for how long it may be."""
        limits, request = self.server.limits, cast("Any", self.request)
        if self.total_outbufs_len:
            return ("unread", self.total_outbufs_len), limits.write_s
        if self.requests or self._lingers_until:
            return ("answering",), float("inf")
        if request is None:
            spoke = self.last_activity != self.creation_time
            return ("idle", spoke), limits.idle_s if spoke else limits.head_s
        if not request.headers_finished:
            return ("head", request), limits.head_s
        return ("body", request), limits.body_deadline_s(request.body_bytes_received)

    def _refuse_slow_request(self) -> None:
        channel: Any = self  # the stubs leave out what is used here
        with channel.requests_lock:
            request, channel.request = channel.request, None
            request.error = RequestTimeout(SLOW)
            request.completed = True
            channel.requests.append(request)
            channel.server.add_task(channel)

    @property
    def is_busy(self) -> bool:
        """Whether a request is being answered, or its answer is being sent."""
        return not self._lingers_until and bool(self.requests or self.total_outbufs_len)

    @property
    def is_receiving(self) -> bool:
        """Whether a request has arrived in part."""
        return self.request is not None


class Dispatcher(ThreadedTaskDispatcher):
    """waitress' threads, kept so that they can be joined."""

    logger = logger
    queue_logger = logger

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._started: list[threading.Thread] = []

    def start_new_thread(self, target: Callable[[int], Any], thread_no: int) -> None:
        """Start one of the threads that run the application."""
        name = f"{self._name}-{thread_no}"
        thread = threading.Thread(target=target, name=name, args=(thread_no,), daemon=True)
        self._started.append(thread)
        thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End the threads; wait for those that still run the application. Return whether all ended in time."""
        deadline = time.monotonic() + timeout_s
        self.set_thread_count(0)
        for thread in self._started:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._started)
