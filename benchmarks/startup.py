"""startup: what embedding torchmgmt costs, and how soon a model can be asked."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import models
from benchmarks.measure import Missing, Result, Sample, interleave, time_each, timed
from benchmarks.peers import bare
from benchmarks.report import Goal, Row, Table
from benchmarks.script import READY, seconds_until_ready
from benchmarks.suite import Setup
from torchmgmt import ModelManager

_LOADING_S = 1.0

_PRINT_RSS = "\nprint(open('/proc/self/status').read().partition('VmRSS:')[2].split()[0])"

_IMPORTS = {
    "empty interpreter": "",
    "import torchmgmt": "import torchmgmt",
    "ModelManager()": "from torchmgmt import ModelManager; manager = ModelManager()",
    "import torch": "import torch",
}

_REGISTER = f"""
import sys
from torchmgmt import ModelManager
with ModelManager() as manager:
    manager.register(sys.argv[1])
    print({READY!r}, flush=True)
    sys.stdin.read()
"""


def run(setup: Setup) -> list[Table]:
    """Measure the suite; return its tables."""
    runs = setup.runs
    with tempfile.TemporaryDirectory(prefix="torchmgmt-bench-") as scratch:
        folder = Path(scratch)
        return [_embedding(runs), _first_worker(folder, runs), _warm_manager(folder, runs)]


def _embedding(runs: int) -> Table:
    variants: dict[str, Callable[[], Sample]] = {name: partial(_interpreter, code) for name, code in _IMPORTS.items()}
    result = interleave("startup, embedding", variants, runs, at_most={"import torch": 2})
    rows = []
    for figure, unit, scale, limit in (("seconds", "ms", 1000.0, 100.0), ("rss", "MB", 1.0, 10.0)):
        empty = result.series("empty interpreter", figure, unit, scale=scale)
        rows.append(Row("empty interpreter", empty))
        for name in ("import torchmgmt", "ModelManager()", "import torch"):
            goal = Goal(limit) if name == "import torchmgmt" else None
            rows.append(Row(f"{name}, on top", result.series(name, figure, unit, scale=scale).minus(empty), goal=goal))
    notes = (
        "Wall time of a whole process, from its start to its exit; resident memory at its end.",
        (
            "`import torchmgmt` loads its parts when they are first asked for; `ModelManager()` is what a program pays that"
            " uses one."
        ),
    )
    return Table("Embedding: beside an empty interpreter", rows, notes)


def _interpreter(code: str) -> Sample:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code + _PRINT_RSS], capture_output=True, check=True, timeout=60)
    return {"seconds": time.perf_counter() - started, "rss": int(done.stdout) * 1024 / 1e6}


def _first_worker(scratch: Path, runs: int) -> Table:
    digits = models.write_digits(scratch / "digits")
    variants: dict[str, Callable[[], Sample]] = {
        "bare": lambda: _ready(bare.LOAD, digits.model_file, digits.model_class, digits.state_dict),
        "folder": lambda: _ready(_REGISTER, digits.folder),
    }
    notes = [
        "From the start of a Python process to the moment when the digits model could answer.",
        (
            "The bare script imports torch and loads the same file with the same calls, in one process. torchmgmt loads it"
            " in a worker, forked from a process that imports torch; its parent never does."
        ),
    ]
    try:
        archive = models.pack_digits(scratch)
        variants["archive"] = lambda: _ready(_REGISTER, archive)
    except Missing as error:
        notes.append(f"From an archive: not measured. {error}.")
    result = interleave("startup, first worker", variants, runs, warm_ups=0)
    script = Row("bare script", result.series("bare", "seconds", "s"))
    names = {"folder": "torchmgmt, from a folder", "archive": "torchmgmt, from a new .mar"}
    goal = Goal(1.2, of_ratio=True)
    rows = [Row(names[each], result.series(each, "seconds", "s"), script, goal) for each in names if each in variants]
    return Table("From nothing to 1 worker that is ready", [script, *rows], notes)


def _ready(code: str, *arguments: str | Path) -> Sample:
    return {"seconds": seconds_until_ready(code, *arguments)}


def _warm_manager(scratch: Path, runs: int) -> Table:
    noop, slow = models.write_noop(scratch / "noop"), models.write_slow(scratch / "slow", _LOADING_S)
    with ModelManager() as manager:
        manager.register(noop)
        variants: dict[str, Callable[[], Sample]] = {
            "register": lambda: _register(manager, noop),
            "idle": lambda: _describe_for(manager, _LOADING_S / 2),
            "loading": lambda: _describe_while_loading(manager, slow),
        }
        result = interleave("startup, warm manager", variants, runs)
    goal = Goal(150)
    rows = [
        Row("register a no-op model, 1 worker", result.series("register", "register", "ms", scale=1e3), goal=goal),
        Row("unregister it", result.series("register", "unregister", "ms", scale=1e3)),
        *_latencies(result),
    ]
    notes = (
        (
            f"While 2 workers load: both compute for {_LOADING_S:g} s in `initialize`, on the cores that the caller needs,"
            " too. A call that waited for a worker would take as long as that."
        ),
        "`longest` is the longest call of a round, of some thousands.",
    )
    return Table("On a manager that has run a worker before", rows, notes)


def _latencies(result: Result) -> list[Row]:
    rows = []
    for call, name in (("describe", "describe()"), ("list", "models()")):
        for figure, what in (("median", ""), ("longest", ", longest")):
            idle = Row(f"{name}, idle{what}", result.series("idle", f"{call} {figure}", "ms", scale=1e3))
            series = result.series("loading", f"{call} {figure}", "ms", scale=1e3)
            rows += [idle, Row(f"{name}, 2 workers load{what}", series, idle)]
    return rows


def _register(manager: ModelManager, folder: Path) -> Sample:
    sample: dict[str, float] = {}
    with timed(sample, "register"):
        model = manager.register(folder, model_name="another")
    with timed(sample, "unregister"):
        model.unregister()
    return sample


def _describe_while_loading(manager: ModelManager, folder: Path) -> Sample:
    with manager.register(folder, initial_workers=2, synchronous=False) as model:
        sample = _describe_for(manager, 0.8 * _LOADING_S, model.name)
        model.wait_ready()
    return sample


def _describe_for(manager: ModelManager, seconds: float, name: str = "noop") -> Sample:
    """Describe and list in turn for so long; return the median and the longest time of either."""
    until = time.monotonic() + seconds
    describe: list[float] = []
    listing: list[float] = []
    while time.monotonic() < until:
        describe += time_each(lambda: manager.describe(name), 1)
        listing += time_each(manager.models, 1)
    return {**_summary("describe", describe), **_summary("list", listing)}


def _summary(call: str, seconds: list[float]) -> Sample:
    seconds = sorted(seconds)
    return {f"{call} median": seconds[len(seconds) // 2], f"{call} longest": seconds[-1]}
