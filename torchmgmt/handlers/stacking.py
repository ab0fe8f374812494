"""Batches for functions of tensors: what requests brought, stacked leaf by leaf along a new dimension 0.

A request's value is a tensor, or dictionaries, lists and tuples of tensors. Requests of different shapes do not stack, and
neither do those of different kinds (types, layouts, devices); those of one form do, so they form groups. What comes out is
split again as :mod:`torchmgmt.handlers.showing` has it.
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

__all__ = ["Form", "Group", "NotABatch", "Stackable", "grouped", "is_array", "kind_of", "sequence_of", "stackable"]

Form: TypeAlias = tuple[Any, ...]
"""How a value is made of its tensors, and what they are like; values of one form can be stacked."""


class NotABatch(ValueError):
    """A value cannot be put into a batch, or what came out of one does not show which part belongs to which request."""


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
        """Return one value with the tensors of all, each with a new dimension 0. Of a single request it is no copy.

        Raises NotABatch for tensors of a kind that has no such operation.
        """
        columns = zip(*(value.leaves for value in self.values), strict=True)
        return _built(self.values[0].form, (_stacked(column) for column in columns))

    def each(self) -> list[Group]:
        """Return a group for each request alone."""
        pairs = zip(self.positions, self.values, strict=True)
        return [Group([position], [value]) for position, value in pairs]


def _stacked(column: Sequence[Tensor]) -> Tensor:
    first = column[0]
    try:
        return first.unsqueeze(0) if len(column) == 1 else torch.stack(list(column))
    except (RuntimeError, NotImplementedError) as error:
        if first.layout is torch.strided and not first.is_nested:
            raise
        kind = "nested" if first.is_nested else f"of layout {first.layout}"
        raise NotABatch(
            f"a tensor that is {kind} cannot be put into a batch, not even alone; send it dense, or register with"
            ' batching="list" to get the requests as they are'
        ) from error


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
        if tensor.is_nested:
            return (Tensor, (), object())  # of no form but its own
        return (Tensor, tuple(tensor.shape), tensor.dtype, tensor.device, tensor.layout, *_more_of(tensor))
    if isinstance(value, Mapping):
        parts = tuple((key, _form_of(each, f"{where}[{key!r}]", leaves)) for key, each in value.items())
        return (dict, *parts)
    if isinstance(value, (list, tuple)):
        return (type(value), *(_form_of(each, f"{where}[{number}]", leaves) for number, each in enumerate(value)))
    raise NotABatch(
        f"{where} is an object of type {type(value).__qualname__}, which cannot be stacked; tensors, arrays, numbers, and"
        ' dictionaries, lists and tuples of them can; register with batching="list" to get the requests as they are'
    )


def _more_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return what there is to say of a tensor that is no plain one: with another one it might become what it is not."""
    flags = (type(tensor), tensor.requires_grad, tensor.is_conj(), tensor.is_neg())
    if flags == (Tensor, False, False, False) and tensor.layout is torch.strided and not tensor.is_quantized:
        return ()
    return (*flags, *_meaning_of(tensor))


def _meaning_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return what the numbers in it stand for, if not for themselves."""
    if tensor.layout is torch.sparse_coo:
        return (tensor.sparse_dim(), tensor.dense_dim())
    if not tensor.is_quantized:
        return ()
    if tensor.qscheme() is torch.per_tensor_affine:
        return (tensor.q_scale(), tensor.q_zero_point())
    return (object(),)  # a scale for each channel: of no form but its own


def kind_of(form: Form) -> Form:
    """Return a form without its sizes: that of all values that are made in the same way of tensors of the same kinds."""
    kind, *parts = form
    if kind is Tensor:
        shape, *rest = parts
        return (Tensor, len(shape), *rest)
    if kind is dict:
        return (dict, *((key, kind_of(part)) for key, part in parts))
    return (kind, *map(kind_of, parts))


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
    if is_array(value):
        return torch.as_tensor(value)
    return None


def _is_of_numbers(value: list[Any]) -> bool:
    return bool(value) and all(
        _is_of_numbers(each) if isinstance(each, list) else isinstance(each, (int, float, complex)) for each in value
    )


def is_array(value: object) -> bool:
    """Return whether it is an array or a number of numpy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))


def _built(form: Form, leaves: Iterator[Tensor]) -> Any:
    kind, *parts = form
    if kind is Tensor:
        return next(leaves)
    if kind is dict:
        return {key: _built(part, leaves) for key, part in parts}
    return sequence_of(kind, [_built(part, leaves) for part in parts])


def sequence_of(kind: type[Any], parts: Sequence[Any]) -> Any:
    """Return a list or tuple; one with names for its parts gets each as an argument."""
    if issubclass(kind, tuple):
        return kind(*parts) if hasattr(kind, "_fields") else tuple(parts)
    return list(parts)


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
