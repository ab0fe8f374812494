"""The inference address: a health that is true."""

from __future__ import annotations

import pytest
import requests

from tests.http.fakes import FakeManager, info_of
from torchmgmt.http import operations as ops
from torchmgmt.http.server import bind, start_inference
from torchmgmt.http.tokens import Keys
from torchmgmt.lifecycle import VersionState
from torchmgmt.settings import Address, Settings

LOADING, FAILED = VersionState.LOADING, VersionState.FAILED


@pytest.fixture
def ping():
    """Ask a server for the health of a manager."""
    servers = []

    def ask(manager: FakeManager, method: str = "GET", path: str = "/ping", **more) -> requests.Response:
        server = start_inference(manager, bind(Address("http", "127.0.0.1", 0)), Settings(), Keys())
        servers.append(server)
        return requests.request(method, server.url + path, timeout=30, **more)

    yield ask
    for server in servers:
        server.close()


@pytest.mark.parametrize(
    "infos, code, status",
    [
        ([], 200, "Healthy"),
        ([info_of("a")], 200, "Healthy"),
        ([info_of("a", workers=1), info_of("b")], 200, "Healthy"),
        ([info_of("a", workers=1), info_of("b", workers=1, state=FAILED)], 200, "Partial Healthy"),
        (
            [info_of("a", "1", workers=1), info_of("a", "2", workers=1, state=LOADING)],
            200,
            "Partial Healthy",
        ),
        ([info_of("a", workers=1, state=FAILED)], 500, "Unhealthy"),
        ([info_of("a", workers=1, state=LOADING), info_of("b")], 500, "Unhealthy"),
    ],
)
def test_ping_says_whether_what_shall_be_served_is(ping, infos, code, status):
    """Every version that shall have workers counts, and only those; all, some or none of them are ready."""
    response = ping(FakeManager(*infos))
    assert (response.status_code, response.json()) == (code, {"status": status})


@pytest.mark.parametrize(
    "infos, code, not_ready",
    [
        ([], 200, []),
        ([info_of("a", workers=1), info_of("b")], 200, []),
        ([info_of("a", workers=1), info_of("b", "2", workers=1, state=LOADING)], 503, ["b:2"]),
        ([info_of("a", workers=1, state=FAILED)], 503, ["a:1.0"]),
    ],
)
def test_ready_means_all_that_shall_be_served(ping, infos, code, not_ready):
    """One version without a ready worker is enough to say so, and it is named."""
    response = ping(FakeManager(*infos), path="/ready")
    status = "Not Ready" if not_ready else "Ready"
    assert response.status_code == code
    assert response.json() == {"status": status, "isLoading": False, "notReady": not_ready}


def test_live_says_nothing_of_models(ping):
    """A model that failed is no reason to end the server."""
    response = ping(FakeManager(info_of("a", workers=1, state=FAILED)), path="/live")
    assert (response.status_code, response.json()) == (200, {"status": "Live"})


def test_ping_is_open_to_all(ping):
    """A probe comes under any name, through any proxy."""
    response = ping(FakeManager(), headers={"Host": "10.0.0.1", "X-Forwarded-For": "1.2.3.4"})
    assert response.status_code == 200
    assert response.headers["Pragma"] == "no-cache"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    "method, path, code, type_name",
    [
        ("GET", "/nope", 404, "ResourceNotFoundException"),
        ("POST", "/ping", 405, "MethodNotAllowedException"),
        ("GET", "/models", 404, "ResourceNotFoundException"),
    ],
)
def test_its_errors_are_json_too(ping, method, path, code, type_name):
    """The inference address words its errors as the management address does."""
    response = ping(FakeManager(), method, path)
    assert response.status_code == code
    assert (response.json()["code"], response.json()["type"]) == (code, type_name)


def test_a_defect_is_a_500_without_its_text(ping, caplog):
    """What goes wrong inside goes to the log."""
    manager = FakeManager()
    manager.error = RuntimeError("secret detail")
    response = ping(manager)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "secret detail" in caplog.text


def test_it_describes_itself(ping):
    """The API description of this address has what this address serves."""
    described = ping(FakeManager(), "OPTIONS", "/").json()
    assert set(described["paths"]) == {operation.path for operation in ops.INFERENCE}
    assert ping(FakeManager(), "GET", "/api-description").json() == described
