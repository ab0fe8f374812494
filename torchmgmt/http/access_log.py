"""One line in the log for each request, and a thread that writes those lines so that answering need not wait for it.

The line has TorchServe's order, and the request's id at its end::

    127.0.0.1:40592 "GET /models?limit=3 HTTP/1.1" 200 0.8 5b1d3c0e-...

The number before the id is milliseconds. The logger is ``torchmgmt.access``, the level INFO.
"""

from __future__ import annotations

import logging
import queue
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import QueueHandler, QueueListener
from typing import cast
from urllib.parse import quote

import falcon
import falcon.asgi

from torchmgmt.http.masking import masked_query

__all__ = ["AccessLog", "log_request", "logger", "written_in_background"]

logger = logging.getLogger("torchmgmt.access")

LONGEST_SHOWN = 2000
MOST_WAITING_LINES = 10_000

_NOT_FOR_A_LOG = re.compile(r"[^\x21-\x7e]")


class AccessLog:
    """Logs each request when its answer is known. The first middleware, so that it sees what the others refuse."""

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Note when the request came."""
        if logger.isEnabledFor(logging.INFO):
            req.context.received = time.perf_counter()

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, resource: object, req_succeeded: bool
    ) -> None:
        """Write the line."""
        received = getattr(req.context, "received", None)
        if received is not None:
            client = f"{req.env.get('REMOTE_ADDR', '-')}:{req.env.get('REMOTE_PORT', '-')}"
            _log(client, req, resp, received)

    async def process_request_async(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """The same on the ASGI side."""
        if logger.isEnabledFor(logging.INFO):
            req.context.received = time.perf_counter()

    async def process_response_async(
        self, req: falcon.asgi.Request, resp: falcon.asgi.Response, resource: object, req_succeeded: bool
    ) -> None:
        """The same on the ASGI side."""
        received = getattr(req.context, "received", None)
        if received is not None:
            host, port = req.scope.get("client") or ("-", "-")
            _log(f"{host}:{port}", req, resp, received)


def _log(client: str, req: falcon.Request, resp: falcon.Response, received: float) -> None:
    code = falcon.http_status_to_code(resp.status)
    seconds = time.perf_counter() - received
    request_id = getattr(req.context, "request_id", "-")
    log_request(client, req.method, quote(req.path, errors="replace"), req.query_string, code, seconds, request_id)


def log_request(client: str, method: str, path: str, query: str, code: int, seconds: float, request_id: str) -> None:
    """Write the line of one request; ``path`` and ``query`` are percent-encoded."""
    target = f"{path}?{masked_query(query)}" if query else path
    shown = target if len(target) <= LONGEST_SHOWN else target[:LONGEST_SHOWN] + "..."
    line = _NOT_FOR_A_LOG.sub(lambda match: quote(match.group(), errors="replace"), shown)
    logger.info('%s "%s %s HTTP/1.1" %d %.1f %s', client, method, line, code, seconds * 1000, request_id)


class _Bounded(QueueHandler):
    """Puts lines into a queue; while it is full they are lost, and counted."""

    lost = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.lost += 1


class _Listener(QueueListener):
    """Waits for room in its queue when it is told to end, where the inherited one fails."""

    def enqueue_sentinel(self) -> None:
        cast("queue.Queue[None]", self.queue).put(None)


@contextmanager
def written_in_background() -> Iterator[None]:
    """Write the access log by a thread of its own inside the block: a slow reader of the log then slows no request.

    For a program that owns the log. Lines go to the root logger's handlers of now; those that wait when the block ends
    are written before it is left. While 10,000 wait, further ones are lost, and the end says how many.
    """
    waiting: queue.Queue[logging.LogRecord] = queue.Queue(MOST_WAITING_LINES)
    handler = _Bounded(waiting)
    listener = _Listener(waiting, *logging.getLogger().handlers, respect_handler_level=True)
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    listener.start()
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
        listener.stop()
        if handler.lost:
            logger.warning(
                "%d lines of the access log were lost: they came faster than they were written", handler.lost
            )
