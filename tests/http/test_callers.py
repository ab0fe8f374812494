"""Who may call: callers on this machine, and no page in a browser that pretends to be one."""

from __future__ import annotations

import pytest

from tests.http.fakes import FakeManager, info_of
from torchmgmt.errors import InvalidArgument
from torchmgmt.http import serve
from torchmgmt.http.middleware import host_name
from torchmgmt.settings import Settings

OPEN = Settings(enable_model_api=True, disable_token_authorization=True)


def port_of(client) -> int:
    return client.address[1]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:{port}", "127.0.0.1:{port}", "127.1.2.3", "[::1]:{port}"])
def test_a_loopback_host_is_served(client, host):
    """Whatever loopback name the caller used, it is on this machine."""
    assert client.get("/models", headers={"Host": host.format(port=port_of(client))}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "localhost.evil.example:8081"},
        {"Host": "10.0.0.1:8081"},
        {"Host": "[x"},
        {"Host": "localhost@evil.example"},
        {"Forwarded": "for=1.2.3.4"},
        {"X-Forwarded-For": "127.0.0.1"},
        {"X-Forwarded-For": ""},
    ],
)
@pytest.mark.parametrize("method, path", [("GET", "/models"), ("DELETE", "/models/noop"), ("GET", "/nope")])
def test_a_caller_from_elsewhere_needs_a_key(client, manager, method, path, headers):
    """Another Host, or the mark of a proxy, means another machine or a rebound name: 401, and nothing is called."""
    response = client(method, path, headers=headers)
    assert response.status_code == 401
    assert response.json()["type"] == "InvalidKeyException"
    assert response.headers["WWW-Authenticate"].startswith("Bearer")
    assert manager.calls == []


def test_a_request_without_host_needs_a_key(client):
    """HTTP/1.0 has none; that proves no locality."""
    assert b" 401 " in client.raw(b"GET /models HTTP/1.0\r\n\r\n").split(b"\r\n")[0]


@pytest.mark.parametrize("method, path", [("OPTIONS", "/"), ("GET", "/api-description"), ("GET", "/api-description/")])
def test_the_api_description_is_open_to_all(client, method, path):
    """The description needs no key."""
    assert client(method, path, headers={"Host": "evil.example"}).status_code == 200


def test_without_token_authorization_everybody_is_served(serving):
    """--disable-token-auth opens the server, proxies included."""
    client = serving(FakeManager(info_of("noop"), settings=OPEN))
    headers = {"Host": "models.example", "X-Forwarded-For": "1.2.3.4"}
    assert client.get("/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://localhost:1", "http://127.0.0.1.evil.example", ""],
)
@pytest.mark.parametrize(
    "method, path",
    [("POST", "/models?url=a.mar"), ("PUT", "/models/noop"), ("DELETE", "/models/noop")],
)
@pytest.mark.parametrize("settings", [Settings(enable_model_api=True), OPEN], ids=["local", "open"])
def test_a_page_of_another_origin_changes_nothing(serving, settings, method, path, origin):
    """A form on any web page can post here without asking; its Origin gives it away, always."""
    manager = FakeManager(info_of("noop"), settings=settings)
    response = serving(manager)(method, path, headers={"Origin": origin})
    assert response.status_code == 403
    assert response.json()["code"] == 403
    assert manager.calls == []


def test_a_page_of_our_own_origin_may_change(client):
    """The origin that the request itself is addressed to is ours."""
    assert client.put("/models/noop", headers={"Origin": client.url}).status_code == 202


def test_a_rebound_name_is_not_our_origin(serving):
    """Host and Origin agree for a page whose name was pointed at us, too."""
    client = serving(FakeManager(info_of("noop"), settings=OPEN))
    port = port_of(client)
    headers = {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"}
    assert client.put("/models/noop", headers=headers).status_code == 403


def test_reading_is_not_changing(client):
    """The same-origin rule of browsers guards what is read; Origin alone forbids nothing there."""
    assert client.get("/models", headers={"Origin": "http://evil.example"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_a_network_address_is_refused_without_token_authorization_disabled(host):
    """No network address is open by accident."""
    with pytest.raises(InvalidArgument) as caught, serve(FakeManager(), host=host):
        pass
    assert "--disable-token-auth" in str(caught.value)


def test_asking_for_tokens_is_refused_until_there_are_some():
    """disable_token_authorization=False asks for what this release has not: refused, not ignored."""
    settings = Settings(disable_token_authorization=False)
    with (
        pytest.raises(InvalidArgument, match="disable_token_authorization"),
        serve(FakeManager(), settings=settings),
    ):
        pass


@pytest.mark.parametrize(
    "header, name",
    [
        (None, ""),
        ("", ""),
        ("A.b:80", "a.b"),
        ("[::1]:80", "::1"),
        ("[", ""),
        ("x:y:z", "x"),
        ("user@localhost", "localhost"),
    ],
)
def test_host_headers_are_read_without_failing(header, name):
    """Any Host header gives a name or none."""
    assert host_name(header) == name
