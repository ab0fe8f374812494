"""The machine that was measured on, and the versions that were measured."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil


def facts() -> dict[str, str]:
    """Return what a reader needs to place the figures."""
    return {
        "cpu": _cpu_model(),
        "cores": f"{len(os.sched_getaffinity(0))} usable of {psutil.cpu_count()} logical",
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "torch": _version("torch"),
        "bytecode": "compiled at every start (PYTHONDONTWRITEBYTECODE)" if sys.dont_write_bytecode else "cached",
    }


def load() -> str:
    """Return the load averages over 1, 5 and 15 minutes: what else was running."""
    return " ".join(f"{each:.2f}" for each in os.getloadavg())


@contextmanager
def pinned(cores: Mapping[int, int]) -> Iterator[None]:
    """Keep each process, by its pid, with all its threads on one core, by its place among the usable ones."""
    usable = sorted(os.sched_getaffinity(0))
    try:
        for pid, core in cores.items():
            _pin(pid, {usable[core % len(usable)]})
        yield
    finally:
        for pid in cores:
            _pin(pid, set(usable))


def _pin(pid: int, cores: set[int]) -> None:
    for thread in _threads(pid):
        with suppress(ProcessLookupError):  # one that was about to end
            os.sched_setaffinity(thread, cores)


def _threads(pid: int) -> list[int]:
    return [int(each.name) for each in Path(f"/proc/{pid}/task").iterdir()]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
