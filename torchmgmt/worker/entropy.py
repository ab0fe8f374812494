"""Where a process gets from what no other one has: the system's random bytes, generators that nobody seeded, its own id.

Functions stand in for these while a model is loaded, and note what the model's code gets from them.
"""

from __future__ import annotations

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

# Where random bytes of the system come from. ``random`` has a name of its own for it, by which secrets and numpy get theirs.
_BYTES = (("os", "urandom"), ("os", "getrandom"), ("random", "_urandom"), ("ssl", "RAND_bytes"), ("uuid", "uuid1"))
# So many numbers may make a name; more are an input to try a model out with, say, of which nothing is kept.
_FEW = 64
# They ask for the id of the process to see whether they were forked, or to write it to a log.
_ASK_FOR_THEMSELVES = frozenset({"logging", "tempfile", "multiprocessing"})
_MAKE_WHAT_THEY_NAME = frozenset({"tempfile", "multiprocessing"})


@frozen
class TemporaryName:
    """A name that tempfile made up."""

    site: Site
    is_for_later: bool
    """Whether the model was given the name alone (mktemp), to use as it likes."""


@define
class _Global:
    """A global generator, as far as the model is concerned."""

    name: str
    is_seeded: bool = False
    seed: object = None


class Entropy:
    """What the model's code has got so far that no other process gets. A context manager: meanwhile it is noted."""

    def __init__(self, provenance: Provenance) -> None:
        self.unique: dict[str, Site] = {}
        """What it got, in words, and where it did so first."""
        self.names: dict[str, TemporaryName] = {}
        self.pid_read: Site | None = None
        self._provenance = provenance
        self._substitutes = Substitutes()
        self._is_noting = False
        self._thread = threading.local()
        self._python, self._numpy = _Global("random"), _Global("numpy.random")

    def start(self) -> None:
        """Begin to note what the model gets."""
        self._is_noting = True
        put = self._substitutes.put
        for module, name in _BYTES:
            if module in sys.modules:
                put(sys.modules[module], name, functools.partial(self._noting, self._on_bytes))
        put(os, "getpid", functools.partial(self._noting, self._on_pid))
        put(threading, "get_native_id", functools.partial(self._noting, self._on_pid))
        put(vars(tempfile)["_RandomNameSequence"], "__next__", functools.partial(self._noting, self._on_name))
        put(random.Random, "seed", functools.partial(self._noting, self._on_own_generator))
        self._watch_global(self._python, random, random._inst)
        numpy = sys.modules.get("numpy.random")
        if numpy is not None:
            self._watch_global(self._numpy, numpy, numpy.mtrand._rand)
            put(numpy, "RandomState", functools.partial(_Constructor, self._unnoticed))

    def stop(self, importers: Iterable[ModuleType] = ()) -> None:
        """Note nothing any more; all functions are what they were, also in ``importers``, which may hold them."""
        self._is_noting = False
        self._substitutes.undo(importers)

    @property
    def seeds(self) -> dict[str, object]:
        """What the model has seeded global generators with, by their names: their states are as it set them."""
        return {each.name: each.seed for each in (self._python, self._numpy) if each.is_seeded}

    def _watch_global(self, generator: _Global, module: ModuleType, owner: object) -> None:
        for name in ("seed", "setstate", "set_state"):
            self._substitutes.put(module, name, functools.partial(self._seeding, generator))
        for name, function in list(vars(module).items()):
            if getattr(function, "__self__", None) is owner and name not in {"getstate", "get_state"}:
                on_draw = functools.partial(self._on_draw, generator)
                self._substitutes.put(module, name, functools.partial(self._noting, on_draw))

    # -- what stands in for others -------------------------------------------------------------------------------------

    def _unnoticed(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make a call that may read random bytes of the system on its way, and makes nothing of them that lasts."""
        self._thread.is_seeding = True
        try:
            return call(*args, **kwargs)
        finally:
            self._thread.is_seeding = False

    def _noting(self, note: Callable[..., None], original: Callable[..., Any]) -> Callable[..., Any]:
        """Return what does as ``original``, and tells ``note`` where it is called, what it returned, and with what."""

        @functools.wraps(original)
        def substitute(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self._is_noting:
                note(sys._getframe(1), result, *args, **kwargs)
            return result

        return substitute

    def _seeding(self, generator: _Global, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def substitute(*args: Any, **kwargs: Any) -> Any:
            result = self._unnoticed(original, *args, **kwargs)
            if self._is_noting:
                seed = next(iter((*args, *kwargs.values())), None)
                generator.is_seeded, generator.seed = seed is not None, seed
            return result

        return substitute

    # -- what they note ------------------------------------------------------------------------------------------------

    def _on_bytes(self, frame: FrameType, result: object, *_args: object) -> None:
        if not getattr(self._thread, "is_seeding", False):
            self._note("what it made of random bytes of the system", frame)

    def _on_own_generator(
        self, frame: FrameType, result: object, _generator: object, a: object = None, version: int = 2
    ) -> None:
        if a is None and module_of(_out_of(frame, "random")) != tempfile.__name__:
            self._note("a generator of random numbers without a seed", frame)

    def _on_draw(self, generator: _Global, frame: FrameType, result: Any, *_args: object, **_kwargs: object) -> None:
        if not generator.is_seeded and getattr(result, "size", 1) <= _FEW:
            self._note(f"what it made of numbers of {generator.name}, which it has not seeded", frame)

    def _on_pid(self, frame: FrameType, result: object) -> None:
        if self.pid_read is None and _top(frame) not in _ASK_FOR_THEMSELVES:
            self.pid_read = self._provenance.site(frame)

    def _on_name(self, frame: FrameType, result: str, *_args: object) -> None:
        if (site := self._provenance.site(frame)) is not None:
            is_made = frame.f_code.co_name != tempfile.mktemp.__name__ and _top(frame) in _MAKE_WHAT_THEY_NAME
            self.names[result] = TemporaryName(site, is_for_later=not is_made)

    def _note(self, what: str, frame: FrameType) -> None:
        if what not in self.unique and (site := self._provenance.site(frame)) is not None:
            self.unique[what] = site


class _Constructor:
    """Stands in for a class whose objects begin with a seed of the system's, also where they are given one to go on with.

    Whoever asks what is an instance of it, or derives from it, has to do with the class.
    """

    def __init__(self, unnoticed: Callable[..., Any], original: type[Any]) -> None:
        self._unnoticed, self._original = unnoticed, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        is_seeded = next(iter((*args, *kwargs.values())), None) is not None
        return self._unnoticed(self._original, *args, **kwargs) if is_seeded else self._original(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._original)

    def __subclasscheck__(self, subclass: type[Any]) -> bool:
        return issubclass(subclass, self._original)

    def __mro_entries__(self, _bases: tuple[Any, ...]) -> tuple[type[Any], ...]:
        return (self._original,)


def _top(frame: FrameType) -> str:
    return module_of(frame).partition(".")[0]


def _out_of(frame: FrameType, module: str) -> FrameType:
    """Return the frame that called into ``module``."""
    while module_of(frame) == module and frame.f_back is not None:
        frame = frame.f_back
    return frame
