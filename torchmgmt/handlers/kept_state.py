"""What a call may change beside its result, kept and put back: a call to look at what comes out is to leave no trace.

Kept are buffers, tensors, plain attributes, and the lists, dictionaries and sets that are attributes, of all modules that can
be found in what is called; and the generators of random numbers that all use. Not kept are parameters, which nobody changes
by asking, and what is in other objects. What TorchScript keeps beside its buffers nobody else can put back: it is copied.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.jit import ScriptModule

__all__ = ["KeptState", "stand_in"]

_OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes of every module: its parts and hooks, which a lazy module changes for good when it is first called."""
_MOST_COPIED_BYTES = 1 << 28
_MISSING: Any = object()
_CANNOT = (RuntimeError, NotImplementedError, ValueError, TypeError)
"""What tensors of some kinds raise that cannot be copied or compared: sparse, uninitialized, of a class of its own."""


def stand_in(call: Any) -> Any:
    """Return what is called to look at what comes out: a copy of a script that is not too large, else ``call`` itself."""
    if isinstance(call, ScriptModule) and sum(each.nbytes for each in call.parameters()) <= _MOST_COPIED_BYTES:
        with contextlib.suppress(RuntimeError):  # it holds something that cannot be copied
            return copy.deepcopy(call)
    return call


class KeptState:
    """The state of what is called, from now on until it is put back.

    Args:
        call: a module, or a function that uses some.
        with_generators: whether the generators of random numbers are kept, too. They are the whole process's.
    """

    def __init__(self, call: Callable[..., Any], *, with_generators: bool) -> None:
        modules = {id(each): each for found in _modules_in(call) for each in found.modules()}
        self._held = [_Held.of(module) for module in modules.values()]
        self._generators = _generators() if with_generators else []

    def put_back(self) -> None:
        """Have modules be as they were. What was not changed is not touched: its memory may be shared."""
        for held in self._held:
            held.put_back()

    def put_back_all(self) -> None:
        """Have generators be as they were, too."""
        self.put_back()
        for put_back in self._generators:
            put_back()


@frozen
class _Held:
    """The state of one module, without those in it."""

    module: nn.Module
    kind: type[nn.Module]
    attributes: dict[str, Any]
    buffers: dict[str, Tensor | None]
    contents: list[tuple[Any, Any]]
    """Tensors and containers, each with a copy of what is in it."""

    @classmethod
    def of(cls, module: nn.Module) -> _Held:
        is_script = isinstance(module, ScriptModule)  # whose attributes are elsewhere
        attributes = {} if is_script else {name: each for name, each in vars(module).items() if name not in _OF_TORCH}
        buffers: dict[str, Tensor | None] = dict(module.named_buffers(recurse=False) if is_script else module._buffers)
        pairs = [(value, _copy_of(value)) for value in (*attributes.values(), *buffers.values())]
        return cls(module, type(module), attributes, buffers, [pair for pair in pairs if pair[1] is not None])

    def put_back(self) -> None:
        if type(self.module) is not self.kind:  # a lazy one that is not so any more
            return
        if not isinstance(self.module, ScriptModule):
            self._bind_again()
        for value, kept in self.contents:
            _restore(value, kept)

    def _bind_again(self) -> None:
        """Have each attribute and buffer be the object that it was."""
        _bind(vars(self.module), self.attributes, _OF_TORCH)
        _bind(self.module._buffers, self.buffers)


def _bind(now: dict[str, Any], before: dict[str, Any], others: frozenset[str] = frozenset()) -> None:
    for name in [name for name in now if name not in before and name not in others]:
        del now[name]
    for name, value in before.items():
        if now.get(name, _MISSING) is not value:
            now[name] = value


def _copy_of(value: object) -> Any:
    """Return a copy of what is in a tensor or container; None of anything else."""
    if isinstance(value, Tensor):
        with contextlib.suppress(*_CANNOT):
            return value.detach().clone()
    return value.copy() if type(value) in {list, dict, set} else None  # type: ignore[attr-defined]


def _restore(value: Any, kept: Any) -> None:
    if isinstance(value, Tensor):
        with contextlib.suppress(*_CANNOT), torch.no_grad():
            if not torch.equal(value, kept):
                value.copy_(kept)
    elif list(map(id, _all_in(value))) != list(map(id, _all_in(kept))):
        value.clear()
        (value.extend if type(value) is list else value.update)(kept)


def _all_in(container: Any) -> Iterable[Any]:
    return [*container, *container.values()] if type(container) is dict else container


def _modules_in(call: Any, depth: int = 3) -> Iterator[nn.Module]:
    """Give the modules that a call of this may run: itself, or what it holds or refers to."""
    if isinstance(call, nn.Module):
        yield call
    elif depth:
        for part in _parts_of(call):
            yield from _modules_in(part, depth - 1)


def _parts_of(call: Any) -> Iterable[Any]:
    if isinstance(call, functools.partial):
        return [call.func, *call.args, *call.keywords.values()]
    if isinstance(call, MethodType):
        return [call.__self__, call.__func__]
    if isinstance(call, FunctionType):
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            used = inspect.getclosurevars(call)
            return [*used.nonlocals.values(), *used.globals.values()]
    return []


def _generators() -> list[Callable[[], object]]:
    """Return what puts each of the generators that all use back to where it is now."""
    put_back: list[Callable[[], object]] = [
        functools.partial(torch.default_generator.set_state, torch.default_generator.get_state()),
        functools.partial(random.setstate, random.getstate()),
    ]
    numbers = sys.modules.get("numpy.random")
    if numbers is not None and hasattr(numbers, "get_state"):
        put_back.append(functools.partial(numbers.set_state, numbers.get_state()))
    if torch.cuda.is_initialized():
        put_back.append(functools.partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    return put_back
