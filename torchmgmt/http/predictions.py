"""Predictions over HTTP: a request in, one call of the library, an answer out, as fast as an event loop can.

This is ASGI without Falcon's objects, which cost more than a small prediction does; Falcon's router finds the paths, and the
rest of the inference address is Falcon's. The body travels to the worker unread, and the answer comes back as it is sent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qsl

import falcon
from attrs import define, field, frozen
from falcon.routing import CompiledRouter

from torchmgmt import Form, HttpBody
from torchmgmt.errors import InvalidArgument
from torchmgmt.http import inference_operations as ops
from torchmgmt.http.access_log import log_request
from torchmgmt.http.asgi import Receive, Scope, Send
from torchmgmt.http.callers import Guard
from torchmgmt.http.cors import CORS
from torchmgmt.http.deadlines import wishes_of
from torchmgmt.http.errors import (
    Answer,
    BadRequest,
    BodyTooLarge,
    EncodingNotServed,
    ParameterRequired,
    answer_for_caller,
    is_known,
    is_kserves,
)
from torchmgmt.http.exchange import Exchange
from torchmgmt.http.middleware import request_id_of
from torchmgmt.http.operation import Operation
from torchmgmt.http.parameters import MOST_PARAMETERS
from torchmgmt.http.sending import Message, Sender, Writer, wants_events
from torchmgmt.settings import Settings

if TYPE_CHECKING:
    from torchmgmt import AnswerStream, ModelManager

__all__ = ["Found", "Predictions"]

logger = logging.getLogger(__name__)

HEADER_LENGTH = "inference-header-content-length"
CUSTOM_ATTRIBUTES = "x-amzn-sagemaker-custom-attributes"
MOST_KNOWN_PATHS = 1024
"""Whose meaning is kept: callers use few, and to find it anew takes longer than much else of a request."""
LONGEST_KNOWN_PATH = 256
LARGE_BODY = 1 << 16
CLIENT_GONE = 499
"""What the access log has for a client that did not wait for its answer; nginx's number for that."""


@frozen
class Route:
    """What a path is for."""

    methods: Sequence[str]
    form: Form = Form.HTTP
    explains: bool = False


FORMS: Mapping[Operation, Form] = {
    ops.INFER: Form.V2,
    ops.INFER_VERSION: Form.V2,
    ops.KSERVE_PREDICT: Form.V1,
    ops.KSERVE_EXPLAIN: Form.V1_EXPLAIN,
}
EXPLAINING = frozenset({*ops.EXPLAIN, *ops.EXPLAIN_VERSION, ops.KSERVE_EXPLAIN})


def _routes() -> Mapping[str, Route]:
    methods: dict[str, list[str]] = {}
    for operation in ops.PREDICTIONS:
        methods.setdefault(operation.path, []).append(operation.method)
    by_path = {operation.path: operation for operation in ops.PREDICTIONS}
    return {
        path: Route(tuple(methods[path]), FORMS.get(operation, Form.HTTP), operation in EXPLAINING)
        for path, operation in by_path.items()
    }


@frozen(eq=False)
class Found:
    """What a path means that is one of predictions."""

    route: Route
    path: Mapping[str, str]


@define
class Predictions:
    """All paths of one address that ask a model for something. For the thread of its event loop."""

    manager: ModelManager
    settings: Settings
    guard: Guard
    cors: CORS | None = None
    _router: CompiledRouter = field(factory=CompiledRouter, init=False)
    _find_known: Callable[[str], Found | None] = field(init=False)

    def __attrs_post_init__(self) -> None:
        for path, route in _routes().items():
            self._router.add_route(path, route)
        self._find_known = lru_cache(MOST_KNOWN_PATHS)(self._find)

    def find(self, path: str) -> Found | None:
        """Return what a path means; None if it is none of these."""
        return self._find_known(path) if len(path) <= LONGEST_KNOWN_PATH else self._find(path)

    def _find(self, path: str) -> Found | None:
        found = self._router.find(path[:-1] if path[-1:] == "/" else path)
        return None if found is None else Found(cast("Route", found[0]), found[2])

    async def serve(self, found: Found, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, from its beginning to its end."""
        call = self._call(found, scope)
        sender = self._sender(call, scope, send)
        await self._serving(call, sender, self._answer(call, receive, sender))

    def begin(self, scope: Scope) -> AtOnce | None:
        """Return what serves a request without a task, once all of it is there; None if a task is to serve it."""
        found = self.find(scope["path"]) if scope["method"] == "POST" else None
        if found is None:
            return None
        call = self._call(found, scope)
        size = int(call.headers.get("content-length", LARGE_BODY))
        # Who sends too much, or much and may not, hears it from a task before all of that has come.
        if size > self.settings.max_request_size or (size >= LARGE_BODY and not self._is_admitted(call)):
            return None
        return AtOnce(self, call)

    def ask_at_once(self, call: Call, content: bytes) -> AnswerStream:
        """Queue a request, all of which is there; raise why it is refused."""
        self._admit(call)
        return self._ask(call, content)

    async def finish(self, call: Call, stream: AnswerStream, scope: Scope, receive: Receive, send: Send) -> None:
        """Go on with a request that was queued, as :meth:`serve` does."""
        sender = self._sender(call, scope, send)
        await self._serving(call, sender, self._send_answer(stream, receive, sender))

    def refuse(self, error: Exception, call: Call) -> Answer:
        """Return the answer that tells of an error, which is logged if it should be."""
        answer = answer_for_caller(error, shows_all=self.settings.show_handler_errors)
        method, path = call.scope["method"], call.scope["path"]
        if not is_known(error):
            logger.error("%s %r failed (request %s)", method, path, call.request_id, exc_info=error)
        elif answer.code >= 500:
            # The rest of it, a worker's traceback, has been logged where it happened.
            line = answer.message.partition("\n")[0]
            logger.warning("%s %r: %s (request %s)", method, path, line, call.request_id)
        return answer

    def _call(self, found: Found, scope: Scope) -> Call:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        request_id = request_id_of(headers.get("x-request-id"))
        more = () if self.cors is None else self.cors.raw_headers(headers)
        return Call(found, scope, headers, Writer(request_id, more))

    def _sender(self, call: Call, scope: Scope, send: Send) -> Sender:
        limit = self.settings.max_response_size
        return Sender(scope, send, call.writer, as_events=call.wants_events, max_bytes=limit)

    async def _serving(self, call: Call, sender: Sender, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception as error:
            await sender.error(self.refuse(error, call), for_kserve=is_kserves(call.scope["path"]))
        finally:
            call.log(sender.status or CLIENT_GONE)

    async def _answer(self, call: Call, receive: Receive, sender: Sender) -> None:
        self._admit(call)
        if call.scope["method"] == "OPTIONS":
            more = () if self.cors is None else self.cors.preflight_headers(call.headers, call.allowed)
            await sender.whole(call.writer.empty([(b"allow", ", ".join(call.allowed).encode()), *more]))
            return
        content = await self._body(call, receive)
        if content is not None:  # else the client is gone
            await self._send_answer(self._ask(call, content), receive, sender)

    async def _send_answer(self, stream: AnswerStream, receive: Receive, sender: Sender) -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())  # an ASGI server calls from one
        watcher = None if sender.on_disconnect(task.cancel) else asyncio.create_task(_watch(receive, task.cancel))
        try:
            await sender.answer(stream)
        except BaseException:
            stream.close()
            raise
        finally:
            if watcher is not None:
                watcher.cancel()

    def _admit(self, call: Call) -> None:
        scope = call.scope
        if b"%2" in scope["raw_path"] and b"%2f" in scope["raw_path"].lower():
            raise InvalidArgument("path", scope["path"], "one whose names have no '/' in them")
        method = scope["method"]
        self.guard.admit(method, scope["path"], call.headers.get)
        if method not in call.found.route.methods and method != "OPTIONS":
            raise falcon.HTTPMethodNotAllowed(call.allowed)

    def _is_admitted(self, call: Call) -> bool:
        try:
            self._admit(call)
        except Exception:  # whoever serves it then finds it again, and says it
            return False
        return True

    def _is_of_size(self, call: Call) -> bool:
        length = call.headers.get("content-length")
        return length is None or int(length) <= self.settings.max_request_size

    async def _body(self, call: Call, receive: Receive) -> bytes | bytearray | None:
        """Return the body; None if the client went while it came."""
        limit = self.settings.max_request_size
        if not self._is_of_size(call):
            raise BodyTooLarge(limit)
        message = await receive()
        content: bytes | bytearray = message.get("body", b"")
        while message.get("more_body", False):
            message = await receive()
            content = content if isinstance(content, bytearray) else bytearray(content)
            content += message.get("body", b"")
            if len(content) > limit:
                raise BodyTooLarge(limit)
        if message["type"] == "http.disconnect":
            return None
        if len(content) > limit:
            raise BodyTooLarge(limit)
        return content

    def _ask(self, call: Call, content: bytes | bytearray) -> AnswerStream:
        """Queue the request."""
        headers, route = call.headers, call.found.route
        timeout_s, priority = wishes_of(headers)
        query = call.query()
        if route.explains:
            headers = {**headers, "explain": "True"}
        encoding = headers.get("content-encoding", "identity")
        if route.form is not Form.HTTP and encoding.lower() != "identity":
            raise EncodingNotServed(encoding)
        body = HttpBody(
            content,
            headers.get("content-type", "application/json" if route.form in _KSERVES else ""),
            () if route.form is Form.V2 else query,
            route.form,
            self.settings.decode_input_request,
            _header_length(headers) if route.form is Form.V2 else -1,
            self.settings.max_response_size,
        )
        path = call.found.path
        name = path.get("model_name") or self._name_of(headers, query)
        return self.manager.stream(
            name,
            body,
            version=path.get("model_version"),
            headers=headers,
            timeout=timeout_s,
            priority=priority,
            request_id=call.writer.request_id,
        )

    def _name_of(self, headers: Mapping[str, str], query: Sequence[tuple[str, str]]) -> str:
        """Return which model is meant where the path names none."""
        given = dict(query).get("model_name") or _attributes(headers.get(CUSTOM_ATTRIBUTES, "")).get("model_name")
        if given:
            return given
        names = list(self.manager)
        if len(names) == 1:
            return names[0]
        held = f"{len(names)} models are" if names else "no model is"
        raise ParameterRequired("model_name", f" It may be left out only where one model is registered; here {held}.")


_KSERVES = frozenset({Form.V1, Form.V1_EXPLAIN, Form.V2})


@define(eq=False)
class Call:
    """One request."""

    found: Found
    scope: Scope
    headers: Mapping[str, str]
    """By their names in lower case; of several of one name the last."""
    writer: Writer
    began: float = field(factory=time.perf_counter, init=False)

    @property
    def request_id(self) -> str:
        """The caller's, or one of ours."""
        return self.writer.request_id

    def again(self, scope: Scope) -> Call:
        """Return another one with the same head."""
        request_id = request_id_of(self.headers.get("x-request-id"))
        return Call(self.found, scope, self.headers, Writer(request_id, self.writer.more_headers))

    @property
    def wants_events(self) -> bool:
        """Whether the client asks for server-sent events."""
        return wants_events(self.headers.get("accept"))

    @property
    def allowed(self) -> Sequence[str]:
        """The methods that its path is served for."""
        return [*self.found.route.methods, "OPTIONS"]

    def query(self) -> Sequence[tuple[str, str]]:
        """Return the fields of the query."""
        raw: bytes = self.scope["query_string"]
        if not raw:
            return ()
        try:
            text = raw.decode("latin-1")
            return parse_qsl(text, keep_blank_values=True, errors="replace", max_num_fields=MOST_PARAMETERS)
        except ValueError:
            raise BadRequest(f"There are more than {MOST_PARAMETERS} parameters") from None

    def log(self, code: int) -> None:
        """Write its line of the access log."""
        scope = self.scope
        seconds = time.perf_counter() - self.began
        path, query = scope["raw_path"], scope["query_string"]
        log_request(scope.get("client"), scope["method"], path, query, code, seconds, self.writer.request_id)


class AtOnce:
    """A request that is served without a task: from the callback that has the end of it to that which has its answer.

    A task, the coroutines in it and its wake-up cost as much as all the rest of a small request.
    """

    __slots__ = ("_call", "_exchange", "_is_over", "_predictions", "_stream")

    def __init__(self, predictions: Predictions, call: Call) -> None:
        self._predictions = predictions
        self._call = call
        self._is_over = False

    @property
    def max_body_bytes(self) -> int:
        """How large the body may be; a larger one is for a task."""
        return self._predictions.settings.max_request_size

    def serve(self, content: bytes, exchange: Exchange) -> None:
        """Queue the request, and have it answered when that is possible."""
        self._exchange = exchange
        try:
            self._stream = self._predictions.ask_at_once(self._call, content)
        except Exception as error:
            self._refuse(error)
            return
        exchange.on_disconnect(self._leave)
        if self._stream.call_when_due(self._answer):
            self._answer()

    def again(self, scope: Scope) -> AtOnce:
        """Return what serves another request, which has the same head."""
        return AtOnce(self._predictions, self._call.again(scope))

    def _leave(self) -> None:
        """Have nothing more of it: the client has gone."""
        if not self._is_over:
            self._is_over = True
            self._stream.close()
            self._call.log(CLIENT_GONE)

    def _answer(self) -> None:
        if self._is_over:
            return
        try:
            whole = None if self._call.wants_events else self._stream.whole_body()
            if whole is not None:
                self._respond(self._call.writer.whole(whole))
            else:
                self._is_over = True
                self._exchange.hand_over(partial(self._predictions.finish, self._call, self._stream))
        except Exception as error:
            self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        try:
            answer = self._predictions.refuse(error, self._call)
            self._respond(self._call.writer.error(answer, for_kserve=is_kserves(self._call.scope["path"])))
        except Exception:  # others have their answers from the same callback: it must end well
            logger.exception("An answer could not be sent (request %s)", self._call.request_id)
            self._exchange.cut()

    def _respond(self, message: Message) -> None:
        self._is_over = True
        self._exchange.respond(*message)
        self._call.log(message[0])


async def _watch(receive: Receive, on_disconnect: Callable[[], Any]) -> None:
    """Call ``on_disconnect`` when the client is gone: the way of servers that tell nobody by themselves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    on_disconnect()


def _header_length(headers: Mapping[str, str]) -> int:
    given = headers.get(HEADER_LENGTH)
    if given is None:
        return -1
    if not (given.isascii() and given.isdigit() and len(given) < 19):
        raise InvalidArgument("Inference-Header-Content-Length", given, "a whole number of bytes, at least 0")
    return int(given)


def _attributes(text: str) -> dict[str, str]:
    """Return the attributes of SageMaker's header: ``name=value``, separated by commas."""
    pairs = (pair.partition("=") for pair in text.split(","))
    return {name.strip(): value.strip() for name, _, value in pairs}
