"""What the inference address says of itself and of its models: health, readiness, and the same in KServe's words."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any

import falcon
import falcon.asgi
from attrs import frozen

import torchmgmt
from torchmgmt import VersionState
from torchmgmt.errors import ManagerClosed
from torchmgmt.http.render import Reply, render_reply
from torchmgmt.records import ModelInfo

if TYPE_CHECKING:
    from torchmgmt import ModelManager

__all__ = [
    "Health",
    "KServeModel",
    "KServeModels",
    "Live",
    "ModelMetadata",
    "ModelReady",
    "Ping",
    "Ready",
    "ServerLive",
    "ServerMetadata",
    "ServerReady",
    "State",
    "health_of",
]

NAME = "torchmgmt"
PLATFORM = "pytorch_torchmgmt"
EXTENSIONS = ("binary_tensor_data", "model_repository")


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


def _is_ready(info: ModelInfo) -> bool:
    """Whether a request would be answered now: by a worker that is there, or by one that the first request wakes."""
    return info.state is VersionState.READY or (
        info.state is VersionState.REGISTERED and info.scale.max_workers > 0 and info.scale.min_workers == 0
    )


@frozen
class State:
    """What is true of a server at the moment. May be asked on any thread."""

    manager: ModelManager
    is_loading: Callable[[], bool]
    is_draining: Callable[[], bool] = lambda: False
    """Whether it finishes what it has accepted, and takes nothing new."""

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Return whether all that shall be served is, and what /ready says of it."""
        is_loading = self.is_loading()
        try:
            unready = [
                f"{info.name}:{info.version}" for info in self.manager.wanted() if info.state is not VersionState.READY
            ]
            is_draining = self.is_draining()
        except ManagerClosed:
            unready, is_draining = [], True
        is_ready = not (unready or is_loading or is_draining)
        status = "Ready" if is_ready else "Draining" if is_draining else "Not Ready"
        return is_ready, {"status": status, "isLoading": is_loading, "notReady": unready}

    def is_model_ready(self, name: str, version: str | None) -> bool:
        """Whether a version has a ready worker, or gets one with its first request; raise ModelNotFound if there is none."""
        return _is_ready(self.manager.describe(name, version)) and not self.is_draining()


@frozen
class Ping:
    """GET /ping."""

    state: State

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Answer 200 while something is served, 500 when nothing that should be is."""
        health = health_of(self.state.manager, is_loading=self.state.is_loading())
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

    state: State

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Answer 200 while all that shall be served is, else 503 with what is not."""
        is_ready, item = self.state.readiness()
        render_reply(req, resp, Reply(200 if is_ready else 503, item))


@frozen
class ModelReady:
    """GET /ready/{model_name}, /v2/models/{model_name}/ready and the same of one version."""

    state: State

    async def on_get(
        self, req: falcon.asgi.Request, resp: falcon.asgi.Response, model_name: str, model_version: str | None = None
    ) -> None:
        """Answer 200 if it is ready, else 503."""
        is_ready = self.state.is_model_ready(model_name, model_version)
        render_reply(req, resp, Reply(200 if is_ready else 503, {"name": model_name, "ready": is_ready}))


@frozen
class KServeModels:
    """GET /v1/models."""

    state: State

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Answer with the names."""
        names = [info.name for info in self.state.manager.models()]
        render_reply(req, resp, Reply(200, {"models": names}))


@frozen
class KServeModel:
    """GET /v1/models/{model_name}."""

    state: State

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, model_name: str) -> None:
        """Answer 200, ready or not, as version 1 of the protocol does."""
        is_ready = self.state.is_model_ready(model_name, None)
        render_reply(req, resp, Reply(200, {"name": model_name, "ready": is_ready}))


class ServerMetadata:
    """GET /v2."""

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Answer with what is known before any model is asked."""
        item = {"name": NAME, "version": torchmgmt.__version__, "extensions": list(EXTENSIONS)}
        render_reply(req, resp, Reply(200, item))


class ServerLive:
    """GET /v2/health/live."""

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Answer: who can do that lives."""
        render_reply(req, resp, Reply(200, {"live": True}))


@frozen
class ServerReady:
    """GET /v2/health/ready."""

    state: State

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Answer 200 while all that shall be served is, else 503."""
        is_ready, _ = self.state.readiness()
        render_reply(req, resp, Reply(200 if is_ready else 503, {"ready": is_ready}))


@frozen
class ModelMetadata:
    """GET /v2/models/{model_name} and /v2/models/{model_name}/versions/{model_version}."""

    state: State

    async def on_get(
        self, req: falcon.asgi.Request, resp: falcon.asgi.Response, model_name: str, model_version: str | None = None
    ) -> None:
        """Answer with the names; a handler takes what it takes, so there are no inputs and outputs to list."""
        manager = self.state.manager
        manager.describe(model_name, model_version)
        versions = [info.version for info in manager.versions(model_name)]
        shown = versions if model_version is None else [model_version]
        item = {"name": model_name, "versions": shown, "platform": PLATFORM, "inputs": [], "outputs": []}
        render_reply(req, resp, Reply(200, item))
