"""What a loaded handler holds: the plain values in its attributes, in those of what it holds, and in its modules.

Bounded: it is to find what somebody has put into an attribute, not to go through a vocabulary.
"""

from __future__ import annotations

import logging
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import partial
from pathlib import PurePath
from time import struct_time
from typing import Any

import torch
from attrs import frozen

__all__ = ["Held", "held_values", "namespaces"]

_MAX_OBJECTS = 20_000
_MAX_ITEMS = 1_000
"""Larger collections are data."""
_LONGEST_TEXT = 10_000
_MAX_DEPTH = 12
_FOREIGN_DEPTH = 2
"""So deep it is looked into what libraries have made."""
_PLAIN = (str, bytes, int, float, datetime, struct_time, PurePath, torch.Generator)
_COLLECTIONS = (list, tuple, set, frozenset, deque)
_OPAQUE = (types.ModuleType, torch.Tensor, logging.Logger, types.CodeType, types.FrameType, types.BuiltinFunctionType)


@frozen
class Held:
    """A plain value, and where it is held."""

    where: str
    value: Any
    is_foreign: bool
    """Whether it is in an object that a library has made."""


def held_values(roots: Iterable[tuple[str, object]], is_model: Callable[[str], bool]) -> Iterator[Held]:
    """Give what is held from ``roots`` on, which have names; ``is_model`` tells a module of the model's by its name."""
    walk = _Walk(is_model)
    for where, root in roots:
        walk.add(where, root, 0, 0)
    return walk.values()


class _Walk:
    def __init__(self, is_model: Callable[[str], bool]) -> None:
        self._is_model = is_model
        self._seen: set[int] = set()
        self._left: deque[tuple[str, Any, int, int]] = deque()

    def add(self, where: str, value: Any, depth: int, foreign: int) -> None:
        """Have a value looked at; ``foreign`` is for how many steps nothing on the way was the model's."""
        if depth <= _MAX_DEPTH and foreign <= _FOREIGN_DEPTH:
            self._left.append((where, value, depth, foreign))

    def values(self) -> Iterator[Held]:
        while self._left and len(self._seen) < _MAX_OBJECTS:
            where, value, depth, foreign = self._left.popleft()
            kind = type(value)
            # By its type, for an object may do anything when it is asked for its class.
            if issubclass(kind, _PLAIN):
                if not (issubclass(kind, (str, bytes)) and len(value) > _LONGEST_TEXT):
                    yield Held(where, value, foreign > 0)
            elif _is_numpys_scalar(kind):
                yield Held(where, value.item(), foreign > 0)
            elif not issubclass(kind, _OPAQUE) and id(value) not in self._seen:
                self._seen.add(id(value))
                self._look_into(where, value, depth + 1, foreign)

    def _look_into(self, where: str, value: Any, depth: int, foreign: int) -> None:
        kind = type(value)
        if issubclass(kind, dict):
            for key, each in _few(dict, value, dict.items):
                self.add(where, key, depth, foreign)
                self.add(f"{where}[{key!r}]" if type(key) in {str, int} else where, each, depth, foreign)
        elif (base := next((each for each in _COLLECTIONS if issubclass(kind, each)), None)) is not None:
            for each in _few(base, value, base.__iter__):
                self.add(where, each, depth, foreign)
        elif issubclass(kind, type):
            if self._is_model(_module_of(value)):
                self._add_all(value.__qualname__, _own_items(vars(value)), depth, foreign)
        elif issubclass(kind, types.FunctionType):
            if self._is_model(_module_of(value)):
                self._add_all(value.__qualname__, _captured(value), depth, foreign)
        elif issubclass(kind, types.MethodType):
            self.add(where, value.__self__, depth, foreign)
            self.add(where, value.__func__, depth, foreign)
        elif issubclass(kind, partial):
            self._add_all(where, {"args": value.args, "keywords": value.keywords, "func": value.func}, depth, foreign)
        else:
            self._look_into_object(where, value, depth, foreign)

    def _look_into_object(self, where: str, value: Any, depth: int, foreign: int) -> None:
        kind = type(value)
        own = self._is_model(_module_of(kind))
        if issubclass(kind, torch.nn.Module):
            modules = _attributes(value).get("_modules")
            if isinstance(modules, dict):  # a script has none in Python
                self._add_all(where, modules, depth - 1, foreign)  # however deep: they are few
            if not own:
                return
        elif _module_of(kind).partition(".")[0] == __name__.partition(".")[0] and depth > 1:
            return  # the context, say
        foreign = 0 if own else foreign + 1
        self._add_all(where, _attributes(value), depth, foreign)
        if own:
            self.add(kind.__qualname__, kind, depth, foreign)

    def _add_all(self, where: str, values: dict[str, Any], depth: int, foreign: int) -> None:
        for name, each in _few(dict, values, dict.items):
            self.add(f"{where}.{name}", each, depth, foreign)


def _module_of(value: Any) -> str:
    """Return the name of the module of a class or function; one without counts as the program's."""
    name = value.__module__
    return name if isinstance(name, str) else "__main__"


def _is_numpys_scalar(kind: type) -> bool:
    generic = getattr(sys.modules.get("numpy"), "generic", None)
    return generic is not None and issubclass(kind, generic)


def _few(base: Any, values: Any, items: Callable[[Any], Iterable[Any]]) -> list[Any]:
    """Return what is in a collection, as one of type ``base``, if that is little.

    Raises nothing if another thread changes it meanwhile.
    """
    try:
        return list(items(values)) if base.__len__(values) <= _MAX_ITEMS else []
    except RuntimeError:
        return []


def _attributes(value: Any) -> dict[str, Any]:
    """Return what is in an object, without running any code of its class."""
    try:
        found = dict(object.__getattribute__(value, "__dict__"))
    except (AttributeError, TypeError, RuntimeError):
        found = {}
    for base in type(value).__mro__:
        for name, slot in vars(base).items():
            if isinstance(slot, types.MemberDescriptorType):
                try:
                    found[name] = slot.__get__(value)
                except AttributeError:  # nothing is in it
                    continue
    return found


def _own_items(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in attributes.items() if not (name.startswith("__") and name.endswith("__"))}


def _captured(function: types.FunctionType) -> dict[str, Any]:
    """Return what a function has from elsewhere: defaults, what it closes over, and the globals that it names."""
    code = function.__code__
    found = {name: function.__globals__[name] for name in code.co_names if name in function.__globals__}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # nothing is in it yet
            continue
    found["defaults"] = (function.__defaults__, function.__kwdefaults__)
    return found


def namespaces(modules: Mapping[str, object], is_model: Callable[[str], bool]) -> Iterator[tuple[str, object]]:
    """Give the namespaces of those of ``modules`` that are the model's, by their names."""
    for name, module in modules.items():
        if isinstance(module, types.ModuleType) and is_model(name):
            yield name, _own_items(vars(module))
