"""The rows of a batch as the shipped handlers read them: each by itself, so that what is refused can be named."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["InputRefused", "decode_base64", "numbers_of", "payload_of", "read_each", "stacked"]

T = TypeVar("T")

_FIELDS = ("data", "body")
_DATA_URI = re.compile(r"data:[\w.+/-]*(?:;[\w.=+-]+)*;base64,", re.IGNORECASE)


class InputRefused(Exception):
    """What a request sent cannot be used: the request is at fault, not the model.

    ``error_code`` is the HTTP status that it deserves, from 400 to 499; ``indexes`` are the positions in the batch of those
    that are refused, once that is known: these requests fail, and the batch is run again without them. ``errors`` has for
    each of these positions what is to be said to that one, where that differs.
    """

    def __init__(
        self,
        message: str,
        error_code: int = 400,
        indexes: Sequence[int] = (),
        errors: Mapping[int, Exception] | None = None,
    ) -> None:
        super().__init__(message)
        self.error_code = error_code
        self.indexes = tuple(indexes)
        self.errors = dict(errors or {})


def read_each(rows: Sequence[Any], read: Callable[[Any], T]) -> list[T]:
    """Return what ``read`` makes of each row, in order.

    Raises:
        InputRefused: ``read`` raised it for at least one row. It names all of these, with the reason of the first.
    """
    made: list[T] = []
    refused: dict[int, InputRefused] = {}
    for index, row in enumerate(rows):
        try:
            made.append(read(row))
        except InputRefused as error:
            refused[index] = error
    if refused:
        raise _together(refused, len(rows))
    return made


def _together(refused: Mapping[int, InputRefused], batch_size: int) -> InputRefused:
    indexes = list(refused)
    first = refused[indexes[0]]
    message = str(first)
    if batch_size > 1:
        message = f"request {indexes[0]} of a batch of {batch_size}, counted from 0: {message}"
    if len(indexes) > 1:
        message += f" (also refused: {', '.join(map(str, indexes[1:]))})"
    return InputRefused(message, first.error_code, indexes, refused)


def payload_of(row: Any, *more_fields: str) -> Any:
    """Return what a request sent: ``data`` or ``body`` of its row, or one of ``more_fields``.

    JSON content that is an object with one of these is opened once more. Raises InputRefused if there is no such field.
    """
    fields = (*_FIELDS, *more_fields)
    value = _field(row, fields)
    return _field(value, fields) if isinstance(value, Mapping) else value


def _field(row: Any, fields: Sequence[str]) -> Any:
    if not isinstance(row, Mapping):
        return row
    for field in fields:
        if row.get(field) is not None:
            return row[field]
    found = ", ".join(sorted(map(str, row))) or "nothing"
    raise InputRefused(f"the request has none of the fields {', '.join(fields)}; it has: {found}")


def decode_base64(text: str) -> bytes:
    """Return the bytes that ``text`` stands for, a data URI or white space in it allowed. Raises InputRefused."""
    prefix = _DATA_URI.match(text)
    plain = "".join(text[prefix.end() if prefix else 0 :].split())
    try:
        return base64.b64decode(plain, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputRefused(f"text must be the base64 form of the data, but this is not base64: {error}") from error


def numbers_of(value: Any, dtype: torch.dtype) -> Tensor:
    """Return a list of (lists of) numbers, or whatever torch takes for one, as a tensor. Raises InputRefused."""
    try:
        return torch.as_tensor(value, dtype=dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputRefused(f"a list of numbers, or of such lists of one length, is needed: {error}") from error


def stacked(rows: Sequence[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    """Return one tensor with ``rows`` along dimension 0; a list of them on ``device`` where they differ in shape or kind."""
    if len({(row.shape, row.dtype) for row in rows}) == 1:
        return torch.stack(list(rows)).to(device)
    return [row.to(device) for row in rows]
