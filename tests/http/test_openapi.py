"""The API description: valid, and true."""

from __future__ import annotations

import re
from typing import Any

import pytest

import torchmgmt
from tests.http.fakes import info_of
from torchmgmt.http import operations as ops
from torchmgmt.http.openapi import api_description

DESCRIPTIONS = [api_description("x", ops.MANAGEMENT), api_description("x", ops.INFERENCE)]


def walk(item: Any):
    yield item
    if isinstance(item, dict):
        for value in item.values():
            yield from walk(value)
    elif isinstance(item, list):
        for value in item:
            yield from walk(value)


def operations_of(described: dict) -> list[tuple[str, str, dict]]:
    return [(path, method, item) for path, methods in described["paths"].items() for method, item in methods.items()]


def check(schema: dict, item: Any, schemas: dict) -> None:
    """As much of JSON schema as our schemas use."""
    if "$ref" in schema:
        return check(schemas[schema["$ref"].rpartition("/")[2]], item, schemas)
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
    }
    if "type" in schema:
        assert isinstance(item, kinds[schema["type"]]), (schema, item)
        assert isinstance(item, bool) == (schema["type"] == "boolean")
    assert "enum" not in schema or item in schema["enum"]
    for name in schema.get("required", ()):
        assert name in item
    for name, inner in schema.get("properties", {}).items():
        if name in item:
            check(inner, item[name], schemas)
    for one in item if isinstance(item, list) else ():
        check(schema["items"], one, schemas)
    return None


@pytest.mark.parametrize("described", DESCRIPTIONS, ids=["management", "inference"])
def test_the_description_is_well_formed(described):
    """What OpenAPI 3.0 demands of structure holds."""
    assert re.fullmatch(r"3\.0\.\d", described["openapi"])
    assert described["info"] == {"title": "x", "version": torchmgmt.__version__}
    ids = [item["operationId"] for _, _, item in operations_of(described)]
    assert len(ids) == len(set(ids))
    for path, _, item in operations_of(described):
        in_path = [one["name"] for one in item["parameters"] if one["in"] == "path"]
        assert in_path == re.findall(r"{(\w+)}", path)
        assert all(one["required"] for one in item["parameters"] if one["in"] == "path")
        names = [(one["in"], one["name"]) for one in item["parameters"]]
        assert len(names) == len(set(names))
        assert item["responses"]
        assert all(answer["description"] for answer in item["responses"].values())


@pytest.mark.parametrize("described", DESCRIPTIONS, ids=["management", "inference"])
def test_every_reference_leads_somewhere_and_no_schema_is_idle(described):
    """References and schemas match."""
    references = {one["$ref"].rpartition("/")[2] for one in walk(described) if isinstance(one, dict) and "$ref" in one}
    assert references == set(described["components"]["schemas"])


def test_both_places_give_the_description_of_this_address(client):
    """OPTIONS / and GET /api-description say the same."""
    described = client("OPTIONS", "/").json()
    assert client.get("/api-description").json() == described
    assert described["paths"] == DESCRIPTIONS[0]["paths"]


def test_every_described_operation_is_served_and_no_other(client):
    """Each path answers the methods that are described, and 405 to the rest."""
    for path, methods in DESCRIPTIONS[0]["paths"].items():
        real = path.format(model_name="noop", model_version="1.0")
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
            served = client(method, real).status_code != 405
            assert served == (method.lower() in methods), (method, real)


@pytest.mark.parametrize(
    "method, path, described_path",
    [
        ("GET", "/models", "/models"),
        ("GET", "/models/noop", "/models/{model_name}"),
        ("GET", "/models/noop/all", "/models/{model_name}/all"),
        ("GET", "/models/nope", "/models/{model_name}"),
        ("POST", "/models", "/models"),
        ("POST", "/models?url=a&synchronous=1&nope=1", "/models"),
        ("PUT", "/models/noop", "/models/{model_name}"),
        ("PUT", "/models/noop/1.0/set-default", "/models/{model_name}/{model_version}/set-default"),
        ("DELETE", "/models/noop", "/models/{model_name}"),
    ],
)
def test_answers_are_as_described(client, method, path, described_path):
    """Code and body of an answer are among those described."""
    response = client(method, path)
    described = DESCRIPTIONS[0]["paths"][described_path][method.lower()]["responses"][str(response.status_code)]
    schema = described["content"]["application/json"]["schema"]
    check(schema, response.json(), DESCRIPTIONS[0]["components"]["schemas"])


def test_a_failed_version_is_as_described():
    """The optional parts of a description are described, too."""
    import attrs

    info = attrs.evolve(info_of("a", workers=2), last_error="x", customized_metadata={"a": 1})
    schemas = DESCRIPTIONS[0]["components"]["schemas"]
    check(schemas["ModelDescription"], info.to_dict(), schemas)
