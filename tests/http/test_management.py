"""Every endpoint, over real sockets: what reaches the library, and what the caller gets back."""

from __future__ import annotations

import threading
import uuid

import pytest

from tests.http.fakes import FakeManager, info_of
from torchmgmt.http import management
from torchmgmt.http import operations as ops
from torchmgmt.http.parameters import LARGEST
from torchmgmt.settings import Settings

SYNCHRONOUS = {"synchronous": "true"}
NO_WORKERS = (
    'Model "noop" Version: 1.0 registered with 0 initial workers. Use scale workers API to add workers for the model.'
)


def last_call(manager: FakeManager, name: str) -> tuple[tuple, dict]:
    return next((args, kwargs) for called, args, kwargs in reversed(manager.calls) if called == name)


def test_every_operation_has_an_endpoint():
    """What the API description promises is served, and nothing else."""
    assert set(management.ENDPOINTS) == set(ops.MANAGEMENT)


# --- register -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters, code, status",
    [
        (
            {"initial_workers": 2, **SYNCHRONOUS},
            200,
            'Model "noop" Version: 1.0 registered with 2 initial workers',
        ),
        (
            SYNCHRONOUS,
            200,
            NO_WORKERS,
        ),
        (
            {},
            202,
            NO_WORKERS,
        ),
        ({"initial_workers": 1}, 202, "Processing worker updates..."),
    ],
)
def test_register_answers_as_the_contract_quotes(client, parameters, code, status):
    """Code and text depend on whether the caller waits and whether there are workers."""
    response = client.post("/models", params={"url": "noop.mar", **parameters})
    assert (response.status_code, response.json()) == (code, {"status": status})


def test_what_is_not_given_is_left_to_archive_and_settings(client, manager):
    """Only the manager knows what the archive says, so HTTP's own defaults do not hide it."""
    client.post("/models", params={"url": "noop.mar"})
    args, kwargs = last_call(manager, "register")
    assert args == ("noop.mar",)
    assert kwargs == {
        "model_name": None,
        "handler": None,
        "runtime": None,
        "batch_size": None,
        "max_batch_delay": None,
        "initial_workers": None,
        "default_workers": 0,
        "synchronous": False,
        "response_timeout": None,
        "startup_timeout": None,
        "trusted": False,
        "may_fetch": True,
    }


def test_default_workers_per_model_is_the_default_over_http(serving):
    """The setting says how many workers a registration without initial_workers starts."""
    settings = Settings(enable_model_api=True, default_workers_per_model=3)
    manager = FakeManager(settings=settings)
    response = serving(manager).post("/models", params={"url": "noop.mar", **SYNCHRONOUS})
    assert response.json()["status"].endswith("registered with 3 initial workers")


EVERYTHING = {
    "url": "http://example.org/a.mar?x=1#sha256=0",
    "model_name": "my model ü",
    "handler": "module:function",
    "runtime": "Python3",
    "batch_size": 4,
    "max_batch_delay": 0,
    "initial_workers": 2,
    "synchronous": True,
    "response_timeout": 7,
    "startup_timeout": 8,
    "s3_sse_kms": False,
}


@pytest.mark.parametrize(
    "sent",
    [{"params": EVERYTHING}, {"json": EVERYTHING}, {"data": EVERYTHING}],
    ids=["query", "json", "form"],
)
def test_parameters_may_come_in_query_json_or_form(client, manager, sent):
    """Wherever it stands, each parameter reaches the library with its own type."""
    assert client.post("/models", **sent).status_code == 200
    args, kwargs = last_call(manager, "register")
    assert args == (EVERYTHING["url"],)
    assert kwargs["model_name"] == "my model ü"
    assert kwargs["runtime"] == "python3"
    assert (kwargs["batch_size"], kwargs["max_batch_delay"], kwargs["initial_workers"]) == (4, 0, 2)
    assert (kwargs["response_timeout"], kwargs["startup_timeout"]) == (7, 8)
    assert kwargs["synchronous"] is True


def test_a_parameter_in_query_and_body_with_two_values_is_refused(client, manager):
    """Neither place wins silently."""
    response = client.post("/models?url=a.mar&batch_size=2", json={"batch_size": 3})
    assert response.status_code == 400
    assert "batch_size" in response.json()["message"]
    assert manager.calls == []


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({}, "Parameter url is required."),
        ({"url": ""}, "Parameter url is required."),
        ({"url": "a", "runtime": "cobol"}, "Invalid RuntimeType value: cobol"),
        (
            {"url": "a", "batch_size": "-2"},
            f"batch_size is '-2', but must be a whole number from 1 to {LARGEST}",
        ),
        (
            {"url": "a", "initial_workers": "abc"},
            f"initial_workers is 'abc', but must be a whole number from 0 to {LARGEST}",
        ),
        ({"url": "a", "synchronous": "maybe"}, "synchronous is 'maybe', but must be true or false"),
        (
            {"url": "a", "s3_sse_kms": "true"},
            "s3_sse_kms is true, but this server has no support for S3",
        ),
    ],
)
def test_wrong_parameters_are_400(client, manager, parameters, message):
    """Nothing reaches the library before all parameters are right."""
    response = client.post("/models", params=parameters)
    assert response.status_code == 400
    assert response.json() == {"code": 400, "type": "BadRequestException", "message": message}
    assert manager.calls == []


@pytest.mark.parametrize("name", ["response_timeout", "startup_timeout"])
def test_a_timeout_of_zero_is_refused(client, name):
    """TorchServe took it, and every prediction failed."""
    assert client.post("/models", params={"url": "a", name: 0}).status_code == 400


def test_an_unknown_parameter_warns_and_does_not_fail(client, caplog):
    """Clients send some; the answer and the log say so."""
    response = client.post("/models", params={"url": "a.mar", "batchSize": 2, **SYNCHRONOUS})
    warning = "unknown parameter 'batchSize': did you mean 'batch_size'?"
    assert response.status_code == 200
    assert response.json()["warnings"] == [warning]
    assert warning in caplog.text


# --- describe and list ----------------------------------------------------------------------------------------------


def test_describe_is_a_list_of_one(client):
    """The description is a JSON list, also for one version."""
    response = client.get("/models/noop")
    assert response.status_code == 200
    (item,) = response.json()
    assert (item["modelName"], item["modelVersion"]) == ("noop", "1.0")
    assert item["workers"][0] == {
        "id": "9000",
        "startTime": "2026-11-22T23:55:48.901Z",
        "status": "READY",
        "memoryUsage": 0,
        "pid": 1,
        "gpu": False,
        "gpuUsage": "N/A",
    }


def test_describe_takes_a_version_or_all(serving):
    """A version names one; `all` lists every one."""
    client = serving(FakeManager(info_of("m", "1.0"), info_of("m", "2.0")))
    assert [item["modelVersion"] for item in client.get("/models/m/2.0").json()] == ["2.0"]
    assert [item["modelVersion"] for item in client.get("/models/m/all").json()] == ["1.0", "2.0"]


@pytest.mark.parametrize("path", ["/models/noop", "/models/noop/1.0", "/models/noop/all"])
def test_customized_is_handed_on(client, manager, path):
    """customized=true asks the handler, wherever it is said."""
    assert client.get(path, params={"customized": "true"}).status_code == 200
    assert last_call(manager, "describe") == (
        ("noop", "1.0" if path.count("/") == 3 else None),
        {"customized": True},
    )


@pytest.mark.parametrize("name", ["mein modell", "模型", "a+b", "100%", "a?b", "x#y", "..."])
def test_names_may_be_any_text_without_a_slash(serving, name):
    """Names are percent-encoded in paths and come back as they are."""
    from urllib.parse import quote

    client = serving(FakeManager(info_of(name)))
    response = client.get(f"/models/{quote(name, safe='')}")
    assert [item["modelName"] for item in response.json()] == [name]


def test_an_encoded_slash_is_refused(client):
    """`a%2Fb` names no version b of model a."""
    response = client.get("/models/noop%2F1.0")
    assert response.status_code == 400
    assert "'/'" in response.json()["message"]


def test_an_encoded_slash_in_the_query_is_no_matter(client):
    """Only paths are meant."""
    assert client.post("/models?url=http%3A%2F%2Fexample.org%2Fa.mar").status_code == 202


@pytest.mark.parametrize("path", ["/models", "/models/noop", "/models/noop/1.0", "/models/noop/all"])
def test_a_trailing_slash_is_the_same_resource(client, path):
    """With and without it, the answer is the same."""
    assert client.get(path + "/").json() == client.get(path).json()


def test_list_is_sorted_and_paged(serving):
    """Pages follow one another by name; the last one has no token."""
    client = serving(FakeManager(*(info_of(name) for name in "cabd")))
    first = client.get("/models", params={"limit": 3}).json()
    assert first == {
        "nextPageToken": "3",
        "models": [{"modelName": name, "modelUrl": f"{name}.mar"} for name in "abc"],
    }
    last = client.get("/models", params={"limit": 3, "next_page_token": first["nextPageToken"]}).json()
    assert last == {"models": [{"modelName": "d", "modelUrl": "d.mar"}]}


def test_a_page_has_100_models_by_default_and_1000_at_most(serving):
    """limit defaults to 100; more than 1000 counts as 1000."""
    client = serving(FakeManager(*(info_of(f"m{n:04}") for n in range(1001))))
    assert len(client.get("/models").json()["models"]) == 100
    largest = client.get("/models", params={"limit": 5000}).json()
    assert len(largest["models"]) == 1000
    assert largest["nextPageToken"] == "1000"


@pytest.mark.parametrize(
    "parameters", [{"limit": 0}, {"limit": "x"}, {"next_page_token": -1}, {"next_page_token": "x"}]
)
def test_a_wrong_page_is_400(client, parameters):
    """A wrong limit or token is not silently another one."""
    assert client.get("/models", params=parameters).status_code == 400


def test_a_token_past_the_end_gives_an_empty_page(client):
    """Models may have gone since the page before."""
    assert client.get("/models", params={"next_page_token": 99}).json() == {"models": []}


# --- scale ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, parameters, code, status, call",
    [
        (
            "/models/noop",
            {"min_worker": 3, **SYNCHRONOUS},
            200,
            "Workers scaled to 3 for model: noop",
            (("noop", 3, 3), {"version": None, "timeout": -1, "synchronous": True}),
        ),
        (
            "/models/noop/1.0",
            {"min_worker": 3, "max_worker": 5, "timeout": 0, **SYNCHRONOUS},
            200,
            "Workers scaled to 3 for model: noop, version: 1.0",
            (("noop", 3, 5), {"version": "1.0", "timeout": 0, "synchronous": True}),
        ),
        (
            "/models/noop",
            {"model_version": "1.0", "number_gpu": 0},
            202,
            "Processing worker updates...",
            (("noop", 1, 1), {"version": "1.0", "timeout": -1, "synchronous": False}),
        ),
    ],
)
@pytest.mark.parametrize("where", ["params", "json", "data"])
def test_scale_answers_as_the_contract_quotes(client, manager, path, parameters, code, status, call, where):
    """min_worker defaults to 1, max_worker to min_worker; 202 unless the caller waits; query and body alike."""
    response = client.put(path, **{where: parameters})
    assert (response.status_code, response.json()) == (code, {"status": status})
    assert last_call(manager, "scale") == call


@pytest.mark.parametrize(
    "path, parameters, message",
    [
        (
            "/models/noop",
            {"min_worker": 2, "max_worker": 1},
            "max_worker cannot be less than min_worker.",
        ),
        ("/models/noop", {"max_worker": 0}, "max_worker cannot be less than min_worker."),
        (
            "/models/noop",
            {"timeout": -2},
            f"timeout is '-2', but must be a whole number of seconds from -1 to {LARGEST}",
        ),
        (
            "/models/noop",
            {"number_gpu": -1},
            f"number_gpu is '-1', but must be a whole number from 0 to {LARGEST}",
        ),
        (
            "/models/noop/1.0",
            {"model_version": "2.0"},
            "model_version is '2.0', but the path says '1.0'",
        ),
    ],
)
def test_a_wrong_scale_is_400(client, manager, path, parameters, message):
    """Nothing is scaled before all parameters are right."""
    response = client.put(path, params=parameters)
    assert (response.status_code, response.json()["message"]) == (400, message)
    assert manager.calls == []


# --- set-default, unregister ----------------------------------------------------------------------------------------


def test_set_default_answers_as_the_contract_quotes(client, manager):
    """The answer names model and version."""
    response = client.put("/models/noop/1.0/set-default")
    assert response.status_code == 200
    assert response.json() == {"status": 'Default version successfully updated for model "noop" to "1.0"'}
    assert last_call(manager, "set_default") == (("noop", "1.0"), {})


@pytest.mark.parametrize("path, version", [("/models/noop", None), ("/models/noop/1.0", "1.0")])
def test_unregister_answers_as_the_contract_quotes(client, manager, path, version):
    """Without a version the manager decides which one goes."""
    response = client.delete(path)
    assert (response.status_code, response.json()) == (200, {"status": 'Model "noop" unregistered'})
    assert last_call(manager, "unregister") == (("noop", version), {})


@pytest.mark.parametrize(
    "method, path, allow",
    [
        ("POST", "/models?url=a.mar", {"GET", "OPTIONS"}),
        ("POST", "/models", {"GET", "OPTIONS"}),
        ("DELETE", "/models/noop", {"GET", "PUT", "OPTIONS"}),
        ("DELETE", "/models/nope/1.0", {"GET", "PUT", "OPTIONS"}),
    ],
)
def test_without_the_model_api_nothing_comes_or_goes(serving, caplog, method, path, allow):
    """Registering and unregistering are 405 unless switched on; the log names the flag, the answer does not."""
    manager = FakeManager(info_of("noop"), settings=Settings())
    response = serving(manager)(method, path)
    assert response.status_code == 405
    assert response.json() == {
        "code": 405,
        "type": "MethodNotAllowedException",
        "message": "Requested method is not allowed, please refer to API document.",
    }
    assert set(response.headers["Allow"].split(", ")) == allow
    assert "--enable-model-api" in caplog.text
    assert manager.calls == []


# --- for every response ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, path",
    [
        ("GET", "/models"),
        ("GET", "/models/nope"),
        ("GET", "/nope"),
        ("PATCH", "/models"),
        ("OPTIONS", "/"),
    ],
)
def test_every_response_has_an_id_and_is_not_cached(client, method, path):
    """A request id, and TorchServe's no-cache headers, on success and on failure."""
    headers = client(method, path).headers
    assert uuid.UUID(headers["x-request-id"])
    assert headers["Pragma"] == "no-cache"
    assert headers["Cache-Control"] == "no-cache; no-store, must-revalidate, private"
    assert headers["Expires"] == "Thu, 01 Jan 1970 00:00:00 UTC"
    assert headers["Content-Type"] == "application/json"


def test_the_callers_request_id_comes_back(client):
    """A caller finds its own id again."""
    assert client.get("/models", headers={"X-Request-Id": "my-id"}).headers["x-request-id"] == "my-id"


@pytest.mark.parametrize("given", ["x" * 129, "a b", "\x80ü"])
def test_an_unfit_request_id_is_replaced(client, given):
    """What cannot be logged safely is not echoed."""
    response = client.get("/models", headers={"x-request-id": given.encode("latin-1")})
    assert uuid.UUID(response.headers["x-request-id"])


def test_json_is_pretty_printed_and_ends_with_a_newline(client):
    """People read it with curl."""
    assert client.get("/models", params={"limit": 1}).text == (
        '{\n  "nextPageToken": "1",\n  "models": [\n    {\n      "modelName": "noop",\n'
        '      "modelUrl": "noop.mar"\n    }\n  ]\n}\n'
    )


def test_waiting_calls_leave_threads_for_the_others(manager, serving):
    """When as many calls wait as may, one more is 503 with Retry-After, and describing still answers at once."""
    manager.gate.clear()
    client = serving(manager)
    answers: list[int] = []

    def register() -> None:
        answers.append(client.post("/models", params={"url": "a.mar", **SYNCHRONOUS}).status_code)

    threads = [threading.Thread(target=register) for _ in range(management.MAX_WAITING)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert manager.entered.acquire(timeout=30)
    try:
        assert client.get("/models/noop").status_code == 200
        assert client.put("/models/noop").status_code == 202
        refused = client.put("/models/noop", params=SYNCHRONOUS)
        assert refused.status_code == 503
        assert refused.json()["type"] == "ServiceUnavailableException"
        assert int(refused.headers["Retry-After"]) > 0
    finally:
        manager.gate.set()
        for thread in threads:
            thread.join()
    assert answers == [200] * management.MAX_WAITING
    assert client.put("/models/noop", params=SYNCHRONOUS).status_code == 200


def test_the_app_can_be_mounted_in_another_server(manager):
    """create_app starts and binds nothing: any WSGI server or test client may call it."""
    import falcon.testing

    from torchmgmt.http import create_app

    client = falcon.testing.TestClient(create_app(manager), headers={"Host": "localhost"})
    assert client.simulate_get("/models").status_code == 200
    response = client.simulate_post("/models", json={"url": "a.mar", "synchronous": True})
    assert response.status_code == 200
