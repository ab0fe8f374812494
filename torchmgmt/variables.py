"""Which environment variables go on to the processes of workers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

__all__ = ["without_matching"]

T = TypeVar("T")


def without_matching(variables: Mapping[str, T], pattern: str | None) -> dict[str, T]:
    """Return the environment variables whose whole names do not match a regular expression; None: all."""
    found = re.compile(pattern) if pattern is not None else None
    return {name: value for name, value in variables.items() if found is None or not found.fullmatch(name)}
