"""The modules that a process had before a model was loaded, which has to leave them as they were."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

__all__ = ["ImportedModules"]


class ImportedModules:
    """The modules that are imported now, held by the process that forks those that load models.

    To count one more reference of each, or only to go through their names, copies their pages: in a process that was just
    forked, 2 ms and 3.6 MB. So it is told from the order of the names, in which new ones come last, whether one is missing.
    """

    def __init__(self) -> None:
        self._modules = dict(sys.modules)
        self._last = next(reversed(self._modules))

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Bring back what is taken out of ``sys.modules`` meanwhile, be it for a file of the same name.

        A handler's file may be called like a module that others import later.
        """
        try:
            yield
        finally:
            if not self._are_there():
                sys.modules.update(self._modules)

    def _are_there(self) -> bool:
        for new, (name, module) in enumerate(reversed(sys.modules.items())):
            if name == self._last:
                return module is self._modules[name] and len(sys.modules) == len(self._modules) + new
        return False
