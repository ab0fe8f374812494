"""What it costs a program to have torchmgmt in it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HEAVY = ("torch", "falcon", "waitress", "uvicorn", "multiprocessing", "requests", "numpy")
NAMES = "from torchmgmt import ModelManager, WorkerPool, Batcher"
RUNS = 5

LIMIT_MEMORY_KIB = 10 * 1024
# Beside an empty interpreter, as the limit above. Time is processor time (that of the clock on a busy machine says more
# about its neighbours), and is held against a module that everybody knows, measured in the same run: absolute figures
# are in benchmarks/RESULTS.md.
PEER = "import requests"

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

    def medians(self, code: str) -> tuple[float, float]:
        """(processor seconds, KiB in memory) over `RUNS` interpreters, after one that compiles."""
        self.run(code)
        reports = [self.run(code) for _ in range(RUNS)]
        return (
            statistics.median(report["cpu_s"] for report in reports),
            statistics.median(report["memory_kib"] for report in reports),
        )


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> FreshInterpreter:
    return FreshInterpreter(tmp_path_factory.mktemp("bytecode"), repository)


@pytest.mark.parametrize("code", ["import torchmgmt", NAMES])
def test_importing_loads_nothing_heavy(interpreter: FreshInterpreter, code: str) -> None:
    """Neither the package nor its classes bring torch, a web framework or multiprocessing in."""
    assert interpreter.run(code)["heavy"] == []


@pytest.mark.parametrize("code", ["import torchmgmt", NAMES])
def test_importing_costs_little(interpreter: FreshInterpreter, code: str) -> None:
    """Having torchmgmt in a program costs less time than having requests in it, and under 10 MB."""
    _, empty_memory_kib = interpreter.medians("")
    peer_cpu_s, _ = interpreter.medians(PEER)
    cpu_s, memory_kib = interpreter.medians(code)
    assert cpu_s < peer_cpu_s
    assert memory_kib - empty_memory_kib < LIMIT_MEMORY_KIB
