"""The API description: valid, and true."""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

import attrs
import pytest
import requests
from jsonschema.exceptions import ValidationError
from openapi_schema_validator import OAS30ReadValidator, oas30_format_checker
from openapi_spec_validator import OpenAPIV30SpecValidator

import torchmgmt
from tests.http.fakes import KeepingManager, info_of
from torchmgmt import ShareWeights, VersionState, errors
from torchmgmt.http import operations as ops
from torchmgmt.http.errors import CALLERS_TABLE, TABLE
from torchmgmt.http.openapi import KeyRule, api_description, api_description_json, key_rule_of
from torchmgmt.http.schemas import ERRORS
from torchmgmt.http.server import bind, start_inference
from torchmgmt.lifecycle import WorkerState
from torchmgmt.records import Sharing
from torchmgmt.settings import Address, Settings

ADDRESSES = {"management": ops.MANAGEMENT, "inference": ops.INFERENCE, "both": ops.MANAGEMENT + ops.INFERENCE}
RULES = list(KeyRule)
DOCUMENT = api_description("x", ops.MANAGEMENT, KeyRule.CALLERS_FROM_ELSEWHERE)
every_address = pytest.mark.parametrize("operations", ADDRESSES.values(), ids=ADDRESSES)
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


def walk(item: Any):
    yield item
    for inner in item.values() if isinstance(item, dict) else item if isinstance(item, list) else ():
        yield from walk(inner)


def operations_of(described: dict) -> list[tuple[str, str, dict]]:
    return [(path, method, item) for path, methods in described["paths"].items() for method, item in methods.items()]


def loopback():
    return bind(Address("http", "127.0.0.1", 0))


def closed(item: Any) -> Any:
    """The same, but no object may have a key that is not described."""
    if isinstance(item, dict):
        inner = {name: closed(value) for name, value in item.items()}
        return {**inner, "additionalProperties": False} if "properties" in item else inner
    return [closed(value) for value in item] if isinstance(item, list) else item


def check(schema: dict, item: Any, document: dict = DOCUMENT) -> None:
    """Fail unless `item` is exactly as described, and has no key that is not described."""
    root = {"allOf": [closed(schema)], "components": closed(document["components"])}
    OAS30ReadValidator(root, format_checker=oas30_format_checker).validate(item)


def check_schema(name: str, item: Any) -> None:
    check({"$ref": f"#/components/schemas/{name}"}, item)


def check_response(response, path: str, method: str, document: dict = DOCUMENT) -> None:
    """Fail unless code, headers and body are among those described."""
    described = document["paths"][path][method.lower()]["responses"][str(response.status_code)]
    if "$ref" in described:
        described = document["components"]["responses"][described["$ref"].rpartition("/")[2]]
    assert response.headers["Content-Type"] == "application/json"
    check(described["content"]["application/json"]["schema"], response.json(), document)
    for name in described["headers"]:
        header = document["components"]["headers"][name]
        if name in response.headers or header["required"]:
            value = response.headers[name]
            check(header["schema"], int(value) if header["schema"]["type"] == "integer" else value, document)


@every_rule
@every_address
def test_the_description_is_valid(operations, rule):
    """It is an OpenAPI 3.0 document, references, defaults and path parameters included, and as it describes itself."""
    document = api_description("x", operations, rule)
    assert list(OpenAPIV30SpecValidator(document).iter_errors()) == []
    assert (document["openapi"], document["info"]["version"]) == ("3.0.3", torchmgmt.__version__)
    check({"$ref": "#/components/schemas/ApiDescription"}, document, document)


@every_rule
@every_address
def test_no_component_is_idle(operations, rule):
    """What is declared is referred to; that every reference leads somewhere is part of being valid."""
    document = api_description("x", operations, rule)
    references = {one["$ref"] for one in walk(document) if isinstance(one, dict) and "$ref" in one}
    components = {
        f"#/components/{section}/{name}"
        for section, found in document["components"].items()
        for name in found
        if section != "securitySchemes"
    }
    assert components == references
    used = {name for _, _, item in operations_of(document) for one in item.get("security", ()) for name in one}
    assert used == set(document["components"].get("securitySchemes", ()))


@every_address
def test_each_operation_is_described_once(operations):
    """An address that serves both APIs describes what they share once."""
    found = [item["operationId"] for _, _, item in operations_of(api_description("x", operations, KeyRule.NOBODY))]
    assert sorted(found) == sorted({operation.id for operation in operations})


def test_both_places_give_the_description_of_this_address(client):
    """OPTIONS / and GET /api-description say the same, and an unknown parameter spoils no OpenAPI document."""
    described = client("OPTIONS", "/").json()
    assert client.get("/api-description").json() == client.get("/api-description?nope=1").json() == described
    assert described["paths"] == DOCUMENT["paths"]


def test_the_description_is_made_once():
    """It is the same for each request to an address."""
    first = api_description_json("x", ops.MANAGEMENT, KeyRule.NOBODY)
    assert api_description_json("x", ops.MANAGEMENT, KeyRule.NOBODY) is first


def test_every_described_operation_is_served_and_no_other(client):
    """Each path answers the methods that are described, and 405 to the rest."""
    for path, methods in DOCUMENT["paths"].items():
        real = path.format(model_name="noop", model_version="1.0")
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
            served = client(method, real).status_code != 405
            assert served == (method.lower() in methods), (method, real)


@pytest.mark.parametrize(
    "code, method, path, described_path",
    [
        (200, "GET", "/models", "/models"),
        (200, "GET", "/models?limit=1", "/models"),
        (200, "GET", "/models?nope=1", "/models"),
        (400, "GET", "/models?limit=0", "/models"),
        (200, "GET", "/models/noop", "/models/{model_name}"),
        (200, "GET", "/models/noop?customized=1", "/models/{model_name}"),
        (200, "GET", "/models/noop/1.0", "/models/{model_name}/{model_version}"),
        (404, "GET", "/models/noop/7", "/models/{model_name}/{model_version}"),
        (200, "GET", "/models/noop/all", "/models/{model_name}/all"),
        (404, "GET", "/models/nope", "/models/{model_name}"),
        (400, "POST", "/models?uri=a", "/models"),
        (409, "POST", "/models?url=noop.mar&model_name=noop", "/models"),
        (200, "POST", "/models?url=a&model_name=b&synchronous=1&nope=1", "/models"),
        (202, "POST", "/models?url=a&model_name=b", "/models"),
        (200, "PUT", "/models/noop?synchronous=true", "/models/{model_name}"),
        (202, "PUT", "/models/noop", "/models/{model_name}"),
        (200, "PUT", "/models/noop/1.0/set-default", "/models/{model_name}/{model_version}/set-default"),
        (200, "DELETE", "/models/noop", "/models/{model_name}"),
        (200, "OPTIONS", "/", "/"),
        (200, "GET", "/api-description", "/api-description"),
    ],
)
def test_answers_are_exactly_as_described(serving, code, method, path, described_path):
    """Code, headers and body of an answer are among those described, and no key goes out that is not."""
    manager = KeepingManager(info_of("noop", workers=1), info_of("other"))
    response = serving(manager)(method, path)
    assert response.status_code == code
    check_response(response, described_path, method)


@pytest.mark.parametrize(
    "code, path, workers, state",
    [
        (200, "/ping", 1, None),
        (500, "/ping", 1, VersionState.FAILED),
        (200, "/live", 1, VersionState.FAILED),
        (200, "/ready", 1, None),
        (503, "/ready", 1, VersionState.FAILED),
        (200, "/api-description", 0, None),
    ],
)
def test_health_is_exactly_as_described(code, path, workers, state):
    """Also where nothing can be served, and the body is no error."""
    server = start_inference(KeepingManager(info_of("a", workers=workers, state=state)), loopback())
    try:
        response = requests.get(server.url + path, timeout=30)
    finally:
        server.close()
    assert response.status_code == code
    check_response(response, path, "GET", api_description("x", ops.INFERENCE, KeyRule.CALLERS_FROM_ELSEWHERE))


@pytest.mark.parametrize("name", ["management", "inference"])
def test_a_new_key_is_exactly_as_described(serving, tmp_path, monkeypatch, name):
    """Which of the two it is follows from what was asked for."""
    monkeypatch.chdir(tmp_path)  # for the key file
    monkeypatch.setenv("TORCHMGMT_API_KEY", "k" * 40)
    settings = Settings(disable_token_authorization=False)
    client = serving(KeepingManager(info_of("a")), settings=settings)
    response = client.get("/token", params={"type": name}, headers={"Authorization": "Bearer " + "k" * 40})
    assert list(response.json()) == [name]
    check_response(response, "/token", "GET")


@pytest.mark.parametrize(
    "code, error",
    [
        (400, errors.InvalidArchive("a.mar", "it is broken")),
        (400, errors.DownloadFailed("http://x", "it is gone")),
        (403, errors.DefaultVersionInUse("a", "1")),
        (404, errors.SourceNotAllowed("x", "y")),
        (500, RuntimeError("a defect")),
        (500, errors.WorkerStartFailed("a", "1", "why", "Traceback", ["last"])),
        (503, errors.NoWorker("a", "1", "scaled to 0")),
        (503, errors.QueueFull("a", 100, 1.2)),
        (507, errors.HandlerFailed("a", "1", "boom", out_of_memory=True)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_are_exactly_as_described(client, manager, code, error):
    """Each error's code, type, headers and body are described where it may occur."""
    manager.error = error
    response = client.post("/models?url=a.mar&synchronous=1&nope=1")
    assert response.status_code == code
    check_response(response, "/models", "POST")


@pytest.mark.parametrize(
    "code, method, path, more",
    [
        (401, "GET", "/models", {"headers": {"Host": "evil.example"}}),
        (403, "POST", "/models", {"headers": {"Origin": "http://evil.example"}}),
        (405, "POST", "/models", {}),
        (413, "PUT", "/models/{model_name}", {"data": b"x" * 101}),
        (413, "GET", "/models", {"data": b"x" * 100_000}),
        (431, "GET", "/models", {"headers": {"x": "y" * 300_000}}),
        (501, "GET", "/models", {"headers": {"Transfer-Encoding": "x"}}),
    ],
)
def test_refusals_are_exactly_as_described(serving, manager, code, method, path, more):
    """So are those of the guard, and those of the server that sees no parameter yet."""
    client = serving(manager, settings=Settings(max_request_size=100))
    response = client(method, path.format(model_name="noop"), **more)
    assert response.status_code == code
    check_response(response, path, method)


def test_every_code_of_the_table_is_described():
    """No error has a code or a type that the description leaves out, and each example is one."""
    document = api_description("x", ops.MANAGEMENT + ops.INFERENCE, KeyRule.CALLERS_FROM_ELSEWHERE)
    for code, type_name in (*TABLE.values(), *CALLERS_TABLE.values()):
        schema = document["components"]["schemas"][f"Error{code}"]
        assert type_name in schema["properties"]["type"]["enum"]
    assert set(document["components"]["responses"]) == {f"Error{code}" for code in ERRORS}


def test_every_example_is_as_described():
    """An example is what a client may copy."""
    schemas = [one for one in walk(DOCUMENT) if isinstance(one, dict) and "example" in one]
    assert len(schemas) > 40
    for schema in schemas:
        check({name: value for name, value in schema.items() if name != "example"}, schema["example"])


MINIMAL = info_of("a")
FULL = attrs.evolve(
    info_of("a", workers=2, state=VersionState.FAILED),
    last_error="x",
    customized_metadata={"a": 1},
    sharing=Sharing(True, "it may"),
)


def test_a_description_has_just_the_keys_that_are_described():
    """ModelInfo.to_dict and the schema cannot drift apart: the same keys, and required are those that never lack."""
    schemas = DOCUMENT["components"]["schemas"]
    assert list(schemas["ModelDescription"]["properties"]) == list(FULL.to_dict())
    assert schemas["ModelDescription"]["required"] == list(MINIMAL.to_dict())
    worker = FULL.to_dict()["workers"][0]
    assert schemas["Worker"]["required"] == list(schemas["Worker"]["properties"]) == list(worker)


@pytest.mark.parametrize(
    "info",
    [
        MINIMAL,
        FULL,
        *(info_of("a", workers=1, state=state) for state in VersionState),
        *(attrs.evolve(MINIMAL, spec=attrs.evolve(MINIMAL.spec, share_weights=way)) for way in ShareWeights),
        attrs.evolve(MINIMAL, spec=attrs.evolve(MINIMAL.spec, response_timeout_s=0.5)),
        *(attrs.evolve(FULL, workers=[attrs.evolve(FULL.workers[0], state=state, pid=None)]) for state in WorkerState),
    ],
)
def test_every_description_is_as_described(info):
    """Whatever state a version and its workers are in."""
    check_schema("ModelDescription", info.to_dict())


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"modelName": 1},
        {"minWorkers": "1"},
        {"minWorkers": -1},
        {"state": "ODD"},
        {"workers": [{"id": 1}]},
        {"weightsShared": "yes"},
        {"jobQueueStatus": {}},
    ],
)
def test_a_wrong_description_is_not_as_described(change):
    """What the tests above find right is not just anything."""
    with pytest.raises(ValidationError):
        check_schema("ModelDescription", {**FULL.to_dict(), **change})


def test_every_link_leads_to_an_operation_and_its_parameters():
    """A link names an operation of the same address and all parameters in its path."""
    described = {item["operationId"]: (path, item) for path, _, item in operations_of(DOCUMENT)}
    links = [
        link
        for _, item in described.values()
        for answer in item["responses"].values()
        for link in answer.get("links", {}).values()
    ]
    assert len(links) > 20
    for link in links:
        path, _ = described[link["operationId"]]
        assert set(link["parameters"]) == set(re.findall(r"{(\w+)}", path))


def test_what_may_stand_in_two_places_has_no_default_in_its_schema():
    """A client sends the defaults of a schema along: in the query, beside another value in the body, that is an error."""
    for _, _, item in operations_of(DOCUMENT):
        if "requestBody" in item:
            body = item["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            properties = DOCUMENT["components"]["schemas"][body]["properties"]
            in_query = {one["name"]: one["schema"] for one in item["parameters"] if one.get("in") == "query"}
            assert set(in_query) == set(properties)
            assert not any("default" in schema for schema in chain(in_query.values(), properties.values()))


@pytest.mark.parametrize(
    "setting, host, rule, security",
    [
        (True, "0.0.0.0", KeyRule.NOBODY, None),
        (None, "127.0.0.1", KeyRule.CALLERS_FROM_ELSEWHERE, [{}, {"managementKey": []}]),
        (None, "0.0.0.0", KeyRule.EVERYBODY, [{"managementKey": []}]),
        (False, "127.0.0.1", KeyRule.EVERYBODY, [{"managementKey": []}]),
    ],
)
def test_who_needs_a_key_is_described(setting, host, rule, security):
    """As the setting and the address say; the description itself needs none."""
    assert key_rule_of(Settings(disable_token_authorization=setting), Address("http", host, 8081)) is rule
    paths = api_description("x", ops.MANAGEMENT, rule)["paths"]
    assert paths["/models"]["get"].get("security") == security
    assert ("401" in paths["/models"]["get"]["responses"]) == (rule is not KeyRule.NOBODY)
    assert not paths["/api-description"]["get"].get("security")
    assert "401" not in paths["/api-description"]["get"]["responses"]
