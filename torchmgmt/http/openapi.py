"""The API description (OpenAPI 3.0) of an address, made from the operations that it serves.

3.0 and not 3.1, because more generators of clients read it, and nothing here needs 3.1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import lru_cache
from typing import Any

import torchmgmt
from torchmgmt.http.contract import needs_key
from torchmgmt.http.deadlines import LONGEST_MS
from torchmgmt.http.errors import to_json
from torchmgmt.http.middleware import NO_CACHE
from torchmgmt.http.operation import NAME, KeyName, Operation
from torchmgmt.http.parameters import Kind, Parameter
from torchmgmt.http.schemas import ERRORS, SCHEMAS, closure, error_name, ref
from torchmgmt.settings import Address, Settings

__all__ = ["KeyRule", "api_description", "api_description_json", "key_rule_of"]

PATH_PARAMETERS: Mapping[str, Parameter] = {
    "model_name": Parameter(
        "model_name", Kind.TEXT, "The model's name, percent-encoded.", forbidden=NAME, example="noop"
    ),
    "model_version": Parameter(
        "model_version", Kind.TEXT, "The version's name, percent-encoded.", forbidden=NAME, example="1.0"
    ),
}
CONVENTIONS = (
    "Parameters stand in the query string; those of POST and PUT may come as a JSON object or a form instead. An empty"
    " value means not given, a truth value is true, false, 1 or 0 in any case, and a parameter that is not known does not"
    " fail the call but is named in `warnings`. Every response has `x-request-id`."
)
WITHOUT_MODEL_API = "Answered with 405 unless the model API is on: `--enable-model-api`, or enable_model_api=true."

# What the server may answer to any request, and what to one that changes something.
EVERYWHERE = (400, 413, 431, 500, 501, 503)
CHANGING_METHODS = frozenset({"POST", "PUT", "DELETE"})
SUCCESS = {200: "Done.", 202: "Accepted; workers are on their way."}


class KeyRule(Enum):
    """Who must send a key with a request."""

    NOBODY = "nobody"
    CALLERS_FROM_ELSEWHERE = "callers from elsewhere"
    EVERYBODY = "everybody"


def key_rule_of(settings: Settings, address: Address) -> KeyRule:
    """Return who must send a key with what is asked of ``address``."""
    if needs_key(settings, address):
        return KeyRule.EVERYBODY
    return KeyRule.NOBODY if settings.disable_token_authorization else KeyRule.CALLERS_FROM_ELSEWHERE


@lru_cache(maxsize=16)
def api_description_json(title: str, operations: tuple[Operation, ...], keys: KeyRule) -> bytes:
    """Return :func:`api_description` as it is sent. Made once for each address; any thread may call it."""
    return to_json(api_description(title, operations, keys))


def api_description(title: str, operations: Iterable[Operation], keys: KeyRule) -> dict[str, Any]:
    """Return the description of an address that serves ``operations``, as a JSON-able object.

    An operation that comes twice, because the address serves two APIs, is described once.
    """
    served = list(dict.fromkeys(operations))
    paths: dict[str, dict[str, Any]] = {}
    for operation in served:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, keys)
    return {
        "openapi": "3.0.3",
        "info": {
            "title": title,
            "version": torchmgmt.__version__,
            "description": CONVENTIONS,
            "license": {"name": "Apache-2.0"},
        },
        "tags": [{"name": tag} for tag in dict.fromkeys(operation.tag for operation in served)],
        "paths": paths,
        "components": _components(served, keys),
    }


# --- operations ---------------------------------------------------------------------------------------------------------


def _operation(operation: Operation, keys: KeyRule) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.id,
        "summary": operation.summary,
        "tags": [operation.tag],
        "parameters": [*_path_parameters(operation), *_query_parameters(operation), _REQUEST_ID_PARAMETER],
        "responses": _responses(operation, keys),
    }
    if operation.needs_model_api:
        described["description"] = WITHOUT_MODEL_API
    if operation.takes_body:
        described["requestBody"] = _request_body(operation)
    if operation.is_prediction:
        described["parameters"] += [_PRIORITY, _TIMEOUT]
        if operation.method != "GET":
            described["requestBody"] = _ANY_BODY
    if keys is not KeyRule.NOBODY:
        described["security"] = _security(operation, keys)
    return described


def _path_parameters(operation: Operation) -> list[dict[str, Any]]:
    names = re.findall(r"{(\w+)}", operation.path)
    return [_parameter(PATH_PARAMETERS[name], "path", required=True) for name in names]


def _query_parameters(operation: Operation) -> list[dict[str, Any]]:
    if not operation.takes_body:
        return [_parameter(parameter, "query", required=parameter.required) for parameter in operation.parameters]
    # What may stand in the body instead is not required in the query.
    return [_parameter(parameter, "query", required=False) | _shared(parameter) for parameter in operation.parameters]


def _parameter(parameter: Parameter, place: str, *, required: bool) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "in": place,
        "required": required,
        "description": parameter.description,
        "schema": parameter.schema,
    }


def _shared(parameter: Parameter) -> dict[str, Any]:
    """Return the description and schema of a parameter that may stand in the query or in the body.

    A default is in words only: clients send the defaults of a schema along, in the one place beside another value in the
    other, and would so contradict themselves.
    """
    schema = parameter.schema
    default = schema.pop("default", None)
    said = f" Default: {json.dumps(default)}." if default is not None else ""
    required = " Required, in the query or in the body." if parameter.required else ""
    return {"description": parameter.description + said + required, "schema": schema}


def _request_body(operation: Operation) -> dict[str, Any]:
    content = {"schema": ref(_body_name(operation))}
    return {
        "required": False,
        "description": "The parameters may come here instead of in the query string. One that is in both, with"
        " different values, is an error.",
        "content": {"application/json": content, "application/x-www-form-urlencoded": content},
    }


def _body_name(operation: Operation) -> str:
    return f"{operation.id[0].upper()}{operation.id[1:]}Parameters"


def _body_schema(operation: Operation) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {parameter.name: _property(parameter) for parameter in operation.parameters},
        "additionalProperties": True,  # one that is not known is a warning
    }


def _property(parameter: Parameter) -> dict[str, Any]:
    shared = _shared(parameter)
    return {**shared["schema"], "description": shared["description"]}


def _security(operation: Operation, keys: KeyRule) -> list[dict[str, list[str]]]:
    if operation.key is None:
        return []
    needed: dict[str, list[str]] = {_scheme_name(operation.key): []}
    return [needed] if keys is KeyRule.EVERYBODY else [{}, needed]


def _scheme_name(key: KeyName) -> str:
    return f"{key.value}Key"


# --- responses ----------------------------------------------------------------------------------------------------------


def _responses(operation: Operation, keys: KeyRule) -> dict[str, Any]:
    errors = _error_codes(operation, keys)
    responses = {code: _answer(operation, code, code in errors) for code in operation.answers}
    responses.update({code: {"$ref": f"#/components/responses/{error_name(code)}"} for code in errors - set(responses)})
    described = {str(code): responses[code] for code in sorted(responses)}
    if operation.is_prediction:
        described["default"] = _OF_THE_HANDLER
    return described


def _error_codes(operation: Operation, keys: KeyRule) -> set[int]:
    codes = {*EVERYWHERE, *operation.errors}
    if operation.key is not None and keys is not KeyRule.NOBODY:
        codes.add(401)
    if operation.method in CHANGING_METHODS:
        codes.add(403)
    return codes


def _answer(operation: Operation, code: int, is_error_too: bool) -> dict[str, Any]:
    schema: dict[str, Any] = ref(operation.answers[code])
    if is_error_too:
        schema = {"anyOf": [schema, ref(error_name(code))]}
    description = SUCCESS.get(code) or f"Not what was asked about; or: {ERRORS[code].meaning}"
    answer = _response(code, description, schema)
    if code < 300 and operation.links:
        answer["links"] = {
            link.operation_id: {"operationId": link.operation_id, "parameters": dict(link.parameters)}
            for link in operation.links
        }
    return answer


def _response(code: int, description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    names = [*_HEADERS_OF_ALL, *_HEADERS_OF.get(code, ())]
    return {
        "description": description,
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names},
        "content": {"application/json": {"schema": dict(schema)}},
    }


# --- components ---------------------------------------------------------------------------------------------------------


def _components(operations: list[Operation], keys: KeyRule) -> dict[str, Any]:
    codes = sorted(set().union(*(_error_codes(operation, keys) for operation in operations)))
    bodies = {name for operation in operations for name in operation.answers.values()}
    sent = closure({*bodies, *map(error_name, codes)})
    schemes = {operation.key for operation in operations if operation.key is not None}
    described: dict[str, Any] = {
        "schemas": {
            **{name: schema for name, schema in SCHEMAS.items() if name in sent},
            **{_body_name(operation): _body_schema(operation) for operation in operations if operation.takes_body},
        },
        "responses": {error_name(code): _response(code, ERRORS[code].meaning, ref(error_name(code))) for code in codes},
        "parameters": {"x-request-id": _REQUEST_ID},
        "headers": _headers(codes),
    }
    if schemes and keys is not KeyRule.NOBODY:
        described["securitySchemes"] = {_scheme_name(key): _scheme(key) for key in KeyName if key in schemes}
    return described


def _scheme(key: KeyName) -> dict[str, str]:
    return {
        "type": "http",
        "scheme": "bearer",
        "description": f"The {key.value} key: the one that the server wrote to key_file.json, or a fixed one.",
    }


def _headers(codes: Iterable[int]) -> dict[str, Any]:
    names = {*_HEADERS_OF_ALL, *(name for code in codes for name in _HEADERS_OF.get(code, ()))}
    return {name: header for name, header in _HEADERS.items() if name in names}


def _header(description: str, schema: Mapping[str, Any], *, required: bool = True) -> dict[str, Any]:
    return {"description": description, "required": required, "schema": dict(schema)}


_REQUEST_ID = {
    "name": "x-request-id",
    "in": "header",
    "required": False,
    "description": "An id for the request, up to 128 printable ASCII characters without a space; sent back, and in the log."
    " If there is none, or a longer one, the server makes one.",
    "schema": {"type": "string"},
}
_PRIORITY = {
    "name": "x-priority",
    "in": "header",
    "required": False,
    "description": "What has more goes before what has less; what waits gains priority with time.",
    "schema": {"type": "integer", "minimum": -10, "maximum": 10, "default": 0},
}
_TIMEOUT = {
    "name": "x-request-timeout-ms",
    "in": "header",
    "required": False,
    "description": "For how long the caller waits, in milliseconds; a request past that is not begun, and answered with 504.",
    "schema": {"type": "integer", "format": "int32", "minimum": 1, "maximum": LONGEST_MS, "example": 5000},
}
_ANY_BODY = {
    "required": False,
    "description": "What the model's handler takes.",
    "content": {
        "application/json": {"schema": {}},
        "text/plain": {"schema": {"type": "string"}},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
}
_OF_THE_HANDLER = {
    "description": "What the model's handler answered: its status, headers and content type, in one body or in parts; with"
    " `Accept: text/event-stream` as server-sent events.",
    "content": {"*/*": {"schema": {}}},
}
_REQUEST_ID_PARAMETER = {"$ref": "#/components/parameters/x-request-id"}
_HEADERS: Mapping[str, Any] = {
    "x-request-id": _header(
        "The id of the request.", {"type": "string", "pattern": "^[\\x21-\\x7e]{1,128}$", "example": "4f1c"}
    ),
    **{name: _header("Nothing is cached.", {"type": "string", "enum": [value]}) for name, value in NO_CACHE.items()},
    "Allow": _header("The methods that are served here.", {"type": "string", "example": "GET, OPTIONS"}),
    "WWW-Authenticate": _header("How to send a key.", {"type": "string", "example": 'Bearer realm="torchmgmt"'}),
    "Retry-After": _header(
        "After how many seconds to try again; only if that is known.",
        {"type": "integer", "minimum": 1, "example": 5},
        required=False,
    ),
}
_HEADERS_OF_ALL = ("x-request-id", *NO_CACHE)
_HEADERS_OF: Mapping[int, tuple[str, ...]] = {
    401: ("WWW-Authenticate",),
    405: ("Allow",),
    503: ("Retry-After",),
}
