"""Request envelopes: the forms in which orchestrators wrap what a handler is to get, and unwrap what it answers.

Their names and formats are those of TorchServe's ``ts.torch_handler.request_envelope``; people's own build on
:class:`BaseEnvelope`. A batch may hold several requests: each is answered by itself.
"""

from __future__ import annotations

import base64
import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain, islice
from math import prod
from typing import Any

from torchmgmt.handlers.inputs import InputRefused, read_each

__all__ = ["BaseEnvelope", "BodyEnvelope", "JSONEnvelope", "KServeEnvelope", "KServev2Envelope", "enveloped"]

# From the names of types of the open inference protocol's version 2 to those of torch and numpy.
_DATATYPES: Mapping[str, str] = {
    "BOOL": "bool",
    **{f"{sign}INT{bits}": f"{sign.lower()}int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": f"float{bits}" for bits in (16, 32, 64)},
}
_DATATYPE_OF = {name: datatype for datatype, name in _DATATYPES.items()}


class BaseEnvelope(ABC):
    """Stands around a handler's ``handle(data, context)``; a subclass says how a batch is opened and answers are wrapped."""

    def __init__(self, handle_fn: Callable[[Any, Any], Any]) -> None:
        self._handle_fn = handle_fn
        self.context: Any = None

    def handle(self, data: Any, context: Any) -> Any:
        """Answer a batch through both steps. Without data it only calls the handler, which is then to load its model."""
        self.context = context
        results = self._handle_fn(self.parse_input(data) if data else data, context)
        return self.format_output(results) if results else results

    @abstractmethod
    def parse_input(self, data: Any) -> Any:
        """Return what the handler gets, of the rows of a batch."""

    @abstractmethod
    def format_output(self, data: Any) -> Any:
        """Return the answers to the batch, of what the handler returned."""


class BodyEnvelope(BaseEnvelope):
    """Gives the handler what was sent, without the name of its field."""

    def parse_input(self, data: Any) -> Any:
        """Return ``data`` or ``body`` of each row."""
        return [_sent(row) for row in data]

    def format_output(self, data: Any) -> Any:
        """Return the answers as they are."""
        return data


class _ManyItems(BaseEnvelope):
    """Requests that each have a list of items: the handler gets the items of all, each request its own answers."""

    def __init__(self, handle_fn: Callable[[Any, Any], Any]) -> None:
        super().__init__(handle_fn)
        self._lengths: list[int] = []

    def handle(self, data: Any, context: Any) -> Any:
        """Answer a batch. What the handler says of single items, returned or raised, is said of their requests."""
        self.context = context
        if not data:
            return self._handle_fn(data, context)
        items = self.parse_input(data)
        try:
            results = self._handle_fn(items, context) if items else []
        except BaseException as error:
            self._name_requests(error)
            raise
        return results if results is None else self.format_output(results)

    def parse_input(self, data: Any) -> Any:
        """Return the items of all requests. Raises InputRefused, which names the requests that are not in the form."""
        items = read_each(data, self._items_of)
        self._lengths = [len(each) for each in items]
        return list(chain.from_iterable(items))

    def format_output(self, data: Any) -> Any:
        """Return an answer for each request. Raises ValueError if there are not as many answers as items."""
        if len(self._lengths) == 1:
            return [self._answer_or_error(0, data)]
        if len(data) != sum(self._lengths):
            raise ValueError(f"the handler returned {len(data)} answers for {sum(self._lengths)} items of a batch")
        answers = iter(data)
        return [self._answer_or_error(index, list(islice(answers, count))) for index, count in enumerate(self._lengths)]

    def _answer_or_error(self, index: int, results: Any) -> Any:
        errors = (
            [each for each in results if isinstance(each, BaseException)] if isinstance(results, (list, tuple)) else []
        )
        return errors[0] if errors else self._answer(index, results)

    def _name_requests(self, error: BaseException) -> None:
        """Have an error that names items of the batch name the requests that they came with."""
        items: Any = getattr(error, "indexes", None)
        if not isinstance(items, Collection):
            return
        owners = [request for request, length in enumerate(self._lengths) for _ in range(length)]
        named = {item: owners[item] for item in items if isinstance(item, int) and 0 <= item < len(owners)}
        own: Any = getattr(error, "errors", None)
        with contextlib.suppress(AttributeError):  # a class that lets nobody set them
            error.indexes = tuple(sorted(set(named.values()))) if len(named) == len(items) else ()  # type: ignore[attr-defined]
            if isinstance(own, dict):
                error.errors = {named[item]: own[item] for item in sorted(named, reverse=True) if item in own}  # type: ignore[attr-defined]

    @abstractmethod
    def _items_of(self, row: Any) -> Sequence[Any]: ...

    @abstractmethod
    def _answer(self, index: int, results: Any) -> Any: ...


class JSONEnvelope(_ManyItems):
    """``{"instances": […]}`` in, ``{"predictions": […]}`` as JSON text out; ``{"b64": "…"}`` stands for bytes."""

    def _items_of(self, row: Any) -> Sequence[Any]:
        return [_without_base64(item) for item in _listed(_opened(row), "instances")]

    def _answer(self, index: int, results: Any) -> Any:
        return json.dumps({"predictions": results})


class KServeEnvelope(_ManyItems):
    """``{"instances": […]}`` in, ``{"predictions": …}`` out, or ``{"explanations": …}`` with the header ``explain``."""

    def _items_of(self, row: Any) -> Sequence[Any]:
        return _listed(_opened(row), "instances")

    def _answer(self, index: int, results: Any) -> Any:
        is_explain = self.context is not None and self.context.get_request_header(index, "explain") == "True"
        return {"explanations" if is_explain else "predictions": results}


class KServev2Envelope(_ManyItems):
    """Version 2 of the open inference protocol: tensors with name, shape and datatype, in and out."""

    def __init__(self, handle_fn: Callable[[Any, Any], Any]) -> None:
        super().__init__(handle_fn)
        self._requests: list[Mapping[str, Any]] = []

    def parse_input(self, data: Any) -> Any:
        """Return the inputs of all requests, each as sent, with ``data`` in its shape. Raises InputRefused."""
        self._requests = []
        return super().parse_input(data)

    def _items_of(self, row: Any) -> Sequence[Any]:
        request = _opened(row)
        self._requests.append(request)
        return [_shaped(each) for each in _listed(request, "inputs")]

    def _answer(self, index: int, results: Any) -> Any:
        request, model = self._requests[index], self.context.manifest.get("model", {})
        names = [each.get("name") for each in request["inputs"]]
        if len(results) > len(names):
            raise ValueError(f"the handler returned {len(results)} outputs for {len(names)} inputs")
        return {
            "id": str(request.get("id") or "").strip() or self.context.get_request_id(index),
            "model_name": model.get("modelName"),
            "model_version": model.get("modelVersion"),
            "outputs": [_output(name, result) for name, result in zip(names, results, strict=False)],
        }


_KINDS: Mapping[str, type[BaseEnvelope]] = {
    "body": BodyEnvelope,
    "json": JSONEnvelope,
    "kserve": KServeEnvelope,
    "kservev2": KServev2Envelope,
}


def enveloped(envelope: str | None, handle_fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return ``handle_fn`` with the envelope of this name around it; as it is for None.

    Raises:
        ValueError: there is no envelope of this name.
    """
    if envelope is None:
        return handle_fn
    if envelope not in _KINDS:
        raise ValueError(f"envelope must be one of {', '.join(_KINDS)}, not {envelope!r}")
    return _KINDS[envelope](handle_fn).handle


def _sent(row: Any) -> Any:
    return row["data"] if row.get("data") is not None else row.get("body")


def _opened(row: Any) -> Mapping[str, Any]:
    """Return the JSON object in a row; the row itself if it is one. Raises InputRefused."""
    value = _sent(row)
    if isinstance(value, (bytes, bytearray, str)):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputRefused(f"the body must be JSON: {error}") from error
    value = row if value is None else value
    if not isinstance(value, Mapping):
        raise InputRefused(f"the body must be a JSON object, not {str(value)[:80]!r}")
    return value


def _listed(request: Mapping[str, Any], key: str) -> Sequence[Any]:
    items = request.get(key)
    if not isinstance(items, list):
        raise InputRefused(
            f"the body must be an object with a list as {key!r}; it has: {', '.join(request) or 'nothing'}"
        )
    return items


def _without_base64(item: Any) -> Any:
    if not isinstance(item, Mapping):
        return item
    if set(item) == {"b64"}:
        return _decoded(item["b64"])
    return {key: _decoded(value["b64"]) if _is_base64(value) else value for key, value in item.items()}


def _is_base64(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"b64"}


def _decoded(text: Any) -> bytes:
    try:
        return base64.b64decode(text)
    except (ValueError, TypeError) as error:
        raise InputRefused(f"b64 must hold the base64 form of the data: {error}") from error


def _shaped(given: Any) -> dict[str, Any]:
    """Return an input with its flat data in its shape; of BYTES the first element."""
    if not isinstance(given, Mapping) or not {"shape", "datatype", "data"} <= set(given):
        raise InputRefused(f"each of the inputs must have name, shape, datatype and data, unlike {str(given)[:80]}")
    datatype, data, shape = given["datatype"], given["data"], given["shape"]
    if not isinstance(data, list):
        raise InputRefused(f"data must be a list, not {str(data)[:80]!r}")
    if datatype == "BYTES":
        return {**given, "data": data[0] if data else ""}
    if not isinstance(datatype, str) or datatype not in _DATATYPES:
        raise InputRefused(f"datatype must be BYTES or one of {', '.join(_DATATYPES)}, not {datatype!r}")
    if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise InputRefused(f"shape must be a list of whole numbers, not {shape!r}")
    try:
        flat = list(_flat(data))
    except RecursionError:
        raise InputRefused("data has too many levels") from None
    if prod(shape) != len(flat):
        raise InputRefused(f"shape {shape} is one of {prod(shape)} elements, but data has {len(flat)}")
    # Nothing in it costs nothing: a shape such as [1000000000, 0] would be as many lists.
    return {**given, "data": _nested(flat, shape) if flat else []}


def _nested(flat: list[Any], shape: Sequence[int]) -> Any:
    if not shape:
        return flat[0]
    if len(shape) == 1:
        return flat
    step = prod(shape[1:])
    return [_nested(flat[i * step : (i + 1) * step], shape[1:]) for i in range(shape[0])]


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _flat(each)
    else:
        yield value


def _output(name: Any, result: Any) -> dict[str, Any]:
    """Return one output of the protocol: flat, as TorchServe answers it."""
    dtype = str(getattr(result, "dtype", "")).removeprefix("torch.")
    flat = list(_flat(result.tolist() if hasattr(result, "tolist") else result))
    return {"name": name, "datatype": _DATATYPE_OF.get(dtype) or _datatype(flat), "data": flat, "shape": [len(flat)]}


def _datatype(flat: Sequence[Any]) -> str:
    if all(isinstance(each, bool) for each in flat):
        return "BOOL"
    if all(isinstance(each, int) for each in flat):
        return "INT64"
    return "FP64" if all(isinstance(each, (int, float)) for each in flat) else "BYTES"
