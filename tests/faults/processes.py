"""Who is who among the processes of a program, and what is done to them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import psutil

from tests.handlers import is_gone, until
from torchmgmt import Model

SEGFAULT = "__import__('ctypes').string_at(0)"
"""A Python expression that crashes in native code."""


def pids_of(model: Model) -> list[int]:
    return [worker.pid or 0 for worker in model.describe().workers]


def only_pid(model: Model) -> int:
    (pid,) = pids_of(model)
    assert pid
    return pid


def states_of(model: Model) -> list[str]:
    return [worker.state.name for worker in model.describe().workers]


def forkers_of(worker: int) -> list[psutil.Process]:
    """The processes between a worker and this program, the nearest first: the template if there is one, the torch-only."""
    found: list[psutil.Process] = []
    for process in psutil.Process(worker).parents():
        if process.pid == os.getpid():
            return found
        found.append(process)
    raise AssertionError(f"process {worker} does not descend from this one")


def template_of(worker: int) -> psutil.Process:
    """The template that a worker was forked from."""
    template, _torch_only = forkers_of(worker)
    return template


def torch_only_of(worker: int) -> psutil.Process:
    return forkers_of(worker)[-1]


def kill(*processes: psutil.Process) -> None:
    """Kill processes, and wait until they are gone."""
    for process in processes:
        process.kill()
    for process in processes:
        until(lambda process=process: is_gone(process.pid), f"process {process.pid} is gone")


def wait_for_another(model: Model, old: int) -> int:
    """Wait until the one worker is ready and is not the process ``old``; return its pid."""
    until(lambda: states_of(model) == ["READY"] and only_pid(model) != old, "the worker is replaced")
    return only_pid(model)


def wait_for_others(model: Model, count: int, old: Sequence[int]) -> None:
    """Wait until as many workers are ready, none of which is one of the processes ``old``."""
    until(
        lambda: states_of(model) == ["READY"] * count and not {*pids_of(model)} & {*old},
        f"{count} other workers are ready",
    )
