"""Inference requests and answers of the Open Inference Protocol, version 2, with its extension for binary tensor data.

A handler gets a row with a field for each input, by its name: a torch tensor, or of BYTES the list of their elements. The
only input is under ``"body"``, too. The request's own parameters, if there are any, are under ``"parameters"``. An archive
with the envelope ``kservev2`` gets what TorchServe hands to that: the JSON of the request under ``"body"``, with the data of
tensors that came as binary data as lists.

What it answers becomes the outputs: each entry of a dictionary one by that name, a list of tensors one for each, anything
else the only one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import field, frozen

from torchmgmt.channel import Buffer
from torchmgmt.exchange import Encoded, ResponseProperties
from torchmgmt.handlers.inputs import InputRefused
from torchmgmt.worker.datatypes import Tensor, Values, from_bytes, from_json, tensor_of, to_bytes, to_json
from torchmgmt.worker.loader import ServedAs

__all__ = ["HEADER_LENGTH", "Asked", "InferRow", "read_request", "written"]

ENVELOPE = "kservev2"
HEADER_LENGTH = "Inference-Header-Content-Length"
"""The header that says how much of a body is JSON; after that come the tensors."""
# What the protocol's extensions define; the rest is the handler's.
_PROTOCOLS_OWN = frozenset({"binary_data_output"})
_NOT_SERVED = ("shared_memory_region", "classification")


@frozen
class Asked:
    """What a request says of the answer that it wants."""

    id: str | None = None
    outputs: Mapping[str, bool] = {}
    """The outputs by name, and whether each is to be binary data; all of them if there are none."""
    is_binary: bool = False
    """Whether outputs that nobody named are to be binary data."""
    served_as: ServedAs = field(factory=ServedAs)


class InferRow(dict[str, Any]):
    """A handler's row, and what its request asked for."""

    def __init__(self, fields: Mapping[str, Any], asked: Asked) -> None:
        super().__init__(fields)
        self.asked = asked


@frozen
class _Input:
    name: str
    datatype: str
    shape: Sequence[int]
    values: Values
    is_binary: bool


# --- requests -----------------------------------------------------------------------------------------------------------


def read_request(content: Buffer, json_bytes: int, served_as: ServedAs) -> InferRow:
    """Return the row of a request, of which the first ``json_bytes`` are JSON (-1: all).

    Raises:
        InputRefused: it is no inference request; says what is wrong with it.
    """
    view = memoryview(content).cast("B")
    if json_bytes > view.nbytes:
        raise InputRefused(f"{HEADER_LENGTH} is {json_bytes}, but the body has {view.nbytes} bytes")
    end = view.nbytes if json_bytes < 0 else json_bytes
    request = _json_of(view[:end])
    inputs = _inputs(request.get("inputs"), view[end:])
    asked = _asked(request, served_as)
    if served_as.envelope == ENVELOPE:
        return InferRow({"body": _for_envelope(request, inputs)}, asked)
    fields: dict[str, Any] = {}
    if len(inputs) == 1:
        fields["body"] = inputs[0].values
    parameters = {key: value for key, value in _parameters(request).items() if key not in _PROTOCOLS_OWN}
    if parameters:
        fields["parameters"] = parameters
    fields.update((each.name, each.values) for each in inputs)
    return InferRow(fields, asked)


def _json_of(data: memoryview) -> dict[str, Any]:
    try:
        request = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"the inference request is not valid JSON: {error}") from None
    if not isinstance(request, dict):
        raise InputRefused("the inference request must be a JSON object with inputs")
    return request


def _parameters(holder: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = holder.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise InputRefused("parameters must be a JSON object")
    for name in _NOT_SERVED:
        if name in parameters:
            raise InputRefused(f"the parameter {name} belongs to an extension that is not served here")
    return parameters


def _inputs(given: Any, binary: memoryview) -> list[_Input]:
    if not isinstance(given, list) or not given:
        raise InputRefused(
            "an inference request must have inputs: a list of tensors with name, shape, datatype and data"
        )
    inputs = []
    for index, tensor in enumerate(given):
        read, binary = _input(index, tensor, binary)
        inputs.append(read)
    if binary.nbytes:
        raise InputRefused(f"the body has {binary.nbytes} bytes more than its inputs say")
    if len({each.name for each in inputs}) != len(inputs):
        raise InputRefused("two inputs have one name")
    return inputs


def _input(index: int, tensor: Any, binary: memoryview) -> tuple[_Input, memoryview]:
    """Return an input, and the binary data that is left after it."""
    if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
        raise InputRefused(f"input {index} must be a JSON object with a name")
    what = f"input {tensor['name']!r}"
    datatype, shape = str(tensor.get("datatype")), _shape(what, tensor.get("shape"))
    size = _parameters(tensor).get("binary_data_size")
    if size is None:
        if "data" not in tensor:
            raise InputRefused(f"{what} has neither data nor the parameter binary_data_size")
        return _Input(tensor["name"], datatype, shape, from_json(what, datatype, shape, tensor["data"]), False), binary
    if not isinstance(size, int) or not 0 <= size <= binary.nbytes:
        raise InputRefused(f"{what} has the binary_data_size {size!r}, but {binary.nbytes} bytes are left of the body")
    values = from_bytes(what, datatype, shape, binary[:size])
    return _Input(tensor["name"], datatype, shape, values, True), binary[size:]


def _shape(what: str, shape: Any) -> list[int]:
    if not isinstance(shape, list) or not all(type(each) is int and each >= 0 for each in shape):
        raise InputRefused(f"{what} must have its shape as a list of whole numbers, not {shape!r}")
    return shape


def _asked(request: Mapping[str, Any], served_as: ServedAs) -> Asked:
    given_id = request.get("id")
    is_binary = _parameters(request).get("binary_data_output") is True
    outputs: dict[str, bool] = {}
    for index, output in enumerate(request.get("outputs") or ()):
        if not isinstance(output, dict) or not isinstance(output.get("name"), str):
            raise InputRefused(f"output {index} must be a JSON object with a name")
        outputs[output["name"]] = _parameters(output).get("binary_data", is_binary) is True
    return Asked(None if given_id is None else str(given_id), outputs, is_binary, served_as)


def _for_envelope(request: dict[str, Any], inputs: Sequence[_Input]) -> dict[str, Any]:
    """Return the request's JSON with all data in it."""
    tensors = []
    for tensor, read in zip(request["inputs"], inputs, strict=True):
        data = _plain(read) if read.is_binary else tensor["data"]
        left = {key: value for key, value in tensor.items() if key != "parameters" or not read.is_binary}
        tensors.append({**left, "data": data})
    return {**request, "inputs": tensors}


def _plain(read: _Input) -> list[Any]:
    if isinstance(read.values, torch.Tensor):
        return list(read.values.reshape(-1).tolist())
    return [element.decode("utf-8", "replace") for element in read.values]


# --- answers ------------------------------------------------------------------------------------------------------------


def written(answer: Any, asked: Asked) -> Encoded:
    """Return the body for ``answer`` in one segment; where tensors are binary data, with the header that says so.

    Raises:
        InputRefused: the request named an output that there is not, or JSON cannot say one.
        TypeError: something in it has no datatype.
    """
    head: dict[str, Any] = {"model_name": asked.served_as.name, "model_version": asked.served_as.version}
    if asked.id is not None:
        head["id"] = asked.id
    if _is_response(answer):  # an envelope's, or that of a handler that knows the protocol
        head |= {key: value for key, value in answer.items() if value is not None}
        outputs = [(each["name"], _given(each)) for each in answer["outputs"]]
    else:
        outputs = [(name, tensor_of(value)) for name, value in _named(answer, asked)]
    head["outputs"], blobs = _outputs(_chosen(outputs, asked), asked)
    text = json.dumps(head, allow_nan=False).encode()
    if not blobs:
        return Encoded([text], content_type="application/json")
    properties = ResponseProperties(headers={HEADER_LENGTH: str(len(text))})
    return Encoded([b"".join([text, *blobs])], properties, "application/octet-stream")


def _is_response(answer: Any) -> bool:
    outputs = answer.get("outputs") if isinstance(answer, dict) else None
    return (
        isinstance(outputs, list)
        and bool(outputs)
        and all(isinstance(each, dict) and {"name", "datatype", "shape", "data"} <= each.keys() for each in outputs)
    )


def _given(output: Mapping[str, Any]) -> Tensor:
    """Return an output that stands in an answer as the protocol writes it."""
    datatype = str(output["datatype"])
    values = from_json(f"output {output['name']!r}", datatype, output["shape"], _as_list(output["data"]))
    return Tensor(datatype, output["shape"], values)


def _as_list(data: Any) -> list[Any]:
    return data if isinstance(data, list) else [data]


def _named(answer: Any, asked: Asked) -> Sequence[tuple[str, Any]]:
    if isinstance(answer, dict) and answer and all(isinstance(name, str) for name in answer):
        return list(answer.items())
    if isinstance(answer, (list, tuple)) and answer and all(hasattr(each, "dtype") for each in answer):
        return [(f"output-{index}", each) for index, each in enumerate(answer)]
    return [(next(iter(asked.outputs)) if len(asked.outputs) == 1 else "output-0", answer)]


def _chosen(outputs: Sequence[tuple[str, Tensor]], asked: Asked) -> Sequence[tuple[str, Tensor]]:
    """Return those that were asked for, in that order."""
    if not asked.outputs:
        return outputs
    by_name = dict(outputs)
    for name in asked.outputs:
        if name not in by_name:
            raise InputRefused(f"there is no output {name!r}; the model gives {', '.join(map(repr, by_name))}")
    return [(name, by_name[name]) for name in asked.outputs]


def _outputs(outputs: Sequence[tuple[str, Tensor]], asked: Asked) -> tuple[list[dict[str, Any]], list[Buffer]]:
    """Return the outputs as they stand in the JSON, and what comes after it."""
    items: list[dict[str, Any]] = []
    blobs: list[Buffer] = []
    for name, tensor in outputs:
        item: dict[str, Any] = {"name": name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if asked.outputs.get(name, asked.is_binary):
            blob = to_bytes(tensor)
            item["parameters"] = {"binary_data_size": memoryview(blob).nbytes}
            blobs.append(blob)
        else:
            item["data"] = to_json(name, tensor)
        items.append(item)
    return items, blobs
