"""Bytes to send in tests."""

from __future__ import annotations


def pattern(size: int, seed: int) -> bytes:
    """Bytes that differ from place to place, so that a shift by one is seen."""
    return (bytes((seed + n) % 251 for n in range(251)) * (size // 251 + 1))[:size]
