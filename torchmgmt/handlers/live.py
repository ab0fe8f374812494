"""The handler of live objects and model files: runs what a program has registered as it is."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from torchmgmt.handlers.batched_call import BatchedCall
from torchmgmt.handlers.context import Context
from torchmgmt.handlers.faults import NO_FAULT
from torchmgmt.handlers.hooks import BEGIN, Hook, hook_of
from torchmgmt.handlers.kept_state import KeptState, stand_in
from torchmgmt.handlers.live_loading import fixed_batch_of, load_live
from torchmgmt.handlers.stacking import Group, grouped
from torchmgmt.live import Batching, LiveObject, Role

__all__ = ["LiveHandler"]

_BODY = "body"


class LiveHandler:
    """Runs a module, a function or a handler that was registered in place of an archive.

    A handler is run as one in an archive is. A module or function is called with what the requests brought: their data,
    or their fields as keyword arguments.
    """

    def __init__(self) -> None:
        self._call: Callable[..., Any]
        self._batched: BatchedCall
        self._isolates_errors = False
        self._own: object = None
        self._shared: LiveObject | None = None
        self._mode: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext

    def initialize(self, context: Context) -> None:
        """Load what was registered. Raises whatever that raises."""
        live = context.live
        if live is None:
            raise ValueError(
                "this handler runs what ModelManager.register is given in place of an archive; this is one"
            )
        loaded = load_live(live)
        if live.batching is None:
            loaded = loaded() if live.role is Role.HANDLER_CLASS else loaded
        self._own, self._shared = loaded, live if loaded is live.target else None
        if live.batching is None:
            self._be(loaded, context)
            return
        self._call, self._isolates_errors = loaded, live.isolates_errors
        if live.role is not Role.FUNCTION:
            self._mode = torch.inference_mode
        if live.batching is Batching.LIST:
            self.handle = self._handle_list  # type: ignore[method-assign]
        else:
            self._batched = self._batched_call(context)

    def _batched_call(self, context: Context) -> BatchedCall:
        # Threads share the program's generators with it, which may draw from them at any time.
        with_generators = context.live is not None and context.live.target is None

        def rehearse() -> tuple[Callable[[Any], Any], KeptState]:
            call = stand_in(self._call)
            return functools.partial(_call_stacked, call), KeptState(call, with_generators=with_generators)

        return BatchedCall(
            functools.partial(_call_stacked, self._call),
            rehearse,
            shares_batches=context.system_properties["batch_size"] > 1,
            fixed_batch=fixed_batch_of(self._call),
        )

    def hook(self, name: str) -> Hook | None:
        """Return the hook ``name`` of what was registered; None if it has none, or it is not this worker's to call.

        Threads share one object, which is the program's: it begins once, and whoever made it closes it.
        """
        hook = hook_of(self._own, name)
        if hook is None or self._shared is None:
            return hook
        return functools.partial(self._call_once, name, hook) if name == BEGIN else None

    def _be(self, service: Any, context: Context) -> None:
        """Hand everything on to a handler."""
        if callable(initialize := getattr(service, "initialize", None)):
            self._call_once("initialize", initialize, context)
        self.handle = service.handle  # type: ignore[method-assign]
        if callable(describe := getattr(service, "describe_handle", None)):
            self.describe_handle = describe

    def _call_once(self, name: str, call: Callable[[Context], object], context: Context) -> None:
        """Make a call, but only once of an object that threads share."""
        if self._shared is None:
            call(context)
        else:
            self._shared.do_once(name, functools.partial(call, context))

    def handle(self, data: Sequence[Any], context: Context) -> Sequence[Any]:
        """Return an answer for each request: its part of what the batch, stacked, was made into.

        Requests whose tensors have other shapes or types are stacked and run apart, and fail apart.
        """
        groups, refused = grouped(data)
        if len(groups) == 1 and not refused:
            return self._run(groups[0])
        answers: list[Any] = [refused.get(position) for position in range(len(data))]
        for group in groups:
            for position, answer in zip(group.positions, self._run_apart(group), strict=True):
                answers[position] = answer
        return answers

    def _handle_list(self, data: Sequence[Any], context: Context) -> Any:
        with self._mode():
            answers = self._call([row[_BODY] if _has_only_body(row) else row for row in data])
        return list(answers) if isinstance(answers, torch.Tensor) and answers.ndim else answers

    def _run(self, group: Group) -> list[Any]:
        with self._mode():
            return self._batched.answers(group)

    def _run_apart(self, group: Group) -> Sequence[Any]:
        """Run one group of several: its error is its own."""
        try:
            return self._run(group)
        except NO_FAULT:
            raise
        except BaseException as error:
            if not self._isolates_errors or len(group.positions) == 1:
                return [error] * len(group.positions)
        return [answer for each in group.each() for answer in self._run_apart(each)]


def _call_stacked(call: Callable[..., Any], value: Mapping[str, Any]) -> Any:
    return call(value[_BODY]) if _has_only_body(value) else _call_by_name(call, value)


def _call_by_name(call: Callable[..., Any], fields: Mapping[str, Any]) -> Any:
    """Call it with fields; in the order in which it has them, because an exported program heeds that alone."""
    try:
        bound = inspect.signature(getattr(call, "forward", call)).bind(**fields)
    except (TypeError, ValueError):  # it has no signature, or fields do not fit: the call says which
        return call(**fields)
    return call(*bound.args, **bound.kwargs)


def _has_only_body(row: Mapping[str, Any]) -> bool:
    return len(row) == 1 and _BODY in row
