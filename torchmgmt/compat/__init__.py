"""Names that existing handlers and programs import from TorchServe, provided by code of our own."""

from __future__ import annotations

import contextlib
import dis
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["install_ts"]

_OURS = "torchmgmt.compat.ts"
# What stands elsewhere, because it needs more than handlers do. By name only: nothing here may import it.
_ELSEWHERE: Mapping[str, str] = {
    "ts.launcher": "torchmgmt.launcher",
    "ts.model_loader": "torchmgmt.worker.service",
    "ts.service": "torchmgmt.worker.service",
}
_IMPORT_FROM = dis.opmap["IMPORT_FROM"]


def install_ts() -> None:
    """Let ``import ts…`` in this process find what torchmgmt has under those names. Idempotent; does not block.

    Workers that are processes do this by themselves. Nothing named ``ts`` is installed anywhere, so a program that does not
    ask is untouched; an installed TorchServe is hidden from a process that does. For unit tests of handlers, and for
    programs that import ``ts.launcher``.

    Raises:
        RuntimeError: another ``ts`` was imported before.
    """
    if any(isinstance(finder, _TsFinder) for finder in sys.meta_path):
        return
    if "ts" in sys.modules:
        where = getattr(sys.modules["ts"], "__file__", None) or "an unknown place"
        raise RuntimeError(f"another module ts was imported before, from {where}; call install_ts() first of all")
    sys.meta_path.insert(0, _TsFinder())


class _TsFinder(importlib.abc.MetaPathFinder):
    """Answers for ``ts`` and all below it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "ts" and not fullname.startswith("ts."):
            return None
        ours = _ELSEWHERE.get(fullname, _OURS + fullname.removeprefix("ts"))
        spec = importlib.util.find_spec(ours)
        if spec is None:
            raise ModuleNotFoundError(_no_module(fullname), name=fullname)
        is_package = spec.submodule_search_locations is not None
        return importlib.util.spec_from_loader(fullname, _TsLoader(ours), is_package=is_package)


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
        module_name = "ts" if module.__spec__ is None else module.__spec__.name
        module.__spec__ = self._spec
        vars(module).setdefault("__getattr__", _missing(module, module_name))


def _missing(module: ModuleType, name: str) -> Callable[[str], Any]:
    """Return what a module does about a name that it does not have."""

    def getattribute(attribute: str) -> Any:
        if not attribute.startswith("__") and _is_importing(sys._getframe(1)):
            raise ImportError(_no_name(module, name, attribute), name=name)
        raise AttributeError(f"module {name!r} has no attribute {attribute!r}")

    return getattribute


def _is_importing(frame: Any) -> bool:
    """Whether ``frame`` stands at ``from … import …``, which else says no more than that it cannot import a name."""
    with contextlib.suppress(AttributeError, IndexError):
        return bool(frame.f_code.co_code[frame.f_lasti] == _IMPORT_FROM)
    return False


def _no_name(module: ModuleType, name: str, attribute: str) -> str:
    if hasattr(module, "__path__"):
        return _no_module(f"{name}.{attribute}")
    return f"torchmgmt has no {attribute} in {name}; it has: {', '.join(module.__all__)}"


def _no_module(name: str) -> str:
    return f"torchmgmt has no {name}; of TorchServe's modules it has: {', '.join(_available())}"


def _available() -> list[str]:
    root = Path(__file__).with_name("ts")
    return sorted({*_ELSEWHERE, *(info.name for info in pkgutil.walk_packages([str(root)], prefix="ts."))})
