"""CORS: which web pages may read an answer or send more than a form, and that the others learn nothing."""

from __future__ import annotations

import pytest

from tests.http.fakes import FakeManager, info_of
from torchmgmt.http.tokens import fixed_keys
from torchmgmt.settings import Settings

GOOD, BAD = "https://good.example", "https://bad.example"
NAMED = Settings(enable_model_api=True, cors_allowed_origin=(GOOD, "http://other.example:3000/"))
ANYBODY = Settings(enable_model_api=True, cors_allowed_origin=("*",))
PREFLIGHT = {"Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "content-type"}


@pytest.fixture(params=["management", "inference"])
def start(request, serving, serving_inference):
    """Serve either address; on both the rule is the same. The path is one that is served there."""
    manager = FakeManager(info_of("noop", workers=1))
    if request.param == "inference":
        return lambda settings: (serving_inference(manager, settings=settings), "/ping")
    return lambda settings: (serving(manager, settings=settings), "/models")


def cors_headers(response) -> dict[str, str]:
    return {name: value for name, value in response.headers.items() if name.lower().startswith("access-control-")}


@pytest.mark.parametrize("origin", [GOOD, "http://other.example:3000"])
def test_a_named_origin_may_read(start, origin):
    """It is named back, never with credentials, and caches are told that the answer is for it alone."""
    client, path = start(NAMED)
    response = client.get(path, headers={"Origin": origin})
    assert response.status_code == 200
    assert response.headers["Access-Control-Allow-Origin"] == origin
    assert response.headers["Access-Control-Expose-Headers"] == "x-request-id"
    assert response.headers["Vary"] == "Origin"
    assert "Access-Control-Allow-Credentials" not in response.headers


@pytest.mark.parametrize("origin", [BAD, "null", "https://good.example.evil.example", "http://good.example"])
def test_any_other_origin_may_not(start, origin):
    """It gets no header that lets it read, and caches are told all the same."""
    client, path = start(NAMED)
    for response in (client.get(path, headers={"Origin": origin}), client.get(path)):
        assert cors_headers(response) == {}
        assert response.headers["Vary"] == "Origin"
    assert cors_headers(client("OPTIONS", path, headers={"Origin": origin, **PREFLIGHT})) == {}


def test_every_origin_may_read_if_the_setting_says_so(start):
    """The star goes out as a star, and never with credentials."""
    client, path = start(ANYBODY)
    response = client.get(path, headers={"Origin": BAD})
    assert response.headers["Access-Control-Allow-Origin"] == "*"
    assert "Access-Control-Allow-Credentials" not in response.headers


def test_without_the_setting_no_page_may(start):
    """By default nothing is said to browsers, which then let no page of another origin read."""
    client, path = start(Settings())
    assert cors_headers(client.get(path, headers={"Origin": GOOD})) == {}
    assert cors_headers(client("OPTIONS", path, headers={"Origin": GOOD, **PREFLIGHT})) == {}


def test_a_preflight_names_what_the_path_serves(serving):
    """Methods are those of the path, headers those that the API uses, unless the settings name others."""
    client = serving(FakeManager(info_of("noop")), settings=NAMED)
    response = client("OPTIONS", "/models/noop", headers={"Origin": GOOD, **PREFLIGHT})
    assert response.status_code == 200
    assert set(response.headers["Access-Control-Allow-Methods"].split(", ")) >= {"GET", "PUT", "DELETE"}
    assert response.headers["Access-Control-Allow-Headers"] == "Authorization, Content-Type, X-Request-Id"
    assert int(response.headers["Access-Control-Max-Age"]) > 0


def test_a_preflight_names_what_the_settings_say(start):
    """cors_allowed_methods and cors_allowed_headers are TorchServe's, word for word."""
    settings = Settings(
        cors_allowed_origin=(GOOD,),
        cors_allowed_methods=("GET", "put"),
        cors_allowed_headers=("X-Custom", "Content-Type"),
    )
    client, path = start(settings)
    response = client("OPTIONS", path, headers={"Origin": GOOD, **PREFLIGHT})
    assert response.headers["Access-Control-Allow-Methods"] == "GET, PUT"
    assert response.headers["Access-Control-Allow-Headers"] == "X-Custom, Content-Type"


def test_a_preflight_needs_no_key(serving_inference):
    """A browser sends none with it; what it asks about needs one all the same, and the page can read that."""
    settings = Settings(disable_token_authorization=False, cors_allowed_origin=(GOOD,))
    keys = fixed_keys({"TORCHMGMT_INFERENCE_KEY": "inference-key"})
    client = serving_inference(FakeManager(), settings=settings, keys=keys)
    headers = {"Origin": GOOD, "Host": "models.example"}
    assert client("OPTIONS", "/api-description", headers={**headers, **PREFLIGHT}).status_code == 200
    refused = client.get("/nope", headers=headers)
    assert (refused.status_code, refused.headers["Access-Control-Allow-Origin"]) == (401, GOOD)
    assert client("OPTIONS", "/api-description", headers=headers).status_code == 401  # no preflight


def test_the_description_at_the_root_is_no_preflight(start):
    """OPTIONS / is the API description, also for a page, and also when it asks first."""
    client, _ = start(NAMED)
    for more in ({}, PREFLIGHT):
        response = client("OPTIONS", "/", headers={"Origin": GOOD, **more})
        assert response.json()["openapi"].startswith("3.")
        assert response.headers["Access-Control-Allow-Origin"] == GOOD
