"""Servers on real sockets for the tests of the HTTP side."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import falcon
import pytest
import requests
from attrs import define

from tests.handlers import EVAL, gate, light_torch, write_folder, write_manifest
from tests.http.fakes import FakeManager, info_of
from torchmgmt import Model, ModelManager, ProcessBackend
from torchmgmt.http import create_inference_app, serve
from torchmgmt.http.addresses import BoundAddress, Role
from torchmgmt.http.asgi_server import ASGIServer
from torchmgmt.http.limits import Limits
from torchmgmt.http.server import RunningServer, bind, start_server
from torchmgmt.settings import Address, Settings

__all__ = ["gate", "light_torch"]

collect_ignore = ["schemathesis_hooks.py"]  # is for schemathesis' own process: to import it registers its hooks

# libuv opens a pipe for signals with the first loop of a process and keeps it: no leak of whichever test is first.
with contextlib.suppress(ImportError):
    import uvloop

    uvloop.new_event_loop().close()

# Falcon's client for tests keeps the first loop that it makes, too.
falcon.async_to_sync(asyncio.sleep, 0)


@define
class Client:
    """Calls one server; nothing is kept open between calls."""

    url: str

    def __call__(self, method: str, path: str, **more: Any) -> requests.Response:
        timeout = more.pop("timeout", 30)
        return requests.request(method, self.url + path, timeout=timeout, **more)

    def get(self, path: str, **more: Any) -> requests.Response:
        return self("GET", path, **more)

    def post(self, path: str, **more: Any) -> requests.Response:
        return self("POST", path, **more)

    def put(self, path: str, **more: Any) -> requests.Response:
        return self("PUT", path, **more)

    def delete(self, path: str, **more: Any) -> requests.Response:
        return self("DELETE", path, **more)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def raw(self, sent: bytes) -> bytes:
        """Everything that comes back for these bytes until the server closes the connection."""
        with socket.create_connection(self.address, timeout=30) as connection:
            connection.sendall(sent)
            received = b""
            while part := connection.recv(65536):
                received += part
        return received


def parse_raw(answer: bytes) -> tuple[int, dict[str, str], Any]:
    """(code, headers with lower-case names, JSON body) of a raw answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return int(first.split()[1]), headers, json.loads(body)


@pytest.fixture
def manager() -> FakeManager:
    return FakeManager(info_of("noop", workers=1), info_of("other"))


@pytest.fixture
def client(manager: FakeManager) -> Iterator[Client]:
    with serve(manager) as server:
        yield Client(server.url)


@pytest.fixture
def serving() -> Iterator[Callable[..., Client]]:
    """Serve managers of the test's own making."""
    with contextlib.ExitStack() as stack:
        yield lambda manager, **more: Client(stack.enter_context(serve(manager, **more)).url)


@pytest.fixture(params=["at once", "in a task"])
def serving_inference(request) -> Iterator[Callable[..., Client]]:
    """Serve the inference address as settings have it that need not say where it really is, in both ways that there are."""
    with contextlib.ExitStack() as stack:

        def start(manager: FakeManager, **more: Any) -> Client:
            app = create_inference_app(manager, **more)
            begin = app.begin if request.param == "at once" else None
            server = ASGIServer(app, bind(Address("http", "127.0.0.1", 0)), begin=begin)
            stack.callback(server.close)
            return Client(server.url)

        yield start


@define
class Predicting:
    """A manager with real workers and its inference address."""

    manager: ModelManager
    client: Client
    server: RunningServer
    folder: Path

    def ask(self, text: str, **headers: str) -> requests.Response:
        """The answer of a model that evaluates its text."""
        return self.client.post("/predictions/model", data=text, headers={"Content-Type": "text/plain", **headers})

    def register(self, name: str, source: str, *, config: str | None = None, **more: Any) -> Model:
        folder = write_folder(self.folder / name / str(more.get("version", "1.0")), source, config=config)
        if config is not None or "envelope" in more:
            envelope = {"envelope": more.pop("envelope")} if "envelope" in more else {}
            write_manifest(folder, modelName=name, handler="handler.py", configFile="model-config.yaml", **envelope)
            (folder / "model-config.yaml").touch()
        return self.manager.register(folder, model_name=name, handler="handler.py", **more)


@pytest.fixture
def predicting(backend: ProcessBackend, tmp_path: Path) -> Iterator[Callable[..., Predicting]]:
    """Serve the inference address of managers with real workers."""
    with contextlib.ExitStack() as stack:

        def start(source: str = EVAL, *, settings: Settings | None = None, limits: Limits | None = None, **more: Any):
            manager = stack.enter_context(ModelManager(backend=backend, settings=settings))
            bound = BoundAddress(more.pop("roles", frozenset({Role.INFERENCE})), bind(Address("http", "127.0.0.1", 0)))
            server = start_server(manager, bound, settings, limits=limits)
            stack.callback(server.close)
            made = Predicting(manager, Client(server.url), server, tmp_path)
            made.register(more.pop("name", "model"), source, **more)
            return made

        yield start
