"""Functions that others stand in for while a model is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from types import FrameType, ModuleType
from typing import Any

__all__ = ["Substitutes"]


class Substitutes:
    """Functions in the place of others, until :meth:`undo`."""

    def __init__(self) -> None:
        self._put: list[tuple[Any, str, Any, Any]] = []
        self._giving: list[tuple[ModuleType, type[ModuleType], type[ModuleType]]] = []
        self._originals: dict[int, tuple[Any, Any]] = {}  # by the id of what stands in for it

    def put(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Put what ``make`` makes of the attribute ``name`` of a module or class in its place; nothing if there is none."""
        original = vars(owner).get(name)
        if original is not None:
            substitute = make(original)
            self._put.append((owner, name, original, substitute))
            self._originals[id(substitute)] = substitute, original
            setattr(owner, name, substitute)

    def give(
        self, module: ModuleType, choose: Callable[[str, Any, FrameType], Any], originals: Mapping[Any, Any]
    ) -> None:
        """Have ``choose`` say what somebody gets who asks ``module`` for an attribute; its namespace stays as it is.

        Args:
            module: what is asked.
            choose: returns what is given, from the attribute's name, what it is, and where it is asked for.
            originals: what it may give, each with what that stands in for.
        """
        kind = type(module)

        class Giving(kind):  # type: ignore[misc, valid-type]  # whatever kind of a module it is
            def __getattribute__(self, name: str) -> Any:
                return choose(name, super().__getattribute__(name), sys._getframe(1))

        self._originals.update({id(substitute): (substitute, original) for substitute, original in originals.items()})
        self._giving.append((module, kind, Giving))
        module.__class__ = Giving

    def undo(self, importers: Iterable[ModuleType] = ()) -> None:
        """Put all back, also where ``importers`` hold a substitute by its name. What has replaced one meanwhile stays."""
        for module, kind, giving in reversed(self._giving):
            if type(module) is giving:
                module.__class__ = kind
        for owner, name, original, substitute in reversed(self._put):
            if vars(owner).get(name) is substitute:
                setattr(owner, name, original)
        for module in importers:
            for name, value in list(vars(module).items()):
                if id(value) in self._originals:
                    vars(module)[name] = self._originals[id(value)][1]
        self._put.clear()
        self._giving.clear()
        self._originals.clear()
