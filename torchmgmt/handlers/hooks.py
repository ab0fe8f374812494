"""Hooks: what of a handler is called in the life of its worker beside ``initialize`` and ``handle``.

``begin`` is called in each worker, after the model was loaded: workers that are forked were not there when that was done.
``finalize``, then ``close``, are called when a worker ends in good order.

A hook is a method of the handler's class, or a function of the module of a handler that is a function. It takes nothing, or
the context.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, MethodDescriptorType, ModuleType, WrapperDescriptorType
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torchmgmt.handlers.context import Context

__all__ = ["BEGIN", "ENDINGS", "Hook", "HookError", "hook_in", "hook_of", "hooks_found"]

log = logging.getLogger(__name__)

BEGIN = "begin"
ENDINGS = ("finalize", "close")
"""In this order: who has both sums up in the first what it gives back in the second."""

Hook: TypeAlias = "Callable[[Context], None]"

# What is written in C is none of the handler's making: a file's ``close``, say, of which its class is a kind.
_NOT_ITS_OWN = (BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType, property, type)
_CONTEXT = frozenset({"context", "ctx"})


class HookError(Exception):
    """A hook cannot be run as it is written."""


def hooks_found(find: Callable[[str], Hook | None]) -> Mapping[str, Hook]:
    """Return the hooks that ``find`` finds, by their names."""
    found = ((name, find(name)) for name in (BEGIN, *ENDINGS))
    return {name: hook for name, hook in found if hook is not None}


def hook_of(owner: object, name: str) -> Hook | None:
    """Return the hook ``name`` of an object; None if its class has none.

    Its class, and not the object: what a module has by such a name may be a layer.
    """
    method = inspect.getattr_static(type(owner), name, None)
    if method is None or isinstance(method, _NOT_ITS_OWN):
        return None
    return _hook(name, getattr(owner, name))


def hook_in(module: ModuleType, name: str) -> Hook | None:
    """Return the hook ``name`` among a module's own functions; None if it has none."""
    function = vars(module).get(name)
    is_own = not isinstance(function, _NOT_ITS_OWN) and getattr(function, "__module__", None) == module.__name__
    return _hook(name, function) if is_own else None


def _hook(name: str, function: Any) -> Hook | None:
    if not callable(function):
        return None
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # it does not say
        parameters = []
    needed = [each for each in parameters if each.default is each.empty and each.kind not in _VARIABLE]
    if len(needed) > 1 or any(each.kind is each.KEYWORD_ONLY for each in needed):
        log.warning(
            "%s() of the handler is not called: such a hook takes nothing, or the context, but this needs more", name
        )
        return None
    first = next((each.name for each in parameters if each.kind in _POSITIONAL), "")
    return functools.partial(_run, name, function, bool(needed) or first in _CONTEXT)


_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _run(name: str, function: Callable[..., Any], takes_context: bool, context: Context) -> None:
    result = function(context) if takes_context else function()
    if inspect.isawaitable(result) or inspect.isgenerator(result):
        result.close() if hasattr(result, "close") else None
        raise HookError(
            f"{name}() of the handler is a coroutine or a generator, which nobody runs; make it a plain function"
        )
