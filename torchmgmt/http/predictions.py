"""Predictions over HTTP: a request in, one call of the library, an answer out, as fast as an event loop can.

This is ASGI without Falcon's objects, which cost more than a small prediction does; Falcon's router finds the paths, and the
rest of the inference address is Falcon's. The body travels to the worker unread, and the answer comes back as it is sent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qsl

import falcon
from attrs import define, field, frozen
from falcon.routing import CompiledRouter

from torchmgmt import Form, HttpBody, Response
from torchmgmt.errors import InvalidArgument
from torchmgmt.http import inference_operations as ops
from torchmgmt.http.access_log import log_request
from torchmgmt.http.access_log import logger as access_logger
from torchmgmt.http.callers import Guard
from torchmgmt.http.cors import CORS
from torchmgmt.http.deadlines import wishes_of
from torchmgmt.http.errors import (
    BadRequest,
    BodyTooLarge,
    EncodingNotServed,
    ParameterRequired,
    answer_for_caller,
    is_known,
    is_kserves,
)
from torchmgmt.http.middleware import request_id_of
from torchmgmt.http.mount import Receive, Scope, Send
from torchmgmt.http.operation import Operation
from torchmgmt.http.parameters import MOST_PARAMETERS
from torchmgmt.http.sending import Sender, wants_events
from torchmgmt.settings import Settings

if TYPE_CHECKING:
    from torchmgmt import AnswerStream, ModelManager

__all__ = ["Found", "Predictions"]

logger = logging.getLogger(__name__)

HEADER_LENGTH = "inference-header-content-length"
CUSTOM_ATTRIBUTES = "x-amzn-sagemaker-custom-attributes"
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


@define(eq=False)
class Found:
    """A request whose path is one of predictions."""

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

    def __attrs_post_init__(self) -> None:
        for path, route in _routes().items():
            self._router.add_route(path, route)

    def find(self, scope: Scope) -> Found | None:
        """Return what the path of a request means; None if it is none of these."""
        path: str = scope["path"]
        found = self._router.find(path[:-1] if path[-1:] == "/" else path)
        return None if found is None else Found(cast("Route", found[0]), found[2])

    async def serve(self, found: Found, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, from its beginning to its end."""
        began = time.perf_counter()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        request_id = request_id_of(headers.get("x-request-id"))
        more = () if self.cors is None else self.cors.raw_headers(headers)
        sender = Sender(scope, send, request_id, more, as_events=wants_events(headers.get("accept")))
        try:
            await self._serve(_Call(found, scope, headers, request_id), receive, sender)
        except Exception as error:
            await self._refuse(error, scope, request_id, sender)
        finally:
            if access_logger.isEnabledFor(logging.INFO):
                _log(scope, sender.status or CLIENT_GONE, time.perf_counter() - began, request_id)

    async def _serve(self, call: _Call, receive: Receive, sender: Sender) -> None:
        scope = call.scope
        if b"%2" in scope["raw_path"] and b"%2f" in scope["raw_path"].lower():
            raise InvalidArgument("path", scope["path"], "one whose names have no '/' in them")
        method = scope["method"]
        self.guard.admit(method, scope["path"], call.header)
        if method not in call.found.route.methods:
            await self._answer_method(call, sender)
            return
        content = await self._body(call, receive)
        if content is None:
            return  # the client is gone
        task = asyncio.current_task()
        assert task is not None  # an ASGI server calls from one
        watcher = None if sender.on_disconnect(task.cancel) else asyncio.create_task(_watch(receive, task.cancel))
        stream = self._ask(call, content)
        try:
            first = await stream.next_body()
            if first is not None and stream.is_complete and not sender.streams_always:
                await sender.whole(first)
            else:
                await _send_parts(first, stream, sender)
        except BaseException:
            stream.close()
            raise
        finally:
            if watcher is not None:
                watcher.cancel()

    async def _answer_method(self, call: _Call, sender: Sender) -> None:
        allowed = [*call.found.route.methods, "OPTIONS"]
        if call.scope["method"] != "OPTIONS":
            raise falcon.HTTPMethodNotAllowed(allowed)
        more = () if self.cors is None else self.cors.preflight_headers(call.headers, allowed)
        await sender.empty([(b"allow", ", ".join(allowed).encode()), *more])

    async def _body(self, call: _Call, receive: Receive) -> bytes | bytearray | None:
        """Return the body; None if the client went while it came."""
        limit = self.settings.max_request_size
        length = call.headers.get("content-length")
        if length is not None and int(length) > limit:
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

    def _ask(self, call: _Call, content: bytes | bytearray) -> AnswerStream:
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
            request_id=call.request_id,
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

    async def _refuse(self, error: Exception, scope: Scope, request_id: str, sender: Sender) -> None:
        answer = answer_for_caller(error, shows_all=self.settings.show_handler_errors)
        line = answer.message.partition("\n")[0]
        if not is_known(error):
            logger.error("%s %r failed (request %s)", scope["method"], scope["path"], request_id, exc_info=error)
        elif answer.code >= 500:
            # The rest of it, a worker's traceback, has been logged where it happened.
            logger.warning("%s %r: %s (request %s)", scope["method"], scope["path"], line, request_id)
        await sender.error(answer, for_kserve=is_kserves(scope["path"]))


_KSERVES = frozenset({Form.V1, Form.V1_EXPLAIN, Form.V2})


@define(eq=False)
class _Call:
    """One request."""

    found: Found
    scope: Scope
    headers: Mapping[str, str]
    """By their names in lower case; of several of one name the last."""
    request_id: str

    def header(self, name: str) -> str | None:
        """Return a header by its name in any case; None if it is not there."""
        return self.headers.get(name.lower())

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


async def _watch(receive: Receive, on_disconnect: Callable[[], Any]) -> None:
    """Call ``on_disconnect`` when the client is gone: the way of servers that tell nobody by themselves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    on_disconnect()


async def _send_parts(first: Response | None, stream: AnswerStream, sender: Sender) -> None:
    if first is None:  # an answer in parts that has none
        first = Response()
    if not sender.takes_parts:
        await sender.whole(await _joined(first, stream))
        return
    await sender.begin(first)
    part: Response | None = first
    while part is not None:
        await sender.part(part.body)
        part = await stream.next_body()
    await sender.end()


async def _joined(first: Response, stream: AnswerStream) -> Response:
    """Return a whole answer, for a client that takes no other."""
    bodies = [first.body]
    while (part := await stream.next_body()) is not None:
        bodies.append(part.body)
    if len(bodies) > 1:
        first.body = b"".join(bodies)
    return first


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


def _log(scope: Scope, code: int, seconds: float, request_id: str) -> None:
    host, port = scope.get("client") or ("-", "-")
    path, query = scope["raw_path"].decode("latin-1"), scope["query_string"].decode("latin-1")
    log_request(f"{host}:{port}", scope["method"], path, query, code, seconds, request_id)
