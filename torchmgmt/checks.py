"""Checks of what callers give, which raise an error that names the argument; also as attrs validators."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

from attrs import Attribute

from torchmgmt.errors import InvalidArgument

__all__ = [
    "Validator",
    "check_number",
    "check_pattern",
    "check_text",
    "check_truth",
    "number",
    "plain",
    "plain_fields",
    "text",
    "truth",
]

_PLAIN = (str, int, float)


def plain(value: Any) -> Any:
    """Return text and numbers as what they are, without the class that somebody has made of them, such as an enumeration.

    Processes of ours do not know that class, and cannot read what is one of it. All else is returned as it is.
    """
    if value is None or type(value) in _PLAIN or isinstance(value, bool):
        return value
    for kind in _PLAIN:
        if isinstance(value, kind):
            return str.__str__(value) if kind is str else kind(value)
    return value


def plain_fields(_class: type, fields: list[Attribute[Any]]) -> list[Attribute[Any]]:
    """Have attrs convert the fields of a class with :func:`plain` that have no converter of their own."""
    return [each if each.converter is not None else each.evolve(converter=plain) for each in fields]


def check_number(argument: str, value: object, *, minimum: float, unit: str = "", whole: bool = True) -> None:
    """Raise :class:`InvalidArgument` unless ``value`` is a number (an int if ``whole``) of at least ``minimum``."""
    if (
        isinstance(value, bool)  # which Python takes for an int
        or not isinstance(value, (int, float))
        or (whole and not isinstance(value, int))
        or not minimum <= value <= sys.float_info.max
    ):
        what = "a whole number" if whole else "a number"
        raise InvalidArgument(argument, value, f"{what}{' of ' + unit if unit else ''}, at least {minimum}")


def check_text(argument: str, value: object, *, forbidden: str = "/\0") -> None:
    """Raise :class:`InvalidArgument` unless ``value`` is a str, not blank and without the ``forbidden`` characters."""
    if not isinstance(value, str) or not value.strip() or any(char in value for char in forbidden):
        listed = " or ".join(repr(char) for char in forbidden)
        raise InvalidArgument(argument, value, f"text that is not blank and has no {listed} in it")


def check_pattern(argument: str, value: object) -> None:
    """Raise :class:`InvalidArgument` unless ``value`` is the text of a regular expression, or None."""
    if value is None:
        return
    try:
        if isinstance(value, str):
            re.compile(value)
            return
    except (re.error, OverflowError, RecursionError):
        pass
    raise InvalidArgument(argument, value, "a regular expression, or None")


def check_truth(argument: str, value: object) -> None:
    """Raise :class:`InvalidArgument` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise InvalidArgument(argument, value, "True or False")


Validator: TypeAlias = "Callable[[object, Attribute[Any], object], None]"  # attrs' own can only be named as text


def number(argument: str, minimum: float, unit: str = "", *, whole: bool = True) -> Validator:
    """Return an attrs validator that checks with :func:`check_number`."""

    def validate(_instance: object, _attribute: Attribute[Any], value: object) -> None:
        check_number(argument, value, minimum=minimum, unit=unit, whole=whole)

    return validate


def text(argument: str) -> Validator:
    """Return an attrs validator that checks with :func:`check_text`."""

    def validate(_instance: object, _attribute: Attribute[Any], value: object) -> None:
        check_text(argument, value)

    return validate


def truth(argument: str) -> Validator:
    """Return an attrs validator that checks with :func:`check_truth`."""

    def validate(_instance: object, _attribute: Attribute[Any], value: object) -> None:
        check_truth(argument, value)

    return validate
