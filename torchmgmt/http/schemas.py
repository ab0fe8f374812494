"""The schemas of all bodies that are sent, as components of an OpenAPI 3.0 document.

An object may get more keys in a later release, but loses none, so each says ``additionalProperties: true``: a client made
from the description must not stumble over a new key. The tests hold the bodies against these schemas with that turned to
false, so that no key goes out that is not described here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torchmgmt import VersionState
from torchmgmt.http.errors import CALLERS_TABLE, METHOD_NOT_ALLOWED, TABLE, TYPES_BY_CODE, answer_for_code
from torchmgmt.records import WIRE_STATUS, ShareWeights

__all__ = ["ERRORS", "SCHEMAS", "ErrorCode", "closure", "error_name", "ref"]

Schema = dict[str, Any]


class ErrorCode(NamedTuple):
    """What a code means, and an example of its type and message."""

    meaning: str
    type: str
    message: str


ERRORS: Mapping[int, ErrorCode] = {
    400: ErrorCode(
        "A parameter is missing or wrong, or the request or the archive cannot be read.",
        "BadRequestException",
        "Parameter url is required.",
    ),
    401: ErrorCode(
        "A key is required, and the request carries none or a wrong one.",
        "InvalidKeyException",
        "This request does not count as coming from this machine: it carries Forwarded",
    ),
    403: ErrorCode(
        "The version is the default one while others exist, or the call comes from a page of another origin.",
        "InvalidModelVersionException",
        "Cannot remove default version for model noop",
    ),
    404: ErrorCode(
        "There is no such model, version, archive or path.", "ModelNotFoundException", "Model not found: noop"
    ),
    405: ErrorCode(
        "The method is not served here, or the model API is switched off.",
        "MethodNotAllowedException",
        METHOD_NOT_ALLOWED,
    ),
    409: ErrorCode(
        "The version is registered already.",
        "ConflictStatusException",
        "Model version 1.0 is already registered for model noop",
    ),
    413: ErrorCode(
        "The body is larger than max_request_size.",
        "RequestEntityTooLargeException",
        "The request's body is larger than the 6553500 bytes that the setting max_request_size allows",
    ),
    415: ErrorCode(
        "The body is compressed.",
        "UnsupportedMediaTypeException",
        "Content-Encoding is 'gzip', but bodies must come uncompressed here",
    ),
    431: ErrorCode("The request's headers are too large.", "BadRequestException", "exceeds max_header of 262144"),
    500: ErrorCode(
        "It failed; the message says why.",
        "InternalServerException",
        "Failed to start workers for model noop version: 1.0",
    ),
    501: ErrorCode(
        "The request uses a part of HTTP that is not served.",
        "NotImplementedException",
        "Transfer-Encoding requested is not supported.",
    ),
    503: ErrorCode(
        "No worker may serve this, or too much is going on; try again later.",
        "ServiceUnavailableException",
        "40 calls that wait for models or workers are running already; try again in 5 s",
    ),
    504: ErrorCode(
        "There was no answer in the time that the caller gave it (X-Request-Timeout-Ms), or the model's configuration does.",
        "RequestTimeoutException",
        "The request did not end within 2 s",
    ),
    507: ErrorCode("A worker ran out of memory.", "InternalServerException", "A worker of noop:1.0 ran out of memory"),
}

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer", "format": "int32", "minimum": 0}
BYTES: Schema = {"type": "integer", "format": "int64", "minimum": 0, "description": "Bytes."}
SECONDS: Schema = {"type": "number", "minimum": 0, "description": "Seconds."}
MILLISECONDS: Schema = {**WHOLE, "description": "Milliseconds."}
TRUTH: Schema = {"type": "boolean"}
WARNINGS: Schema = {
    "type": "array",
    "items": TEXT,
    "minItems": 1,
    "description": "About parameters of the request that are not known; absent if there are none.",
}


def ref(name: str) -> dict[str, str]:
    """Return a reference to the schema ``name``."""
    return {"$ref": f"#/components/schemas/{name}"}


def closure(names: Iterable[str]) -> set[str]:
    """Return ``names`` and every schema that they refer to."""
    found: set[str] = set()
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        waiting |= set(re.findall(r"#/components/schemas/(\w+)", repr(SCHEMAS[name]))) - found
    return found


def error_name(code: int) -> str:
    """Return the name of the schema, and of the response, of errors of ``code``."""
    return f"Error{code}"


def _object(properties: Mapping[str, Any], *optional: str, **more: Any) -> Schema:
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        **({"required": required} if required else {}),  # OpenAPI 3.0 allows no empty list
        "properties": dict(properties),
        "additionalProperties": True,
        **more,
    }


def _one_of(values: Iterable[str], **more: Any) -> Schema:
    return {"type": "string", "enum": sorted(set(values)), **more}


def _array(items: Mapping[str, Any]) -> Schema:
    return {"type": "array", "items": dict(items)}


def _map_of(items: Mapping[str, Any]) -> Schema:
    return {"type": "object", "additionalProperties": dict(items)}


def _types_of(code: int) -> set[str]:
    """Return the types that errors of ``code`` may have: those of the tables that answer them."""
    rows = (*TABLE.values(), *CALLERS_TABLE.values())
    types = {of_row for of_code, of_row in rows if of_code == code}
    if code in TYPES_BY_CODE or not types:
        types.add(answer_for_code(code, "").type)
    return types


def _error(code: int, error: ErrorCode) -> Schema:
    return _object(
        {
            "code": {"type": "integer", "enum": [code]},
            "type": _one_of(_types_of(code)),
            "message": TEXT,
            "error": {**TEXT, "description": "The message, for clients of KServe's protocols; on their paths only."},
            "warnings": WARNINGS,
        },
        "error",
        "warnings",
        description=error.meaning,
        example={"code": code, "type": error.type, "message": error.message},
    )


WORKER = _object(
    {
        "id": TEXT,
        "startTime": {"type": "string", "format": "date-time", "description": "When it was wanted, in UTC."},
        "status": _one_of(WIRE_STATUS.values(), description="READY also when it is busy."),
        "memoryUsage": {**BYTES, "description": "Bytes; 0 until it is known."},
        "pid": {**WHOLE, "description": "0 while it has no process yet."},
        "gpu": TRUTH,
        "gpuUsage": TEXT,
    },
    example={
        "id": "9000",
        "startTime": "2026-11-22T23:55:48.901Z",
        "status": "READY",
        "memoryUsage": 89247744,
        "pid": 22876,
        "gpu": False,
        "gpuUsage": "N/A",
    },
)
MODEL_DESCRIPTION = _object(
    {
        "modelName": TEXT,
        "modelVersion": TEXT,
        "modelUrl": {**TEXT, "description": "Where it came from, as its registration said."},
        "engine": TEXT,
        "runtime": TEXT,
        "minWorkers": WHOLE,
        "maxWorkers": WHOLE,
        "batchSize": {**WHOLE, "minimum": 1},
        "maxBatchDelay": MILLISECONDS,
        "responseTimeout": SECONDS,
        "startupTimeout": SECONDS,
        "maxRetryTimeoutInSec": SECONDS,
        "clientTimeoutInMills": MILLISECONDS,
        "parallelType": TEXT,
        "parallelLevel": WHOLE,
        "deviceType": TEXT,
        "continuousBatching": TRUTH,
        "useJobTicket": TRUTH,
        "useVenv": TRUTH,
        "stateful": TRUTH,
        "sequenceMaxIdleMSec": MILLISECONDS,
        "sequenceTimeoutMSec": MILLISECONDS,
        "maxNumSequence": WHOLE,
        "maxSequenceJobQueueSize": WHOLE,
        "loadedAtStartup": TRUTH,
        "workers": _array(ref("Worker")),
        "jobQueueStatus": ref("JobQueueStatus"),
        "state": _one_of((state.value for state in VersionState), description="FAILED: see lastError."),
        "defaultVersion": TRUTH,
        "queueTimeoutInMills": MILLISECONDS,
        "shareWeights": _one_of(one.value for one in ShareWeights),
        "weightsShared": {
            **TRUTH,
            "nullable": True,
            "description": "Whether its workers are forked from a process that loaded it once; null: not known yet.",
        },
        "weightsSharedReason": TEXT,
        "lastError": {**TEXT, "description": "Why a worker failed last, with its last lines; absent if none did."},
        "customizedMetadata": {
            "type": "object",
            "additionalProperties": True,
            "description": "What the handler's describe_handle returned; with customized=true only.",
        },
    },
    "lastError",
    "customizedMetadata",
)
API_OPERATION = _object(
    {
        "operationId": TEXT,
        "summary": TEXT,
        "description": TEXT,
        "tags": _array(TEXT),
        "parameters": _array({"type": "object", "additionalProperties": True}),
        "requestBody": {"type": "object", "additionalProperties": True},
        "responses": _map_of({"type": "object", "additionalProperties": True}),
        "security": _array(_map_of(_array(TEXT))),
    },
    "description",
    "requestBody",
    "security",
)
API_DESCRIPTION = _object(
    {
        "openapi": {"type": "string", "pattern": r"^3\.0\.[0-9]+$"},
        "info": _object(
            {"title": TEXT, "version": TEXT, "description": TEXT, "license": _object({"name": TEXT})},
        ),
        "tags": _array(_object({"name": TEXT})),
        "paths": _map_of(_map_of(ref("ApiOperation"))),
        "components": _object(
            {
                section: _map_of({"type": "object", "additionalProperties": True})
                for section in ("schemas", "responses", "parameters", "headers", "securitySchemes")
            },
            "securitySchemes",
        ),
    },
    description="An OpenAPI 3.0 document.",
)
SCHEMAS: Mapping[str, Schema] = {
    "Status": _object(
        {"status": TEXT, "warnings": WARNINGS}, "warnings", example={"status": "Processing worker updates..."}
    ),
    "Health": _object({"status": _one_of(("Healthy", "Partial Healthy", "Unhealthy"))}, example={"status": "Healthy"}),
    "NewKey": _object(
        {"management": ref("Key"), "inference": ref("Key"), "warnings": WARNINGS},
        "management",
        "inference",
        "warnings",
        description="The one that was asked for.",
    ),
    "Key": _object(
        {"key": TEXT, "expiration time": {"type": "string", "format": "date-time", "description": "In UTC."}}
    ),
    "Liveness": _object({"status": _one_of(("Live",))}, example={"status": "Live"}),
    "Readiness": _object(
        {
            "status": _one_of(("Ready", "Not Ready", "Draining")),
            "isLoading": {**TRUTH, "description": "Whether models are still to come that are loaded at the start."},
            "notReady": _array({**TEXT, "description": "A model version that shall have workers and has none ready."}),
        },
        example={"status": "Not Ready", "isLoading": False, "notReady": ["noop:1.0"]},
    ),
    "ModelReadiness": _object({"name": TEXT, "ready": TRUTH}, example={"name": "noop", "ready": True}),
    "KServeModels": _object({"models": _array(TEXT)}, example={"models": ["noop"]}),
    "KServeModel": _object({"name": TEXT, "ready": TRUTH}, example={"name": "noop", "ready": True}),
    "ServerMetadata": _object({"name": TEXT, "version": TEXT, "extensions": _array(TEXT)}),
    "ServerLive": _object({"live": TRUTH}),
    "ServerReady": _object({"ready": TRUTH}),
    "ModelMetadata": _object(
        {
            "name": TEXT,
            "versions": _array(TEXT),
            "platform": TEXT,
            "inputs": _array(ref("TensorMetadata")),
            "outputs": _array(ref("TensorMetadata")),
        }
    ),
    "TensorMetadata": _object({"name": TEXT, "datatype": TEXT, "shape": _array({"type": "integer"})}),
    "RepositoryIndex": _array(ref("RepositoryModel")),
    "RepositoryModel": _object(
        {
            "name": TEXT,
            "version": {**TEXT, "description": "Empty for an archive that is not loaded."},
            "state": _one_of(("READY", "LOADING", "UNLOADING", "UNAVAILABLE")),
            "reason": TEXT,
        }
    ),
    "ModelList": _object(
        {
            "nextPageToken": {**TEXT, "description": "Absent on the last page."},
            "models": _array(ref("ModelListItem")),
            "warnings": WARNINGS,
        },
        "nextPageToken",
        "warnings",
    ),
    "ModelListItem": _object(
        {
            "modelName": TEXT,
            "modelUrl": TEXT,
            "state": _one_of([VersionState.FAILED.value], description="Only if it failed."),
            "lastError": {**TEXT, "description": "Why it failed; only then."},
        },
        "state",
        "lastError",
        example={"modelName": "noop", "modelUrl": "noop.mar"},
    ),
    "ModelDescriptions": {"type": "array", "items": ref("ModelDescription"), "minItems": 1},
    "ModelDescription": MODEL_DESCRIPTION,
    "Worker": WORKER,
    "JobQueueStatus": _object(
        {"remainingCapacity": WHOLE, "pendingRequests": WHOLE},
        example={"remainingCapacity": 100, "pendingRequests": 0},
    ),
    "ApiDescription": API_DESCRIPTION,
    "ApiOperation": API_OPERATION,
    **{error_name(code): _error(code, error) for code, error in ERRORS.items()},
}
