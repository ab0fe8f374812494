"""One line in the log for each request, and a thread that writes those lines so that answering need not wait for it.

The line has TorchServe's order, and the request's id at its end::

    127.0.0.1:40592 "GET /models?limit=3 HTTP/1.1" 200 0.8 5b1d3c0e-...

The number before the id is milliseconds. The logger is ``torchmgmt.access``, the level INFO.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeAlias
from urllib.parse import quote

import falcon
import falcon.asgi

from torchmgmt.http.masking import masked_query

__all__ = ["AccessLog", "LineFormatter", "log_request", "logger", "written_in_background"]

logger = logging.getLogger("torchmgmt.access")
_own_log = logging.getLogger(__name__)

LONGEST_SHOWN = 2000
_LONGEST_KNOWN = 256
MOST_WAITING_LINES = 10_000

_COLLECTED_S = 0.05
"""For so long lines are collected before they are written: one call for many."""

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
            _log((req.env.get("REMOTE_ADDR", "-"), req.env.get("REMOTE_PORT", "-")), req, resp, received)

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
            _log(req.scope.get("client"), req, resp, received)


def _log(client: Client, req: falcon.Request, resp: falcon.Response, received: float) -> None:
    code = falcon.http_status_to_code(resp.status)
    seconds = time.perf_counter() - received
    request_id = getattr(req.context, "request_id", "-")
    path, query = quote(req.path, errors="replace").encode(), req.query_string.encode("latin-1", "replace")
    log_request(client, req.method, path, query, code, seconds, request_id)


Client: TypeAlias = "Sequence[str | int] | None"
"""Host and port of who asks; None if that is not known."""


_Line: TypeAlias = "tuple[float, Client, str, bytes, bytes, int, float, str]"
"""What there is to say of one request, before anybody has written it: when, who, method, path, query, code, seconds, id."""


def _text_of(line: _Line) -> str:
    _, client, method, path, query, code, seconds, request_id = line
    # No query, which may have a token in it, is kept.
    target = _target if query or len(path) > _LONGEST_KNOWN else _known_target
    host, port = client or ("-", "-")
    return f'{host}:{port} "{method} {target(path, query)} HTTP/1.1" {code} {seconds * 1000:.1f} {request_id}'


def _target(path: bytes, query: bytes) -> str:
    """Return what was asked for as it may stand in a log."""
    target = path.decode("latin-1")
    if query:
        target += f"?{masked_query(query.decode('latin-1'))}"
    shown = target if len(target) <= LONGEST_SHOWN else target[:LONGEST_SHOWN] + "..."
    return _NOT_FOR_A_LOG.sub(lambda match: quote(match.group(), errors="replace"), shown)


_known_target = lru_cache(maxsize=1024)(_target)  # callers use few


def _record_of(line: _Line) -> logging.LogRecord:
    record = logger.makeRecord(logger.name, logging.INFO, "", 0, _text_of(line), (), None)
    record.created, record.msecs = line[0], line[0] % 1 * 1000
    return record


def log_request(
    client: Client, method: str, path: bytes, query: bytes, code: int, seconds: float, request_id: str
) -> None:
    """Write the line of one request, if such lines are wanted; ``path`` and ``query`` are percent-encoded."""
    if not logger.isEnabledFor(logging.INFO):
        return
    line = time.time(), client, method, path, query, code, seconds, request_id
    if _background.writer is None:
        logger.handle(_record_of(line))
    else:
        _background.writer.put(line)


class LineFormatter(logging.Formatter):
    """Time, level, logger and message of each record in one line: the form of the program's log."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def text_of(self, lines: Sequence[_Line]) -> str:
        """Return what many lines come to: the same as to format a record of each, at a tenth of the cost."""
        parts, second, prefix = [], -1, ""
        for line in lines:
            when = line[0]
            if int(when) != second:
                second = int(when)
                prefix = time.strftime(self.default_time_format, self.converter(second))
            parts.append(f"{prefix},{int(when % 1 * 1000):03d} INFO {logger.name}: {_text_of(line)}\n")
        return "".join(parts)


class _Writer(threading.Thread):
    """Writes lines as they collect. Each waits for at most :data:`_COLLECTED_S`, and no request for any of them."""

    def __init__(self, handlers: Sequence[logging.Handler]) -> None:
        super().__init__(name="torchmgmt-access-log", daemon=True)
        self.lost = 0
        self._handlers = handlers
        self._lines: deque[_Line] = deque()
        self._awake = threading.Event()
        self._ending = threading.Event()

    def put(self, line: _Line) -> None:
        """Have a line written, or count it as lost if too many wait. Any thread; does not block."""
        if len(self._lines) >= MOST_WAITING_LINES:
            self.lost += 1
            return
        self._lines.append(line)
        if not self._awake.is_set():
            self._awake.set()

    def end(self) -> None:
        """Write what waits, and end. Blocks until that is done."""
        self._ending.set()
        self._awake.set()
        self.join()

    def run(self) -> None:
        """Write lines until told to end."""
        while not self._ending.is_set():
            self._awake.wait()
            self._ending.wait(_COLLECTED_S)
            self._awake.clear()  # before they are taken: what comes after that wakes it again
            self._write([self._lines.popleft() for _ in range(len(self._lines))])

    def _write(self, lines: Sequence[_Line]) -> None:
        for handler in self._handlers:
            if type(handler) is logging.StreamHandler and isinstance(handler.formatter, LineFormatter):
                self._write_together(handler, handler.formatter.text_of(lines))
                continue
            for line in lines:
                if handler.level <= logging.INFO:
                    handler.handle(_record_of(line))

    def _write_together(self, handler: logging.StreamHandler[Any], text: str) -> None:
        if not text or handler.level > logging.INFO:
            return
        try:
            with handler.lock or contextlib.nullcontext():
                handler.stream.write(text)
                handler.flush()
        except (OSError, ValueError):
            _own_log.debug("The access log cannot be written", exc_info=True)


class _Background:
    """Where lines go while they are written by a thread of their own."""

    writer: _Writer | None = None


_background = _Background()


@contextlib.contextmanager
def written_in_background() -> Iterator[None]:
    """Write the access log by a thread of its own inside the block: a slow reader of the log then slows no request.

    For a program that owns the log. Lines go to the root logger's handlers of now; those that wait when the block ends
    are written before it is left. While 10,000 wait, further ones are lost, and the end says how many.
    """
    writer = _Writer(logging.getLogger().handlers)
    writer.start()
    before, _background.writer = _background.writer, writer
    try:
        yield
    finally:
        _background.writer = before
        writer.end()
        if writer.lost:
            logger.warning("%d lines of the access log were lost: they came faster than they were written", writer.lost)
