"""The API description: valid, and true."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
from openapi_schema_validator import OAS30ReadValidator
from openapi_spec_validator import OpenAPIV30SpecValidator

import torchmgmt
from tests.http.fakes import info_of
from torchmgmt.http import operations as ops
from torchmgmt.http.openapi import KeyRule, api_description, api_description_json
from torchmgmt.http.schemas import SCHEMAS

MANAGEMENT = api_description("x", ops.MANAGEMENT, KeyRule.CALLERS_FROM_ELSEWHERE)
DESCRIPTIONS = {
    "management": MANAGEMENT,
    "management, keys": api_description("x", ops.MANAGEMENT, KeyRule.EVERYBODY),
    "inference": api_description("x", ops.INFERENCE, KeyRule.NOBODY),
    "one address": api_description("x", (*ops.MANAGEMENT, *ops.INFERENCE), KeyRule.CALLERS_FROM_ELSEWHERE),
}
every_description = pytest.mark.parametrize("described", DESCRIPTIONS.values(), ids=DESCRIPTIONS)


def walk(item: Any) -> Iterator[Any]:
    yield item
    for value in item.values() if isinstance(item, dict) else item if isinstance(item, list) else ():
        yield from walk(value)


def closed(schema: Any) -> Any:
    """The schema without the room that it leaves for keys of later releases."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    is_object = schema.get("additionalProperties") is True and "properties" in schema
    return {
        name: closed(value)
        for name, value in {**schema, **({"additionalProperties": False} if is_object else {})}.items()
    }


def errors_of(name: str, item: Any, described: dict[str, Any] = MANAGEMENT) -> list[str]:
    """What is wrong with a body that goes out under the schema ``name``; a key that is not described is."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": closed(described["components"])}
    return [error.message for error in OAS30ReadValidator(schema).iter_errors(item)]


@every_description
def test_the_description_is_valid(described):
    """It is what the specification of OpenAPI 3.0 demands."""
    assert [error.message for error in OpenAPIV30SpecValidator(described).iter_errors()] == []
    assert described["info"]["version"] == torchmgmt.__version__


@every_description
def test_operations_have_ids_of_their_own(described):
    """Generated clients name their methods by them."""
    ids = [item["operationId"] for methods in described["paths"].values() for item in methods.values()]
    assert len(ids) == len(set(ids))


@every_description
def test_every_reference_leads_somewhere_and_no_component_is_idle(described):
    """References and components match."""
    references = {one["$ref"] for one in walk(described) if isinstance(one, dict) and "$ref" in one}
    components = {f"#/components/{kind}/{name}" for kind, found in described["components"].items() for name in found}
    components = {one for one in components if not one.startswith("#/components/securitySchemes/")}
    assert references == components


@every_description
def test_examples_are_as_described(described):
    """Whoever copies one gets no error."""
    validated = OAS30ReadValidator({"components": described["components"]})
    for one in walk(described):
        if isinstance(one, dict) and "example" in one and "type" in one:
            assert (
                list(
                    validated.evolve(schema={**one, "components": described["components"]}).iter_errors(one["example"])
                )
                == []
            )


def test_both_places_give_the_description_of_this_address(client):
    """OPTIONS / and GET /api-description say the same."""
    described = client("OPTIONS", "/").json()
    assert client.get("/api-description").json() == described
    assert described["paths"] == MANAGEMENT["paths"]


def test_it_is_made_once_for_each_address():
    """Making it takes milliseconds, so who asks often gets the same bytes."""
    first = api_description_json("x", ops.MANAGEMENT, KeyRule.NOBODY)
    assert api_description_json("x", ops.MANAGEMENT, KeyRule.NOBODY) is first
    assert json.loads(first) == api_description("x", ops.MANAGEMENT, KeyRule.NOBODY)


def test_every_described_operation_is_served_and_no_other(client):
    """Each path answers the methods that are described, and 405 to the rest."""
    for path, methods in MANAGEMENT["paths"].items():
        real = path.format(model_name="noop", model_version="1.0")
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
            served = client(method, real).status_code != 405
            assert served == (method.lower() in methods), (method, real)


@pytest.mark.parametrize(
    "method, path, described_path",
    [
        ("GET", "/models", "/models"),
        ("GET", "/models?limit=1", "/models"),
        ("GET", "/models/noop", "/models/{model_name}"),
        ("GET", "/models/noop/all", "/models/{model_name}/all"),
        ("GET", "/models/nope", "/models/{model_name}"),
        ("POST", "/models", "/models"),
        ("POST", "/models?url=a&synchronous=1&nope=1", "/models"),
        ("PUT", "/models/noop", "/models/{model_name}"),
        ("PUT", "/models/noop/1.0/set-default", "/models/{model_name}/{model_version}/set-default"),
        ("DELETE", "/models/noop", "/models/{model_name}"),
        ("GET", "/token?type=API", "/token"),
        ("GET", "/api-description", "/api-description"),
        ("OPTIONS", "/", "/"),
    ],
)
def test_answers_are_as_described(client, method, path, described_path):
    """Code, headers and body of an answer are among those described."""
    response = client(method, path)
    answer = MANAGEMENT["paths"][described_path][method.lower()]["responses"][str(response.status_code)]
    if "$ref" in answer:
        answer = MANAGEMENT["components"]["responses"][answer["$ref"].rpartition("/")[2]]
    schema = answer["content"]["application/json"]["schema"]
    name = (schema if "$ref" in schema else schema["anyOf"][0])["$ref"].rpartition("/")[2]
    assert errors_of(name, response.json()) == []
    assert all(header in response.headers for header in answer["headers"] if header != "Retry-After")


def test_a_failed_version_is_as_described():
    """The optional parts of a description are described, too."""
    info = attrs.evolve(info_of("a", workers=2), last_error="x", customized_metadata={"a": 1})
    assert errors_of("ModelDescriptions", [info.to_dict()]) == []


def test_a_key_that_is_not_described_is_seen_here():
    """What these tests hold bodies against leaves no room for keys that nobody has described."""
    assert errors_of("ModelDescriptions", [{**info_of("a").to_dict(), "novel": 1}])


@pytest.mark.parametrize("name", SCHEMAS)
def test_clients_may_meet_new_keys(name):
    """No schema of a body forbids keys that a later release may bring."""
    assert SCHEMAS[name].get("additionalProperties") is not False
    assert re.fullmatch(r"[A-Za-z0-9]+", name)
