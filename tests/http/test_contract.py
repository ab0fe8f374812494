"""The setting contract, other origins, and the access log: against servers on real sockets."""

from __future__ import annotations

import logging
import re

import pytest
from falcon.testing import TestClient

from tests.http.fakes import FakeManager, info_of
from torchmgmt.http.access_log import written_in_background
from torchmgmt.http.contract import CONTRACTS
from torchmgmt.http.inference import create_inference_app
from torchmgmt.http.tokens import KEY_FILE
from torchmgmt.settings import Settings

AS_SERVER = {"contract": "torchserve-0.12", "enable_model_api": True}
NONE = (
    'Model "noop" Version: 1.0 registered with 0 initial workers. Use scale workers API to add workers for the model.'
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory: keys are written there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contract", CONTRACTS)
@pytest.mark.parametrize(
    "query, workers, codes, text",
    [
        ("", 0, {"documented": 202, "torchserve-0.12": 200}, NONE),
        ("&synchronous=false", 0, {"documented": 202, "torchserve-0.12": 200}, NONE),
        ("&synchronous=true", 0, {"documented": 200, "torchserve-0.12": 200}, NONE),
        (
            "&synchronous=TRUE&initial_workers=2",
            2,
            {"documented": 200, "torchserve-0.12": 200},
            'Model "noop" Version: 1.0 registered with 2 initial workers',
        ),
        (
            "&synchronous=0&initial_workers=2",
            2,
            {"documented": 202, "torchserve-0.12": 202},
            "Processing worker updates...",
        ),
    ],
)
def test_registering_answers_as_the_contract_says(serving, contract, query, workers, codes, text):
    """The codes and texts of a registration, in both columns of the table."""
    settings = Settings(contract=contract, enable_model_api=True, disable_token_authorization=True)
    manager = FakeManager(info_of("noop", workers=workers))
    answer = serving(manager, settings=settings).post(f"/models?url=noop.mar{query}")
    assert (answer.status_code, answer.json()) == (codes[contract], {"status": text})


def test_torchserve_waits_unless_told_not_to(serving):
    """The server's default of synchronous is true, the documentation's false."""
    for contract, expected in (("documented", False), ("torchserve-0.12", True)):
        settings = Settings(contract=contract, enable_model_api=True, disable_token_authorization=True)
        manager = FakeManager(info_of("noop", workers=1))
        serving(manager, settings=settings).post("/models?url=noop.mar&initial_workers=1")
        ((_, _, options),) = [call for call in manager.calls if call[0] == "register"]
        assert options["synchronous"] is expected


def test_torchserve_refuses_a_missing_key_with_400(serving, folder):
    """Loopback needs a key there, and the refusal has the server's code and text."""
    manager = FakeManager(info_of("noop"))
    refused = serving(manager, settings=Settings(**AS_SERVER)).get("/models")
    assert refused.status_code == 400
    assert refused.json()["type"] == "InvalidKeyException"
    assert refused.json()["message"].startswith("Token Authorization failed.")
    assert (folder / KEY_FILE).exists()
    opened = Settings(**AS_SERVER, disable_token_authorization=True)
    assert serving(manager, settings=opened).get("/models").status_code == 200


def test_torchserve_lists_100_models_at_most(serving):
    """However many are asked for; the documentation says 1000."""
    manager = FakeManager(*[info_of(f"m{number:04}") for number in range(150)])
    settings = Settings(**AS_SERVER, disable_token_authorization=True)
    listed = serving(manager, settings=settings).get("/models?limit=500").json()
    assert (len(listed["models"]), listed["nextPageToken"]) == (100, "100")


# --- other origins ----------------------------------------------------------------------------------------------------

CORS = Settings(
    enable_model_api=True,
    cors_allowed_origin=("https://good.example",),
    cors_allowed_methods=("GET", "PUT"),
    cors_allowed_headers=("X-Mine",),
)
PREFLIGHT = {"Origin": "https://good.example", "Access-Control-Request-Method": "PUT"}


def test_a_preflight_of_an_allowed_origin_says_what_it_may(serving, manager):
    """Methods and headers are those of the settings, and no credentials are allowed."""
    answer = serving(manager, settings=CORS)("OPTIONS", "/models/noop", headers=PREFLIGHT)
    assert answer.ok
    assert answer.headers["Access-Control-Allow-Origin"] == "https://good.example"
    assert answer.headers["Access-Control-Allow-Methods"] == "GET, PUT"
    assert answer.headers["Access-Control-Allow-Headers"] == "X-Mine"
    assert "Access-Control-Allow-Credentials" not in answer.headers


def test_an_allowed_origin_may_read_answers(serving, manager):
    """Errors included; caches keep the answers of origins apart."""
    client = serving(manager, settings=CORS)
    for path in ("/models", "/models/nope"):
        answer = client.get(path, headers={"Origin": "https://good.example"})
        assert answer.headers["Access-Control-Allow-Origin"] == "https://good.example"
        assert "Origin" in answer.headers["Vary"]


def test_another_origin_may_read_nothing(serving, manager):
    """Without the setting no origin may."""
    for settings in (CORS, Settings()):
        answer = serving(manager, settings=settings).get("/models", headers={"Origin": "https://bad.example"})
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_the_description_is_still_there_for_who_asks_for_it(serving, manager):
    """OPTIONS / is both: a preflight, and the API description."""
    client = serving(manager, settings=CORS)
    assert client("OPTIONS", "/").json()["openapi"]
    assert client("OPTIONS", "/", headers=PREFLIGHT).headers["Access-Control-Allow-Origin"] == "https://good.example"


def test_the_inference_address_has_the_same_rule():
    """One setting for both."""
    client = TestClient(create_inference_app(FakeManager(), settings=CORS))
    answer = client.simulate_get("/ping", host="localhost", headers={"Origin": "https://good.example"})
    assert answer.headers["access-control-allow-origin"] == "https://good.example"


# --- the access log ---------------------------------------------------------------------------------------------------

LINE = re.compile(r'127\.0\.0\.1:\d+ "(?P<request>[^"]*)" (?P<code>\d{3}) \d+\.\d (?P<id>\S+)')


def lines_of(caplog) -> list[re.Match[str]]:
    messages = [record.getMessage() for record in caplog.records if record.name == "torchmgmt.access"]
    return [match for match in map(LINE.fullmatch, messages) if match]


@pytest.mark.parametrize(
    "method, path, shown, code",
    [
        ("GET", "/models?limit=3", "GET /models?limit=3 HTTP/1.1", 200),
        ("GET", "/models/n%C3%B6%20p", "GET /models/n%C3%B6%20p HTTP/1.1", 404),
        ("PATCH", "/models", "PATCH /models HTTP/1.1", 405),
        (
            "POST",
            "/models?url=https%3A%2F%2Fme%3Asecret%40h%2Fa.mar%3Ftoken%3Dsecret",
            "POST /models?url=https://***%40h/a.mar%3Ftoken%3D*** HTTP/1.1",
            202,
        ),
    ],
)
def test_each_request_is_one_line(client, caplog, method, path, shown, code):
    """Who, what, how it ended, how long it took, its id; secrets in it are masked, and no line is broken in two."""
    caplog.set_level(logging.INFO, "torchmgmt.access")
    client(method, path, headers={"x-request-id": "mine-1"})
    (line,) = lines_of(caplog)
    assert (line["request"], int(line["code"]), line["id"]) == (shown, code, "mine-1")


def test_the_access_log_can_be_off(client, caplog):
    """Above INFO nothing is written."""
    caplog.set_level(logging.WARNING, "torchmgmt.access")
    client.get("/models")
    assert lines_of(caplog) == []


def test_the_program_writes_it_in_the_background(client, caplog):
    """All lines are written when the block ends, in their order."""
    root = logging.getLogger()
    caplog.set_level(logging.INFO)
    assert caplog.handler in root.handlers
    with written_in_background():
        for number in range(50):
            client.get("/models", headers={"x-request-id": f"r{number}"})
    assert [line["id"] for line in lines_of(caplog)] == [f"r{number}" for number in range(50)]
