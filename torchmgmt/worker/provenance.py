"""Whose code runs: the model's, a library's on its behalf, or what a library does when it is imported.

The model's is all that is neither Python's, nor installed, nor ours: files of the archive, and of the program where a live
object comes from; and the package of the handler, if that is installed.
"""

from __future__ import annotations

import os
import sysconfig
from enum import Enum, auto
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from attrs import frozen

from torchmgmt.handlers import SHIPPED

if TYPE_CHECKING:
    from torchmgmt.records import ModelSpec

__all__ = ["Provenance", "Site", "module_of"]

_OURS = str(Path(__file__).parents[1])
_OUR_HANDLERS = str(Path(_OURS, "handlers"))
# What stands in for others there is called by whoever calls those.
_STANDING_IN = frozenset(str(Path(__file__).with_name(f"{name}.py")) for name in ("entropy", "audit"))
_INSTALLED = frozenset({"site-packages", "dist-packages"})
_PYTHONS = tuple({*map(sysconfig.get_path, ("stdlib", "platstdlib")), str(Path(os.__file__).parent)})


class _Owner(Enum):
    MODEL = auto()
    LIBRARY = auto()
    IMPORT = auto()
    """What finds and runs modules."""
    OUR_HANDLER = auto()
    OURS = auto()
    NOBODY = auto()
    """Made at run time, by whoever called it."""


@frozen
class Site:
    """Where the model's code did something."""

    file: str
    line: int
    called: str = ""
    """What it called there that did it; empty if it did so itself."""

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"


class Provenance:
    """Tells whose code runs in a process that loads the model of ``spec``."""

    def __init__(self, spec: ModelSpec) -> None:
        self._folder = spec.model_dir
        self._packages = spec.packages
        self._package = _installed_handler(spec)
        self._owners: dict[str, _Owner] = {}

    def site(self, frame: FrameType | None) -> Site | None:
        """Return where the model's code had done what ``frame`` does; None if it was no doing of the model's.

        What a library does when it is imported is none, but what the model's own modules do is. What is called by a handler
        that ships is the handler's doing, and so is what a thread does that has nothing of the model's on its stack.
        """
        inner: FrameType | None = None
        while frame is not None:
            owner = self._owner(frame)
            if owner is _Owner.MODEL:
                return self._site(frame, inner)
            if owner is _Owner.OURS or (owner is _Owner.IMPORT and inner is None) or self._is_import(frame, owner):
                return None
            if owner is _Owner.OUR_HANDLER:
                return self._site(inner or frame, None)
            if owner is not _Owner.NOBODY or frame.f_code.co_filename not in _STANDING_IN:
                inner = frame
            frame = frame.f_back
        return None if inner is None else self._site(inner, None)

    def is_models(self, frame: FrameType) -> bool:
        """Whether ``frame`` runs code of the model's own."""
        return self._owner(frame) is _Owner.MODEL

    def is_model(self, module: str, file: str | None) -> bool:
        """Whether a module is the model's, by its name and its file."""
        if module.partition(".")[0] == self._package:
            return True
        return self._owner_of_file(file) is _Owner.MODEL if file else module == "__main__"

    def _site(self, frame: FrameType, inner: FrameType | None) -> Site:
        file = frame.f_code.co_filename
        called = "" if inner is None else f"{module_of(inner)}.{inner.f_code.co_name}"
        return Site(file.removeprefix(self._folder + os.sep), frame.f_lineno, called)

    def _is_import(self, frame: FrameType, owner: _Owner) -> bool:
        if frame.f_code.co_name != "<module>":
            return False
        return owner is _Owner.LIBRARY or (frame.f_back is not None and self._owner(frame.f_back) is _Owner.IMPORT)

    def _owner(self, frame: FrameType) -> _Owner:
        file = frame.f_code.co_filename
        if file.startswith("<frozen importlib"):
            return _Owner.IMPORT
        if self.is_model(module_of(frame), None if file.startswith("<") else file):
            return _Owner.MODEL
        return _Owner.NOBODY if file.startswith("<") else self._owner_of_file(file)

    def _owner_of_file(self, file: str) -> _Owner:
        owner = self._owners.get(file)
        if owner is None:
            owner = self._owners[file] = self._find_owner(file)
        return owner

    def _find_owner(self, file: str) -> _Owner:
        if file in _STANDING_IN:
            return _Owner.NOBODY
        if _is_in(file, self._folder):
            return _Owner.MODEL
        if _is_in(file, _OUR_HANDLERS):
            return _Owner.OUR_HANDLER
        if _is_in(file, _OURS):
            return _Owner.OURS
        folders = (*_PYTHONS, self._packages)
        if any(_is_in(file, each) for each in folders if each) or not _INSTALLED.isdisjoint(Path(file).parts):
            return _Owner.LIBRARY
        return _Owner.MODEL


def module_of(frame: FrameType) -> str:
    """Return the name of the module that ``frame`` runs in."""
    return str(frame.f_globals.get("__name__", ""))


def _is_in(file: str, folder: str) -> bool:
    return file.startswith(folder + os.sep)


def _installed_handler(spec: ModelSpec) -> str | None:
    """Return the package that the handler is in, if it is neither in the model's folder nor one that ships."""
    name = spec.handler.partition(":")[0].removesuffix(".py").replace("/", ".")
    package = name.partition(".")[0]
    if name in SHIPPED or package == __name__.partition(".")[0] or Path(spec.model_dir, f"{name}.py").is_file():
        return None
    return package
