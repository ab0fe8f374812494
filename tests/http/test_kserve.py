"""KServe's protocol, version 1: its paths, and an answer as its clients expect it."""

from __future__ import annotations

import pytest

ROWS = "def handle(data, context):\n    return data and [[each * 2 for each in row['body']['instances']] for row in data]\n"
OWN = "def handle(data, context):\n    return data and [{'predictions': [len(data)], 'more': 1} for row in data]\n"
EXPLAINS = (
    "def handle(data, context):\n"
    "    return data and [[context.get_request_header(i, 'explain')] for i, row in enumerate(data)]\n"
)


def test_predictions_are_what_the_handler_answers(predicting):
    """It gets the body's JSON, as TorchServe hands it over; a list that it answers is under the protocol's key."""
    response = predicting(ROWS).client.post("/v1/models/model:predict", json={"instances": [1, 2]})
    assert (response.status_code, response.json()) == (200, {"predictions": [2, 4]})


def test_a_client_that_names_no_content_type_sends_json(predicting):
    """The protocol has nothing else."""
    response = predicting(ROWS).client.post("/v1/models/model:predict", data=b'{"instances": [1]}')
    assert response.json() == {"predictions": [2]}


def test_an_answer_that_has_the_protocols_form_stays(predicting):
    """That of the envelope kserve, or of a handler that knows the protocol."""
    response = predicting(OWN).client.post("/v1/models/model:predict", json={"instances": []})
    assert response.json() == {"predictions": [1], "more": 1}


def test_an_archive_with_the_envelope_gets_the_instances(predicting):
    """The envelope kserve makes each one an item of the batch."""
    made = predicting("def handle(data, context):\n    return data\n")
    made.register(
        "wrapped", "def handle(data, context):\n    return data and [each + 1 for each in data]\n", envelope="kserve"
    )
    assert made.client.post("/v1/models/wrapped:predict", json={"instances": [1, 2]}).json() == {"predictions": [2, 3]}
    assert made.client.post("/v1/models/wrapped:explain", json={"instances": [1]}).json() == {"explanations": [2]}
    refused = made.client.post("/v1/models/wrapped:predict", json={})
    assert (refused.status_code, "instances" in refused.json()["error"]) == (400, True)


def test_explanations_have_their_own_key(predicting):
    """And the header that asks BaseHandler for them."""
    response = predicting(EXPLAINS).client.post("/v1/models/model:explain", json={"instances": []})
    assert response.json() == {"explanations": ["True"]}


def test_a_name_may_have_a_colon_in_it(predicting):
    """The verb is what comes after the last one."""
    made = predicting(EXPLAINS, name="a:b")
    assert made.client.post("/v1/models/a:b:predict", json={}).json() == {"predictions": [None]}


def test_models_and_their_readiness(predicting):
    """A model without workers is listed, and not ready."""
    made = predicting(ROWS)
    made.register("idle", ROWS, initial_workers=0, max_workers=0)
    assert made.client.get("/v1/models").json() == {"models": ["idle", "model"]}
    assert made.client.get("/v1/models/model").json() == {"name": "model", "ready": True}
    assert made.client.get("/v1/models/idle").json() == {"name": "idle", "ready": False}


@pytest.mark.parametrize(
    "method, path, code",
    [
        ("GET", "/v1/models/nope", 404),
        ("POST", "/v1/models/nope:predict", 404),
        ("GET", "/v1/models/nope:predict", 405),
        ("GET", "/v1/nope", 404),
    ],
)
def test_errors_have_the_message_where_these_clients_look(predicting, method, path, code):
    """Under ``error``, beside the form that all our errors have."""
    response = predicting(ROWS).client(method, path)
    item = response.json()
    assert (response.status_code, item["code"]) == (code, code)
    assert item["error"] == item["message"]


def test_a_handler_that_fails_says_so_in_the_same_way(predicting):
    """One line."""
    item = predicting(ROWS).client.post("/v1/models/model:predict", json={}).json()
    assert "KeyError" in item["error"]


def test_a_compressed_body_is_refused(predicting):
    """What reads it takes it as it is."""
    response = predicting(ROWS).client.post("/v1/models/model:predict", data=b"x", headers={"Content-Encoding": "gzip"})
    assert (response.status_code, response.json()["type"]) == (415, "UnsupportedMediaTypeException")
