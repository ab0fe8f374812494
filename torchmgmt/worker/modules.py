"""The modules that a process had before a model was loaded, which has to leave them as they were."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType

__all__ = ["ImportedModules"]

_MARK = "torchmgmt.worker.modules.<mark>"  # no name that can be imported


class ImportedModules:
    """The modules that are imported now, held by the process that forks those that load models.

    To count one more reference of each, or only to go through their names, copies their pages: in a process that was just
    forked, 2 ms and 3.6 MB. So a mark is put behind them in ``sys.modules``, where new names come last, and it is told from
    the number of names before it whether one is missing.
    """

    def __init__(self) -> None:
        self._modules = dict(sys.modules)
        sys.modules[_MARK] = ModuleType(_MARK)

    def later_names(self) -> set[str]:
        """Return the names of the modules that were imported since."""
        return _names_after_mark()

    def later(self) -> Iterator[ModuleType]:
        """Give the modules that were imported since."""
        found = (sys.modules.get(name) for name in self.later_names())
        return (module for module in found if isinstance(module, ModuleType))

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Bring back what is taken out of ``sys.modules`` meanwhile, and be it for a file of the same name.

        A handler's file may be called like a module that others import later. What a handler replaces in its place stays.
        """
        try:
            yield
        finally:
            later = _names_after_mark()
            if len(sys.modules) != len(self._modules) + 1 + len(later):
                there = sys.modules.keys() - later
                sys.modules.update({name: each for name, each in self._modules.items() if name not in there})


def _names_after_mark() -> set[str]:
    """Return the names that came later; all of them, if the mark is gone."""
    while True:
        names = set()
        try:
            for name in reversed(sys.modules):
                if name == _MARK:
                    break
                names.add(name)
        except RuntimeError:  # another thread, of the handler's, imports something
            continue
        return names
