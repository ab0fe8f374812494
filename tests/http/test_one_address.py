"""One address for several APIs: all routes on one port, one description, one set of rules for each."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.http.conftest import Client
from tests.http.fakes import FakeManager
from torchmgmt.errors import InvalidArgument
from torchmgmt.http.addresses import Addresses, Role
from torchmgmt.http.asgi_server import ASGIServer
from torchmgmt.http.management_server import ManagementServer
from torchmgmt.http.server import start_servers
from torchmgmt.http.tokens import Keys, fixed_keys
from torchmgmt.settings import Settings

ALL_FIXED = {"TORCHMGMT_MANAGEMENT_KEY": "management-key", "TORCHMGMT_INFERENCE_KEY": "inference-key"}


async def metrics(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"figures"})


def free_address() -> str:
    with Addresses.bind(Settings(management_address="http://127.0.0.1:0"), [Role.MANAGEMENT]) as free:
        return str(free[Role.MANAGEMENT])


@pytest.fixture
def serve_all(manager: FakeManager) -> Iterator[Callable[..., Client]]:
    """Serve all roles on one port, with the settings and keys of the test."""
    with contextlib.ExitStack() as stack:

        def serve(keys: Keys | None = None, **options) -> Client:
            address = free_address()
            settings = Settings(
                management_address=address, inference_address=address, metrics_address=address, **options
            )
            addresses = stack.enter_context(Addresses.bind(settings, Role))
            servers = start_servers(manager, addresses, settings, keys or Keys(), metrics=metrics)
            stack.callback(servers.close, 10)
            assert len(servers.running) == 1
            return Client(address)

        yield serve


def test_all_are_served_from_one_port(serve_all):
    """Health, models and metrics, each with its own errors."""
    client = serve_all()
    assert client.get("/ping").json() == {"status": "Healthy"}
    assert [model["modelName"] for model in client.get("/models").json()["models"]] == ["noop", "other"]
    assert client.get("/models/noop/").json()[0]["modelName"] == "noop"
    assert client.get("/metrics").text == "figures"
    assert client.get("/nope").json()["type"] == "ResourceNotFoundException"
    assert client.put("/ping").status_code == 405
    assert client.post("/models?url=a.mar").status_code == 405  # the model API is off


def test_the_description_is_of_all(serve_all):
    """One document, in both places."""
    described = serve_all().get("/api-description").json()
    assert {"/models", "/ping", "/api-description"} <= set(described["paths"])


def test_each_key_opens_its_own_part(serve_all):
    """To share a port is not to share a key."""
    client = serve_all(fixed_keys({**ALL_FIXED, "TORCHMGMT_API_KEY": "the-api-key"}), disable_token_authorization=False)

    def code(path: str, key: str) -> int:
        return client.get(path, headers={"Authorization": f"Bearer {key}"}).status_code

    assert (code("/models", "management-key"), code("/models", "inference-key")) == (200, 401)
    assert (code("/nope", "inference-key"), code("/nope", "management-key")) == (404, 401)
    assert client.get("/ping").status_code == 200


def test_waiting_calls_do_not_silence_the_port(serve_all, manager):
    """While as many calls wait for workers as may, health and models are answered, and one more is told to come back."""
    client = serve_all(enable_model_api=True)
    manager.gate.clear()
    calls = [threading.Thread(target=client.post, args=("/models?url=a",)) for _ in range(40)]
    for call in calls:
        call.start()
    for _ in calls:
        assert manager.entered.acquire(timeout=30)
    try:
        assert client.get("/ping").status_code == 200
        assert client.get("/models").status_code == 200
        assert client.post("/models?url=a").status_code == 503
    finally:
        manager.gate.set()
        for call in calls:
            call.join()


def test_an_address_of_its_own_stays_on_waitress(manager):
    """Different addresses: two servers, so that a flood on one cannot silence the other."""
    settings = Settings(management_address="http://127.0.0.1:0", inference_address="http://127.0.0.1:0")
    with Addresses.bind(settings) as addresses:
        servers = start_servers(manager, addresses, settings, Keys())
        try:
            assert [type(server) for server in servers.running] == [ASGIServer, ManagementServer]
        finally:
            assert servers.close(10)


def test_one_port_cannot_speak_http_and_https():
    """The refusal names both settings."""
    settings = Settings(management_address="http://127.0.0.1:9", inference_address="https://localhost:9")
    with pytest.raises(InvalidArgument, match="either http or https"):
        Addresses.bind(settings)
