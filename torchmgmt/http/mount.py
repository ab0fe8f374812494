"""Several applications on one server: the WSGI one mounted through a2wsgi, each path to the application that has it."""

from __future__ import annotations

import asyncio
import io
import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any, TypeAlias

from a2wsgi import WSGIMiddleware
from attrs import define, field, frozen

from torchmgmt.http.asgi import ASGIApp, Receive, Scope, Send
from torchmgmt.http.errors import INTERNAL, Answer, BodyTooLarge, answer_for, answer_for_code
from torchmgmt.http.exchange import EXCHANGE, Exchange
from torchmgmt.http.middleware import request_id_of
from torchmgmt.http.uvicorn_parts import raw_headers
from torchmgmt.http.waitress_parts import Dispatcher

__all__ = ["LastResort", "MountedWSGI", "Paths", "counted"]

logger = logging.getLogger("torchmgmt.http.server")

WSGIApp: TypeAlias = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

BODY = "torchmgmt.body"


@frozen
class Paths:
    """Hands each request to the application that has its path's first segment, or else to the default one.

    Before that, ``exceptions`` are looked at: regular expressions for method and path, as ``POST /a/b``.
    """

    by_segment: Mapping[str, ASGIApp]
    default: ASGIApp
    exceptions: Sequence[tuple[re.Pattern[str], ASGIApp]] = ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        path: str = scope["path"]
        for pattern, app in self.exceptions:
            if pattern.fullmatch(f"{scope['method']} {path}"):
                await app(scope, receive, send)
                return
        await self.by_segment.get(path[1:].partition("/")[0], self.default)(scope, receive, send)


@frozen
class LastResort:
    """Answers in JSON where an application, against its habit, raised; the log says what."""

    app: ASGIApp
    on_response: Callable[[int], object] = lambda _code: None
    """Told the code of each answer."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        started = False
        exchange: Exchange | None = scope.get(EXCHANGE)
        if exchange is not None:  # what is answered there goes past send
            exchange.on_answer = self.on_response

        async def send_on(message: dict[str, Any]) -> None:
            nonlocal started
            if not started:
                started = True
                self.on_response(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, send_on)
        except asyncio.CancelledError:
            return  # only a server that ends does this, and it has told the client
        except Exception:
            request_id = _request_id(scope)
            logger.exception("%s %r failed (request %s)", scope["method"], scope["path"], request_id)
            if started or (exchange is not None and exchange.has_begun):
                raise  # uvicorn ends the connection, so that nobody takes half an answer for a whole one
            self.on_response(500)
            await _send_answer(answer_for_code(500, INTERNAL), request_id, send)
        finally:
            # It refers to what has this scope: together they, and a large answer, would wait for a garbage collection.
            scope.pop(EXCHANGE, None)


def counted(app: WSGIApp, on_response: Callable[[int], object]) -> WSGIApp:
    """Return ``app`` such that ``on_response`` is told the code of each of its answers."""

    def call(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        def start(status: str, *more: Any) -> Any:
            on_response(int(status[:3]))
            return start_response(status, *more)

        return app(environ, start)

    return call


@define
class MountedWSGI:
    """A WSGI application as an ASGI one, run on threads of its own.

    A request's body is read before a thread is taken, so that slow clients hold none. ``number_of_threads`` must be
    more than the application lets wait at once.
    """

    app: WSGIApp
    name: str
    number_of_threads: int
    max_body_bytes: int
    _dispatcher: Dispatcher = field(init=False)
    _threads: _Threads = field(init=False)
    _middleware: WSGIMiddleware = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._dispatcher = Dispatcher(self.name)
        self._dispatcher.set_thread_count(self.number_of_threads)
        self._threads = _Threads(self._dispatcher)
        self._middleware = WSGIMiddleware(self._call)  # type: ignore[arg-type]  # an environment is a dict
        # Its own would be waited for when the program ends, however long a call still takes.
        self._middleware.executor = self._threads  # type: ignore[assignment]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        headers = dict(scope["headers"])
        if int(headers.get(b"content-length", 0)) > self.max_body_bytes:
            await self._refuse_body(scope, send)
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_body_bytes:
                await self._refuse_body(scope, send)
                return
        await self._middleware(_scope_with(scope, bytes(body)), receive, send)  # type: ignore[arg-type]

    @property
    def is_busy(self) -> bool:
        """Whether a call of the application has not returned."""
        return bool(self._threads.tasks)

    def stop(self, timeout_s: float) -> bool:
        """End the threads; return whether all ended in time. Not to be called on the event loop."""
        return self._dispatcher.stop(timeout_s)

    async def _refuse_body(self, scope: Scope, send: Send) -> None:
        # A client that asked first may or may not send its body now: only on a new connection is that clear.
        asked = any(name == b"expect" for name, _ in scope["headers"])
        answer = answer_for(BodyTooLarge(self.max_body_bytes))
        await _send_answer(answer, _request_id(scope), send, close=asked)

    def _call(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Add to the environment what a2wsgi leaves out. Runs on one of the threads."""
        scope = environ["asgi.scope"]
        environ["wsgi.input"] = io.BytesIO(scope[BODY])
        environ["wsgi.errors"] = sys.stderr
        environ["RAW_URI"] = scope["raw_path"].decode("ascii")
        return self.app(environ, start_response)


class _Task:
    """A call, as waitress' threads take it."""

    def __init__(self, call: Callable[[], Any], on_done: Callable[[_Task], None]) -> None:
        self.future: Future[Any] = Future()
        self._call = call
        self._on_done = on_done

    def service(self) -> None:
        """Make the call."""
        try:
            if self.future.set_running_or_notify_cancel():
                self._answer()
        finally:
            self._on_done(self)

    def _answer(self) -> None:
        try:
            result = self._call()
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class _Threads(Executor):
    """waitress' threads as an executor; unlike the standard one, a call that hangs does not hold up the program's end."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self.tasks: set[_Task] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run ``fn`` on the next free thread."""
        task = _Task(lambda: fn(*args, **kwargs), self.tasks.discard)
        self.tasks.add(task)
        self._dispatcher.add_task(task)  # type: ignore[arg-type]  # the stubs ask for a subclass
        return task.future


def _scope_with(scope: Scope, body: bytes) -> Scope:
    """Return ``scope`` as the application shall see it: a body of known length, no header that fakes another one."""
    # In WSGI, X_Forwarded_For and X-Forwarded-For have one name; waitress drops the former, too.
    dropped = (b"content-length", b"transfer-encoding")
    headers = [item for item in scope["headers"] if item[0] not in dropped and b"_" not in item[0]]
    if body:
        headers.append((b"content-length", str(len(body)).encode()))
    return {**scope, "headers": headers, BODY: body}


def _request_id(scope: Scope) -> str:
    given = dict(scope["headers"]).get(b"x-request-id", b"")
    return request_id_of(given.decode("latin-1"))


async def _send_answer(answer: Answer, request_id: str, send: Send, *, close: bool = False) -> None:
    body = answer.body()
    headers = raw_headers(answer, request_id, len(body))
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": answer.code, "headers": headers})
    await send({"type": "http.response.body", "body": body})
