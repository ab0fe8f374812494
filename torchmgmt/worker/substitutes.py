"""Functions that others stand in for while a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

__all__ = ["Substitutes"]


class Substitutes:
    """Functions in the place of others, until :meth:`undo`."""

    def __init__(self) -> None:
        self._done: list[tuple[Any, str, Any, Any]] = []

    def put(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Put what ``make`` makes of the attribute ``name`` of a module or class in its place; nothing if there is none."""
        original = vars(owner).get(name)
        if original is not None:
            substitute = make(original)
            self._done.append((owner, name, original, substitute))
            setattr(owner, name, substitute)

    def undo(self, importers: Iterable[ModuleType] = ()) -> None:
        """Put all back, also where ``importers`` hold a substitute by its name. What has replaced one meanwhile stays."""
        originals = {id(substitute): original for _, _, original, substitute in self._done}
        for owner, name, original, substitute in reversed(self._done):
            if vars(owner).get(name) is substitute:
                setattr(owner, name, original)
        for module in importers:
            for name, value in list(vars(module).items()):
                if id(value) in originals:
                    vars(module)[name] = originals[id(value)]
        self._done.clear()
