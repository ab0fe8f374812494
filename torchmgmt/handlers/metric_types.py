"""The parts that metrics of handlers are made of: kinds, units, dimensions, and what is raised for wrong ones.

The names are those of TorchServe's ``ts.metrics``, which handlers in the field import.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeAlias

from torchmgmt.records import MetricKind

__all__ = [
    "Dimension",
    "MetricTypes",
    "MetricsCacheKeyError",
    "MetricsCacheTypeError",
    "MetricsCacheValueError",
    "NamedValue",
    "Units",
    "pairs_of",
    "unit_name",
]

MetricTypes: TypeAlias = MetricKind

_UNITS: dict[str | None, str] = {
    "ms": "Milliseconds",
    "s": "Seconds",
    "us": "Microseconds",
    "percent": "Percent",
    "count": "Count",
    "MB": "Megabytes",
    "GB": "Gigabytes",
    "kB": "Kilobytes",
    "B": "Bytes",
    "": "unit",
    None: "unit",
}


class Units:
    """``units``: from the short names of units to those that metrics carry."""

    def __init__(self) -> None:
        self.units = dict(_UNITS)


def unit_name(unit: str | None) -> str:
    """Return the long name of a unit; ``unit`` itself if it has none."""
    return _UNITS.get(unit, str(unit))


class NamedValue(Protocol):
    """What a dimension has to have."""

    name: str
    value: object


class Dimension:
    """One thing by which the figures of a metric are told apart, such as ``Dimension("Level", "Model")``."""

    def __init__(self, name: str, value: object) -> None:
        self.name = name
        self.value = value

    def __str__(self) -> str:
        return f"{self.name}:{self.value}"

    def __repr__(self) -> str:
        return f"Dimension({self.name!r}, {self.value!r})"

    def to_dict(self) -> dict[str, object]:
        """Return it as ``{"Name": name, "Value": value}``."""
        return {"Name": self.name, "Value": self.value}


def pairs_of(dimensions: Iterable[NamedValue] | None) -> dict[str, str]:
    """Return dimensions as a dictionary; raise ValueError for anything else than objects with a name and a value."""
    try:
        return {str(each.name): str(each.value) for each in dimensions or ()}
    except (AttributeError, TypeError):
        raise ValueError(f"dimensions must be a list of Dimension(name, value), not {dimensions!r}") from None


class MetricsCacheTypeError(TypeError):
    """An argument has the wrong type."""


class MetricsCacheValueError(ValueError):
    """An argument has a value that it must not have."""


class MetricsCacheKeyError(KeyError):
    """A metric, or a part of its declaration, is not there."""

    def __str__(self) -> str:  # that of KeyError shows the text as a literal
        return str(self.args[0]) if self.args else ""
