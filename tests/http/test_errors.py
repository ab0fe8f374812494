"""The table of errors: each exception of the library over a real socket, and what Falcon and waitress refuse."""

from __future__ import annotations

import inspect
import socket

import pytest

from tests.http.conftest import parse_raw
from torchmgmt import errors
from torchmgmt.http.errors import TABLE, answer_for
from torchmgmt.settings import Settings

NO_WORKER = "No worker is available to serve model noop version 1.0: it is scaled to 0"

ROWS = [
    (
        errors.InvalidArgument("url", "", "text"),
        400,
        "BadRequestException",
        "url is '', but must be text",
    ),
    (errors.InvalidArchive("a.mar", "no manifest"), 400, "InvalidModelException", None),
    (
        errors.DownloadFailed("http://x", "refused"),
        400,
        "DownloadArchiveException",
        "Failed to download archive from: http://x: refused",
    ),
    (
        errors.DefaultVersionInUse("noop", "1.0"),
        403,
        "InvalidModelVersionException",
        "Cannot remove default version for model noop",
    ),
    (errors.ModelNotFound("nope"), 404, "ModelNotFoundException", "Model not found: nope"),
    (
        errors.SourceNotFound("nope.mar"),
        404,
        "ModelNotFoundException",
        "Model not found at: nope.mar",
    ),
    (
        errors.SourceNotAllowed("../x", "Relative path is not allowed in url: ../x"),
        404,
        "ModelNotFoundException",
        "Relative path is not allowed in url: ../x",
    ),
    (
        errors.ModelVersionNotFound("noop", "9.9"),
        404,
        "ModelVersionNotFoundException",
        "Model version: 9.9 does not exist for model: noop",
    ),
    (
        errors.AlreadyRegistered("noop", "1.0"),
        409,
        "ConflictStatusException",
        "Model version 1.0 is already registered for model noop",
    ),
    (
        errors.WorkerStartFailed("bad", "1.0", "it broke", "Traceback ...", ["last"]),
        500,
        "InternalServerException",
        "Failed to start workers for model bad version: 1.0: it broke\nTraceback ...\nIts last lines:\nlast",
    ),
    (errors.WorkerDied("noop", "1.0", 7, -9, "killed"), 500, "InternalServerException", None),
    (errors.HandlerFailed("noop", "1.0", "boom"), 500, "InternalServerException", None),
    (
        errors.HandlerFailed("noop", "1.0", "boom", out_of_memory=True),
        507,
        "InternalServerException",
        None,
    ),
    (errors.DeadlineExceeded("describe", 3), 500, "InternalServerException", None),
    (
        errors.NoWorker("noop", "1.0", "it is scaled to 0"),
        503,
        "ServiceUnavailableException",
        NO_WORKER,
    ),
    (errors.QueueFull("noop", 100, 1.2), 503, "ServiceUnavailableException", None),
    (errors.ManagerClosed(), 503, "ServiceUnavailableException", None),
]


@pytest.mark.parametrize("error, code, type_name, message", ROWS, ids=lambda x: type(x).__name__)
def test_each_error_has_its_code_and_type(client, manager, error, code, type_name, message):
    """What the library raises becomes code, type and message of the contract."""
    manager.error = error
    response = client.get("/models")
    expected = {"code": code, "type": type_name, "message": message or str(error)}
    assert (response.status_code, response.json()) == (code, expected)


def test_every_error_of_the_library_is_in_the_table():
    """No error of ours ends as an unexplained 500."""
    ours = {
        cls
        for _, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, errors.TorchmgmtError) and cls is not errors.TorchmgmtError
    }
    assert {cls for cls in ours if not any(base in TABLE for base in cls.__mro__)} == set()


def test_a_full_queue_says_when_to_come_back(client, manager):
    """Retry-After is in whole seconds, rounded up."""
    manager.error = errors.QueueFull("noop", 100, 1.2)
    assert client.get("/models").headers["Retry-After"] == "2"


def test_a_defect_is_a_500_that_tells_the_log_and_not_the_caller(client, manager, caplog):
    """The traceback of an unforeseen exception goes to the log under the request's id, nothing of it to the caller."""
    manager.error = RuntimeError("secret detail")
    response = client.get("/models", headers={"x-request-id": "find-me"})
    assert response.status_code == 500
    assert response.json()["type"] == "InternalServerException"
    assert "secret" not in response.text
    assert "secret detail" in caplog.text
    assert "Traceback" in caplog.text
    assert "find-me" in caplog.text


def test_an_error_carries_the_warnings(client):
    """A misspelt name is often the reason of a refusal."""
    item = client.post("/models", params={"uri": "a.mar"}).json()
    assert item["message"] == "Parameter url is required."
    assert item["warnings"] == ["unknown parameter 'uri': did you mean 'url'?"]


def test_half_a_surrogate_pair_is_answered_in_json(client):
    """JSON can carry text that has no UTF-8; the answer is JSON all the same."""
    response = client.post(
        "/models",
        data=b'{"url": "a", "runtime": "\\ud800"}',
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == 400
    assert response.json()["message"] == "Invalid RuntimeType value: \ud800"


def test_the_message_for_set_default_is_worded_as_torchserve_does(client):
    """set-default and describe word a missing version differently."""
    assert client.put("/models/noop/9.9/set-default").json() == {
        "code": 404,
        "type": "ModelVersionNotFoundException",
        "message": "Model version 9.9 does not exist for model noop",
    }
    assert client.put("/models/nope/9.9/set-default").json()["message"] == "Model not found: nope"


@pytest.mark.parametrize("path", ["/nope", "/models/a/b/c", "/models/a/b/set-default/c", "/token", "//x", "/Models"])
def test_an_unknown_path_is_404(client, path):
    """The body says what was not found: the resource."""
    response = client.get(path)
    assert response.status_code == 404
    assert response.json()["type"] == "ResourceNotFoundException"


@pytest.mark.parametrize(
    "method, path, allowed",
    [
        ("PATCH", "/models", {"GET", "POST", "OPTIONS"}),
        ("DELETE", "/models", {"GET", "POST", "OPTIONS"}),
        ("HEAD", "/models", {"GET", "POST", "OPTIONS"}),
        ("POST", "/models/noop", {"GET", "PUT", "DELETE", "OPTIONS"}),
        ("GET", "/models/noop/1.0/set-default", {"PUT", "OPTIONS"}),
        ("GET", "/", {"OPTIONS"}),
        ("PROPFIND", "/models", {"GET", "POST", "OPTIONS"}),
        ("FROBNICATE", "/models", {"GET", "POST", "OPTIONS"}),
    ],
)
def test_a_wrong_method_is_405_with_allow(client, method, path, allowed):
    """Any method that a path does not serve, known to HTTP or not, is 405 and says which ones it serves."""
    response = client(method, path)
    assert response.status_code == 405
    assert set(response.headers["Allow"].split(", ")) == allowed
    if method != "HEAD":
        assert response.json()["type"] == "MethodNotAllowedException"
        assert response.json()["message"] == "Requested method is not allowed, please refer to API document."


@pytest.mark.parametrize(
    "sent, code",
    [
        (b"GET /models HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"get /models HTTP/1.1\r\n\r\n", 400),
        (b"POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", 400),
        (b"POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /models HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (
            b"POST /models HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            400,
        ),
        (b"GET /models HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 300_000 + b"\r\n\r\n", 431),
        (b"GET /models/%ff%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
        (
            b"GET /models?%zz=%00&=&&limit HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
            200,
        ),
        (
            b"GET http://evil.example/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
            200,
        ),
        (
            b"GET /models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
            400,
        ),
    ],
    ids=lambda x: str(x[:60]) if isinstance(x, bytes) else "",
)
def test_what_is_malformed_is_answered_in_json(client, sent, code):
    """Whatever can be taken for an HTTP request gets the JSON body, an id and the no-cache headers."""
    answered, headers, item = parse_raw(client.raw(sent))
    assert answered == code
    assert headers["content-type"] == "application/json"
    assert headers["pragma"] == "no-cache"
    assert headers["x-request-id"]
    if code != 200:
        assert item["code"] == code
        assert item["type"].endswith("Exception")
        assert "generated by" not in item["message"]


@pytest.mark.parametrize("size, code", [(1000, 202), (1001, 413), (3_000_000, 413)])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_body_over_max_request_size_is_413(serving, manager, size, code, chunked):
    """The limit itself is allowed; the client is read out, gets the answer, and is told the setting."""
    manager.settings = Settings(enable_model_api=True, max_request_size=1000)
    body = b'{"url": "a.mar"' + b" " * (size - 16) + b"}"
    sent = iter([body]) if chunked else body
    response = serving(manager).post("/models", data=sent, headers={"Content-Type": "application/json"})
    assert response.status_code == code
    if code == 413:
        assert response.json()["type"] == "RequestEntityTooLargeException"
        assert "max_request_size" in response.json()["message"]


def test_a_client_that_asks_before_sending_is_told_at_once(serving, manager):
    """With Expect: 100-continue a body too large is never sent."""
    manager.settings = Settings(enable_model_api=True, max_request_size=1000)
    client = serving(manager)
    head = b"POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\nExpect: 100-continue\r\n\r\n"
    assert parse_raw(client.raw(head))[0] == 413


def test_a_client_that_hangs_up_disturbs_nobody(client):
    """Half a request, then nothing: the next one is served."""
    for sent in (b"", b"GET", b"POST /models HTTP/1.1\r\nContent-Length: 100\r\n\r\nabc"):
        with socket.create_connection(client.address) as connection:
            connection.sendall(sent)
    assert client.get("/models").status_code == 200


def test_an_unlisted_exception_is_an_unexplained_500():
    """The table foresees what it lists, and nothing by accident."""
    assert answer_for(KeyError("x")).code == 500
    assert "x'" not in answer_for(KeyError("x")).message
