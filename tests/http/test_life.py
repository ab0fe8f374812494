"""The life of models over HTTP, with the real manager, real workers and real sockets."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from tests.http.archives import BROKEN, OUT_OF_REACH, write_model
from tests.http.conftest import Client
from torchmgmt import ModelManager, register_model, register_model_with_params
from torchmgmt.http import serve
from torchmgmt.lifecycle import VersionState
from torchmgmt.settings import Settings


@pytest.fixture
def store(tmp_path) -> Path:
    store = tmp_path / "store"
    write_model(store, "noop")
    write_model(store, "noop2", name="noop", version="2.0")
    write_model(store, "broken", BROKEN)
    return store


@pytest.fixture
def manager(store, backend) -> Iterator[ModelManager]:
    settings = Settings(enable_model_api=True, model_store=store)
    with ModelManager(settings=settings, backend=backend) as manager:
        yield manager


def register(client: Client, url: str, **parameters: object) -> requests.Response:
    return client.post("/models", params={"url": url, "synchronous": "true", **parameters})


def item_of(client: Client, path: str) -> dict:
    (item,) = client.get(path).json()
    return item


def test_a_whole_life(client, manager):
    """Register, predict, scale, add a version, make it the default, describe, list, unregister."""
    registered = register(client, "noop", initial_workers=1)
    assert registered.json() == {"status": 'Model "noop" Version: 1.0 registered with 1 initial workers'}
    assert manager.predict("noop", "hello") == "hello"
    scaled = client.put("/models/noop", params={"min_worker": 2, "synchronous": "true"})
    assert scaled.json() == {"status": "Workers scaled to 2 for model: noop"}
    item = item_of(client, "/models/noop")
    assert [worker["status"] for worker in item["workers"]] == ["READY", "READY"]
    assert register(client, "noop2").status_code == 200
    assert item_of(client, "/models/noop")["modelVersion"] == "1.0"
    assert client.put("/models/noop/2.0/set-default").status_code == 200
    assert item_of(client, "/models/noop")["modelVersion"] == "2.0"
    assert {item["modelVersion"] for item in client.get("/models/noop/all").json()} == {"1.0", "2.0"}
    assert client.get("/models").json() == {"models": [{"modelName": "noop", "modelUrl": "noop2"}]}
    refused = client.delete("/models/noop/2.0")
    assert (refused.status_code, refused.json()["type"]) == (403, "InvalidModelVersionException")
    assert client.delete("/models/noop/1.0").json() == {"status": 'Model "noop" unregistered'}
    assert client.delete("/models/noop").status_code == 200
    assert client.get("/models").json() == {"models": []}
    assert client.get("/models/noop").status_code == 404


def test_describe_has_what_strict_clients_parse(client):
    """Names and types of the description are the contract's."""
    register(client, "noop", initial_workers=1, batch_size=4, max_batch_delay=7, response_timeout=9)
    item = item_of(client, "/models/noop")
    assert item["modelUrl"] == "noop"
    assert (item["engine"], item["runtime"], item["deviceType"]) == ("Torch", "python", "cpu")
    assert (item["batchSize"], item["maxBatchDelay"], item["responseTimeout"]) == (4, 7, 9)
    assert isinstance(item["responseTimeout"], int)
    assert item["jobQueueStatus"] == {"remainingCapacity": 100, "pendingRequests": 0}
    (worker,) = item["workers"]
    assert isinstance(worker["id"], str)
    assert isinstance(worker["memoryUsage"], int)
    assert worker["gpu"] is False
    os.kill(worker["pid"], 0)


def test_the_archives_min_workers_win_over_the_default(client, store):
    """HTTP's default of 0 workers is only for archives that say nothing; the call wins over both."""
    write_model(store, "sized", config="minWorkers: 1\nmaxWorkers: 2\nbatchSize: 3\n")
    assert register(client, "sized").json()["status"].endswith("registered with 1 initial workers")
    item = item_of(client, "/models/sized")
    assert (item["minWorkers"], item["maxWorkers"], item["batchSize"]) == (1, 2, 3)
    register(client, "sized", model_name="other", initial_workers=0, batch_size=1)
    item = item_of(client, "/models/other")
    assert (item["minWorkers"], item["batchSize"]) == (0, 1)


def test_an_asynchronous_registration_answers_before_the_workers_are_ready(client, manager):
    """202 comes at once; describe shows the worker from then on, and it becomes ready by itself."""
    response = client.post("/models", params={"url": "noop", "initial_workers": 1})
    assert (response.status_code, response.json()) == (202, {"status": "Processing worker updates..."})
    assert len(item_of(client, "/models/noop")["workers"]) == 1
    manager["noop"].wait_ready(30)
    assert manager["noop"].state is VersionState.READY


def test_an_asynchronous_registration_still_checks_the_archive(client):
    """What is wrong with the source is told at once, not found out later."""
    response = client.post("/models", params={"url": "nope.mar"})
    assert (response.status_code, response.json()["type"]) == (404, "ModelNotFoundException")


@pytest.mark.parametrize("code, reason", [(BROKEN, "broken on purpose"), (OUT_OF_REACH, "module_that_does_not_exist")])
def test_a_registration_whose_workers_cannot_start_leaves_nothing(client, store, code, reason):
    """500 with the worker's own error and traceback, and the name is free."""
    write_model(store, "bad", code)
    response = register(client, "bad", initial_workers=1)
    assert (response.status_code, response.json()["type"]) == (500, "InternalServerException")
    message = response.json()["message"]
    assert message.startswith("Failed to start workers for model bad version: 1.0")
    assert reason in message
    assert "handler.py" in message
    assert client.get("/models").json() == {"models": []}


def test_a_failed_version_says_why(client, manager):
    """A worker that cannot start is described with its error; scaling it synchronously is 500."""
    assert register(client, "broken").status_code == 200
    response = client.put("/models/broken", params={"synchronous": "true"})
    assert response.status_code == 500
    assert "broken on purpose" in response.json()["message"]
    item = item_of(client, "/models/broken")
    assert "broken on purpose" in item["lastError"]
    assert item["minWorkers"] == 1


@pytest.mark.parametrize(
    "url, code, type_name, message",
    [
        ("nope.mar", 404, "ModelNotFoundException", "Model not found at: nope.mar"),
        ("../noop", 404, "ModelNotFoundException", "Relative path is not allowed in url: ../noop"),
        ("empty", 400, "InvalidModelException", None),
        ("text.mar", 400, "InvalidModelException", None),
    ],
)
def test_a_source_that_cannot_be_used_is_refused(client, store, url, code, type_name, message):
    """Missing, outside the store, without manifest, corrupt: each with its own code and type."""
    (store / "empty").mkdir()
    (store / "text.mar").write_text("no archive")
    response = register(client, url)
    assert (response.status_code, response.json()["type"]) == (code, type_name)
    assert message in {None, response.json()["message"]}


def test_a_path_outside_the_store_is_not_for_callers_over_http(client, tmp_path):
    """The library may register any path; a caller over HTTP may not."""
    outside = write_model(tmp_path / "elsewhere", "secret")
    assert register(client, str(outside)).status_code == 404
    assert client.get("/models").json() == {"models": []}


def test_registering_twice_is_a_conflict(client):
    """409 names model and version."""
    assert register(client, "noop").status_code == 200
    response = register(client, "noop")
    assert (response.status_code, response.json()["type"]) == (409, "ConflictStatusException")
    assert response.json()["message"] == "Model version 1.0 is already registered for model noop"


def test_of_concurrent_registrations_only_one_succeeds(client):
    """Many callers, one load: one 200, the rest 409."""
    with ThreadPoolExecutor(8) as executor:
        answers = list(executor.map(lambda _: register(client, "noop", initial_workers=1), range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 7
    assert len(item_of(client, "/models/noop")["workers"]) == 1


@pytest.mark.parametrize(
    "method, path",
    [
        ("GET", "/models/nope"),
        ("GET", "/models/nope/all"),
        ("GET", "/models/nope/1.0"),
        ("PUT", "/models/nope"),
        ("PUT", "/models/nope/1.0/set-default"),
        ("DELETE", "/models/nope"),
    ],
)
def test_an_unknown_model_is_404_everywhere(client, method, path):
    """Whatever is asked of it."""
    response = client(method, path)
    assert response.json() == {
        "code": 404,
        "type": "ModelNotFoundException",
        "message": "Model not found: nope",
    }


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_an_unknown_version_is_404_everywhere(client, method):
    """Whatever is asked of it."""
    register(client, "noop")
    response = client(method, "/models/noop/9.9")
    assert response.json() == {
        "code": 404,
        "type": "ModelVersionNotFoundException",
        "message": "Model version: 9.9 does not exist for model: noop",
    }


@pytest.mark.parametrize("name", ["mein modell", "模型 ü", "a+b", "100%"])
def test_a_model_may_have_any_name_without_a_slash(client, name):
    """Spaces and unicode come back as they went."""
    from urllib.parse import quote

    assert register(client, "noop", model_name=name).status_code == 200
    path = f"/models/{quote(name, safe='')}"
    assert item_of(client, path)["modelName"] == name
    assert client.delete(path).json() == {"status": f'Model "{name}" unregistered'}


@pytest.mark.parametrize("name", ["a/b", " ", "\0"])
def test_a_name_that_no_path_can_carry_is_refused(client, name):
    """400 names the parameter."""
    response = register(client, "noop", model_name=name)
    assert response.status_code == 400
    assert "model_name" in response.json()["message"]


DESCRIBING = """
class Handler:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        return [1 for _ in data]

    def describe_handle(self):
        return {"classes": ["cat", "dog"]}
"""


def test_customized_runs_the_handlers_description(client, store):
    """customizedMetadata is what describe_handle returned."""
    write_model(store, "describing", DESCRIBING)
    register(client, "describing", initial_workers=1)
    item = item_of(client, "/models/describing?customized=true")
    assert json.loads(json.dumps(item["customizedMetadata"])) == {"classes": ["cat", "dog"]}
    assert "customizedMetadata" not in item_of(client, "/models/describing")


def test_customized_without_a_worker_is_503(client):
    """There is nobody to ask."""
    register(client, "noop")
    response = client.get("/models/noop?customized=true")
    assert (response.status_code, response.json()["type"]) == (503, "ServiceUnavailableException")


WAITS = """
import pathlib, time
def handle(data, context):
    if data is None:
        return None
    pathlib.Path(data[0]["body"]).with_suffix(".begun").touch()
    while not pathlib.Path(data[0]["body"]).exists():
        time.sleep(0.005)
    return ["done" for _ in data]
"""


def test_unregistering_waits_for_what_runs(client, manager, store, tmp_path):
    """A request that runs when its model is unregistered still gets its answer."""
    write_model(store, "waits", WAITS)
    register(client, "waits", initial_workers=1)
    go = tmp_path / "go"
    future = manager.submit("waits", str(go))
    while not go.with_suffix(".begun").exists():
        threading.Event().wait(0.01)
    threading.Timer(0.2, go.touch).start()
    assert client.delete("/models/waits").status_code == 200
    assert future.result(0) == "done"


def test_describing_does_not_wait_for_a_busy_worker(client, manager, store, tmp_path):
    """Describe and list answer while a batch runs."""
    write_model(store, "waits", WAITS)
    register(client, "waits", initial_workers=1)
    go = tmp_path / "go"
    future = manager.submit("waits", str(go))
    while not go.with_suffix(".begun").exists():
        threading.Event().wait(0.01)
    assert item_of(client, "/models/waits")["workers"][0]["status"] == "READY"
    assert client.get("/models", timeout=5).ok
    assert not future.done()
    go.touch()
    assert future.result(30) == "done"


def test_the_manager_outlives_the_server(manager):
    """Leaving serve leaves the manager open."""
    with serve(manager) as server:
        register(Client(server.url), "noop", initial_workers=1)
    assert manager.predict("noop", "still here") == "still here"


def test_a_closed_manager_is_503(client, manager):
    """A server whose manager is gone says so."""
    manager.close()
    response = client.get("/models")
    assert (response.status_code, response.json()["type"]) == (503, "ServiceUnavailableException")


def test_the_helpers_register_with_one_worker(client):
    """register_model waits for one worker and returns the response."""
    response = register_model("mine", "noop", management_address=client.url)
    assert response.json() == {"status": 'Model "mine" Version: 1.0 registered with 1 initial workers'}
    pairs = [("url", "noop"), ("model_name", "other"), ("synchronous", "true")]
    response = register_model_with_params(pairs, management_address=client.url, timeout=30)
    assert response.status_code == 200
    assert [model["modelName"] for model in client.get("/models").json()["models"]] == ["mine", "other"]


def test_the_helpers_warn_of_a_model_api_that_is_off(store, backend):
    """The 405 is returned, and the warning names the flag."""
    with ModelManager(store, backend=backend) as manager, serve(manager) as server:
        with pytest.warns(UserWarning, match="--enable-model-api"):
            response = register_model("noop", "noop", management_address=server.url)
    assert response.status_code == 405
