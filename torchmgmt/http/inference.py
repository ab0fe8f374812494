"""The inference address as an ASGI application: so far, its health and its API description."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any

import falcon
import falcon.asgi
from attrs import frozen

from torchmgmt import VersionState
from torchmgmt.http import operations as ops
from torchmgmt.http.access_log import AccessLog
from torchmgmt.http.callers import CallerGuard, Guard
from torchmgmt.http.cors import cors_middleware
from torchmgmt.http.middleware import RequestHeaders
from torchmgmt.http.openapi import KeyRule, api_description_json, key_rule_of
from torchmgmt.http.operations import Operation
from torchmgmt.http.render import Reply, render_error_async, render_reply
from torchmgmt.http.tokens import KeyName, Keys, fixed_keys
from torchmgmt.settings import Address, Settings

if TYPE_CHECKING:
    from torchmgmt import ModelManager

__all__ = ["Health", "create_inference_app", "health_of"]


class Health(Enum):
    """How many of the model versions that shall have workers have a ready one."""

    HEALTHY = "Healthy"
    PARTIAL = "Partial Healthy"
    UNHEALTHY = "Unhealthy"


def health_of(manager: ModelManager, *, is_loading: bool = False) -> Health:
    """Return the health of all that ``manager`` serves. Waits for nothing; may be called from any thread.

    ``is_loading`` is whether there are models still to come, which nobody can see in ``manager`` yet.
    """
    wanting = manager.wanted()
    unready = [info for info in wanting if info.state is not VersionState.READY]
    if not unready and not is_loading:
        return Health.HEALTHY
    return Health.PARTIAL if len(unready) < len(wanting) else Health.UNHEALTHY


def create_inference_app(
    manager: ModelManager,
    *,
    settings: Settings | None = None,
    keys: Keys | None = None,
    is_loading: Callable[[], bool] = lambda: False,
    title: str = "torchmgmt Inference API",
    operations: tuple[Operation, ...] = ops.INFERENCE,
) -> falcon.asgi.App[falcon.asgi.Request, falcon.asgi.Response]:
    """Return what ``manager`` serves on the inference address as an ASGI application. Does not close the manager.

    ``settings`` and ``keys`` are as for :func:`torchmgmt.http.create_app`; the ``inference_address`` counts here.
    While ``is_loading`` returns True, /ping and /ready do not answer that all is well. ``title`` and ``operations`` are
    those of the API description: an address may serve more than this application.
    """
    settings = settings or manager.settings
    keys = fixed_keys(settings=settings) if keys is None else keys
    address = Address.parse("inference_address", settings.inference_address)
    guard = Guard(settings, address, KeyName.INFERENCE, keys)
    middleware: list[Any] = [AccessLog(), RequestHeaders(), *cors_middleware(settings), CallerGuard(guard)]
    app = falcon.asgi.App(middleware=middleware)
    app.req_options.strip_url_path_trailing_slash = True
    app.add_error_handler(Exception, render_error_async)
    app.add_error_handler(falcon.HTTPError, render_error_async)
    description = ApiDescription(title, operations, key_rule_of(settings, address))
    app.add_route(ops.PING.path, Ping(manager, is_loading))
    app.add_route(ops.LIVE.path, Live())
    app.add_route(ops.READY.path, Ready(manager, is_loading))
    app.add_route(ops.API_DESCRIPTION.path, description)
    app.add_route(ops.API_DESCRIPTION_AT_ROOT.path, description, suffix="root")
    return app


@frozen
class Ping:
    """GET /ping."""

    manager: ModelManager
    is_loading: Callable[[], bool]

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Answer 200 while something is served, 500 when nothing that should be is."""
        health = health_of(self.manager, is_loading=self.is_loading())
        code = 500 if health is Health.UNHEALTHY else 200
        render_reply(req, resp, Reply(code, {"status": health.value}))


class Live:
    """GET /live."""

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Answer: who can do that lives."""
        render_reply(req, resp, Reply(200, {"status": "Live"}))


@frozen
class Ready:
    """GET /ready."""

    manager: ModelManager
    is_loading: Callable[[], bool]

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Answer 200 while all that shall be served is, else 503 with what is not."""
        is_loading = self.is_loading()
        unready = [
            f"{info.name}:{info.version}" for info in self.manager.wanted() if info.state is not VersionState.READY
        ]
        is_ready = not (unready or is_loading)
        status = "Ready" if is_ready else "Not Ready"
        item = {"status": status, "isLoading": is_loading, "notReady": unready}
        render_reply(req, resp, Reply(200 if is_ready else 503, item))


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
