"""The contract's document, row by row, against a running server; and the one table of where the documentation and
TorchServe 0.12 disagree."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import attrs
import pytest
import requests
from attrs import field, frozen
from falcon.testing import TestClient

from tests.http.archives import BROKEN, write_model
from tests.http.conftest import Client
from tests.http.fakes import FakeManager, info_of
from torchmgmt import ModelManager
from torchmgmt.http import create_app, serve
from torchmgmt.http.contract import CONTRACTS, Contract
from torchmgmt.settings import Settings

NO_WORKERS = "registered with 0 initial workers. Use scale workers API to add workers for the model."
PROCESSING = "Processing worker updates..."
NOT_ALLOWED = "Requested method is not allowed, please refer to API document."
NOT_FOUND = "Requested resource is not found, please refer to API document."

Check = Callable[[Any], bool]


@frozen
class Row:
    """One line of the document: a request and its answer."""

    request: str
    """Method and path with query."""
    code: int
    answer: object
    """The body, or what is to be true of it."""
    body: dict[str, Any] = field(factory=dict)
    """Keyword arguments of requests."""

    def complaint(self, client: Client) -> str:
        """What differs; empty if nothing does."""
        method, path = self.request.split(" ", 1)
        response = client(method, path, **self.body)
        wrong = [
            name for name in ("x-request-id", "Pragma", "Cache-Control", "Expires") if name not in response.headers
        ]
        if not response.text.endswith("\n"):
            wrong.append("no newline at the end")
        item = response.json()
        is_right = self.answer(item) if callable(self.answer) else item == self.answer
        if response.status_code == self.code and is_right and not wrong:
            return ""
        return f"{self.request} {self.body}: {response.status_code} {wrong} {item}, expected {self.code} {self.answer}"


def status(text: str, *warnings: str) -> dict[str, Any]:
    return {"status": text, **({"warnings": list(warnings)} if warnings else {})}


def error(code: int, kind: str, message: str) -> dict[str, Any]:
    return {"code": code, "type": f"{kind}Exception", "message": message}


def starts(code: int, kind: str, start: str, *parts: str) -> Check:
    """An error whose message starts so and has these parts."""

    def check(item: dict[str, Any]) -> bool:
        message = item["message"]
        has_all = message.startswith(start) and all(part in message for part in parts)
        return bool((item["code"], item["type"]) == (code, f"{kind}Exception") and has_all)

    return check


def versions(*expected: str) -> Check:
    return lambda items: [item["modelVersion"] for item in items] == list(expected)


def described(**expected: object) -> Check:
    return lambda items: len(items) == 1 and {name: items[0][name] for name in expected} == expected


def listed(*names: str, token: str | None = None) -> Check:
    def check(item: dict[str, Any]) -> bool:
        return [model["modelName"] for model in item["models"]] == list(names) and item.get("nextPageToken") == token

    return check


BAD, GONE = "BadRequest", "ModelNotFound"


# In the order of the document. Each row stands on those before it.
REGISTER = (
    Row("POST /models", 400, error(400, BAD, "Parameter url is required.")),
    Row("POST /models?url=", 400, error(400, BAD, "Parameter url is required.")),
    Row("POST /models?url=noop&runtime=cobol", 400, error(400, BAD, "Invalid RuntimeType value: cobol")),
    Row("POST /models?url=noop&batch_size=0", 400, starts(400, BAD, "batch_size is '0', but must be")),
    Row("POST /models?url=noop&max_batch_delay=-1", 400, starts(400, BAD, "max_batch_delay is '-1', but must be")),
    Row("POST /models?url=noop&initial_workers=abc", 400, starts(400, BAD, "initial_workers is 'abc', but must be")),
    Row("POST /models?url=noop&synchronous=maybe", 400, starts(400, BAD, "synchronous is 'maybe'", "true or false")),
    Row("POST /models?url=noop&response_timeout=0", 400, starts(400, BAD, "response_timeout is '0', but must be")),
    Row("POST /models?url=noop&startup_timeout=-5", 400, starts(400, BAD, "startup_timeout is '-5', but must be")),
    Row("POST /models?url=noop&s3_sse_kms=true", 400, starts(400, BAD, "s3_sse_kms", "S3")),
    Row("POST /models?url=noop", 400, starts(400, BAD, "url is given in"), {"json": {"url": "other"}}),
    Row("POST /models?url=noop&url=other", 400, starts(400, BAD, "url is given twice")),
    Row("POST /models?url=noop&model_name=a%2Fb", 400, starts(400, BAD, "model_name is 'a/b', but must be")),
    Row("POST /models?url=nope.mar", 404, error(404, GONE, "Model not found at: nope.mar")),
    Row("POST /models?url=../noop", 404, error(404, GONE, "Relative path is not allowed in url: ../noop")),
    Row("POST /models?url=empty", 400, starts(400, "InvalidModel", "")),
    Row("POST /models?url=text.mar", 400, starts(400, "InvalidModel", "")),
    Row(
        "POST /models?url=noop&initial_workers=2&synchronous=TRUE&runtime=PYTHON3&s3_sse_kms=0&handler=",
        200,
        status('Model "noop" Version: 1.0 registered with 2 initial workers'),
    ),
    Row(
        "POST /models/",
        200,
        status(f'Model "noop" Version: 2.0 {NO_WORKERS}'),
        {"json": {"url": "noop2", "synchronous": 1, "batch_size": 4, "max_batch_delay": None}},
    ),
    Row(
        "POST /models",
        202,
        status(f'Model "späte" Version: 1.0 {NO_WORKERS}'),
        {"data": {"url": "noop", "model_name": "späte"}},
    ),
    Row(
        "POST /models?url=noop&model_name=late&initial_workers=1",
        202,
        status(PROCESSING),
    ),
    Row(
        "POST /models?url=noop",
        409,
        error(409, "ConflictStatus", "Model version 1.0 is already registered for model noop"),
    ),
    Row(
        "POST /models?url=broken&model_name=bad&initial_workers=1&synchronous=true",
        500,
        starts(500, "InternalServer", "Failed to start workers for model bad version: 1.0", "broken on purpose"),
    ),
    Row("GET /models/bad", 404, error(404, GONE, "Model not found: bad")),
    Row(
        "POST /models?url=noop&model_name=warned&batchSize=2&synchronous=1",
        200,
        status(
            f'Model "warned" Version: 1.0 {NO_WORKERS}', "unknown parameter 'batchSize': did you mean 'batch_size'?"
        ),
    ),
    Row(
        "POST /models?url=configured&synchronous=true&batch_size=7",
        200,
        lambda item: "with 1 initial" in item["status"],
    ),
    Row(
        "GET /models/configured",
        200,
        described(batchSize=7, maxBatchDelay=9, responseTimeout=33, minWorkers=1, maxWorkers=2),
    ),
)
SCALE = (
    Row("PUT /models/noop?min_worker=3&synchronous=true", 200, status("Workers scaled to 3 for model: noop")),
    Row(
        "PUT /models/noop/2.0?min_worker=1&max_worker=2&synchronous=true",
        200,
        status("Workers scaled to 1 for model: noop, version: 2.0"),
    ),
    Row(
        "PUT /models/noop?model_version=2.0",
        200,
        status("Workers scaled to 1 for model: noop, version: 2.0"),
        {"json": {"min_worker": 1, "synchronous": True}},
    ),
    Row(
        "PUT /models/noop/2.0/",
        202,
        status(PROCESSING),
        {"data": {"min_worker": "1", "number_gpu": "0", "timeout": "-1"}},
    ),
    Row("PUT /models/noop?timeout=0", 202, status(PROCESSING)),
    Row(
        "PUT /models/noop?min_worker=2&max_worker=1", 400, error(400, BAD, "max_worker cannot be less than min_worker.")
    ),
    Row("PUT /models/noop?max_worker=0", 400, error(400, BAD, "max_worker cannot be less than min_worker.")),
    Row("PUT /models/noop?timeout=-2", 400, starts(400, BAD, "timeout is '-2', but must be")),
    Row("PUT /models/noop?min_worker=1", 400, starts(400, BAD, "min_worker is given in"), {"data": {"min_worker": 2}}),
    Row("PUT /models/nope", 404, error(404, GONE, "Model not found: nope")),
    Row(
        "PUT /models/noop/9.9",
        404,
        error(404, "ModelVersionNotFound", "Model version: 9.9 does not exist for model: noop"),
    ),
)
DESCRIBE = (
    Row("GET /models/noop/1.0/", 200, versions("1.0")),
    Row("GET /models/noop/all", 200, versions("1.0", "2.0")),
    Row("GET /models/sp%C3%A4te", 200, described(modelName="späte", workers=[])),
    Row("GET /models/noop?customized=maybe", 400, starts(400, BAD, "customized is 'maybe'")),
    Row("GET /models/nope/all", 404, error(404, GONE, "Model not found: nope")),
    Row(
        "GET /models/noop/9.9",
        404,
        error(404, "ModelVersionNotFound", "Model version: 9.9 does not exist for model: noop"),
    ),
    Row("GET /models/warned?customized=true", 503, starts(503, "ServiceUnavailable", "No worker is available")),
)
LIST = (
    Row("GET /models", 200, listed("configured", "late", "noop", "späte", "warned")),
    Row("GET /models?limit=2", 200, listed("configured", "late", token="2")),
    Row("GET /models/?limit=2&next_page_token=2", 200, listed("noop", "späte", token="4")),
    Row("GET /models?limit=2&next_page_token=4", 200, listed("warned")),
    Row("GET /models?limit=5000", 200, listed("configured", "late", "noop", "späte", "warned")),
    Row("GET /models?limit=0", 400, starts(400, BAD, "limit is '0', but must be")),
    Row("GET /models?next_page_token=x", 400, starts(400, BAD, "next_page_token is 'x', but must be")),
    Row("GET /models?pages=2", 200, lambda item: item["warnings"][0].startswith("unknown parameter 'pages'")),
)
DEFAULT_AND_UNREGISTER = (
    Row(
        "PUT /models/noop/9.9/set-default",
        404,
        error(404, "ModelVersionNotFound", "Model version 9.9 does not exist for model noop"),
    ),
    Row(
        "PUT /models/noop/2.0/set-default/",
        200,
        status('Default version successfully updated for model "noop" to "2.0"'),
    ),
    Row("GET /models/noop", 200, versions("2.0")),
    Row(
        "DELETE /models/noop",
        403,
        error(403, "InvalidModelVersion", "Cannot remove default version for model noop"),
    ),
    Row("DELETE /models/noop/1.0", 200, status('Model "noop" unregistered')),
    Row("DELETE /models/noop", 200, status('Model "noop" unregistered')),
    Row("DELETE /models/noop", 404, error(404, GONE, "Model not found: noop")),
    Row("POST /models?url=noop&synchronous=true", 200, status(f'Model "noop" Version: 1.0 {NO_WORKERS}')),
)
PATHS = (
    Row("GET /nope", 404, error(404, "ResourceNotFound", NOT_FOUND)),
    Row("PATCH /models", 405, error(405, "MethodNotAllowed", NOT_ALLOWED)),
    Row("GET /models/noop/1.0/set-default", 405, error(405, "MethodNotAllowed", NOT_ALLOWED)),
    Row("OPTIONS /", 200, lambda item: item["openapi"].startswith("3.")),
    Row("GET /api-description/", 200, lambda item: "/models" in item["paths"]),
    Row(
        "POST /models",
        400,
        starts(400, BAD, "The body is not valid JSON"),
        {"data": "{", "headers": {"Content-Type": "application/json"}},
    ),
    Row(
        "POST /models", 413, starts(413, "RequestEntityTooLarge", "", "max_request_size"), {"json": {"url": "x" * 2000}}
    ),
)


@pytest.fixture
def client(tmp_path, backend) -> Iterator[Client]:
    """A server with a real manager and the archives that the rows name."""
    store = tmp_path / "store"
    write_model(store, "noop")
    write_model(store, "noop2", name="noop", version="2.0")
    write_model(store, "broken", BROKEN)
    config = "minWorkers: 1\nmaxWorkers: 2\nbatchSize: 3\nmaxBatchDelay: 9\nresponseTimeout: 33\n"
    write_model(store, "configured", config=config)
    (store / "empty").mkdir()
    (store / "text.mar").write_text("no archive")
    settings = Settings(enable_model_api=True, model_store=store, max_request_size=1000, default_response_timeout=44)
    with ModelManager(settings=settings, backend=backend) as manager, serve(manager) as server:
        yield Client(server.url)


def test_every_row_of_the_document_holds(client):
    """Register, scale, describe, list, default, unregister, errors: codes, types and texts are the quoted ones."""
    rows = (*REGISTER, *SCALE, *DESCRIBE, *LIST, *DEFAULT_AND_UNREGISTER, *PATHS)
    complaints = [complaint for row in rows if (complaint := row.complaint(client))]
    assert not complaints, "\n" + "\n".join(complaints)


QUOTED = {  # word for word the document's, in its order
    "modelName": "noop", "modelVersion": "1.0", "modelUrl": "noop", "engine": "Torch", "runtime": "python",
    "minWorkers": 1, "maxWorkers": 1, "batchSize": 1, "maxBatchDelay": 100, "responseTimeout": 44, "startupTimeout": 120,
    "maxRetryTimeoutInSec": 300, "clientTimeoutInMills": 0, "parallelType": "", "parallelLevel": 0, "deviceType": "cpu",
    "continuousBatching": False, "useJobTicket": False, "useVenv": False, "stateful": False, "sequenceMaxIdleMSec": 0,
    "sequenceTimeoutMSec": 0, "maxNumSequence": 0, "maxSequenceJobQueueSize": 0, "loadedAtStartup": False,
    "jobQueueStatus": {"remainingCapacity": 100, "pendingRequests": 0},
}  # fmt: skip


def test_describe_is_the_quoted_one(client):
    """Every key with its type and value; strict clients parse it. The archive's silence leaves the settings' timeout."""
    assert client.post("/models?url=noop&initial_workers=1&synchronous=true").status_code == 200
    (item,) = client.get("/models/noop").json()
    assert {name: item[name] for name in QUOTED} == QUOTED
    assert [type(item[name]) for name in QUOTED] == [type(value) for value in QUOTED.values()]
    (worker,) = item["workers"]
    assert {name: type(value) for name, value in worker.items()} == {
        "id": str, "startTime": str, "status": str, "memoryUsage": int, "pid": int, "gpu": bool, "gpuUsage": str
    }  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", worker["startTime"])
    assert datetime.fromisoformat(worker["startTime"].replace("Z", "+00:00"))
    assert (worker["status"], worker["gpu"], worker["gpuUsage"]) == ("READY", False, "N/A")


# --- where the documentation and TorchServe 0.12.0 disagree ---------------------------------------------------------

DOCUMENTED, AS_SERVED = "documented", "torchserve-0.12"


def app_client(contract: str, **more: Any) -> TestClient:
    settings = Settings(enable_model_api=True, contract=contract, **{"disable_token_authorization": True, **more})
    manager = FakeManager(*(info_of(f"m{n:04}") for n in range(1001)), settings=settings)
    return TestClient(create_app(manager), headers={"Host": "localhost"})


def test_the_default_follows_the_documentation():
    """Nobody has to ask for it."""
    assert Settings().contract == DOCUMENTED
    assert set(CONTRACTS) == {DOCUMENTED, AS_SERVED}


def test_every_row_of_the_table_differs():
    """A row that says the same in both columns would be no difference."""
    one, other = CONTRACTS.values()
    assert [row.name for row in attrs.fields(Contract) if getattr(one, row.name) == getattr(other, row.name)] == []


@pytest.mark.parametrize(
    "query, documented, as_served",
    [
        ("", 202, 200),
        ("&initial_workers=1", 202, 200),
        ("&synchronous=true", 200, 200),
        ("&synchronous=true&initial_workers=1", 200, 200),
        ("&synchronous=false", 202, 200),
        ("&synchronous=false&initial_workers=1", 202, 202),
        ("&synchronous=&initial_workers=1", 202, 200),
    ],
)
def test_registering_differs(query, documented, as_served):
    """What `synchronous` means when it is not given, and the code of what had nothing to wait for."""
    for contract, code in ((DOCUMENTED, documented), (AS_SERVED, as_served)):
        response = app_client(contract).simulate_post(f"/models?url=noop.mar{query}")
        assert response.status_code == code
        waited = "initial_workers=1" not in query or code == 200
        assert response.json["status"].startswith('Model "noop" Version: 1.0') is waited


@pytest.mark.parametrize("contract", [DOCUMENTED, AS_SERVED])
def test_the_description_follows_the_contract(contract):
    """A client that is generated from it sends what it means."""
    described = app_client(contract).simulate_options("/").json["paths"]["/models"]["post"]["parameters"]
    (synchronous,) = [parameter for parameter in described if parameter.get("name") == "synchronous"]
    default = json.dumps(CONTRACTS[contract].synchronous_by_default)
    assert synchronous["description"].endswith(f"Default: {default}.")


@pytest.mark.parametrize("contract, most", [(DOCUMENTED, 1000), (AS_SERVED, 100)])
def test_the_largest_page_differs(contract, most):
    """The token leads to the next one either way."""
    item = app_client(contract).simulate_get("/models?limit=2000").json
    assert (len(item["models"]), item["nextPageToken"]) == (most, str(most))


def test_a_refused_key_differs(monkeypatch):
    """401 with a challenge and the reason; or TorchServe's 400 with its one text for every reason."""
    monkeypatch.setenv("TORCHMGMT_MANAGEMENT_KEY", "management-key")
    refused = app_client(DOCUMENTED, disable_token_authorization=False).simulate_get("/models")
    assert (refused.status_code, refused.json["type"]) == (401, "InvalidKeyException")
    assert "WWW-Authenticate" in refused.headers
    refused = app_client(AS_SERVED, disable_token_authorization=None).simulate_get("/models")
    assert refused.json == error(
        400, "InvalidKey", "Token Authorization failed. Token either incorrect, expired, or not provided correctly"
    )
    assert "WWW-Authenticate" not in refused.headers


@pytest.mark.parametrize(
    "contract, disabled, code", [(DOCUMENTED, None, 200), (AS_SERVED, None, 400), (AS_SERVED, True, 200)]
)
def test_loopback_without_a_key_differs(monkeypatch, contract, disabled, code):
    """Open; or refused unless --disable-token-auth says otherwise."""
    monkeypatch.setenv("TORCHMGMT_MANAGEMENT_KEY", "management-key")
    assert app_client(contract, disable_token_authorization=disabled).simulate_get("/models").status_code == code


def test_what_torchserve_got_wrong_is_carried_over_by_neither():
    """Wrong numbers are refused in both contracts."""
    for contract in (DOCUMENTED, AS_SERVED):
        client = app_client(contract)
        for query in ("batch_size=-2", "response_timeout=0", "initial_workers=abc"):
            assert client.simulate_post(f"/models?url=a&{query}").status_code == 400


def test_no_other_code_asks_which_contract_is_followed(repository: Path):
    """One table holds all of the differences: nothing else in the package compares the setting."""
    for path in (repository / "torchmgmt").rglob("*.py"):
        if path.name != "contract.py":
            assert not re.search(r"settings\.contract\b|\bcontract\b\s*(==|!=)", path.read_text("utf-8")), path


def test_a_real_client_meets_torchserves_contract(tmp_path, monkeypatch):
    """Over a socket, with the key file that TorchServe's clients look for: refused without, served with the key."""
    monkeypatch.chdir(tmp_path)
    settings = Settings(contract=AS_SERVED, enable_model_api=True)
    with serve(FakeManager(info_of("noop"), settings=settings)) as server:
        assert requests.get(f"{server.url}/models", timeout=30).status_code == 400
        key = json.loads((tmp_path / "key_file.json").read_text())["management"]["key"]
        sent = {"Authorization": f"Bearer {key}"}
        response = requests.post(f"{server.url}/models?url=noop.mar", headers=sent, timeout=30)
        assert (response.status_code, response.json()) == (200, status(f'Model "noop" Version: 1.0 {NO_WORKERS}'))
