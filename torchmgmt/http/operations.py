"""The operations of each address: method, path, parameters, answers. Routes and the API description derive from these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import frozen

from torchmgmt.http.parameters import Kind, Parameter

__all__ = ["INFERENCE", "MANAGEMENT", "Operation"]


@frozen(eq=False)  # each is itself, and a key of tables
class Operation:
    """One operation: what is called how, and what it answers with when all is well."""

    id: str
    method: str
    path: str
    summary: str
    parameters: Sequence[Parameter] = ()
    takes_body: bool = False
    """Whether the parameters may also come as a JSON object or a form."""
    needs_model_api: bool = False
    """Whether it is served only where the setting ``enable_model_api`` is on."""
    needs_keys: bool = False
    """Whether it is served only where there are keys (token authorization)."""
    answers: Mapping[int, str] = {200: "Status"}
    """Code -> name of the schema of its body."""
    errors: Sequence[int] = ()
    """Codes of its errors, beside those that every operation has."""


URL = Parameter(
    "url",
    Kind.TEXT,
    "The archive: the name of one in the model store, or the `file://` URL of one.",
    required=True,
)
REGISTER_PARAMETERS = (
    URL,
    Parameter(
        "model_name",
        Kind.TEXT,
        "The model's name; if not given, the one in the archive's manifest.",
    ),
    Parameter(
        "handler",
        Kind.TEXT,
        "`module`, `module.py`, `module:function` or a shipped handler; else the manifest's.",
    ),
    Parameter("runtime", Kind.TEXT, "PYTHON, python3 or LSP, in any case; else the manifest's."),
    Parameter(
        "batch_size",
        Kind.WHOLE,
        "Requests in a batch, at most; else the archive's, else 1.",
        minimum=1,
    ),
    Parameter(
        "max_batch_delay",
        Kind.WHOLE,
        "How long a batch waits to be filled, in milliseconds; else the archive's, else 100.",
        minimum=0,
    ),
    Parameter(
        "initial_workers",
        Kind.WHOLE,
        "Workers to start; else the archive's minWorkers, else the setting default_workers_per_model, else 0.",
        minimum=0,
    ),
    Parameter("synchronous", Kind.TRUTH, "Whether to answer when the workers are ready.", default=False),
    Parameter(
        "response_timeout",
        Kind.WHOLE,
        "How long a batch may run, in seconds; else the archive's, else 120.",
        minimum=1,
    ),
    Parameter(
        "startup_timeout",
        Kind.WHOLE,
        "How long a worker may take to load the model, in seconds; else the archive's, else 120.",
        minimum=1,
    ),
    Parameter(
        "s3_sse_kms",
        Kind.TRUTH,
        "Accepted for TorchServe's clients; true is refused, as S3 is not supported.",
        default=False,
    ),
)
SCALE_PARAMETERS = (
    Parameter("min_worker", Kind.WHOLE, "Workers at least.", default=1, minimum=0),
    Parameter("max_worker", Kind.WHOLE, "Workers at most; if not given, as many as min_worker.", minimum=0),
    Parameter("number_gpu", Kind.WHOLE, "Accepted for TorchServe's clients; has no effect.", minimum=0),
    Parameter("synchronous", Kind.TRUTH, "Whether to answer when the workers are ready.", default=False),
    Parameter(
        "timeout",
        Kind.WHOLE,
        "How long, in seconds, a worker that is to go may finish its work: -1 for ever, 0 not at all.",
        default=-1,
        minimum=-1,
    ),
)
MODEL_VERSION = Parameter("model_version", Kind.TEXT, "The version, where the path does not name it.")
CUSTOMIZED = Parameter(
    "customized",
    Kind.TRUTH,
    "Whether to run the handler's describe_handle and add customizedMetadata.",
    default=False,
)
LIST_PARAMETERS = (
    Parameter(
        "limit",
        Kind.WHOLE,
        "Models on a page; more than 1000 counts as 1000.",
        default=100,
        minimum=1,
    ),
    Parameter("next_page_token", Kind.WHOLE, "nextPageToken of the page before.", default=0, minimum=0),
)

REGISTER = Operation(
    "registerModel",
    "POST",
    "/models",
    "Register a model version.",
    REGISTER_PARAMETERS,
    takes_body=True,
    needs_model_api=True,
    answers={200: "Status", 202: "Status"},
    errors=(404, 405, 409, 413, 503, 507),
)
LIST = Operation(
    "listModels",
    "GET",
    "/models",
    "List the models, by name.",
    LIST_PARAMETERS,
    answers={200: "ModelList"},
)
DESCRIBE = Operation(
    "describeModel",
    "GET",
    "/models/{model_name}",
    "Describe the default version.",
    (CUSTOMIZED,),
    answers={200: "ModelDescriptions"},
    errors=(404, 503, 507),
)
DESCRIBE_VERSION = Operation(
    "describeModelVersion",
    "GET",
    "/models/{model_name}/{model_version}",
    "Describe one version.",
    (CUSTOMIZED,),
    answers={200: "ModelDescriptions"},
    errors=(404, 503, 507),
)
DESCRIBE_ALL = Operation(
    "describeAllModelVersions",
    "GET",
    "/models/{model_name}/all",
    "Describe all versions.",
    (CUSTOMIZED,),
    answers={200: "ModelDescriptions"},
    errors=(404, 503, 507),
)
SCALE = Operation(
    "scaleWorkers",
    "PUT",
    "/models/{model_name}",
    "Set how many workers the default version shall have.",
    (*SCALE_PARAMETERS, MODEL_VERSION),
    takes_body=True,
    answers={200: "Status", 202: "Status"},
    errors=(404, 413, 503, 507),
)
SCALE_VERSION = Operation(
    "scaleVersionWorkers",
    "PUT",
    "/models/{model_name}/{model_version}",
    "Set how many workers one version shall have.",
    (*SCALE_PARAMETERS, MODEL_VERSION),
    takes_body=True,
    answers={200: "Status", 202: "Status"},
    errors=(404, 413, 503, 507),
)
SET_DEFAULT = Operation(
    "setDefaultVersion",
    "PUT",
    "/models/{model_name}/{model_version}/set-default",
    "Make a version the default one.",
    errors=(404, 503),
)
UNREGISTER = Operation(
    "unregisterModel",
    "DELETE",
    "/models/{model_name}",
    "Unregister the default version, once its requests are done.",
    needs_model_api=True,
    errors=(404, 405, 503),
)
UNREGISTER_VERSION = Operation(
    "unregisterModelVersion",
    "DELETE",
    "/models/{model_name}/{model_version}",
    "Unregister one version, once its requests are done.",
    needs_model_api=True,
    errors=(404, 405, 503),
)
NEW_KEY = Operation(
    "newKey",
    "GET",
    "/token",
    "Replace the management or the inference key by a new one. Needs the API key.",
    (Parameter("type", Kind.TEXT, "Which key: `management` or `inference`.", required=True),),
    needs_keys=True,
    answers={200: "NewKey"},
    errors=(401, 404),
)
API_DESCRIPTION_AT_ROOT = Operation(
    "apiDescriptionAtRoot",
    "OPTIONS",
    "/",
    "Describe the API of this address.",
    answers={200: "ApiDescription"},
)
API_DESCRIPTION = Operation(
    "apiDescription",
    "GET",
    "/api-description",
    "Describe the API of this address.",
    answers={200: "ApiDescription"},
)
PING = Operation(
    "ping",
    "GET",
    "/ping",
    "Whether every model version that shall have workers has a ready one.",
    answers={200: "Health", 500: "Health"},
)

MANAGEMENT = (
    REGISTER,
    LIST,
    DESCRIBE,
    DESCRIBE_ALL,
    DESCRIBE_VERSION,
    SCALE,
    SCALE_VERSION,
    SET_DEFAULT,
    UNREGISTER,
    UNREGISTER_VERSION,
    NEW_KEY,
    API_DESCRIPTION_AT_ROOT,
    API_DESCRIPTION,
)
INFERENCE = (PING, API_DESCRIPTION_AT_ROOT, API_DESCRIPTION)
