"""The Management API as a WSGI application: for each operation, read the request, one call of the library, render."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeAlias

import falcon
from attrs import define, evolve, field, frozen

from torchmgmt import VersionState
from torchmgmt.errors import ModelVersionNotFound
from torchmgmt.http import operations as ops
from torchmgmt.http import repository
from torchmgmt.http.access_log import AccessLog
from torchmgmt.http.callers import CallerGuard, Guard
from torchmgmt.http.contract import Contract, contract_of
from torchmgmt.http.cors import cors_middleware
from torchmgmt.http.errors import (
    BadRequest,
    BodyTooLarge,
    MethodOff,
    TokensOff,
    TooManyWaiting,
    VersionToSetNotFound,
)
from torchmgmt.http.middleware import PathGuard, RequestHeaders
from torchmgmt.http.openapi import api_description_json, key_rule_of
from torchmgmt.http.operations import Operation
from torchmgmt.http.parameters import Pairs, Values, pairs_of_body, pairs_of_query, read_parameters
from torchmgmt.http.render import Reply, render_error, render_reply
from torchmgmt.http.tokens import KeyName, Keys, fixed_keys
from torchmgmt.redaction import redacted_text
from torchmgmt.settings import Address, Settings

if TYPE_CHECKING:
    from torchmgmt import ModelManager
    from torchmgmt.records import ModelInfo

__all__ = ["MAX_WAITING", "create_app"]

logger = logging.getLogger(__name__)

MAX_WAITING = 40
RETRY_AFTER_S = 5

Respond: TypeAlias = "Callable[[ManagementAPI, Values, Mapping[str, str]], Reply]"


def create_app(
    manager: ModelManager,
    *,
    settings: Settings | None = None,
    keys: Keys | None = None,
    max_waiting: int = MAX_WAITING,
) -> falcon.App[falcon.Request, falcon.Response]:
    """Return the Management API of ``manager`` as a WSGI application, to be mounted in any WSGI server.

    Starts nothing, binds nothing, writes no file, and does not close the manager. ``settings`` default to the manager's;
    their ``management_address`` says whether other machines reach it. ``keys`` are those of token authorization, such as
    :func:`torchmgmt.http.tokens.keys_for` makes; if not given, those that the environment fixes. Calls that wait
    (registering, unregistering, synchronous scaling) hold a thread of the server; at most ``max_waiting`` of them run at
    once, more are answered with 503, so that a server with more threads than that always has one for the rest. The
    application may be called from any number of threads.

    Raises :class:`~torchmgmt.errors.InvalidArgument` if the settings require keys and there is none for it.
    """
    settings = settings or manager.settings
    keys = fixed_keys(settings=settings) if keys is None else keys
    address = Address.parse("management_address", settings.management_address)
    guard = Guard(settings, address, KeyName.MANAGEMENT, keys)
    middleware: list[Any] = [AccessLog(), RequestHeaders(), *cors_middleware(settings), CallerGuard(guard), PathGuard()]
    app: falcon.App[falcon.Request, falcon.Response] = falcon.App(middleware=middleware)
    app.req_options.strip_url_path_trailing_slash = True
    app.add_error_handler(Exception, render_error)
    app.add_error_handler(falcon.HTTPError, render_error)
    api = ManagementAPI(manager, settings, keys, WaitingCalls(max_waiting))
    by_path = attrgetter("path")
    for path, found in groupby(sorted(ops.MANAGEMENT, key=by_path), key=by_path):
        app.add_route(path, Route(api, list(found)))
    return app


@define
class WaitingCalls:
    """Bounds the calls that hold a thread while they wait for models or workers."""

    limit: int
    _free: threading.BoundedSemaphore = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._free = threading.BoundedSemaphore(self.limit)

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """Count as waiting inside the block; raise :class:`TooManyWaiting` at once if too many do."""
        if not self._free.acquire(blocking=False):
            raise TooManyWaiting(self.limit, RETRY_AFTER_S)
        try:
            yield
        finally:
            self._free.release()


@frozen
class ManagementAPI:
    """One method for each operation: values in, one call of the library, reply out."""

    manager: ModelManager
    settings: Settings
    keys: Keys
    waiting: WaitingCalls
    operations: Mapping[Operation, Operation] = field(init=False)
    """Each operation as declared -> as the contract has it."""

    @operations.default
    def _default_operations(self) -> Mapping[Operation, Operation]:
        return self.contract.operations()

    @property
    def _is_loopback(self) -> bool:
        return Address.parse("management_address", self.settings.management_address).is_loopback

    @property
    def contract(self) -> Contract:
        """Which of TorchServe's documentation and server is followed where they disagree."""
        return contract_of(self.settings)

    def register(self, values: Values, path: Mapping[str, str]) -> Reply:
        """POST /models."""
        with self.waiting.one_more():
            model = self.manager.register(
                values["url"],
                model_name=values["model_name"],
                handler=values["handler"],
                runtime=values["runtime"],
                batch_size=values["batch_size"],
                max_batch_delay=values["max_batch_delay"],
                initial_workers=values["initial_workers"],
                default_workers=self.settings.default_workers_per_model or 0,
                synchronous=values["synchronous"],
                response_timeout=values["response_timeout"],
                startup_timeout=values["startup_timeout"],
                trusted=False,
                may_fetch=values.has_key or self._is_loopback,
            )
        workers = model.describe().scale.min_workers
        code = self.contract.code_of_registration(synchronous=values["synchronous"], workers=workers)
        if workers and not values["synchronous"]:
            return _status(code, "Processing worker updates...")
        text = f'Model "{model.name}" Version: {model.version} registered with {workers} initial workers'
        if not workers:
            text += ". Use scale workers API to add workers for the model."
        return _status(code, text)

    def list_models(self, values: Values, path: Mapping[str, str]) -> Reply:
        """GET /models."""
        start, limit = values["next_page_token"], min(values["limit"], self.contract.most_on_a_page)
        # One more than the page shows says whether there is another page.
        infos = self.manager.models(start=start, limit=limit + 1)
        item: dict[str, object] = {}
        if len(infos) > limit:
            item["nextPageToken"] = str(start + limit)
        item["models"] = [_list_item(info) for info in infos[:limit]]
        return Reply(200, item)

    def describe(self, values: Values, path: Mapping[str, str]) -> Reply:
        """GET /models/{model_name} and /models/{model_name}/{model_version}."""
        return Reply(200, [self._describe(path["model_name"], path.get("model_version"), values)])

    def describe_all(self, values: Values, path: Mapping[str, str]) -> Reply:
        """GET /models/{model_name}/all."""
        infos = self.manager.versions(path["model_name"])
        if not values["customized"]:
            return Reply(200, [_item(info) for info in infos])
        return Reply(200, [self._describe(info.name, info.version, values) for info in infos])

    def _describe(self, name: str, version: str | None, values: Values) -> dict[str, Any]:
        if not values["customized"]:
            return _item(self.manager.describe(name, version))
        with self.waiting.one_more():
            return _item(self.manager.describe(name, version, customized=True))

    def scale(self, values: Values, path: Mapping[str, str]) -> Reply:
        """PUT /models/{model_name} and /models/{model_name}/{model_version}."""
        name, version = path["model_name"], _version_to_scale(values, path)
        low = values["min_worker"]
        high = low if values["max_worker"] is None else values["max_worker"]
        if high < low:
            raise BadRequest("max_worker cannot be less than min_worker.")
        limits = {"version": version, "timeout": values["timeout"]}
        if not values["synchronous"]:
            self.manager.scale(name, low, high, synchronous=False, **limits)
            return _status(202, "Processing worker updates...")
        with self.waiting.one_more():
            self.manager.scale(name, low, high, synchronous=True, **limits)
        suffix = f", version: {version}" if version else ""
        return _status(200, f"Workers scaled to {low} for model: {name}{suffix}")

    def set_default(self, values: Values, path: Mapping[str, str]) -> Reply:
        """PUT /models/{model_name}/{model_version}/set-default."""
        name, version = path["model_name"], path["model_version"]
        try:
            self.manager.set_default(name, version)
        except ModelVersionNotFound:
            raise VersionToSetNotFound(name, version) from None
        return _status(200, f'Default version successfully updated for model "{name}" to "{version}"')

    def unregister(self, values: Values, path: Mapping[str, str]) -> Reply:
        """DELETE /models/{model_name} and /models/{model_name}/{model_version}."""
        name = path["model_name"]
        with self.waiting.one_more():
            self.manager.unregister(name, path.get("model_version"))
        return _status(200, f'Model "{name}" unregistered')

    def new_key(self, values: Values, path: Mapping[str, str]) -> Reply:
        """GET /token."""
        name = KeyName(values["type"])
        return Reply(200, {name.value: self.keys.renew(name).to_dict()})

    def repository_index(self, values: Values, path: Mapping[str, str]) -> Reply:
        """POST /v2/repository/index."""
        return Reply(200, repository.index_of(self.manager, only_ready=values["ready"]))

    def repository_load(self, values: Values, path: Mapping[str, str]) -> Reply:
        """POST /v2/repository/models/{model_name}/load."""
        name = path["model_name"]
        workers = self.settings.default_workers_per_model or 1
        with self.waiting.one_more():
            repository.load(self.manager, name, workers=workers, may_fetch=values.has_key or self._is_loopback)
        return _status(200, f'Model "{name}" loaded')

    def repository_unload(self, values: Values, path: Mapping[str, str]) -> Reply:
        """POST /v2/repository/models/{model_name}/unload."""
        name = path["model_name"]
        with self.waiting.one_more():
            repository.unload(self.manager, name)
        return _status(200, f'Model "{name}" unloaded')

    def describe_api(self, values: Values, path: Mapping[str, str]) -> Reply:
        """OPTIONS / and GET /api-description."""
        rule = key_rule_of(self.settings, Address.parse("management_address", self.settings.management_address))
        return Reply(200, api_description_json("torchmgmt Management API", tuple(self.operations.values()), rule))


ENDPOINTS: Mapping[Operation, Respond] = {
    ops.REGISTER: ManagementAPI.register,
    ops.LIST: ManagementAPI.list_models,
    ops.DESCRIBE: ManagementAPI.describe,
    ops.DESCRIBE_ALL: ManagementAPI.describe_all,
    ops.DESCRIBE_VERSION: ManagementAPI.describe,
    ops.SCALE: ManagementAPI.scale,
    ops.SCALE_VERSION: ManagementAPI.scale,
    ops.SET_DEFAULT: ManagementAPI.set_default,
    ops.UNREGISTER: ManagementAPI.unregister,
    ops.UNREGISTER_VERSION: ManagementAPI.unregister,
    ops.NEW_KEY: ManagementAPI.new_key,
    ops.REPOSITORY_INDEX: ManagementAPI.repository_index,
    ops.REPOSITORY_LOAD: ManagementAPI.repository_load,
    ops.REPOSITORY_UNLOAD: ManagementAPI.repository_unload,
    ops.API_DESCRIPTION_AT_ROOT: ManagementAPI.describe_api,
    ops.API_DESCRIPTION: ManagementAPI.describe_api,
}


class Route:
    """One path: its operations, as the ``on_...`` methods that Falcon looks for."""

    def __init__(self, api: ManagementAPI, operations: list[Operation]) -> None:
        self._api = api
        self._always_served = [operation.method for operation in operations if not operation.needs_model_api]
        for operation in operations:
            setattr(self, f"on_{operation.method.lower()}", self._responder(operation))

    def _responder(self, operation: Operation) -> Callable[..., None]:
        api, endpoint, adapted = self._api, ENDPOINTS[operation], self._api.operations[operation]

        def respond(req: falcon.Request, resp: falcon.Response, **path: str) -> None:
            if operation.needs_model_api and not api.settings.enable_model_api:
                self._refuse(operation, req)
            if operation.needs_keys and not api.keys:
                raise TokensOff
            values = evolve(_read(adapted, req, api.settings.max_request_size), has_key=req.context.has_key)
            render_reply(req, resp, endpoint(api, values, path))

        return respond

    def _refuse(self, operation: Operation, req: falcon.Request) -> None:
        logger.warning(
            "%s %r is refused: the model API is off; start the server with --enable-model-api"
            " (or the setting enable_model_api=true) to allow it",
            req.method,
            req.path,
        )
        raise MethodOff(sorted({*self._always_served, "OPTIONS"}))


def _read(operation: Operation, req: falcon.Request, max_bytes: int) -> Values:
    body: Pairs = ()
    if operation.takes_body:
        body = pairs_of_body(req.content_type, _read_body(req, max_bytes))
    values, refusal = read_parameters(operation.parameters, pairs_of_query(req.query_string.encode("latin-1")), body)
    req.context.warnings = values.warnings
    for warning in values.warnings:
        logger.warning("%s %r: %s", req.method, req.path, warning)
    if refusal is not None:
        raise refusal
    return values


def _read_body(req: falcon.Request, max_bytes: int) -> bytes:
    length = req.content_length
    if length is None and not req.env.get("wsgi.input_terminated"):
        return b""  # reading might wait for ever
    if length is not None and length > max_bytes:
        raise BodyTooLarge(max_bytes)
    body: bytes = req.stream.read(max_bytes + 1 if length is None else length)
    if len(body) > max_bytes:
        raise BodyTooLarge(max_bytes)
    return body


def _item(info: ModelInfo) -> dict[str, Any]:
    item = info.to_dict()
    return {**item, "modelUrl": redacted_text(item["modelUrl"])}


def _status(code: int, text: str) -> Reply:
    return Reply(code, {"status": text})


def _version_to_scale(values: Values, path: Mapping[str, str]) -> str | None:
    in_path, in_query = path.get("model_version"), values["model_version"]
    if in_path and in_query and in_path != in_query:
        raise BadRequest(f"model_version is {in_query!r}, but the path says {in_path!r}")
    return in_path or in_query


def _list_item(info: ModelInfo) -> dict[str, object]:
    """Return what the list says of a model: TorchServe's keys, and why it cannot be used if it failed."""
    item: dict[str, object] = {"modelName": info.name, "modelUrl": redacted_text(info.spec.url)}
    if info.state is VersionState.FAILED:
        item.update(state=info.state.value, lastError=info.last_error)
    return item
