"""The API description (OpenAPI 3.0) of an address, made from the operations that it serves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torchmgmt
from torchmgmt.http.operations import Operation

__all__ = ["api_description"]

PATH_PARAMETERS: Mapping[str, str] = {
    "model_name": "The model's name, percent-encoded.",
    "model_version": "The version's name, percent-encoded.",
}

# Every operation can be refused for its parameters or its caller, or hit a defect.
COMMON_ERRORS: Mapping[int, str] = {
    400: "A parameter is missing or wrong.",
    401: "The caller is not on this machine, and carries no key.",
    403: "A page of another origin may not do this.",
    404: "There is no such model, version or path.",
    405: "The method is not served here, or the model API is switched off.",
    409: "The version is registered already.",
    413: "The body is larger than max_request_size.",
    500: "It failed; the message says why.",
    503: "No worker may serve this, or too much is going on; try again later.",
    507: "A worker ran out of memory.",
}
EVERYWHERE = (400, 500)
GUARDED = (401,)
CHANGING = (403,)


def api_description(title: str, operations: Iterable[Operation]) -> dict[str, Any]:
    """Return the description of an address that serves ``operations``, as a JSON-able object."""
    paths: dict[str, dict[str, Any]] = {}
    schemas: set[str] = {"Error"}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
        schemas.update(operation.answers.values())
    return {
        "openapi": "3.0.3",
        "info": {"title": title, "version": torchmgmt.__version__},
        "paths": paths,
        "components": {"schemas": {name: SCHEMAS[name] for name in SCHEMAS if name in _closure(schemas)}},
    }


def _operation(operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.id,
        "summary": operation.summary,
        "parameters": [*_path_parameters(operation), *_query_parameters(operation)],
        "responses": {
            **{str(code): _response(_TITLES.get(code, "Done."), name) for code, name in operation.answers.items()},
            **{str(code): _response(COMMON_ERRORS[code], "Error") for code in _error_codes(operation)},
        },
    }
    if operation.takes_body:
        described["requestBody"] = _request_body(operation)
    return described


def _path_parameters(operation: Operation) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "in": "path",
            "required": True,
            "description": PATH_PARAMETERS[name],
            "schema": {"type": "string"},
        }
        for name in _path_names(operation)
    ]


def _query_parameters(operation: Operation) -> list[dict[str, Any]]:
    return [
        {
            "name": parameter.name,
            "in": "query",
            # What may stand in the body instead is not required in the query.
            "required": parameter.required and not operation.takes_body,
            "description": parameter.help + (" Required, here or in the body." if parameter.required else ""),
            "schema": parameter.schema,
        }
        for parameter in operation.parameters
    ]


def _path_names(operation: Operation) -> list[str]:
    return re.findall(r"{(\w+)}", operation.path)


def _request_body(operation: Operation) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {
            parameter.name: {**parameter.schema, "description": parameter.help} for parameter in operation.parameters
        },
    }
    return {
        "required": False,
        "description": "The parameters may come here instead of in the query string.",
        "content": {
            "application/json": {"schema": schema},
            "application/x-www-form-urlencoded": {"schema": schema},
        },
    }


def _error_codes(operation: Operation) -> list[int]:
    codes = {*EVERYWHERE, *operation.errors} - set(operation.answers)
    if operation.path.startswith("/models"):
        codes.update(GUARDED)
    if operation.method in {"POST", "PUT", "DELETE"}:
        codes.update(CHANGING)
    return sorted(codes)


_TITLES = {202: "Accepted; workers are on their way.", 500: "Nothing can be served."}


def _response(description: str, schema: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _ref(schema)}}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(properties: Mapping[str, Any], *optional: str) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "required": required, "properties": dict(properties)}


_TEXT = {"type": "string"}
_WHOLE = {"type": "integer"}
_NUMBER = {"type": "number"}
_TRUTH = {"type": "boolean"}
_WARNINGS = {"type": "array", "items": _TEXT, "description": "About parameters that are not known."}

SCHEMAS: Mapping[str, dict[str, Any]] = {
    "Error": _object({"code": _WHOLE, "type": _TEXT, "message": _TEXT, "warnings": _WARNINGS}, "warnings"),
    "Status": _object({"status": _TEXT, "warnings": _WARNINGS}, "warnings"),
    "Health": _object({"status": {"type": "string", "enum": ["Healthy", "Partial Healthy", "Unhealthy"]}}),
    "ApiDescription": {"type": "object"},
    "ModelList": _object(
        {
            "nextPageToken": {"type": "string", "description": "Absent on the last page."},
            "models": {"type": "array", "items": _ref("ModelListItem")},
            "warnings": _WARNINGS,
        },
        "nextPageToken",
        "warnings",
    ),
    "ModelListItem": _object(
        {
            "modelName": _TEXT,
            "modelUrl": _TEXT,
            "state": {"type": "string", "enum": ["FAILED"], "description": "Only if it failed."},
            "lastError": {"type": "string", "description": "Why it failed; only then."},
        },
        "state",
        "lastError",
    ),
    "ModelDescriptions": {"type": "array", "items": _ref("ModelDescription")},
    "ModelDescription": _object(
        {
            "modelName": _TEXT,
            "modelVersion": _TEXT,
            "modelUrl": _TEXT,
            "engine": _TEXT,
            "runtime": _TEXT,
            "minWorkers": _WHOLE,
            "maxWorkers": _WHOLE,
            "batchSize": _WHOLE,
            "maxBatchDelay": {**_WHOLE, "description": "Milliseconds."},
            "responseTimeout": {**_NUMBER, "description": "Seconds."},
            "startupTimeout": {**_NUMBER, "description": "Seconds."},
            "maxRetryTimeoutInSec": _NUMBER,
            "deviceType": _TEXT,
            "loadedAtStartup": _TRUTH,
            "workers": {"type": "array", "items": _ref("Worker")},
            "jobQueueStatus": _object({"remainingCapacity": _WHOLE, "pendingRequests": _WHOLE}),
            "state": {
                "type": "string",
                "enum": ["REGISTERED", "LOADING", "READY", "FAILED", "RETIRING", "GONE"],
            },
            "defaultVersion": _TRUTH,
            "lastError": {
                "type": "string",
                "description": "Why a worker failed last, with its last lines.",
            },
            "customizedMetadata": {"description": "What describe_handle returned."},
        },
        "lastError",
        "customizedMetadata",
    ),
    "Worker": _object(
        {
            "id": _TEXT,
            "startTime": {"type": "string", "format": "date-time"},
            "status": {"type": "string", "enum": ["READY", "LOADING", "UNLOADING"]},
            "memoryUsage": {**_WHOLE, "description": "Bytes."},
            "pid": _WHOLE,
            "gpu": _TRUTH,
            "gpuUsage": _TEXT,
        }
    ),
}


def _closure(names: set[str]) -> set[str]:
    """Return ``names`` and every schema that they refer to."""
    found: set[str] = set()
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= set(re.findall(r"#/components/schemas/(\w+)", repr(SCHEMAS[name]))) - found
    return found
