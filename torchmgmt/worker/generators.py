"""The global random generators: those of Python, numpy and torch that everybody uses who has none of their own.

In a forked worker they are copies of the template's. What the model has seeded stays as it set it, as if the worker had
loaded the model by itself; what it has not gets numbers of its own.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["GlobalGenerators", "is_of_system", "reseed"]

# What torch begins with where nobody has seeded a generator of one's own.
_TORCHS_DEFAULT = 67280421310721
# People's seeds are below, or a little below zero; the system's are anywhere in 64 bits.
_OF_PEOPLE = 1 << 32
# So many numbers of 32 bits may have been taken from Python's generator; more take longer than a tenth of a second to tell.
_MOST_NUMBERS, _AT_A_TIME = 1 << 24, 1 << 20
_ENOUGH_BYTES = 16


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
        torch.default_generator.seed()
        self._torchs_seed = torch.default_generator.initial_seed()
        self._numpy = sys.modules.get("numpy.random")
        self._numpys_own: Any = None
        if self._numpy is not None and hasattr(self._numpy, "set_bit_generator"):  # since numpy 1.24
            # One that was given no seed yet: it keeps what it began with until it is given one.
            self._numpys_own = self._numpy.MT19937()
            self._numpy.set_bit_generator(self._numpys_own)
        else:
            _reseed_numpy()
        self._pythons_state = random.getstate()
        self._is_torch_seeded = self._is_numpy_seeded = self._is_python_seeded = False
        self.is_python_drawn_from = False
        """Whether somebody took numbers from Python's, which nobody had seeded."""

    def note(self, seeds: Mapping[str, object]) -> None:
        """Note, when the model is loaded, which it has seeded, be it by its own code or by what that has called.

        ``seeds`` are those of Python's and numpy's that its own code has given last; None: from the system.
        """
        self._is_torch_seeded = torch.default_generator.initial_seed() != self._torchs_seed
        if "numpy.random" in seeds:
            self._is_numpy_seeded = seeds["numpy.random"] is not None
        elif self._numpys_own is not None and self._numpy is not None:
            is_another = self._numpy.get_bit_generator() is not self._numpys_own  # which the model has put there
            self._is_numpy_seeded = is_another or self._numpys_own._seed_seq is None
        before, self._pythons_state = self._pythons_state, random.getstate()
        if "random" in seeds:
            self._is_python_seeded = seeds["random"] is not None
        elif before != self._pythons_state:
            self.is_python_drawn_from = _leads_to(before, self._pythons_state)
            self._is_python_seeded = not self.is_python_drawn_from

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
        if self._is_python_seeded:
            random.setstate(self._pythons_state)


def _leads_to(before: Any, after: Any) -> bool:
    """Whether one state of Python's generator comes of another by taking numbers: is it on its way, or was it set?"""
    on_its_way, there = random.Random(0), random.Random(0)
    on_its_way.setstate(before)
    there.setstate(after)
    sought = there.getrandbits(8 * _ENOUGH_BYTES).to_bytes(_ENOUGH_BYTES, "little")
    rest = b""
    for _ in range(_MOST_NUMBERS // _AT_A_TIME):
        rest += on_its_way.getrandbits(32 * _AT_A_TIME).to_bytes(4 * _AT_A_TIME, "little")
        if sought in rest:
            return True
        rest = rest[-_ENOUGH_BYTES:]
    return False


def _reseed_numpy() -> None:
    # Imported later it begins with numbers of its own. Not asked for by the package's attribute, which would import it.
    numpy = sys.modules.get("numpy.random")
    if numpy is not None and hasattr(numpy, "seed"):
        numpy.seed()
