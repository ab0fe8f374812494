"""Who may call: callers on this machine, and no page in a browser that pretends to be one."""

from __future__ import annotations

import pytest
from falcon.testing import TestClient

from tests.http.fakes import FakeManager, info_of
from torchmgmt.errors import InvalidArgument
from torchmgmt.http import create_app, create_inference_app
from torchmgmt.http.callers import host_name, log_who_may_call
from torchmgmt.http.tokens import fixed_keys, keys_for
from torchmgmt.settings import Address, Settings

ALL_FIXED = {
    "TORCHMGMT_MANAGEMENT_KEY": "management-key",
    "TORCHMGMT_INFERENCE_KEY": "inference-key",
    "TORCHMGMT_API_KEY": "the-api-key",
}
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


NETWORK = Settings(management_address="http://0.0.0.0:8081", inference_address="http://192.0.2.1:8080")
WITH_KEYS = Settings(disable_token_authorization=False)
AS_SERVED = Settings(contract="torchserve-0.12")
LOCAL = {"Host": "localhost"}


@pytest.mark.parametrize("settings", [NETWORK, WITH_KEYS, AS_SERVED], ids=["network", "asked for", "contract"])
def test_where_keys_are_required_being_local_is_not_enough(settings):
    """Any other address than loopback, --enable-token-auth, and TorchServe's contract: each wants a key of everybody."""
    with keys_for(settings, [], environ=ALL_FIXED) as keys:
        client = TestClient(create_app(FakeManager(info_of("noop")), settings=settings, keys=keys))
        assert client.simulate_get("/models", headers=LOCAL).status_code in {400, 401}
        sent = {**LOCAL, "Authorization": "Bearer management-key"}
        assert client.simulate_get("/models", headers=sent).status_code == 200


@pytest.mark.parametrize(
    "address, sent, expected",
    [
        ("http://127.0.0.1:8081", {}, True),
        ("http://0.0.0.0:8081", {}, False),
        ("http://0.0.0.0:8081", {"Authorization": "Bearer management-key"}, True),
    ],
    ids=["loopback", "network", "network with a key"],
)
def test_who_may_have_archives_fetched(address, sent, expected):
    """Who calls a loopback address or sent a valid key; not everybody who reaches a network address without tokens."""
    with keys_for(NETWORK, [], environ=ALL_FIXED) as keys:
        settings = Settings(
            enable_model_api=True, management_address=address, disable_token_authorization=None if sent else True
        )
        manager = FakeManager(settings=settings)
        client = TestClient(create_app(manager, settings=settings, keys=keys))
        client.simulate_post("/models?url=http://h/a.mar", headers={**LOCAL, **sent})
        assert manager.calls[0][2]["may_fetch"] is expected


def test_a_key_stands_for_any_host_and_any_proxy(serving):
    """Who has the key may come from anywhere, also to a loopback address that needs none."""
    manager = FakeManager(info_of("noop"))
    keys = fixed_keys(ALL_FIXED)
    client = TestClient(create_app(manager, settings=Settings(), keys=keys))
    headers = {"Host": "models.example", "X-Forwarded-For": "1.2.3.4"}
    assert client.simulate_get("/models", headers=headers).status_code == 401
    headers["Authorization"] = "Bearer management-key"
    assert client.simulate_get("/models", headers=headers).status_code == 200
    assert client.simulate_get("/models", headers={**LOCAL, "Authorization": "Bearer stale"}).status_code == 200


@pytest.mark.parametrize("factory", [create_app, create_inference_app])
def test_an_app_that_needs_a_key_is_not_made_without_one(factory):
    """No network address is open by accident; the error says where a key comes from."""
    with pytest.raises(InvalidArgument, match=r"torchmgmt\.http\.tokens\.keys_for") as caught:
        factory(FakeManager(), settings=NETWORK)
    assert "_KEY in the environment" in str(caught.value)


@pytest.mark.parametrize(
    "method, path",
    [("GET", "/ping"), ("GET", "/ping/"), ("GET", "/api-description"), ("OPTIONS", "/"), ("GET", "/live")],
)
def test_health_and_description_need_no_key_on_the_inference_address(serving_inference, method, path):
    """/ping, /live, /ready, metrics and the description: whoever watches the server has no key."""
    client = serving_inference(FakeManager(), settings=NETWORK, keys=fixed_keys(ALL_FIXED))
    code = client(method, path, headers={"Host": "models.example"}).status_code
    assert code == 200


@pytest.mark.parametrize("settings", [NETWORK, WITH_KEYS], ids=["network", "asked for"])
def test_the_inference_address_wants_the_inference_key(serving_inference, settings):
    """The management key opens the management address alone."""
    client = serving_inference(FakeManager(), settings=settings, keys=fixed_keys(ALL_FIXED))

    def code(key: str) -> int:
        return client.post("/predictions/noop", headers={"Authorization": f"Bearer {key}"}).status_code

    assert [code(key) for key in ("management-key", "the-api-key", "nothing")] == [401] * 3
    assert code("inference-key") == 404  # past the guard: this release serves no predictions


def test_the_inference_address_has_the_same_rule_of_locality(serving_inference):
    """Loopback is open by default, and a rebound name is not loopback."""
    client = serving_inference(FakeManager())
    assert client.get("/nope").status_code == 404
    assert client.get("/nope", headers={"Host": "evil.example"}).status_code == 401


@pytest.mark.parametrize(
    "address, settings, says",
    [
        ("http://0.0.0.0:8081", Settings(), "needs a key (other machines reach it); without https"),
        ("https://0.0.0.0:8081", Settings(), "needs a key (other machines reach it)"),
        ("http://0.0.0.0:8081", OPEN, "open to everybody who reaches it"),
        ("http://127.0.0.1:8081", WITH_KEYS, "needs a key (callers on this machine, too)"),
        ("http://127.0.0.1:8081", Settings(), ""),
    ],
)
def test_the_log_says_who_may_call(caplog, address, settings, says):
    """Nobody has to find out by trying; a server that is open to all is a warning."""
    caplog.set_level("INFO")
    log_who_may_call("management", Address.parse("x", address), settings)
    assert says in caplog.text
    assert ("unencrypted" in caplog.text) is ("without https" in says)
    assert bool(caplog.records) is bool(says)
    assert {record.levelname for record in caplog.records} <= {"WARNING" if settings is OPEN else "INFO"}


def test_a_named_origin_may_change_and_any_origin_may_not_manage(serving, serving_inference):
    """cors_allowed_origin lets its pages change; * lets every page use the models, but none put code here."""
    manager = FakeManager(info_of("noop"))
    named = Settings(enable_model_api=True, cors_allowed_origin=("https://Good.example/",))
    client = serving(manager, settings=named)
    assert client.put("/models/noop", headers={"Origin": "https://good.example"}).status_code == 202
    assert client.put("/models/noop", headers={"Origin": "https://bad.example"}).status_code == 403
    anybody = Settings(enable_model_api=True, cors_allowed_origin=("*",))
    client = serving(manager, settings=anybody)
    assert client.put("/models/noop", headers={"Origin": "https://bad.example"}).status_code == 403
    inference = serving_inference(manager, settings=anybody)
    assert inference.post("/predictions/noop", headers={"Origin": "https://any.example"}).status_code == 200


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
