"""Batches for functions of tensors: what requests brought is stacked leaf by leaf, and what comes out is split again.

A request's value is a tensor, or dictionaries, lists and tuples of tensors. Requests of different shapes do not stack;
those of one shape do, so they form groups.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from attrs import frozen
from torch import Tensor

from torchmgmt.handlers.faults import NO_FAULT
from torchmgmt.handlers.tensors import read_tensor

__all__ = ["Group", "NotABatch", "Stackable", "grouped", "split", "stackable"]

Form: TypeAlias = tuple[Any, ...]
"""How a value is made of its tensors, and what they are like; values of one form can be stacked."""


class NotABatch(ValueError):
    """A value cannot be put into a batch, or one that came out of a batch does not have a part for each request."""


@frozen
class Stackable:
    """What one request brought."""

    form: Form
    leaves: Sequence[Tensor]


@frozen
class Group:
    """Requests that can be stacked, by their positions in the batch."""

    positions: Sequence[int]
    values: Sequence[Stackable]

    def stacked(self) -> Any:
        """Return one value with the tensors of all, each with a new dimension 0. Of a single request it is no copy."""
        columns = zip(*(value.leaves for value in self.values), strict=True)
        leaves = (column[0].unsqueeze(0) if len(column) == 1 else torch.stack(column) for column in columns)
        return _built(self.values[0].form, leaves)


def stackable(row: Mapping[str, Any]) -> Stackable:
    """Return the row of a request as tensors in a form.

    Arrays, numbers and lists of nothing but numbers become tensors; bytes are read as files of numpy.save or torch.save.

    Raises:
        NotABatch: something in it is no tensor and becomes none; says what, and where.
        InputRefused: bytes are neither.
    """
    leaves: list[Tensor] = []
    if row.keys() == {"body"}:
        return Stackable((dict, ("body", _form_of(row["body"], "data", leaves))), leaves)
    return Stackable(_form_of(row, "fields", leaves), leaves)


def _form_of(value: Any, where: str, leaves: list[Tensor]) -> Form:
    tensor = _tensor_of(value)
    if tensor is not None:
        leaves.append(tensor)
        return (Tensor, tuple(tensor.shape), tensor.dtype, tensor.device)
    if isinstance(value, Mapping):
        parts = tuple((key, _form_of(each, f"{where}[{key!r}]", leaves)) for key, each in value.items())
        return (dict, *parts)
    if isinstance(value, (list, tuple)):
        return (type(value), *(_form_of(each, f"{where}[{number}]", leaves) for number, each in enumerate(value)))
    raise NotABatch(
        f"{where} is an object of type {type(value).__qualname__}, which cannot be stacked; tensors, arrays, numbers, and"
        ' dictionaries, lists and tuples of them can; register with batching="list" to get the requests as they are'
    )


def _tensor_of(value: object) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (int, float, complex)) or (isinstance(value, list) and _is_of_numbers(value)):
        try:
            return torch.tensor(value)
        except (ValueError, OverflowError) as error:  # lists of different lengths
            raise NotABatch(f"a list of numbers is no tensor: {error}") from error
    if isinstance(value, (bytes, bytearray, memoryview)):
        return read_tensor(value, torch.float32, None)
    if _is_array(value):
        return torch.as_tensor(value)
    return None


def _is_of_numbers(value: list[Any]) -> bool:
    return bool(value) and all(
        _is_of_numbers(each) if isinstance(each, list) else isinstance(each, (int, float, complex)) for each in value
    )


def _is_array(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))


def _built(form: Form, leaves: Iterator[Tensor]) -> Any:
    kind, *parts = form
    if kind is Tensor:
        return next(leaves)
    if kind is dict:
        return {key: _built(part, leaves) for key, part in parts}
    return _sequence(kind, [_built(part, leaves) for part in parts])


def _sequence(kind: type[Any], parts: Sequence[Any]) -> Any:
    """Return a list or tuple; one with names for its parts gets each as an argument."""
    if issubclass(kind, tuple):
        return kind(*parts) if hasattr(kind, "_fields") else tuple(parts)
    return list(parts)


def split(output: Any, count: int) -> list[Any]:
    """Return, for each of ``count`` requests, what ``output`` has for it: dimension 0 of each tensor is the batch.

    A list or tuple without tensors is a list of answers. None stays None.

    Raises:
        NotABatch: a tensor or list has another number of parts, or what is neither cannot be split.
    """
    if isinstance(output, (list, tuple)) and not _holds_tensors(output):
        _check(len(output), count, "the output has {} answers")
        return list(output)
    return _split(output, count, "the output")


def _split(value: Any, count: int, where: str) -> list[Any]:
    if value is None:
        return [None] * count
    if isinstance(value, Tensor) or _is_array(value):
        if not value.ndim:
            raise NotABatch(
                f"{where} is a single number for a batch of {count} requests; dimension 0 must be the batch"
            )
        _check(len(value), count, where + " has {} in dimension 0")
        return list(value.unbind(0)) if isinstance(value, Tensor) else list(value)
    if isinstance(value, Mapping):
        columns = [_split(each, count, f"{where}[{key!r}]") for key, each in value.items()]
        return [dict(zip(value, row, strict=True)) for row in _rows(columns, count)]
    if isinstance(value, (list, tuple)):
        columns = [_split(each, count, f"{where}[{number}]") for number, each in enumerate(value)]
        return [_sequence(type(value), row) for row in _rows(columns, count)]
    raise NotABatch(
        f"{where} is an object of type {type(value).__qualname__}, of which nobody can say which part belongs to which of the"
        f' {count} requests; return tensors, and dictionaries, lists and tuples of them, or register with batching="list"'
    )


def _rows(columns: Sequence[Sequence[Any]], count: int) -> Iterator[Sequence[Any]]:
    return ([column[number] for column in columns] for number in range(count))


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor) or _is_array(value)


def _check(found: int, count: int, what: str) -> None:
    if found != count:
        raise NotABatch(
            f"{what.format(found)} for a batch of {count} requests; it must have one part for each, in order"
        )


def grouped(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Group], dict[int, BaseException]]:
    """Return the groups that ``rows`` form, and by position why one is in none."""
    groups: dict[Form, tuple[list[int], list[Stackable]]] = {}
    refused: dict[int, BaseException] = {}
    for position, row in enumerate(rows):
        try:
            value = stackable(row)
        except NO_FAULT:
            raise
        except BaseException as error:
            refused[position] = error
            continue
        positions, values = groups.setdefault(value.form, ([], []))
        positions.append(position)
        values.append(value)
    return [Group(*each) for each in groups.values()], refused
