"""What CONTRACT.md says and OpenAPI cannot: taken into account where schemathesis, in its own process, looks at the API.

Written against the served document and the contract's rules, not against the code that reads parameters: that code is what
is being tested.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import schemathesis
from openapi_schema_validator import OAS30ReadValidator
from schemathesis.core.failures import AcceptedNegativeData
from schemathesis.core.parameters import ParameterLocation
from schemathesis.openapi.checks import RejectedPositiveData

Declared = Mapping[str, Mapping[str, Any]]
EXAMPLE_NAME = "noop"
TRUTHS = {"true": True, "1": True, "false": False, "0": False}


@schemathesis.hook
def before_call(context, case, kwargs) -> None:
    """Say each parameter in one place, and the one that is required in one place or the other in one of them.

    In both with different values it is an error, which would hide what the case is about.
    """
    body = case.body if isinstance(case.body, dict) else {}
    if case.operation.path == "/models" and case.operation.method == "post":
        if "url" not in {**case.query, **body}:
            case.query["url"] = "noop.mar"
        for place in (case.query, body):
            if place.get("model_name") == EXAMPLE_NAME:  # every second registration of one name would be a conflict
                place["model_name"] = case.id
    if body and is_negative_at(case, ParameterLocation.BODY):
        case.query = {name: value for name, value in case.query.items() if name not in body}
    elif body:
        case.body = {name: value for name, value in body.items() if name not in case.query}


@schemathesis.hook
def filter_failure(context, failure, case, response) -> bool:
    """Drop a failure where the contract says so, and only there; keep every other one."""
    if is_prediction(case):
        return not (isinstance(failure, AcceptedNegativeData) and is_prediction_legal(case, response.request))
    if isinstance(failure, AcceptedNegativeData):
        return not reads_as_valid(case, response.request)
    if isinstance(failure, RejectedPositiveData):
        return not (response.status_code == 400 and contradicts_itself(case, response.request))
    return True


def is_prediction(case) -> bool:
    """Whether a handler decides what a body may be, and what is answered."""
    document = case.operation.schema.raw_schema
    return "default" in document["paths"][case.operation.path][case.operation.method]["responses"]


def is_prediction_legal(case, request) -> bool:
    """Whether what was made wrong on purpose is none of the server's business: the body, and what nobody declared."""
    if is_negative_at(case, ParameterLocation.PATH):
        return False
    document = case.operation.schema.raw_schema
    described = document["paths"][case.operation.path][case.operation.method]["parameters"]
    headers = {one["name"]: one["schema"] for one in described if one.get("in") == "header"}
    return all(is_legal(schema, request.headers.get(name)) for name, schema in headers.items())


def is_negative_at(case, location) -> bool:
    """Whether something wrong was put there on purpose."""
    component = case.meta.components.get(location) if case.meta is not None else None
    return component is not None and component.mode.is_negative


def reads_as_valid(case, request) -> bool:
    """Whether all that was sent is legal once it is read as the contract reads it.

    An empty value (and JSON's null) means not given; a truth value is true, false, 1 or 0 in any case; what a form sends as
    text, a JSON body may send as text, too; a parameter that is not known does not fail the call.
    """
    if is_negative_at(case, ParameterLocation.PATH):
        return False
    declared, sent = declared_parameters(case), sent_parameters(request)
    return sent is not None and all(is_legal(declared[name], value) for name, value in sent if name in declared)


def contradicts_itself(case, request) -> bool:
    """Whether a parameter says something else than another one, or than itself elsewhere."""
    declared, sent = declared_parameters(case), sent_parameters(request)
    if sent is None:
        return False
    given: dict[str, Any] = {}
    for name, raw in sent:
        if name in declared and raw not in ("", None):
            value = as_read(declared[name], raw)
            if given.setdefault(name, value) != value:
                return True
    in_path = unquote(urlsplit(request.url).path).split("/")[3:4]
    in_query = given.get("model_version")
    low = given.get("min_worker", 1)
    return given.get("max_worker", low) < low or bool(in_path and in_query and [in_query] != in_path)


def declared_parameters(case) -> Declared:
    """The schemas of the parameters, by name, as the served document has them."""
    document = case.operation.schema.raw_schema
    described = document["paths"][case.operation.path][case.operation.method]
    return {one["name"]: one["schema"] for one in described["parameters"] if one.get("in") == "query"}


def sent_parameters(request) -> list[tuple[str, Any]] | None:
    """The parameters in the query and in the body; None if the body cannot be read."""
    sent: list[tuple[str, Any]] = parse_qsl(urlsplit(request.url).query, keep_blank_values=True)
    body = request.body or b""
    text = body.decode() if isinstance(body, bytes) else body
    if not text.strip():
        return sent
    if request.headers.get("Content-Type", "").startswith("application/x-www-form-urlencoded"):
        return sent + parse_qsl(text, keep_blank_values=True)
    item = json.loads(text)
    return sent + list(item.items()) if isinstance(item, dict) else None


def is_legal(schema: Mapping[str, Any], raw: Any) -> bool:
    return raw in ("", None) or OAS30ReadValidator(schema).is_valid(as_read(schema, raw))


def as_read(schema: Mapping[str, Any], raw: Any) -> Any:
    """The value that the contract has `raw` stand for; itself if it stands for none."""
    if schema["type"] == "boolean":
        return TRUTHS.get(str(raw).lower(), raw) if isinstance(raw, (str, int)) else raw
    if schema["type"] == "integer" and isinstance(raw, str) and re.fullmatch(r" *[+-]?[0-9]{1,19} *", raw):
        return int(raw)
    if "enum" in schema and isinstance(raw, str):
        return next((value for value in schema["enum"] if value.lower() == raw.strip(" ").lower()), raw)
    return raw
