"""What it costs a program to have torchmgmt in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HEAVY = ("torch", "falcon", "waitress", "uvicorn", "multiprocessing", "requests", "numpy")
NAMES = "from torchmgmt import ModelManager, WorkerPool, Batcher"
RUNS = 5

# What `import torchmgmt` may cost beside an empty interpreter.
LIMIT_MEMORY_KIB = 10 * 1024
# Its parts are loaded when they are first asked for, so its names are measured, too: against a module that everybody
# knows, in the same run. Time is processor time, since that of the clock on a busy machine says more about its
# neighbours. Absolute figures are in benchmarks/RESULTS.md.
PEER = "import requests"
MOST_TIMES = 1.5

REPORT = f"""
import json, sys
modules = sorted(sys.modules)
import resource
usage = resource.getrusage(resource.RUSAGE_SELF)
memory_kib = 0
if sys.platform == "linux":  # ru_maxrss would begin with the size of the process that started this one
    with open("/proc/self/status") as status:
        memory_kib = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
print(json.dumps({{
    "heavy": [name for name in {HEAVY!r} if name in modules],
    "cpu_s": usage.ru_utime + usage.ru_stime,
    "memory_kib": memory_kib,
}}))
"""


class FreshInterpreter:
    """Runs code in new interpreters, with the byte code of what they import kept as it is for users."""

    def __init__(self, bytecode: Path, repository: Path) -> None:
        self._environment = {
            **os.environ,
            "PYTHONPYCACHEPREFIX": str(bytecode),
            "PYTHONPATH": str(repository),
        }
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def run(self, code: str) -> dict[str, Any]:
        finished = subprocess.run(
            [sys.executable, "-c", code + REPORT],
            check=False,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=50,
        )
        assert finished.returncode == 0, finished.stderr
        report: dict[str, Any] = json.loads(finished.stdout)
        return report

    def least(self, *codes: str) -> list[tuple[float, float]]:
        """(processor seconds, KiB in memory) of each code: the least of `RUNS` interpreters that take turns.

        What a busy machine adds only makes a run longer, so the least one says most.
        """
        for code in codes:
            self.run(code)  # compiles
        rounds = [[self.run(code) for code in codes] for _ in range(RUNS)]
        return [
            (min(report["cpu_s"] for report in reports), min(report["memory_kib"] for report in reports))
            for reports in zip(*rounds, strict=True)
        ]


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> FreshInterpreter:
    return FreshInterpreter(tmp_path_factory.mktemp("bytecode"), repository)


@pytest.mark.parametrize("code", ["import torchmgmt", NAMES])
def test_importing_loads_nothing_heavy(interpreter: FreshInterpreter, code: str) -> None:
    """Neither the package nor its classes bring torch, a web framework or multiprocessing in."""
    assert interpreter.run(code)["heavy"] == []


def test_importing_the_package_costs_little_memory(interpreter: FreshInterpreter) -> None:
    """Having torchmgmt in a program costs under 10 MB beside an empty interpreter."""
    (_, empty_kib), (_, memory_kib) = interpreter.least("", "import torchmgmt")
    assert memory_kib - empty_kib < LIMIT_MEMORY_KIB


@pytest.mark.parametrize("code", ["import torchmgmt", NAMES])
def test_importing_costs_about_as_much_as_a_well_known_module(interpreter: FreshInterpreter, code: str) -> None:
    """Having torchmgmt in a program, and its classes, costs less memory than having requests, and not half as much time again."""
    (peer_cpu_s, peer_kib), (cpu_s, memory_kib) = interpreter.least(PEER, code)
    assert memory_kib < peer_kib
    assert cpu_s < MOST_TIMES * peer_cpu_s
