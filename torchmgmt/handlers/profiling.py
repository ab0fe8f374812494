"""The profiler switch: with ENABLE_TORCH_PROFILER in the environment, handlers run under torch's profiler."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["is_profiled", "run_profiled", "step"]

log = logging.getLogger(__name__)

SWITCH = "ENABLE_TORCH_PROFILER"


def is_profiled() -> bool:
    """Whether the environment asks for the profiler: the variable has any value but nothing."""
    return bool(os.environ.get(SWITCH))


def run_profiled(run: Callable[[], Any], arguments: dict[str, Any], model_name: str) -> tuple[Any, Any]:
    """Return what ``run`` returns, and the profiler that watched it; log the ten most expensive operations.

    Args:
        run: what to watch; parts of it in ``with step(name)`` are shown by that name.
        arguments: for ``torch.profiler.profile``; what is not said is filled in. By default traces for Chrome and
            TensorBoard are written to ``pytorch_profiler/<model name>`` in the folder for temporary files.
        model_name: the name of the folder.
    """
    profiler = torch.profiler
    if not arguments:
        activities = [profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(profiler.ProfilerActivity.CUDA)
        arguments.update(activities=activities, record_shapes=True)
    if "on_trace_ready" not in arguments:
        folder = Path(tempfile.gettempdir(), "pytorch_profiler", model_name)
        arguments["on_trace_ready"] = profiler.tensorboard_trace_handler(str(folder))
        log.info("Traces of the profiler are written to %s", folder)
    with profiler.profile(**arguments) as watching:
        result = run()
    log.info("%s", watching.key_averages().table(sort_by="cpu_time_total", row_limit=10))
    return result, watching


def step(name: str) -> Any:
    """Show what is done in this context by ``name`` in a profile."""
    return torch.profiler.record_function(name)
