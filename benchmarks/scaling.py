"""scaling: how long more workers take, and what memory they cost."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from benchmarks import models
from benchmarks.measure import Result, Sample, interleave, pss_mb, timed
from benchmarks.peers import bare
from benchmarks.report import Goal, Row, Table
from benchmarks.script import end, start, wait_ready
from torchmgmt import Model, ModelManager

_STEPS = (8, 4, 1)
_BARE_ROUNDS = 2
_WEIGHTS = models.HEAVY_WEIGHTS_MB
_NO_TEMPLATE = (
    "Workers load by themselves for now: each is forked from a process that has imported torch, and then loads its own"
    " copy of the weights. The template that loads once and is forked comes with a later issue; the goals are its."
)


def run(runs: int) -> list[Table]:
    """Measure the suite in ``runs`` rounds; return its tables."""
    with tempfile.TemporaryDirectory(prefix="torchmgmt-bench-") as scratch, ModelManager() as manager:
        heavy = models.write_heavy(Path(scratch, "heavy"))
        noop_model = manager.register(models.write_noop(Path(scratch, "noop")))
        heavy_model = manager.register(heavy.folder)
        variants: dict[str, Callable[[], Sample]] = {
            "noop": lambda: _scale(noop_model),
            "heavy": lambda: _scale(heavy_model),
            "load": lambda: _bare(bare.LOAD, heavy.model_file, heavy.model_class, heavy.state_dict),
        }
        result = interleave("scaling", variants, runs, warm_ups=0, at_most={"load": _BARE_ROUNDS})
    return [_times(result), _memory(result)]


def _times(result: Result) -> Table:
    load = Row("7 bare processes that load 400 MB", result.series("load", "up", "s"))
    rows = [
        Row("1 → 8 workers, no-op", result.series("noop", "up", "s")),
        Row("1 → 8 workers, 400 MB", result.series("heavy", "up", "s"), load, Goal(0.3)),
        load,
        Row("8 → 4 workers, no-op", result.series("noop", "down", "s")),
        Row("8 → 4 workers, 400 MB", result.series("heavy", "down", "s")),
    ]
    notes = (
        "Synchronous `scale`, on a manager whose torch-only process runs and whose model has 1 worker.",
        (
            "The bare processes are what a server without a warm process does for 7 more workers: start 7 interpreters at"
            " once, import torch, load the file. Until the last one is ready."
            f" At most {_BARE_ROUNDS} rounds, because they take long; a ratio is over the rounds that both have."
        ),
        _NO_TEMPLATE,
    )
    return Table("Time to scale", rows, notes)


def _memory(result: Result) -> Table:
    rows = []
    for variant, what in (("noop", "no-op"), ("heavy", "400 MB")):
        for count in sorted(_STEPS):
            goal = Goal(1.5 * _WEIGHTS + 40 * count) if variant == "heavy" and count == 8 else None
            rows.append(Row(f"{count} workers, {what}", result.series(variant, f"pss {count}", "MB"), goal=goal))
    rows += [
        Row("torch-only process + embedding program", result.series("noop", "pss rest", "MB")),
        Row("7 bare processes that load 400 MB", result.series("load", "pss", "MB")),
    ]
    notes = (
        (
            "Sum of the proportional set sizes (a page that n processes share counts 1/n in each) of the workers; what they"
            " share with the torch-only process and with the other model's one worker is partly counted there. MB are 1e6"
            " bytes."
        ),
        f"400 MB stands for {_WEIGHTS} MB of float32 weights: 24 linear layers of 2048 x 2048, from a state dict.",
        _NO_TEMPLATE,
    )
    return Table("Memory of workers", rows, notes)


def _scale(model: Model) -> Sample:
    """Scale from 1 to 8 workers, and down again; weigh them at each step."""
    sample: dict[str, float] = {}
    with timed(sample, "up"):
        model.scale(8)
    for count in _STEPS:
        with timed(sample, "down" if count == 4 else "last step"):
            model.scale(count)
        sample[f"pss {count}"] = pss_mb(_worker_pids(model))
    sample["pss rest"] = pss_mb([psutil.Process().pid, *_torch_only_pids()])
    return sample


def _worker_pids(model: Model) -> list[int]:
    return [worker.pid for worker in model.describe().workers if worker.pid]


def _torch_only_pids() -> list[int]:
    """The processes that this one started and that started others: workers are children of the torch-only process."""
    return [child.pid for child in psutil.Process().children() if child.children()]


def _bare(code: str, *arguments: str | Path) -> Sample:
    """Start 7 bare processes at once; return the seconds until the last one is ready, and what they weigh then."""
    started = time.perf_counter()
    processes = [start(code, *arguments) for _ in range(7)]
    try:
        for process in processes:
            wait_ready(process)
        return {"up": time.perf_counter() - started, "pss": pss_mb([process.pid for process in processes])}
    finally:
        end(*processes)
