"""The inference address as an ASGI application: predictions, health, KServe's protocols, its API description."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import falcon
import falcon.asgi
from attrs import frozen

from torchmgmt.http import health
from torchmgmt.http import inference_operations as served
from torchmgmt.http import operations as ops
from torchmgmt.http.access_log import AccessLog
from torchmgmt.http.asgi import Receive, Scope, Send
from torchmgmt.http.callers import CallerGuard, Guard
from torchmgmt.http.cors import CORS, cors_middleware
from torchmgmt.http.health import Health, State, health_of
from torchmgmt.http.middleware import RequestHeaders
from torchmgmt.http.openapi import KeyRule, api_description_json, key_rule_of
from torchmgmt.http.operations import Operation
from torchmgmt.http.predictions import Predictions
from torchmgmt.http.render import Reply, render_error_async, render_reply
from torchmgmt.http.tokens import KeyName, Keys, fixed_keys
from torchmgmt.settings import Address, Settings

if TYPE_CHECKING:
    from torchmgmt import ModelManager

__all__ = ["Health", "create_inference_app", "health_of"]


def create_inference_app(
    manager: ModelManager,
    *,
    settings: Settings | None = None,
    keys: Keys | None = None,
    is_loading: Callable[[], bool] = lambda: False,
    is_draining: Callable[[], bool] = lambda: False,
    title: str = "torchmgmt Inference API",
    operations: tuple[Operation, ...] = ops.INFERENCE,
) -> InferenceApp:
    """Return what ``manager`` serves on the inference address as an ASGI application. Does not close the manager.

    ``settings`` and ``keys`` are as for :func:`torchmgmt.http.create_app`; the ``inference_address`` counts here.
    While ``is_loading`` returns True, /ping and /ready do not answer that all is well; nor does /ready while
    ``is_draining`` does. ``title`` and ``operations`` are
    those of the API description: an address may serve more than this application.
    """
    settings = settings or manager.settings
    keys = fixed_keys(settings=settings) if keys is None else keys
    address = Address.parse("inference_address", settings.inference_address)
    guard = Guard(settings, address, KeyName.INFERENCE, keys)
    middleware: list[Any] = [AccessLog(), RequestHeaders(), *cors_middleware(settings), CallerGuard(guard)]
    cors = next((one for one in middleware if isinstance(one, CORS)), None)
    app = InferenceApp(Predictions(manager, settings, guard, cors), middleware)
    app.add_error_handler(Exception, render_error_async)
    app.add_error_handler(falcon.HTTPError, render_error_async)
    for operation, resource in _resources(State(manager, is_loading, is_draining)).items():
        app.add_route(operation.path, resource)
    description = ApiDescription(title, operations, key_rule_of(settings, address))
    app.add_route(ops.API_DESCRIPTION.path, description)
    app.add_route(ops.API_DESCRIPTION_AT_ROOT.path, description, suffix="root")
    return app


def _resources(state: State) -> Mapping[Operation, object]:
    return {
        served.PING: health.Ping(state),
        served.LIVE: health.Live(),
        served.READY: health.Ready(state),
        served.READY_MODEL: health.ModelReady(state),
        served.KSERVE_MODELS: health.KServeModels(state),
        served.KSERVE_MODEL: health.KServeModel(state),
        served.SERVER_METADATA: health.ServerMetadata(),
        served.SERVER_LIVE: health.ServerLive(),
        served.SERVER_READY: health.ServerReady(state),
        served.MODEL_METADATA: health.ModelMetadata(state),
        served.VERSION_METADATA: health.ModelMetadata(state),
        served.MODEL_READY: health.ModelReady(state),
        served.VERSION_READY: health.ModelReady(state),
    }


class InferenceApp(falcon.asgi.App[falcon.asgi.Request, falcon.asgi.Response]):
    """Falcon's application, in front of which predictions are taken out: they pay for no object that they do not need."""

    def __init__(self, predictions: Predictions, middleware: list[Any]) -> None:
        super().__init__(middleware=middleware)
        self.req_options.strip_url_path_trailing_slash = True
        self._predictions = predictions
        self.begin = predictions.begin
        """What serves a request without a task, for a server that can do that."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # type: ignore[override]  # plain ASGI
        """Serve one request."""
        found = self._predictions.find(scope["path"]) if scope["type"] == "http" else None
        if found is None:
            await super().__call__(scope, receive, send)
        else:
            await self._predictions.serve(found, scope, receive, send)


@frozen
class ApiDescription:
    """OPTIONS / and GET /api-description."""

    title: str
    operations: tuple[Operation, ...]
    keys: KeyRule

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Answer with what this address serves."""
        item = api_description_json(self.title, self.operations, self.keys)
        render_reply(req, resp, Reply(200, item))

    on_options_root = on_get
