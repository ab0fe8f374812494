"""Where a process gets from what no other one has: the system's random bytes, generators that nobody seeded, its own id.

Functions stand in for these while a model is loaded, and note what the model's code gets from them. Those of ``random`` and
``numpy.random`` do so for the model's own code alone: libraries such as numba keep tables of these very functions.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from types import FrameType, ModuleType
from typing import Any

from attrs import define, frozen

from torchmgmt.worker.provenance import Provenance, Site, module_of
from torchmgmt.worker.substitutes import Substitutes

__all__ = ["Entropy", "TemporaryName"]

_BYTES = "what it made of random bytes of the system"
_GENERATOR = "a generator of random numbers without a seed"
_DRAWN = "what it made of numbers of {}, which it has not seeded"
# Where random bytes of the system come from. ``random`` has a name of its own for it, by which secrets get theirs.
_SOURCES = (("os", "urandom"), ("os", "getrandom"), ("random", "_urandom"), ("ssl", "RAND_bytes"), ("uuid", "uuid1"))
_SEEDING = frozenset({"seed", "setstate", "set_state"})
_LOOKING = frozenset({"getstate", "get_state"})
# So many letters or whole numbers in a row may make a name. More, or fractions, are an input to try a model out with.
_LONGEST_NAME = 64
# They ask for the id of the process to see whether they were forked, or to write it to a log.
_ASK_FOR_THEMSELVES = frozenset({"logging", "tempfile", "multiprocessing"})
_MAKE_WHAT_THEY_NAME = frozenset({"tempfile", "multiprocessing"})


@frozen
class TemporaryName:
    """A name that tempfile made up."""

    site: Site
    is_for_later: bool
    """Whether the model was given the name alone (mktemp), to use as it likes."""


class Entropy:
    """What the model's code has got so far that no other process gets, between :meth:`start` and :meth:`stop`."""

    def __init__(self, provenance: Provenance) -> None:
        self.names: dict[str, TemporaryName] = {}
        self.pid_read: Site | None = None
        self.seeds: dict[str, object] = {}
        """What the model's own code has seeded Python's and numpy's global generators with last; None: from the system."""
        self.is_drawn_by_imports = False
        """Whether a library has taken numbers from Python's global generator when it was imported."""
        self._seeded_by_libraries: set[str] = set()
        self._provenance = provenance
        self._substitutes = Substitutes()
        self._is_noting = False
        self._thread = threading.local()
        self._got: dict[str, Site] = {}
        self._numpy_seeds: list[_Asked] = []

    def start(self) -> None:
        """Begin to note what the model gets."""
        self._is_noting = True
        put = self._substitutes.put
        for module, name in _SOURCES:
            if module in sys.modules:
                put(sys.modules[module], name, self._noting(self._on_bytes))
        put(os, "getpid", self._noting(self._on_pid))
        put(threading, "get_native_id", self._noting(self._on_pid))
        put(vars(tempfile)["_RandomNameSequence"], "__next__", self._noting(self._on_name))
        put(random.Random, "seed", self._noting(self._on_own_generator))
        self._watch_global(random, vars(random)["_inst"])
        numpy = sys.modules.get("numpy.random")
        if numpy is not None:
            self._watch_global(numpy, numpy.mtrand._rand)
            put(numpy.bit_generator, "randbits", self._seeding_numpys)

    def stop(self, importers: Iterable[ModuleType] = ()) -> None:
        """Note nothing any more; all functions are what they were, also in ``importers``, which may hold them."""
        self._is_noting = False
        self._substitutes.undo(importers)

    @property
    def unique(self) -> dict[str, Site]:
        """What it got, in words, and where it did so first."""
        kept = [each.site for each in self._numpy_seeds if not each.is_discarded]
        return {**self._got, **({_GENERATOR: kept[0]} if kept else {})}

    def _watch_global(self, module: ModuleType, owner: object) -> None:
        """Have the functions of a module that belong to its global generator tell when the model's own code calls them."""
        substitutes: dict[str, Any] = {}
        for name, function in list(vars(module).items()):
            if name in _SEEDING:
                substitutes[name] = self._seeding(module.__name__, function)
            elif getattr(function, "__self__", None) is owner and name not in _LOOKING:
                substitutes[name] = self._noting(functools.partial(self._on_draw, module.__name__))(function)

        def give(name: str, value: Any, frame: FrameType) -> Any:
            if name not in substitutes or not self._is_noting:
                return value
            if self._provenance.is_models(frame):
                return substitutes[name]
            self._on_library(module.__name__, name, frame)
            return value

        self._substitutes.give(module, give, {substitutes[name]: vars(module)[name] for name in substitutes})

    # -- what stands in for others -------------------------------------------------------------------------------------

    def _noting(self, note: Callable[..., None]) -> Callable[[Any], Any]:
        """Return what makes of a function one that does the same and tells ``note`` of it: where, what came out, with what."""

        def make(original: Any) -> Any:
            @functools.wraps(original)
            def substitute(*args: Any, **kwargs: Any) -> Any:
                result = original(*args, **kwargs)
                if self._is_noting:
                    note(sys._getframe(1), result, *args, **kwargs)
                return result

            return substitute

        return make

    def _seeding(self, generator: str, original: Any) -> Any:
        @functools.wraps(original)
        def substitute(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self._is_noting:
                self.seeds[generator] = next(iter((*args, *kwargs.values())), None)
            return result

        return substitute

    def _seeding_numpys(self, original: Any) -> Any:
        """Return what numpy seeds a generator from that was given no seed, or will be in a moment: see :class:`_Seed`."""

        @functools.wraps(original)
        def substitute(count: int) -> int:
            self._thread.is_seeding = True
            try:
                seed: int = original(count)
            finally:
                self._thread.is_seeding = False
            frame = sys._getframe(1)
            if not self._is_noting or (site := self._provenance.site(frame)) is None:
                return seed
            self._numpy_seeds.append(_Asked(site))
            return _Seed(seed, frame, self._numpy_seeds[-1])

        return substitute

    # -- what they note ------------------------------------------------------------------------------------------------

    def _on_bytes(self, frame: FrameType, result: object, *_args: object, **_kwargs: object) -> None:
        if not getattr(self._thread, "is_seeding", False):
            self._note(_BYTES, frame)

    def _on_own_generator(
        self, frame: FrameType, result: object, generator: object, a: object = None, version: int = 2
    ) -> None:
        if a is None and module_of(_out_of(frame, "random")) != tempfile.__name__:
            self._note(_GENERATOR, frame)

    def _on_draw(self, generator: str, frame: FrameType, result: Any, *_args: object, **_kwargs: object) -> None:
        if not self._is_seeded(generator) and _may_be_name(result):
            self._note(_DRAWN.format(generator), frame)

    def _on_library(self, generator: str, name: str, frame: FrameType) -> None:
        """Note that a library is about to seed a global generator, or to draw from it: for the model, or for itself.

        Of numpy's one cannot know yet how many numbers it will be; and who draws many makes no name of them.
        """
        is_for_model = self._provenance.site(frame) is not None
        if name in _SEEDING:
            self._seeded_by_libraries |= {generator} if is_for_model else set()
        elif generator == random.__name__ and not is_for_model:
            self.is_drawn_by_imports = True
        elif generator == random.__name__ and not self._is_seeded(generator):
            self._note(_DRAWN.format(generator), frame)

    def _is_seeded(self, generator: str) -> bool:
        return self.seeds.get(generator) is not None or generator in self._seeded_by_libraries

    def _on_pid(self, frame: FrameType, result: object) -> None:
        if self.pid_read is None and _top(frame) not in _ASK_FOR_THEMSELVES:
            self.pid_read = self._provenance.site(frame)

    def _on_name(self, frame: FrameType, result: str, *_args: object) -> None:
        if (site := self._provenance.site(frame)) is not None:
            is_made = frame.f_code.co_name != tempfile.mktemp.__name__ and _top(frame) in _MAKE_WHAT_THEY_NAME
            self.names[result] = TemporaryName(site, is_for_later=not is_made)

    def _note(self, what: str, frame: FrameType) -> None:
        if what not in self._got and (site := self._provenance.site(frame)) is not None:
            self._got[what] = site


@define
class _Asked:
    """A seed that numpy has asked the system for."""

    site: Site
    is_discarded: bool = False


class _Seed(int):
    """A seed of the system's for a generator of numpy's, which tells whether that has thrown it away at once.

    ``RandomState(7)`` asks for one, too, and then takes the 7: both within the one call. A generator that was given no seed
    keeps it, and if it is made for a single number, at least until the next call.
    """

    def __new__(cls, value: int, frame: FrameType, asked: _Asked) -> _Seed:
        """Return the number, asked for in ``frame``."""
        seed = super().__new__(cls, value)
        seed.asked, seed.place = asked, (id(frame), frame.f_lasti)
        return seed

    asked: _Asked
    place: tuple[int, int]

    def __del__(self) -> None:
        with contextlib.suppress(ValueError):  # the interpreter ends, and no code runs any more
            frame = sys._getframe(1)
            self.asked.is_discarded = self.place == (id(frame), frame.f_lasti)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


def _may_be_name(drawn: Any) -> bool:
    """Whether a number or a name may be made of what was drawn."""
    if getattr(drawn, "size", 1) == 1:
        return True
    return bool(drawn.size <= _LONGEST_NAME and drawn.ndim == 1 and drawn.dtype.kind != "f")


def _top(frame: FrameType) -> str:
    return module_of(frame).partition(".")[0]


def _out_of(frame: FrameType, module: str) -> FrameType:
    """Return the frame that called into ``module``."""
    while module_of(frame) == module and frame.f_back is not None:
        frame = frame.f_back
    return frame
