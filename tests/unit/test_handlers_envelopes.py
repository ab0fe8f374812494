"""Request envelopes: the items of several requests go to the handler together, and each gets its own answers back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.shipped import context_of
from torchmgmt.handlers.envelopes import (
    BaseEnvelope,
    BodyEnvelope,
    JSONEnvelope,
    KServeEnvelope,
    KServev2Envelope,
)
from torchmgmt.handlers.inputs import InputRefused


def through(kind: type[BaseEnvelope], folder: Path, handle: Any, *bodies: Any, header: str = "") -> Any:
    context = context_of(folder, {"modelName": "m", "modelVersion": "1.0"})
    context.begin_batch([f"id{n}" for n in range(len(bodies))], [{"Explain": header} for _ in bodies])
    return kind(handle).handle([{"body": body} for body in bodies], context)


def double(data: Any, context: Any) -> Any:
    return [each * 2 for each in data]


def test_a_body_comes_without_its_field(tmp_path: Path) -> None:
    """The handler gets what was sent, 0 and tensors included; its answers go out as they are."""
    assert through(BodyEnvelope, tmp_path, double, 0, 4) == [0, 8]


def test_instances_of_several_requests_are_split_again(tmp_path: Path) -> None:
    """JSON and KServe: the handler gets all instances, each request the predictions of its own."""
    bodies = ({"instances": [1, 2]}, {"instances": [3]}, b'{"instances": [4, 5]}')
    predictions = [{"predictions": [2, 4]}, {"predictions": [6]}, {"predictions": [8, 10]}]
    assert [json.loads(answer) for answer in through(JSONEnvelope, tmp_path, double, *bodies)] == predictions
    assert through(KServeEnvelope, tmp_path, double, *bodies) == predictions
    assert through(KServeEnvelope, tmp_path, double, bodies[0], header="True") == [{"explanations": [2, 4]}]
    with pytest.raises(ValueError, match="1 answers for 5 items"):
        through(KServeEnvelope, tmp_path, lambda data, context: [0], *bodies)


def test_base64_in_instances_is_decoded(tmp_path: Path) -> None:
    """JSON: an instance, or a field of it, that is {"b64": …} is given to the handler as bytes."""
    seen: list[Any] = []

    def handle(data: Any, context: Any) -> Any:
        seen.extend(data)
        return [1] * len(data)

    through(JSONEnvelope, tmp_path, handle, {"instances": [{"b64": "aGk="}, {"picture": {"b64": "aGk="}, "size": 3}]})
    assert seen == [b"hi", {"picture": b"hi", "size": 3}]


def test_version_2_has_shapes_and_types(tmp_path: Path) -> None:
    """KServe's version 2: data in its shape to the handler; outputs with type, and the id and model of the request."""
    seen: list[Any] = []

    def handle(data: Any, context: Any) -> Any:
        seen.extend(each["data"] for each in data)
        return [torch.ones(2), [1, 2], "text"]

    inputs = [
        {"name": "a", "shape": [2, 2], "datatype": "INT64", "data": [1, 2, 3, 4]},
        {"name": "b", "shape": [1], "datatype": "BYTES", "data": ["word"]},
    ]
    other = {"inputs": [{"name": "c", "shape": [], "datatype": "FP32", "data": [1.5]}]}
    first, second = through(KServev2Envelope, tmp_path, handle, {"id": "mine", "inputs": inputs}, other)
    assert seen == [[[1, 2], [3, 4]], "word", 1.5]
    assert first == {
        "id": "mine",
        "model_name": "m",
        "model_version": "1.0",
        "outputs": [
            {"name": "a", "datatype": "FP32", "data": [1.0, 1.0], "shape": [2]},
            {"name": "b", "datatype": "INT64", "data": [1, 2], "shape": [2]},
        ],
    }
    assert second["id"] == "id1"
    assert second["outputs"] == [{"name": "c", "datatype": "BYTES", "data": ["text"], "shape": [1]}]


@pytest.mark.parametrize(
    "kind, body, words",
    [
        (JSONEnvelope, {"inputs": []}, "a list as 'instances'; it has: inputs"),
        (JSONEnvelope, b"{", "must be JSON"),
        (JSONEnvelope, {"instances": [{"b64": 5}]}, "b64"),
        (KServeEnvelope, [1], "JSON object"),
        (KServev2Envelope, {"inputs": [5]}, "name, shape, datatype and data"),
        (KServev2Envelope, {"inputs": [{"shape": [3], "datatype": "INT8", "data": [1]}]}, "3 elements, but data has 1"),
        (KServev2Envelope, {"inputs": [{"shape": [1], "datatype": "INT9", "data": [1]}]}, "'INT9'"),
        (KServev2Envelope, {"inputs": [{"shape": [1], "datatype": [], "data": [1]}]}, "not []"),
        (KServev2Envelope, {"inputs": [{"shape": [1], "datatype": "BYTES", "data": 1}]}, "data must be a list"),
        (KServev2Envelope, b"[" * 100_000, "must be JSON"),
        (KServev2Envelope, {"inputs": [{"shape": "x", "datatype": "INT8", "data": [1]}]}, "whole numbers"),
    ],
)
def test_what_has_not_the_form_is_refused(tmp_path: Path, kind: type[BaseEnvelope], body: Any, words: str) -> None:
    """A request that is not in the envelope's form is at fault itself, and is told what the form is."""
    with pytest.raises(InputRefused) as caught:
        through(kind, tmp_path, double, body)
    assert words in str(caught.value)


def test_an_envelope_loads_its_handler(tmp_path: Path) -> None:
    """Called without data, as at the start, it passes that on."""
    seen: list[Any] = []
    assert JSONEnvelope(lambda data, context: seen.append(data)).handle(None, None) is None
    assert seen == [None]


def test_no_items_are_no_work(tmp_path: Path) -> None:
    """Without any the handler is not called; a tensor without elements is not laid out, however large its shape says."""
    assert through(KServeEnvelope, tmp_path, lambda data, context: 1 / 0, {"instances": []}) == [{"predictions": []}]
    seen: list[Any] = []

    def handle(data: Any, context: Any) -> Any:
        seen.extend(each["data"] for each in data)
        return [0] * len(data)

    empty = {"name": "a", "shape": [1_000_000_000, 0], "datatype": "INT8", "data": []}
    through(KServev2Envelope, tmp_path, handle, {"inputs": [empty]})
    assert seen == [[]]


def test_more_outputs_than_inputs_are_an_error(tmp_path: Path) -> None:
    """Each output has the name of an input; the error says both numbers."""
    tensor = {"name": "a", "shape": [1], "datatype": "INT8", "data": [1]}
    with pytest.raises(ValueError, match="2 outputs for 1 inputs"):
        through(KServev2Envelope, tmp_path, lambda data, context: [1, 2], {"inputs": [tensor]})


def test_an_error_that_names_items_names_their_requests(tmp_path: Path) -> None:
    """With the reason of each; what it says of items that there are not is not taken for requests."""

    class Refused(Exception):
        def __init__(self) -> None:
            self.indexes: Any = (1, 2, 4)
            self.errors: Any = {2: ValueError("second"), 4: ValueError("fourth")}

    def handle(data: Any, context: Any) -> Any:
        raise Refused

    bodies = ({"instances": [1]}, {"instances": [2, 3]}, {"instances": []}, {"instances": [4, 5]})
    with pytest.raises(Refused) as caught:
        through(JSONEnvelope, tmp_path, handle, *bodies)
    assert caught.value.indexes == (1, 3)
    assert {index: str(error) for index, error in caught.value.errors.items()} == {1: "second", 3: "fourth"}
    with pytest.raises(Refused) as caught:
        through(JSONEnvelope, tmp_path, handle, *bodies[:2])
    assert caught.value.indexes == ()
