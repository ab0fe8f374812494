"""Tensors as the Open Inference Protocol, version 2, has them: datatypes, numbers in JSON, and bytes.

Its source is the protocol's text and its extension for binary tensor data.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from attrs import frozen

from torchmgmt.channel import Buffer
from torchmgmt.handlers.inputs import InputRefused

__all__ = ["BYTES", "TORCH_TYPES", "Tensor", "Values", "from_bytes", "from_json", "tensor_of", "to_bytes", "to_json"]

BYTES = "BYTES"
TORCH_TYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "UINT16": torch.uint16,
    "UINT32": torch.uint32,
    "UINT64": torch.uint64,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
    "FP32": torch.float32,
    "FP64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in TORCH_TYPES.items()}
_LENGTH = struct.Struct("<I")

Values: TypeAlias = "torch.Tensor | list[bytes]"
"""What handlers get: a tensor, or of BYTES the list of its elements, in row-major order."""


@frozen(eq=False)
class Tensor:
    """A tensor on its way out."""

    datatype: str
    shape: Sequence[int]
    values: Values


# --- in -----------------------------------------------------------------------------------------------------------------


def from_json(what: str, datatype: str, shape: Sequence[int], data: Any) -> Values:
    """Return the values of ``data``, nested or flat; ``what`` is what messages call it.

    Raises:
        InputRefused: the datatype is unknown, or the values are of another kind or number than it and ``shape`` say.
    """
    _check_datatype(what, datatype)
    flat = _flat(what, data)
    if len(flat) != math.prod(shape):
        raise InputRefused(f"{what} has {len(flat)} values, but its shape {list(shape)} has {math.prod(shape)}")
    if datatype == BYTES:
        return [_element(what, value) for value in flat]
    _check_kinds(what, datatype, flat)
    try:
        return torch.tensor(flat, dtype=TORCH_TYPES[datatype]).reshape(tuple(shape))
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        raise InputRefused(f"{what} holds a value that is no {datatype}: {error}") from None


def from_bytes(what: str, datatype: str, shape: Sequence[int], data: memoryview) -> Values:
    """Return the values of binary ``data``, copied, so that a handler may write to them.

    Raises:
        InputRefused: the datatype is unknown, or ``data`` has another length than it and ``shape`` say.
    """
    _check_datatype(what, datatype)
    count = math.prod(shape)
    if datatype == BYTES:
        return _elements(what, data, count)
    dtype = TORCH_TYPES[datatype]
    if data.nbytes != count * dtype.itemsize:
        raise InputRefused(
            f"{what} comes with {data.nbytes} bytes, but {datatype} of shape {list(shape)} has {count * dtype.itemsize}"
        )
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8 if datatype == "BOOL" else dtype)
    return (flat != 0 if datatype == "BOOL" else flat).reshape(tuple(shape))


def _check_datatype(what: str, datatype: str) -> None:
    if datatype != BYTES and datatype not in TORCH_TYPES:
        raise InputRefused(
            f"{what} has the datatype {datatype!r}, but must have one of {', '.join(TORCH_TYPES)}, BYTES"
        )


def _flat(what: str, data: Any) -> list[Any]:
    if not isinstance(data, list):
        raise InputRefused(f"{what} must have its data as a list")
    flat: list[Any] = data
    while flat and isinstance(flat[0], list):
        if not all(isinstance(each, list) for each in flat):
            raise InputRefused(f"{what} has lists and values beside each other in its data")
        flat = list(itertools.chain.from_iterable(flat))
    return flat


_INTEGRAL = frozenset(name for name in TORCH_TYPES if name.startswith(("INT", "UINT")))


def _check_kinds(what: str, datatype: str, flat: list[Any]) -> None:
    """Refuse what torch would convert without a word: 1.5 to 1, true to 1, 2 to true."""
    allowed: set[type] = {bool} if datatype == "BOOL" else {int} if datatype in _INTEGRAL else {int, float}
    strange = set(map(type, flat)) - allowed
    if strange:
        named = ", ".join(sorted(each.__name__ for each in strange))
        raise InputRefused(f"{what} is {datatype}, but there are values of type {named} in its data")


def _element(what: str, value: Any) -> bytes:
    if not isinstance(value, str):
        raise InputRefused(f"{what} is BYTES, so each of its values must be text, not {type(value).__name__}")
    return value.encode("utf-8", "surrogatepass")


def _elements(what: str, data: memoryview, count: int) -> list[bytes]:
    """Return the elements, each of which comes after its length."""
    elements: list[bytes] = []
    offset = 0
    while offset < data.nbytes:
        end = offset + _LENGTH.size
        if end <= data.nbytes:
            (length,) = _LENGTH.unpack(data[offset:end])
            offset, end = end, end + length
        if end > data.nbytes:
            raise InputRefused(f"{what} ends in the middle of element {len(elements)}")
        elements.append(bytes(data[offset:end]))
        offset = end
    if len(elements) != count:
        raise InputRefused(f"{what} has {len(elements)} elements, but its shape has {count}")
    return elements


# --- out ----------------------------------------------------------------------------------------------------------------


def tensor_of(value: Any) -> Tensor:
    """Return what goes out for ``value``: a tensor, an array, nested lists of numbers or text, a number, text, bytes.

    What is none of these goes out as its JSON, in one element of BYTES.

    Raises:
        TypeError: it has a dtype that the protocol does not know, or no JSON.
    """
    if isinstance(value, torch.Tensor):
        return _of_torch(value)
    if hasattr(value, "__array__") and hasattr(value, "dtype"):
        return _of_array(value)
    if isinstance(value, (bytearray, memoryview)):
        return Tensor(BYTES, [1], [bytes(value)])
    if isinstance(value, (list, tuple)):
        return _of_list(value) or _of_anything(value)
    return _of_list([value]) or _of_anything(value)


def _of_torch(value: torch.Tensor) -> Tensor:
    if value.dtype not in _NAMES:
        raise TypeError(f"a tensor of {value.dtype} has no datatype in the protocol; answer with a type that has one")
    return Tensor(_NAMES[value.dtype], list(value.shape), value.detach().cpu().contiguous())


def _of_array(value: Any) -> Tensor:
    """Return the tensor of a numpy array or number."""
    if value.dtype.kind in "OSU":
        elements = [each if isinstance(each, (str, bytes)) else str(each) for each in value.reshape(-1).tolist()]
        return Tensor(BYTES, list(value.shape), [_bytes_of(each) for each in elements])
    native = value.astype(value.dtype.newbyteorder("="), order="C", copy=True)  # torch wants one it may write to
    return _of_torch(torch.as_tensor(native))


def _of_list(value: Sequence[Any]) -> Tensor | None:
    """Return the tensor of nested lists; None if they are no tensor."""
    shape, flat = _shape_of(value)
    if shape is None:
        return None
    kinds = set(map(type, flat))
    if flat and kinds <= {str, bytes}:
        return Tensor(BYTES, shape, [_bytes_of(each) for each in flat])
    fitting = (name for name, allowed in _KINDS if kinds <= allowed and (flat or name == "FP64"))
    name = next(fitting, None)
    if name is None:
        return None
    try:
        return Tensor(name, shape, torch.tensor(flat, dtype=TORCH_TYPES[name]).reshape(shape))
    except (RuntimeError, OverflowError, ValueError):  # numbers that no datatype can hold
        return None


_KINDS: Sequence[tuple[str, set[type]]] = (("BOOL", {bool}), ("INT64", {int}), ("FP64", {int, float}))


def _shape_of(value: Any) -> tuple[list[int] | None, list[Any]]:
    """Return the shape of nested lists and their values, in order; None if lists of one level differ in length."""
    shape: list[int] = []
    level = [value]
    while level and isinstance(level[0], (list, tuple)):
        length = len(level[0])
        if not all(isinstance(each, (list, tuple)) and len(each) == length for each in level):
            return None, []
        shape.append(length)
        level = list(itertools.chain.from_iterable(level))
    return shape, level


def _of_anything(value: Any) -> Tensor:
    return Tensor(BYTES, [1], [json.dumps(value, default=_plain).encode()])


def _plain(value: Any) -> Any:
    if callable(to_list := getattr(value, "tolist", None)):
        return to_list()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _bytes_of(value: str | Buffer) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


def to_bytes(tensor: Tensor) -> Buffer:
    """Return the values as binary data."""
    values = tensor.values
    if isinstance(values, list):
        return b"".join(part for element in values for part in (_LENGTH.pack(len(element)), element))
    flat = values.reshape(-1).view(torch.uint8)
    data = bytearray(flat.numel())
    if data:  # torch takes no empty buffer
        torch.frombuffer(data, dtype=torch.uint8).copy_(flat)
    return data


def to_json(name: str, tensor: Tensor) -> list[Any]:
    """Return the values for JSON, flat.

    Raises:
        InputRefused: JSON cannot say one of them: NaN, an infinity, bytes that are no text.
    """
    if isinstance(tensor.values, list):
        try:
            return [element.decode() for element in tensor.values]
        except UnicodeDecodeError:
            raise InputRefused(f"output {name!r} is not UTF-8, which JSON needs: {_ASK}") from None
    if tensor.values.is_floating_point() and not bool(tensor.values.isfinite().all()):
        raise InputRefused(f"output {name!r} has NaN or an infinity in it, which JSON has not: {_ASK}")
    values: list[Any] = tensor.values.reshape(-1).tolist()
    return values


_ASK = "ask for it as binary data"
