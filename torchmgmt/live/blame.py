"""Which part of an object it is that cannot be pickled."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

__all__ = ["why_not"]

_DEEPEST = 12


def why_not(target: object, error: Exception, dumps: Callable[[object], object]) -> str:
    """Return what ``target``, pickling which raised ``error``, must be: the text names the part that is at fault.

    ``dumps`` pickles an object, or raises.
    """
    path, culprit, reason = _culprit(target, error, dumps)
    kind = f"{type(culprit).__module__}.{type(culprit).__qualname__}"
    part = f"its {path} (an object of type {kind})" if path else f"an object of type {kind}"
    return (
        f"picklable, so that workers can get it: {part} is not ({_line_of(reason)}). Make that in the worker instead (in"
        ' initialize(context) of a handler class, say), leave it out in __getstate__, or register with backend="thread"'
    )


def _culprit(target: object, error: Exception, dumps: Callable[[object], object]) -> tuple[str, object, Exception]:
    """Return the innermost part that cannot be pickled, how one gets there, and what was raised."""
    path, seen = "", {id(target)}
    for _ in range(_DEEPEST):
        for name, part in _parts(target):
            if id(part) in seen:
                continue
            seen.add(id(part))
            try:
                dumps(part)
            except Exception as reason:  # whatever a __reduce__ raises
                path, target, error = path + name, part, reason
                break
        else:
            break
    return path.strip(" ."), target, error


def _parts(target: object) -> Iterator[tuple[str, object]]:
    if isinstance(target, MethodType):
        yield ".__self__", target.__self__
    elif isinstance(target, FunctionType):
        yield from _used_by(target)
    elif isinstance(target, Mapping):
        yield from ((f"[{key!r}]", value) for key, value in target.items())
    elif isinstance(target, (list, tuple, set, frozenset)):
        yield from ((f"[{number}]", value) for number, value in enumerate(target))
    elif not isinstance(target, type):
        yield from ((f".{name}", value) for name, value in _attributes(target))


def _used_by(function: FunctionType) -> Iterator[tuple[str, object]]:
    try:
        variables = inspect.getclosurevars(function)
    except ValueError:  # a variable that has no value yet
        return
    yield from ((f" variable {name}", value) for name, value in {**variables.nonlocals, **variables.globals}.items())


def _attributes(target: object) -> Iterator[tuple[str, Any]]:
    for name, value in getattr(target, "__dict__", {}).items():
        # What a module is made of stands in dictionaries of its own, and is asked for without them.
        if name in {"_modules", "_parameters", "_buffers"} and isinstance(value, dict):
            yield from value.items()
        else:
            yield name, value


def _line_of(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
