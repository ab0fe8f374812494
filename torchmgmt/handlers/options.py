"""The ``handler:`` section of model-config.yaml, as the shipped handlers read it: checked, with errors that name the key."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import isfinite
from typing import Any, TypeVar

from attrs import frozen

__all__ = ["Options"]

T = TypeVar("T")


@frozen
class Options:
    """What the section holds. Keys that nobody asks for may stand in it: it is the user's own, too.

    Each method returns the value of a key, or ``default`` if the section has no such key. Raises ValueError for any other
    value than it says.
    """

    section: Mapping[str, Any]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Options:
        """Return the options in a whole configuration. Raises ValueError if its ``handler`` is no mapping."""
        section = config.get("handler")
        if section is not None and not isinstance(section, Mapping):
            raise ValueError(f"handler in model-config.yaml must be a section of keys and values, not {section!r}")
        return cls(section or {})

    def count(self, key: str, default: int) -> int:
        """A whole number of at least 1."""
        return default if key not in self.section else self._count(key, "")

    def count_or_none(self, key: str, default: int | None) -> int | None:
        """A whole number of at least 1, or null."""
        if key not in self.section:
            return default
        return None if self.section[key] is None else self._count(key, ", or null")

    def _count(self, key: str, also: str) -> int:
        value = self.section[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(key, f"a whole number of at least 1{also}")
        return value

    def share(self, key: str, default: float) -> float:
        """A number from 0 to 1."""
        value = self.section.get(key, default)
        if not _is_number(value) or not 0 <= value <= 1:
            raise self._wrong(key, "a number from 0 to 1")
        return float(value)

    def numbers(self, key: str, default: tuple[float, ...] | None) -> tuple[float, ...] | None:
        """A list of numbers, or null."""
        value = self.section.get(key, default)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)) or not value or not all(map(_is_number, value)):
            raise self._wrong(key, "a list of numbers, or null")
        return tuple(map(float, value))

    def sizes(self, key: str) -> tuple[int, ...] | None:
        """A list of whole numbers of at least 1, of which one may be -1; None if there is none."""
        value = self.section.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(_is_size(each) for each in value) or value.count(-1) > 1:
            raise self._wrong(key, "a list of whole numbers of at least 1, of which one may be -1")
        return tuple(value)

    def choice(self, key: str, default: T, allowed: Collection[str]) -> str | T:
        """One of the words in ``allowed``."""
        if key not in self.section:
            return default
        value = self.section[key]
        if not isinstance(value, str) or value not in allowed:
            raise self._wrong(key, "one of: " + ", ".join(allowed))
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.section.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def _wrong(self, key: str, allowed: str) -> ValueError:
        return ValueError(f"handler.{key} in model-config.yaml must be {allowed}, not {self.section.get(key)!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (value >= 1 or value == -1)
