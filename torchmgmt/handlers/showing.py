"""Which part of an output belongs to which request: that is never guessed, but shown, by a batch of one and a batch of two.

The dimension of a tensor that is 1 for a batch of one and 2 for a batch of two is the batch, and a list that has one part
and then two is a list of answers. Of what does not change so nobody can tell whose it is.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from attrs import evolve, frozen
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from torchmgmt.handlers.stacking import NotABatch, is_array, sequence_of

__all__ = ["Layout", "Single", "anywhere", "layout_of", "mixed_part"]

_WHAT_TO_DO = (
    'return tensors of which each request has a part of its own, or register with batching="list", and return a list with'
    " one answer for each request"
)
# Kernels for other sizes of a batch round otherwise, the more so the fewer bits there are, and quantized ones take the range of
# the whole batch for each in it. What another request leaves in an answer is more, where it is anything.
_TOLERANCE = 0.05
_ENOUGH_BYTES = 4  # numbers of fewer have few operations


class Layout(Protocol):
    """How an output, or a part of it, is made of those of the requests."""

    def split(self, value: Any, count: int, where: str = "the output") -> list[Any]:
        """Return, for each of ``count`` requests, what ``value`` has for it.

        Raises:
            NotABatch: it is not made as was shown.
        """


@frozen
class Nothing:
    """None for all."""

    def split(self, value: Any, count: int, where: str = "the output") -> list[Any]:
        """Return None for each."""
        if value is not None:
            raise NotABatch(f"{where} is {_shown(value)}, where None was shown for other requests; {_WHAT_TO_DO}")
        return [None] * count


@frozen
class Rows:
    """A tensor or array: the requests are its parts along one dimension."""

    dimension: int
    rest: tuple[int, ...] | None
    """Its other dimensions; None: they were not shown for requests of these shapes."""

    def split(self, value: Any, count: int, where: str = "the output") -> list[Any]:
        """Return the parts, without that dimension."""
        if not _has_rows(value):
            raise NotABatch(f"{where} is {_shown(value)}, where a tensor was shown for other requests; {_WHAT_TO_DO}")
        shape = tuple(value.shape)
        found, rest = shape[self.dimension : self.dimension + 1], _without(shape, self.dimension)
        if found != (count,) or (self.rest is not None and rest != self.rest):
            raise NotABatch(
                f"{where} has shape {shape} for a batch of {count}; to judge by batches of one and of two, dimension"
                f" {self.dimension} is the batch{'' if self.rest is None else f', and the others are {self.rest}'}."
                f" A shape that depends on more than the shapes of the requests shows nothing: {_WHAT_TO_DO}"
            )
        if isinstance(value, Tensor):
            return list(value.unbind(self.dimension))
        return [value.take(number, self.dimension) for number in range(count)]


@frozen
class Answers:
    """A list of answers, whatever each of them is."""

    def split(self, value: Any, count: int, where: str = "the output") -> list[Any]:
        """Return them."""
        if not _is_sequence(value) or len(value) != count:
            raise NotABatch(
                f"{where} is {_shown(value)}, and must have one answer for each of {count} requests, in order"
            )
        return list(value)


@frozen
class Parts:
    """A dictionary, list, tuple or dataclass of parts, each of which is split for itself."""

    names: tuple[Any, ...]
    parts: tuple[Layout, ...]

    def split(self, value: Any, count: int, where: str = "the output") -> list[Any]:
        """Return such an object for each; of a mapping of whatever kind a dictionary."""
        found = _parts_of(value)
        if found is None or tuple(found) != self.names:
            raise NotABatch(f"{where} is {_shown(value)}, where {list(self.names)} were shown in it; {_WHAT_TO_DO}")
        columns = [
            part.split(each, count, _place(where, value, name))
            for part, (name, each) in zip(self.parts, found.items(), strict=True)
        ]
        return [_like(value, [column[number] for column in columns]) for number in range(count)]


@frozen
class Single:
    """What comes out of a call that takes batches of one only: there is nobody else whose part it could be.

    Dimension 0, along which the request went in, is dropped.
    """

    def split(self, value: Any, count: int, where: str = "the output") -> list[Any]:
        """Return the one answer, in a list."""
        return [self._answer(value, where)]

    def _answer(self, value: Any, where: str) -> Any:
        if value is None:
            return None
        if _has_rows(value) and tuple(value.shape[:1]) == (1,):
            return value[0]
        parts = None if isinstance(value, PackedSequence) else _parts_of(value)
        if parts is None:
            raise NotABatch(
                f"{where} is {_shown(value)} for a batch of one, and no other batch can be run to see what belongs to a request;"
                f" dimension 0 would have to be 1; {_WHAT_TO_DO}"
            )
        if _is_sequence(value) and len(value) == 1 and not _holds_rows(value):
            return value[0]
        return _like(value, [self._answer(each, _place(where, value, name)) for name, each in parts.items()])


def layout_of(one: Any, two: Any, where: str = "the output") -> Layout:
    """Return how the outputs for a batch of ``one`` and of ``two`` requests of one form are made of those of the requests.

    Raises:
        NotABatch: that does not show; says what was seen, and what to do.
    """
    if one is None and two is None:
        return Nothing()
    if isinstance(one, PackedSequence):
        raise NotABatch(f"{where} is a PackedSequence, which has no batch dimension: unpack it (pad_packed_sequence)")
    if _has_rows(one) and _has_rows(two):
        return _rows(tuple(one.shape), tuple(two.shape), where)
    if isinstance(one, Tensor) or isinstance(two, Tensor):
        raise NotABatch(
            f"{where} is {_shown(one)}, for two requests {_shown(two)}: only dense tensors can be split; {_WHAT_TO_DO}"
        )
    if _is_sequence(one) and _is_sequence(two) and (len(one), len(two)) == (1, 2):
        return Answers()
    return _parts(one, two, where)


def _parts(one: Any, two: Any, where: str) -> Parts:
    parts, others = _parts_of(one), _parts_of(two)
    if parts is None or others is None:
        raise NotABatch(
            f"{where} is {_shown(one)}, of which nobody can say which part belongs to which request; {_WHAT_TO_DO}"
        )
    if _is_sequence(one) and _is_sequence(two) and not (_holds_rows(one) or _holds_rows(two)):
        seen = f"{len(one)} answers for a batch of one, and {len(two)} for a batch of two"
        raise NotABatch(f"{where} has {seen}; there must be one for each request, in order")
    if tuple(parts) != tuple(others):
        raise NotABatch(f"{where} is {_shown(one)} for one request, and {_shown(two)} for two; {_WHAT_TO_DO}")
    layouts = (layout_of(part, others[name], _place(where, one, name)) for name, part in parts.items())
    return Parts(tuple(parts), tuple(layouts))


def _rows(one: tuple[int, ...], two: tuple[int, ...], where: str) -> Rows:
    changed = [at for at, sizes in enumerate(zip(one, two, strict=False)) if sizes[0] != sizes[1]]
    if len(one) == len(two) and len(changed) == 1 and (one[changed[0]], two[changed[0]]) == (1, 2):
        return Rows(changed[0], _without(one, changed[0]))
    seen = (
        f"shape {one} for a batch of one as for a batch of two"
        if one == two
        else f"shape {one} for one request, and {two} for two"
    )
    raise NotABatch(
        f"{where} has {seen}: the batch, which is dimension 0 of what goes in, must be one dimension that is 1 and then 2"
        f" (of recurrent and attention layers with batch_first=True it is), and the others the same; {_WHAT_TO_DO}"
    )


def anywhere(layout: Layout) -> Layout:
    """Return a layout without the sizes that were shown for requests of some shape."""
    if isinstance(layout, Rows):
        return evolve(layout, rest=None)
    if isinstance(layout, Parts):
        return evolve(layout, parts=tuple(map(anywhere, layout.parts)))
    return layout


def mixed_part(alone: Any, beside: Any, where: str = "the output") -> str:
    """Return which part of an answer is another one where the request was not alone; "" if none is for certain.

    Only floating-point numbers are compared: a label may well change by rounding.
    """
    if _has_rows(alone) and _has_rows(beside):
        one, other = _numbers_of(alone), _numbers_of(beside)
        return where if one is not None and other is not None and _are_far_apart(one, other) else ""
    parts, others = _parts_of(alone) or {}, _parts_of(beside) or {}
    shared = (name for name in parts if name in others)
    return next(
        filter(None, (mixed_part(parts[name], others[name], _place(where, alone, name)) for name in shared)), ""
    )


def _numbers_of(value: Any) -> Tensor | None:
    """Return what can be compared; None: nothing."""
    if not isinstance(value, Tensor):
        return torch.as_tensor(value) if value.dtype.kind in "fc" else None
    if value.is_quantized or value.is_meta or not (value.is_floating_point() or value.is_complex()):
        return None
    return value.float() if value.element_size() < _ENOUGH_BYTES else value


def _are_far_apart(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not one.numel() or not (one.isfinite().all() and other.isfinite().all()):
        return False
    return bool((one - other).abs().max() > _TOLERANCE * torch.maximum(one.abs().max(), other.abs().max()))


def _has_rows(value: Any) -> bool:
    """Whether it is a dense tensor or an array."""
    if isinstance(value, Tensor):
        return value.layout is torch.strided and not value.is_nested
    return is_array(value)


def _holds_rows(value: Any) -> bool:
    parts = _parts_of(value)
    return isinstance(value, Tensor) or _has_rows(value) if parts is None else any(map(_holds_rows, parts.values()))


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not hasattr(value, "_fields")


def _parts_of(value: Any) -> Mapping[Any, Any] | None:
    """Return the parts of what has some, by their names or numbers."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _like(value: Any, parts: Sequence[Any]) -> Any:
    """Return an object like ``value`` of other parts."""
    if isinstance(value, Mapping):
        return dict(zip(value, parts, strict=True))
    if isinstance(value, (list, tuple)):
        return sequence_of(type(value), parts)
    made = copy.copy(value)
    for field, part in zip(dataclasses.fields(value), parts, strict=True):
        object.__setattr__(made, field.name, part)  # a frozen one, too
    return made


def _place(where: str, value: Any, name: Any) -> str:
    is_item = isinstance(value, (Mapping, list, tuple))
    return f"{where}[{name!r}]" if is_item else f"{where}.{name}"


def _without(shape: tuple[int, ...], dimension: int) -> tuple[int, ...]:
    return (*shape[:dimension], *shape[dimension + 1 :])


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = (
            "nested" if value.is_nested else "dense" if value.layout is torch.strided else f"of layout {value.layout}"
        )
        return f"a tensor that is {kind}" + ("" if value.is_nested else f", of shape {tuple(value.shape)}")
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__qualname__} of {len(value)}"
    return f"an object of type {type(value).__qualname__}"
