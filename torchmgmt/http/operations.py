"""The operations of each address: method, path, parameters, answers. Routes and the API description derive from these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum

from attrs import field, frozen

from torchmgmt.http.parameters import Kind, Parameter

__all__ = ["INFERENCE", "MANAGEMENT", "KeyName", "Link", "Operation"]


class KeyName(Enum):
    """What a key of token authorization opens; the value is its name in the key file."""

    MANAGEMENT = "management"
    INFERENCE = "inference"
    API = "API"
    """Makes new management and inference keys, and opens nothing else."""


@frozen
class Link:
    """How an answer leads to another operation: what of the request or the answer is a parameter of that one."""

    operation_id: str
    parameters: Mapping[str, str]
    """Name -> expression as OpenAPI has them: ``$request.query.model_name``, ``$response.body#/0/modelName``."""


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
    key: KeyName | None = KeyName.MANAGEMENT
    """Which one a caller sends where keys are required. None: served to everybody, always."""
    tag: str = "Management"
    """The group of operations that generated clients put it into."""
    answers: Mapping[int, str] = field(factory=lambda: {200: "Status"})
    """Code -> name of the schema of its body."""
    errors: Sequence[int] = ()
    """Codes of its errors, beside those that the server may give to any request."""
    links: Sequence[Link] = ()
    """What an answer of a code below 300 leads to."""


NAME = "/\0"  # what no name may have in it
URL = Parameter(
    "url",
    Kind.TEXT,
    "The archive: the name of one in the model store, or the `file://` URL of one.",
    required=True,
    example="noop.mar",
)
SYNCHRONOUS = Parameter(
    "synchronous", Kind.TRUTH, "Whether to answer when the workers are ready.", default=False, example=True
)
REGISTER_PARAMETERS = (
    URL,
    Parameter(
        "model_name",
        Kind.TEXT,
        "The model's name; if not given, the one in the archive's manifest.",
        forbidden=NAME,
        example="noop",
    ),
    Parameter(
        "handler",
        Kind.TEXT,
        "`module`, `module.py`, `module:function` or a shipped handler; else the manifest's.",
        forbidden=NAME,
        example="handler.py",
    ),
    Parameter(
        "runtime",
        Kind.TEXT,
        "The language of the handler, in any case; else the manifest's.",
        choices=("python", "python3", "LSP"),
        refusal="Invalid RuntimeType value: {}",
        example="python",
    ),
    Parameter(
        "batch_size",
        Kind.WHOLE,
        "Requests in a batch, at most; else the archive's, else 1.",
        minimum=1,
        example=4,
    ),
    Parameter(
        "max_batch_delay",
        Kind.WHOLE,
        "How long a batch waits to be filled; else the archive's, else 100.",
        minimum=0,
        unit="milliseconds",
        example=50,
    ),
    Parameter(
        "initial_workers",
        Kind.WHOLE,
        "Workers to start; else the archive's minWorkers, else the setting default_workers_per_model, else 0.",
        minimum=0,
        example=1,
    ),
    SYNCHRONOUS,
    Parameter(
        "response_timeout",
        Kind.WHOLE,
        "How long a batch may run; else the archive's, else 120.",
        minimum=1,
        unit="seconds",
        example=60,
    ),
    Parameter(
        "startup_timeout",
        Kind.WHOLE,
        "How long a worker may take to load the model; else the archive's, else 120.",
        minimum=1,
        unit="seconds",
        example=300,
    ),
    Parameter(
        "s3_sse_kms",
        Kind.TRUTH,
        "Accepted for TorchServe's clients; true is refused, as S3 is not supported.",
        default=False,
        choices=(False,),
        refusal="s3_sse_kms is {}, but this server has no support for S3",
    ),
)
SCALE_PARAMETERS = (
    Parameter("min_worker", Kind.WHOLE, "Workers at least.", default=1, minimum=0, example=2),
    Parameter(
        "max_worker",
        Kind.WHOLE,
        "Workers at most, not less than min_worker; if not given, as many as min_worker.",
        minimum=0,
        example=4,
    ),
    Parameter("number_gpu", Kind.WHOLE, "Accepted for TorchServe's clients; has no effect.", minimum=0),
    SYNCHRONOUS,
    Parameter(
        "timeout",
        Kind.WHOLE,
        "How long a worker that is to go may finish its work: -1 for ever, 0 not at all.",
        default=-1,
        minimum=-1,
        unit="seconds",
        example=30,
    ),
    Parameter(
        "model_version",
        Kind.TEXT,
        "The version; where the path names one, too, both must be the same.",
        forbidden=NAME,
        example="1.0",
    ),
)
CUSTOMIZED = Parameter(
    "customized",
    Kind.TRUTH,
    "Whether to run the handler's describe_handle and add customizedMetadata.",
    default=False,
    example=True,
)
LIST_PARAMETERS = (
    Parameter(
        "limit",
        Kind.WHOLE,
        "Models on a page; more than 1000 counts as 1000.",
        default=100,
        minimum=1,
        example=10,
    ),
    Parameter(
        "next_page_token",
        Kind.WHOLE,
        "nextPageToken of the page before.",
        default=0,
        minimum=0,
        example=10,
    ),
)
OF_A_MODEL = ("describeModel", "describeAllModelVersions", "scaleWorkers", "unregisterModel")
OF_A_VERSION = ("describeModelVersion", "scaleVersionWorkers", "setDefaultVersion", "unregisterModelVersion")


def _to_model(name: str, *operations: str) -> tuple[Link, ...]:
    return tuple(Link(operation, {"model_name": name}) for operation in operations)


def _to_version(name: str, version: str) -> tuple[Link, ...]:
    return tuple(Link(operation, {"model_name": name, "model_version": version}) for operation in OF_A_VERSION)


TO_FIRST_DESCRIBED = _to_version("$response.body#/0/modelName", "$response.body#/0/modelVersion")
TO_SAME_MODEL = _to_model("$request.path.model_name", "describeModel")

REGISTER = Operation(
    "registerModel",
    "POST",
    "/models",
    "Register a model version.",
    REGISTER_PARAMETERS,
    takes_body=True,
    needs_model_api=True,
    answers={200: "Status", 202: "Status"},
    errors=(404, 405, 409, 507),
    links=_to_model("$request.query.model_name", *OF_A_MODEL),
)
LIST = Operation(
    "listModels",
    "GET",
    "/models",
    "List the models, by name.",
    LIST_PARAMETERS,
    answers={200: "ModelList"},
    links=_to_model("$response.body#/models/0/modelName", *OF_A_MODEL),
)
DESCRIBE = Operation(
    "describeModel",
    "GET",
    "/models/{model_name}",
    "Describe the default version.",
    (CUSTOMIZED,),
    answers={200: "ModelDescriptions"},
    errors=(404, 507),
    links=TO_FIRST_DESCRIBED,
)
DESCRIBE_VERSION = Operation(
    "describeModelVersion",
    "GET",
    "/models/{model_name}/{model_version}",
    "Describe one version.",
    (CUSTOMIZED,),
    answers={200: "ModelDescriptions"},
    errors=(404, 507),
    links=TO_FIRST_DESCRIBED,
)
DESCRIBE_ALL = Operation(
    "describeAllModelVersions",
    "GET",
    "/models/{model_name}/all",
    "Describe all versions.",
    (CUSTOMIZED,),
    answers={200: "ModelDescriptions"},
    errors=(404, 507),
    links=TO_FIRST_DESCRIBED,
)
SCALE = Operation(
    "scaleWorkers",
    "PUT",
    "/models/{model_name}",
    "Set how many workers the default version shall have.",
    SCALE_PARAMETERS,
    takes_body=True,
    answers={200: "Status", 202: "Status"},
    errors=(404, 507),
    links=TO_SAME_MODEL,
)
SCALE_VERSION = Operation(
    "scaleVersionWorkers",
    "PUT",
    "/models/{model_name}/{model_version}",
    "Set how many workers one version shall have.",
    SCALE_PARAMETERS,
    takes_body=True,
    answers={200: "Status", 202: "Status"},
    errors=(404, 507),
    links=TO_SAME_MODEL,
)
SET_DEFAULT = Operation(
    "setDefaultVersion",
    "PUT",
    "/models/{model_name}/{model_version}/set-default",
    "Make a version the default one.",
    errors=(404,),
    links=TO_SAME_MODEL,
)
UNREGISTER = Operation(
    "unregisterModel",
    "DELETE",
    "/models/{model_name}",
    "Unregister the default version, once its requests are done.",
    needs_model_api=True,
    errors=(404, 405),
)
UNREGISTER_VERSION = Operation(
    "unregisterModelVersion",
    "DELETE",
    "/models/{model_name}/{model_version}",
    "Unregister one version, once its requests are done.",
    needs_model_api=True,
    errors=(404, 405),
)
NEW_KEY = Operation(
    "newKey",
    "GET",
    "/token",
    "Replace the management or the inference key by a new one. Needs the API key.",
    (Parameter("type", Kind.TEXT, "Which key.", choices=("management", "inference"), required=True),),
    needs_keys=True,
    key=KeyName.API,
    tag="Keys",
    answers={200: "NewKey"},
    errors=(401, 404),
)
API_DESCRIPTION_AT_ROOT = Operation(
    "apiDescriptionAtRoot",
    "OPTIONS",
    "/",
    "Describe the API of this address.",
    key=None,
    tag="API description",
    answers={200: "ApiDescription"},
)
API_DESCRIPTION = Operation(
    "apiDescription",
    "GET",
    "/api-description",
    "Describe the API of this address.",
    key=None,
    tag="API description",
    answers={200: "ApiDescription"},
)
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
INFERENCE = (PING, LIVE, READY, API_DESCRIPTION_AT_ROOT, API_DESCRIPTION)
