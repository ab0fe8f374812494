"""What a caller may say of how long it waits, and of how much its request matters, in headers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torchmgmt.errors import InvalidArgument

__all__ = ["PRIORITY", "TIMEOUT_MS", "Wishes", "wishes_of"]

TIMEOUT_MS = "x-request-timeout-ms"
PRIORITY = "x-priority"
LONGEST_MS = 2**31 - 1
MOST_PRIORITY = 10

Wishes: TypeAlias = "tuple[float | None, int]"
"""How many seconds the caller waits in all (None: it does not say), and its priority."""


def wishes_of(headers: Mapping[str, str]) -> Wishes:
    """Return what ``headers`` (names in lower case) say.

    Raises:
        InvalidArgument: one of them is no whole number, or out of range; names it and what is allowed.
    """
    timeout, priority = headers.get(TIMEOUT_MS), headers.get(PRIORITY)
    limit_s = None
    if timeout is not None:
        limit_s = _whole("X-Request-Timeout-Ms", timeout, 1, LONGEST_MS, " of milliseconds") / 1000
    return limit_s, 0 if priority is None else _whole("X-Priority", priority, -MOST_PRIORITY, MOST_PRIORITY)


def _whole(name: str, given: str, least: int, most: int, unit: str = "") -> int:
    text = given.strip()
    digits = text[1:] if text[:1] in {"-", "+"} else text
    if digits.isascii() and digits.isdigit() and len(digits) < 19 and least <= int(text) <= most:
        return int(text)
    raise InvalidArgument(name, given, f"a whole number{unit} from {least} to {most}")
