"""waitress, made to speak JSON about what it refuses by itself, and to end without cutting a request off.

waitress answers some requests before any application sees them (a malformed header, a body too large) in plain text; a
client of the Management API parses JSON. Each class here replaces one part of waitress by its documented seam: the
class attributes ``task_class``, ``error_task_class``, ``parser_class`` and ``channel_class``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, cast

from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask
from waitress.utilities import InternalServerError, RequestEntityTooLarge

from torchmgmt.http.errors import INTERNAL, Answer, BodyTooLarge, answer_for, answer_for_code
from torchmgmt.http.middleware import request_id_of, response_headers

__all__ = ["Channel", "Dispatcher"]

# waitress' own loggers would print through logging's last resort in a program that configured none.
logger = logging.getLogger("torchmgmt.http.server")

MOST_DISCARDED_BYTES = 64 * 2**20


class Parser(HTTPRequestParser):
    """Reads on over a body that is too large, so that the client is still there to read the refusal.

    Closing a connection with unread bytes makes TCP reset it, and the answer is lost on the way.
    """

    _to_discard = 0

    def received(self, data: bytes) -> int:
        """Take bytes from the connection; return how many were used."""
        if self._to_discard:
            used = min(len(data), self._to_discard)
            self._to_discard -= used
            self.completed = not self._to_discard
            return used
        used = super().received(data)
        if self.completed and isinstance(self.error, RequestEntityTooLarge):
            self._discard_body()
        return used

    def _discard_body(self) -> None:
        if self.expect_continue:  # the client asked first, and has not sent it
            self.expect_continue = False
        elif not self.chunked:
            self._to_discard = min(self.content_length, MOST_DISCARDED_BYTES)
            self.completed = False


class JSONErrorTask(ErrorTask):
    """Answers what waitress refused, as the Management API words its errors."""

    def execute(self) -> None:
        """Write the answer and close the connection."""
        request = cast("Any", self.request)  # the stubs take it for an Error
        answer = _answer_for(request.error, request.adj.max_request_body_size - 1)
        body = answer.body()
        request_id = request_id_of(request.headers.get("X_REQUEST_ID"))
        self.status = answer.status
        headers = {"Content-Type": "application/json", **response_headers(request_id)}
        cast("list[tuple[str, str]]", self.response_headers).extend(headers.items())
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


def _answer_for(error: Any, max_body_bytes: int) -> Answer:
    if isinstance(error, RequestEntityTooLarge):
        return answer_for(BodyTooLarge(max_body_bytes))
    if isinstance(error, InternalServerError):
        return answer_for_code(500, INTERNAL)
    return answer_for_code(error.code, str(error.body))


class Task(WSGITask):
    """Tells the client that the connection will be closed while the server is being stopped."""

    def build_response_header(self) -> bytes:
        """Return the head of the response."""
        if getattr(self.channel.server, "stopping", False):
            self.set_close_on_finish()
        return super().build_response_header()


class Channel(HTTPChannel):
    """One connection."""

    task_class = Task
    error_task_class = JSONErrorTask
    parser_class = Parser
    logger = logger

    @property
    def is_busy(self) -> bool:
        """Whether a request is being answered, or its answer is being sent."""
        return bool(self.requests) or self.total_outbufs_len > 0

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
