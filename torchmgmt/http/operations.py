"""The operations of each address: method, path, parameters, answers. Routes and the API description derive from these."""

from __future__ import annotations

from torchmgmt.http.inference_operations import SERVED_INFERENCE
from torchmgmt.http.operation import NAME, KeyName, Link, Operation
from torchmgmt.http.parameters import Kind, Parameter

__all__ = ["INFERENCE", "MANAGEMENT", "NAME", "KeyName", "Link", "Operation"]


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
REPOSITORY_INDEX = Operation(
    "repositoryIndex",
    "POST",
    "/v2/repository/index",
    "List every version of every model, and the archives in the model store.",
    (Parameter("ready", Kind.TRUTH, "Whether to list only what is ready.", default=False),),
    takes_body=True,
    tag="Model repository",
    answers={200: "RepositoryIndex"},
    for_kserve=True,
)
REPOSITORY_LOAD = Operation(
    "repositoryModelLoad",
    "POST",
    "/v2/repository/models/{model_name}/load",
    "Register the archive of this name in the model store, with a worker; give a worker to a model that has none.",
    needs_model_api=True,
    tag="Model repository",
    errors=(404, 405, 409, 507),
    for_kserve=True,
)
REPOSITORY_UNLOAD = Operation(
    "repositoryModelUnload",
    "POST",
    "/v2/repository/models/{model_name}/unload",
    "Unregister all versions of a model, once their requests are done.",
    needs_model_api=True,
    tag="Model repository",
    errors=(404, 405),
    for_kserve=True,
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
    REPOSITORY_INDEX,
    REPOSITORY_LOAD,
    REPOSITORY_UNLOAD,
    API_DESCRIPTION_AT_ROOT,
    API_DESCRIPTION,
)
INFERENCE = (*SERVED_INFERENCE, API_DESCRIPTION_AT_ROOT, API_DESCRIPTION)
