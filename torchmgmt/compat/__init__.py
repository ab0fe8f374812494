"""Names that existing handlers and programs import from TorchServe, provided by code of our own."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

__all__ = ["install_ts"]

_OURS = "torchmgmt.compat.ts"


def install_ts() -> None:
    """Let ``import ts…`` in this process find what torchmgmt has under those names. Idempotent.

    Workers do this by themselves. Nothing named ``ts`` is installed anywhere, so a program that does not ask is
    untouched; an installed TorchServe is hidden from a process that does.
    """
    if not any(isinstance(finder, _TsFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TsFinder())


class _TsFinder(importlib.abc.MetaPathFinder):
    """Answers for ``ts`` and all below it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "ts" and not fullname.startswith("ts."):
            return None
        ours = _OURS + fullname.removeprefix("ts")
        if importlib.util.find_spec(ours) is None:
            raise ModuleNotFoundError(
                f"torchmgmt has no {fullname}; of TorchServe's modules it has: {', '.join(_available())}", name=fullname
            )
        return importlib.util.spec_from_loader(fullname, _TsLoader(ours), is_package=True)


class _TsLoader(importlib.abc.Loader):
    """Gives the module of ours that stands behind a name: the same object under both names."""

    def __init__(self, ours: str) -> None:
        self._ours = ours
        self._spec: importlib.machinery.ModuleSpec | None = None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._ours)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module as importing it under its own name has made it; the machinery put the other name in it."""
        module.__spec__ = self._spec


def _available() -> list[str]:
    root = Path(__file__).with_name("ts")
    return sorted(info.name for info in pkgutil.walk_packages([str(root)], prefix="ts."))
