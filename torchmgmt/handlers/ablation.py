"""What each part of an input adds to an answer, found by leaving it out: explanations that need the model alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["ablated"]

_TOGETHER = 64
"""So many variants of an input are run at once: each is about as long as the input."""


def ablated(score: Callable[[Tensor], Tensor], length: int, places: Sequence[int]) -> list[float]:
    """Return for each of ``places`` the score of the whole input, less that of the input without this place.

    Args:
        score: returns the scores [n] of n variants; a row of what it is given [n, m] names the places that a variant keeps.
        length: how many places the input has.
        places: the ones to leave out, each by itself.
    """
    every = torch.arange(length)
    whole = score(every[None])
    found: list[float] = []
    for start in range(0, len(places), _TOGETHER):
        kept = [every[every != place] for place in places[start : start + _TOGETHER]]
        found += (whole - score(torch.stack(kept))).tolist()
    return found
