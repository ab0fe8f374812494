"""The global random generators: those of Python, numpy and torch that everybody uses who has none of their own.

In a forked worker they are copies of the template's. What the model has seeded stays as it set it, as if the worker had
loaded the model by itself; what it has not gets numbers of its own.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Collection
from typing import Any

import torch

__all__ = ["GlobalGenerators", "is_of_system", "reseed"]

# What torch begins with where nobody has seeded a generator of one's own.
_TORCHS_DEFAULT = 67280421310721
# People's seeds are below, or a little below zero; the system's are anywhere in 64 bits.
_OF_PEOPLE = 1 << 32


def reseed() -> None:
    """Give this process random numbers of its own. Python's generator does so by itself whenever a process is forked.

    torch's generator and not ``torch.seed``: that imports, and a handler's file may be called torch.
    """
    torch.default_generator.seed()
    _reseed_numpy()


def is_of_system(seed: int) -> bool:
    """Whether a seed of torch's is one that the system may have given, and hardly a person."""
    return seed != _TORCHS_DEFAULT and _OF_PEOPLE < seed < (1 << 64) - _OF_PEOPLE


class GlobalGenerators:
    """The global generators of a process that loads a model: which of them the model has seeded. Seeds all when made."""

    def __init__(self) -> None:
        reseed()
        self._torchs_seed = torch.default_generator.initial_seed()
        self._is_numpy_seeded = self._is_torch_seeded = False
        self._python_state: Any = None

    def note(self, seeded: Collection[str]) -> None:
        """Note, when the model is loaded, which were seeded; ``seeded`` names those of Python and numpy."""
        self._is_torch_seeded = torch.default_generator.initial_seed() != self._torchs_seed
        self._is_numpy_seeded = "numpy.random" in seeded
        self._python_state = random.getstate() if "random" in seeded else None

    @property
    def torch_seed(self) -> dict[str, int]:
        """The seed that torch's generator was given meanwhile, by that name; empty if none."""
        return {"torch": torch.default_generator.initial_seed()} if self._is_torch_seeded else {}

    def settle(self) -> None:
        """In a worker, have those that the model has seeded in its states, and others with numbers of their own."""
        if not self._is_torch_seeded:
            torch.default_generator.seed()
        if not self._is_numpy_seeded:
            _reseed_numpy()
        if self._python_state is not None:
            random.setstate(self._python_state)


def _reseed_numpy() -> None:
    # Imported later it begins with numbers of its own. Not asked for by the package's attribute, which would import it.
    numpy = sys.modules.get("numpy.random")
    if numpy is not None and hasattr(numpy, "seed"):
        numpy.seed()
