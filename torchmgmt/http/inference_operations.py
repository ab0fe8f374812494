"""The operations of the inference address: health, predictions, KServe's protocols."""

from __future__ import annotations

from torchmgmt.http.operation import NAME, KeyName, Operation
from torchmgmt.http.parameters import Kind, Parameter

__all__ = ["PREDICTIONS", "SERVED_INFERENCE"]

METHODS = ("POST", "PUT", "GET")
ERRORS = (404, 504, 507)

PING = Operation(
    "ping",
    "GET",
    "/ping",
    "Whether every model version that shall have workers has a ready one.",
    key=None,
    tag="Inference",
    answers={200: "Health", 500: "Health"},
)
LIVE = Operation(
    "live",
    "GET",
    "/live",
    "Whether the server runs; says nothing of models.",
    key=None,
    tag="Inference",
    answers={200: "Liveness"},
)
READY = Operation(
    "ready",
    "GET",
    "/ready",
    "Whether all models of the start are loaded, and every model version that shall have workers has a ready one.",
    key=None,
    tag="Inference",
    answers={200: "Readiness", 503: "Readiness"},
)

READY_MODEL = Operation(
    "readyModel",
    "GET",
    "/ready/{model_name}",
    "Whether the default version of a model has a ready worker.",
    key=None,
    tag="Inference",
    answers={200: "ModelReadiness", 503: "ModelReadiness"},
    errors=(404,),
)


def _predictions(id: str, path: str, summary: str, *parameters: Parameter) -> tuple[Operation, ...]:
    """Return an operation for each method: TorchServe's clients use all of them."""
    return tuple(
        Operation(
            id if method == "POST" else f"{id}By{method.title()}",
            method,
            path,
            summary,
            parameters,
            key=KeyName.INFERENCE,
            tag="Inference",
            answers={},
            errors=ERRORS,
            is_prediction=True,
        )
        for method in METHODS
    )


PREDICT = _predictions("predict", "/predictions/{model_name}", "Ask the default version of a model.")
PREDICT_VERSION = _predictions("predictVersion", "/predictions/{model_name}/{model_version}", "Ask one version.")
EXPLAIN = _predictions("explain", "/explanations/{model_name}", "Have the default version explain its answer.")
EXPLAIN_VERSION = _predictions(
    "explainVersion", "/explanations/{model_name}/{model_version}", "Have one version explain its answer."
)
INVOCATIONS = _predictions(
    "invocations",
    "/invocations",
    "Ask the model that the query names.",
    Parameter(
        "model_name",
        Kind.TEXT,
        "The model's name; where only one is registered, it may be left out.",
        forbidden=NAME,
        required=True,
        example="noop",
    ),
)
INVOKE = _predictions("invoke", "/models/{model_name}/invoke", "Ask the default version of a model.")


def _kserve(id: str, path: str, summary: str, answer: str = "", *errors: int) -> Operation:
    return Operation(
        id,
        "GET" if answer else "POST",
        path,
        summary,
        key=KeyName.INFERENCE,
        tag="KServe",
        answers={200: answer} if answer else {},
        errors=errors or (() if answer else (415, *ERRORS)),
        is_prediction=not answer,
        for_kserve=True,
    )


KSERVE_MODELS = _kserve("kserveModels", "/v1/models", "List the models.", "KServeModels")
KSERVE_MODEL = _kserve("kserveModel", "/v1/models/{model_name}", "Whether a model is ready.", "KServeModel", 404)
KSERVE_PREDICT = _kserve("kservePredict", "/v1/models/{model_name}:predict", "Ask a model for predictions.")
KSERVE_EXPLAIN = _kserve("kserveExplain", "/v1/models/{model_name}:explain", "Ask a model for explanations.")
SERVER_METADATA = _kserve("serverMetadata", "/v2", "Name, version and extensions of the server.", "ServerMetadata")
SERVER_LIVE = Operation(
    "serverLive",
    "GET",
    "/v2/health/live",
    "Whether the server runs.",
    key=None,
    tag="KServe",
    answers={200: "ServerLive"},
    for_kserve=True,
)
SERVER_READY = Operation(
    "serverReady",
    "GET",
    "/v2/health/ready",
    "The same as /ready.",
    key=None,
    tag="KServe",
    answers={200: "ServerReady", 503: "ServerReady"},
    for_kserve=True,
)
MODEL = "/v2/models/{model_name}"
VERSION = "/v2/models/{model_name}/versions/{model_version}"
MODEL_METADATA = _kserve("modelMetadata", MODEL, "Name and versions of a model.", "ModelMetadata", 404)
VERSION_METADATA = _kserve("versionMetadata", VERSION, "The same of one version.", "ModelMetadata", 404)
MODEL_READY = _kserve(
    "modelReady", f"{MODEL}/ready", "Whether the default version has a ready worker.", "ModelReadiness", 404
)
VERSION_READY = _kserve(
    "versionReady", f"{VERSION}/ready", "Whether one version has a ready worker.", "ModelReadiness", 404
)
INFER = _kserve(
    "infer", f"{MODEL}/infer", "Ask the default version: an inference request of the Open Inference Protocol."
)
INFER_VERSION = _kserve("inferVersion", f"{VERSION}/infer", "The same of one version.")

PREDICTIONS = (
    *PREDICT,
    *PREDICT_VERSION,
    *EXPLAIN,
    *EXPLAIN_VERSION,
    *INVOCATIONS,
    *INVOKE,
    KSERVE_PREDICT,
    KSERVE_EXPLAIN,
    INFER,
    INFER_VERSION,
)
"""What hands a body to a model."""
SERVED_INFERENCE = (
    PING,
    LIVE,
    READY,
    READY_MODEL,
    *PREDICTIONS,
    KSERVE_MODELS,
    KSERVE_MODEL,
    SERVER_METADATA,
    SERVER_LIVE,
    SERVER_READY,
    MODEL_METADATA,
    VERSION_METADATA,
    MODEL_READY,
    VERSION_READY,
)
