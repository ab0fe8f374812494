"""One table: which exception answers with which code and type; and how each becomes the JSON body of an error."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus

import falcon
from attrs import frozen

from torchmgmt import errors
from torchmgmt.redaction import redacted_text

__all__ = [
    "CALLERS_TABLE",
    "TABLE",
    "Answer",
    "AnswerNotSendable",
    "AnswerTooLarge",
    "BadRequest",
    "BodyTooLarge",
    "EncodingNotServed",
    "Forbidden",
    "KeyRequired",
    "KeyRequiredAsBadRequest",
    "MethodOff",
    "ParameterRequired",
    "RequestRefused",
    "TokensOff",
    "TooManyWaiting",
    "VersionToSetNotFound",
    "answer_for",
    "answer_for_caller",
    "answer_for_code",
    "is_known",
    "is_kserves",
    "phrase_of",
    "to_json",
]

METHOD_NOT_ALLOWED = "Requested method is not allowed, please refer to API document."
RESOURCE_NOT_FOUND = "Requested resource is not found, please refer to API document."
KEY_REFUSED_BY_TORCHSERVE = "Token Authorization failed. Token either incorrect, expired, or not provided correctly"
INTERNAL = "The server failed to answer this request; its log says why, under this request's x-request-id."


class RequestRefused(Exception):
    """A refusal that the HTTP side decides by itself; the text is the message for the caller."""

    headers: Mapping[str, str] = {}


class BadRequest(RequestRefused):
    """The request cannot be understood, or a parameter is missing or contradicts another."""


class BodyTooLarge(RequestRefused):
    """The request's body is larger than ``max_request_size``."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            f"The request's body is larger than the {limit_bytes} bytes that the setting max_request_size allows"
        )


class KeyRequired(RequestRefused):
    """The request needs a key, and carries none, a wrong one or one that has expired."""

    def __init__(self, message: str, *, carries_one: bool = False) -> None:
        super().__init__(message)
        # As RFC 6750, section 3 has it: the error is named only if there was something to judge.
        problem = ', error="invalid_token"' if carries_one else ""
        self.headers = {"WWW-Authenticate": f'Bearer realm="torchmgmt"{problem}'}


class KeyRequiredAsBadRequest(KeyRequired):
    """The same as TorchServe 0.12 answers it, whatever is wrong with the key."""

    def __init__(self, message: str, *, carries_one: bool = False) -> None:
        super().__init__(KEY_REFUSED_BY_TORCHSERVE, carries_one=carries_one)
        self.headers = {}


class TokensOff(RequestRefused):
    """There are no keys, so none can be made anew."""

    def __init__(self) -> None:
        super().__init__(
            "This server has no keys; --enable-token-auth (disable_token_authorization=false) turns them on"
        )


class Forbidden(RequestRefused):
    """The request comes from a page that is none of ours."""


class MethodOff(RequestRefused):
    """The method exists, but the model API is switched off."""

    def __init__(self, allowed: Sequence[str]) -> None:
        super().__init__(METHOD_NOT_ALLOWED)
        self.headers = {"Allow": ", ".join(allowed)}


class VersionToSetNotFound(RequestRefused):
    """``set-default`` names a version that does not exist: TorchServe words this one differently."""

    def __init__(self, name: str, version: str) -> None:
        super().__init__(f"Model version {version} does not exist for model {name}")


class ParameterRequired(BadRequest):
    """A parameter is missing."""

    def __init__(self, name: str, more: str = "") -> None:
        super().__init__(f"Parameter {name} is required.{more}")


class EncodingNotServed(RequestRefused):
    """The body is compressed, and what reads it takes it as it is."""

    def __init__(self, encoding: str) -> None:
        super().__init__(f"Content-Encoding is {encoding!r}, but bodies must come uncompressed here")
        self.headers = {"Accept-Encoding": "identity"}


class AnswerNotSendable(RequestRefused):
    """The handler has set a status or a header that HTTP does not have."""


class AnswerTooLarge(RequestRefused):
    """The parts of an answer are too large together for a client that cannot take them one by one."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"The answer is larger than max_response_size allows ({limit} bytes) for a client of HTTP/1.0, which takes no parts"
        )


class TooManyWaiting(RequestRefused):
    """As many calls wait for workers as threads may be spent on."""

    def __init__(self, limit: int, retry_after_s: int) -> None:
        super().__init__(
            f"{limit} calls that wait for models or workers are running already; try again in {retry_after_s} s"
        )
        self.headers = {"Retry-After": str(retry_after_s)}


TABLE: Mapping[type[Exception], tuple[int, str]] = {
    BadRequest: (400, "BadRequestException"),
    errors.InvalidArgument: (400, "BadRequestException"),
    errors.InvalidArchive: (400, "InvalidModelException"),
    errors.DownloadFailed: (400, "DownloadArchiveException"),
    KeyRequired: (401, "InvalidKeyException"),
    KeyRequiredAsBadRequest: (400, "InvalidKeyException"),
    Forbidden: (403, "ForbiddenException"),
    errors.DefaultVersionInUse: (403, "InvalidModelVersionException"),
    errors.ModelNotFound: (404, "ModelNotFoundException"),
    errors.SourceNotAllowed: (404, "ModelNotFoundException"),
    errors.ModelVersionNotFound: (404, "ModelVersionNotFoundException"),
    VersionToSetNotFound: (404, "ModelVersionNotFoundException"),
    TokensOff: (404, "ResourceNotFoundException"),
    MethodOff: (405, "MethodNotAllowedException"),
    errors.AlreadyRegistered: (409, "ConflictStatusException"),
    BodyTooLarge: (413, "RequestEntityTooLargeException"),
    AnswerTooLarge: (413, "RequestEntityTooLargeException"),
    EncodingNotServed: (415, "UnsupportedMediaTypeException"),
    AnswerNotSendable: (500, "InternalServerException"),
    errors.WorkerStartFailed: (500, "InternalServerException"),
    errors.WorkerDied: (500, "InternalServerException"),
    errors.HandlerFailed: (500, "InternalServerException"),
    errors.WrongNumberOfAnswers: (500, "InternalServerException"),
    errors.DeadlineExceeded: (500, "InternalServerException"),
    errors.ReaderTooSlow: (500, "InternalServerException"),
    errors.WouldWaitForever: (500, "InternalServerException"),
    errors.InvalidStateFile: (500, "InternalServerException"),
    errors.StateFileInUse: (500, "InternalServerException"),
    errors.NoWorker: (503, "ServiceUnavailableException"),
    errors.QueueFull: (503, "ServiceUnavailableException"),
    errors.ManagerClosed: (503, "ServiceUnavailableException"),
    TooManyWaiting: (503, "ServiceUnavailableException"),
}
"""Exception class -> code and type. The most derived class that is listed decides."""

CALLERS_TABLE: Mapping[type[Exception], tuple[int, str]] = {
    errors.DeadlineExceeded: (504, "RequestTimeoutException"),
    # TorchServe's code for whatever a handler raised that has no code of its own.
    errors.HandlerFailed: (503, "InternalServerException"),
}
"""What those who predict are answered, where that differs."""

TYPES_BY_CODE: Mapping[int, str] = {
    401: "InvalidKeyException",
    403: "ForbiddenException",
    404: "ResourceNotFoundException",
    405: "MethodNotAllowedException",
    413: "RequestEntityTooLargeException",
    415: "UnsupportedMediaTypeException",
    501: "NotImplementedException",
    503: "ServiceUnavailableException",
}
"""The type for what Falcon or the HTTP parser refuses; BadRequestException for any other code below 500."""


@frozen
class Answer:
    """An error as it goes out."""

    code: int
    type: str
    message: str
    headers: Mapping[str, str]

    @property
    def status(self) -> str:
        """The status line's part: code and reason."""
        return f"{self.code} {phrase_of(self.code)}"

    def body(self, warnings: Sequence[str] = (), *, for_kserve: bool = False) -> bytes:
        """The JSON body; ``warnings`` about the request's parameters go along, as they do on success.

        ``for_kserve``: KServe's clients look for the message under ``error``, so it is there, too.
        """
        item: dict[str, object] = {"code": self.code, "type": self.type, "message": self.message}
        if for_kserve:
            item["error"] = self.message
        if warnings:
            item["warnings"] = list(warnings)
        return to_json(item)


def answer_for(error: Exception) -> Answer:
    """Return what ``error`` is answered with. What the table does not know is a defect: 500, without its text."""
    if isinstance(error, falcon.HTTPError):
        return _answer_for_falcon(error)
    row = _row_for(type(error))
    if row is None:
        return Answer(500, "InternalServerException", INTERNAL, {})
    code, type_name = row
    if getattr(error, "out_of_memory", False):  # a worker's, not ours
        code = 507
    # The one who manages a model is told all that its handler said; callers who only predict are not.
    message = error.report() if isinstance(error, errors.HandlerFailed) else str(error)
    return Answer(code, type_name, redacted_text(message), dict(_headers_of(error)))


def answer_for_caller(error: Exception, *, shows_all: bool = False) -> Answer:
    """Return what ``error`` is answered with to somebody who predicts.

    Of what a handler raised or a worker printed they read one line, unless ``shows_all``.
    """
    answer = answer_for(error)
    row = next((CALLERS_TABLE[base] for base in type(error).__mro__ if base in CALLERS_TABLE), None)
    code, type_name = (answer.code, answer.type) if row is None or answer.code == 507 else row
    message = answer.message
    if isinstance(error, errors.HandlerFailed):
        if error.error_code is not None and 400 <= error.error_code < 600:
            code = error.error_code
            type_name = answer_for_code(code, "").type if code < 500 else type_name
        # Who has sent something wrong is told what; the class that a handler raised for it says nothing.
        told = error.reason.removeprefix(f"{error.error_type}: ") if code < 500 else str(error)
        message = error.report() if shows_all else told.partition("\n")[0]
    elif not shows_all:
        message = message.partition("\n")[0]
    return Answer(code, type_name, redacted_text(message), answer.headers)


def is_known(error: Exception) -> bool:
    """Whether ``error`` is one that the table foresees, not a defect of ours."""
    return isinstance(error, falcon.HTTPError) or _row_for(type(error)) is not None


def answer_for_code(code: int, message: str) -> Answer:
    """Return the answer for a refusal that has a code but no exception of ours."""
    default = "BadRequestException" if code < 500 else "InternalServerException"
    return Answer(code, TYPES_BY_CODE.get(code, default), message, {})


def phrase_of(code: int) -> str:
    """Return what goes with a status; "" if HTTP has no name for it."""
    try:
        return HTTPStatus(code).phrase
    except ValueError:
        return ""


def is_kserves(path: str) -> bool:
    """Whether a path belongs to one of KServe's protocols."""
    return path.startswith(("/v1/", "/v2/")) or path in {"/v1", "/v2"}


def to_json(item: object) -> bytes:
    """Write JSON as the Management API does: pretty-printed, with a newline at the end."""
    text = json.dumps(item, indent=2, ensure_ascii=False, default=str) + "\n"
    # Half a surrogate pair, which a JSON body may smuggle in, has no UTF-8; escaped it stays JSON.
    return text.encode("utf-8", "backslashreplace")


def _row_for(cls: type[BaseException]) -> tuple[int, str] | None:
    return next((TABLE[base] for base in cls.__mro__ if base in TABLE), None)


def _headers_of(error: Exception) -> Iterator[tuple[str, str]]:
    if isinstance(error, RequestRefused):
        yield from error.headers.items()
    if isinstance(error, errors.QueueFull):
        yield "Retry-After", str(max(1, math.ceil(error.retry_after_s)))


def _answer_for_falcon(error: falcon.HTTPError) -> Answer:
    code = error.status_code
    fixed = {404: RESOURCE_NOT_FOUND, 405: METHOD_NOT_ALLOWED}
    message = fixed.get(code) or error.description or error.title or HTTPStatus(code).phrase
    answer = answer_for_code(code, message)
    headers = error.headers or {}
    items = headers.items() if isinstance(headers, Mapping) else headers
    return Answer(answer.code, answer.type, answer.message, dict(items))
