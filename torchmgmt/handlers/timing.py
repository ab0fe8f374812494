"""``timed``: how long the steps of a handler take, if model-config.yaml asks for it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch

__all__ = ["timed"]

F = TypeVar("F", bound=Callable[..., Any])


def timed(func: F) -> F:
    """Have a method of a handler record its duration as ``ts_handler_<its name>``, in ms.

    Only where ``handler: {profile: true}`` stands in the model-config.yaml of its ``context``. On an accelerator it waits for
    what the method has set off. Named as in TorchServe's ``ts.handler_utils.timer``.
    """

    @functools.wraps(func)
    def measured(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_wanted(self):
            return func(self, *args, **kwargs)
        _wait_for_device()
        started = time.perf_counter()
        result = func(self, *args, **kwargs)
        _wait_for_device()
        self.context.metrics.add_time(f"ts_handler_{func.__name__}", (time.perf_counter() - started) * 1000)
        return result

    return cast(F, measured)


def _is_wanted(handler: Any) -> bool:
    config = getattr(getattr(handler, "context", None), "model_yaml_config", None)
    section = config.get("handler") if config else None
    return isinstance(section, Mapping) and bool(section.get("profile"))


def _wait_for_device() -> None:
    if torch.cuda.is_initialized():  # is_available alone may start a context, which no fork survives
        torch.cuda.synchronize()
