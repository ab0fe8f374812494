"""growth: what managing models costs at 1, 100, 1,000 and 5,000 of them, in process and over HTTP, and 100 starts at once."""

from __future__ import annotations

import gc
import itertools
import json
import os
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import requests

from benchmarks import models
from benchmarks.measure import Sample, Series, interleave, pss_mb, time_each
from benchmarks.processes import tree
from benchmarks.report import Goal, Row, Table
from benchmarks.script import READY, end, start, wait_ready
from benchmarks.suite import Setup
from torchmgmt import ModelManager
from torchmgmt.http import serve

__all__ = ["run"]

SIZES = (1, 100, 1000, 5000)
MOST = SIZES[-1]
_ARCHIVES = 1000
"""So many archives, each with another content, are unpacked."""
_CALLS = 300
_HTTP_CALLS = 400
_PAGE = 100
_EACH = 50
"""So many models more are registered, and unregistered again, to measure that at a size."""
_STARTS = 100
_LOAD_S = 0.2

# In a process of its own, so that what is weighed is what the models cost, and nothing that the suites left.
_WEIGH = f"""
import gc, json, os, sys, threading
from benchmarks.growth import fill
from benchmarks.measure import pss_mb
from torchmgmt import ModelManager
with ModelManager(**json.loads(sys.argv[3])) as manager:
    fill(manager, sys.argv[1], 20, "warm-up")
    def weigh():
        gc.collect()
        return pss_mb([os.getpid()]) * 1e6, len(os.listdir("/proc/self/fd")), threading.active_count()
    before = weigh()
    fill(manager, sys.argv[1], int(sys.argv[2]))
    print({READY!r}, flush=True)
    print(json.dumps([after - was for after, was in zip(weigh(), before)]), flush=True)
    sys.stdin.read()
"""


def run(setup: Setup) -> list[Table]:
    """Measure the suite; return its tables."""
    runs = setup.runs
    with tempfile.TemporaryDirectory(prefix="torchmgmt-bench-") as scratch:
        folder = models.write_noop(Path(scratch, "noop"))
        archives = _write_archives(Path(scratch, "archives"))
        return [
            _memory(folder, archives, Path(scratch), runs),
            *_calls(folder, runs),
            _recording(folder, Path(scratch), runs),
            _starts(Path(scratch), runs),
        ]


def fill(manager: ModelManager, source: str | Path, count: int, prefix: str = "model") -> None:
    """Register ``count`` models without workers: the folder ``source``, or the archives ``0.mar`` and so on in it."""
    has_archives = Path(source, "0.mar").exists()
    for number in range(count):
        url = Path(source, f"{number}.mar") if has_archives else source
        manager.register(url, model_name=f"{prefix}-{number:05}", initial_workers=0)


def _write_archives(folder: Path) -> Path:
    """Write small archives, each with another content."""
    folder.mkdir()
    manifest = {"runtime": "python", "model": {"modelName": "noop", "modelVersion": "1.0", "handler": "noop.py"}}
    for number in range(_ARCHIVES):
        with zipfile.ZipFile(folder / f"{number}.mar", "w") as archive:
            archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
            archive.writestr("noop.py", f"def handle(data, context):\n    return data and [{number} for _ in data]\n")
    return folder


def _memory(folder: Path, archives: Path, scratch: Path, runs: int) -> Table:
    states = (json.dumps({"state_file": str(scratch / f"weighed-{number}.json")}) for number in itertools.count())
    variants: dict[str, Callable[[], Sample]] = {
        f"{MOST:,} from one folder": lambda: _weigh(folder, MOST, "{}"),
        f"{MOST:,} from one folder, with a state file": lambda: _weigh(folder, MOST, next(states)),
        f"{_ARCHIVES:,} from an archive each": lambda: _weigh(archives, _ARCHIVES, "{}"),
    }
    result = interleave("growth, memory", variants, min(runs, 3), warm_ups=0)
    rows = []
    for name in variants:
        rows.append(Row(f"{name}: memory of each", result.series(name, "memory", "kB"), goal=Goal(50)))
        rows.append(Row(f"{name}: descriptors of all", result.series(name, "descriptors", ""), goal=Goal(0)))
        rows.append(Row(f"{name}: threads of all", result.series(name, "threads", ""), goal=Goal(0)))
    notes = ("Growth of the program over the registrations: of its PSS by their number, of the others in all.",)
    return Table("Versions without workers", rows, notes)


def _weigh(source: Path, count: int, options: str) -> Sample:
    process = start(_WEIGH, source, str(count), options)
    try:
        wait_ready(process)
        size, descriptors, threads = json.loads(process.stdout.readline() if process.stdout else "")
    finally:
        end(process)
    return {"memory": size / count / 1e3, "descriptors": descriptors, "threads": threads}


def _calls(folder: Path, runs: int) -> list[Table]:
    """Measure each call at each number of models; it grows in one manager, as it does in life."""
    samples: list[dict[str, float]] = [{} for _ in range(runs)]
    for sample in samples:
        with ModelManager() as manager, serve(manager, port=0) as server, requests.Session() as session:
            have = 0
            for size in SIZES:
                for number in range(have, size):
                    manager.register(folder, model_name=f"model-{number:05}", initial_workers=0)
                have = size
                gc.collect()
                sample.update({f"{name} {size}": value for name, value in _ask(manager, folder, size).items()})
                asked = _ask_over_http(session, server.url, size)
                sample.update({f"{name} {size}": value for name, value in asked.items()})
    calls = {
        "register": "register, without workers",
        "unregister": "unregister",
        "describe": "describe()",
        "page": f"models(limit={_PAGE})",
        "http describe": "GET /models/{name}",
        "http page": f"GET /models?limit={_PAGE}",
    }
    return [_table_of_calls(samples, figure, name) for figure, name in calls.items()]


def _table_of_calls(samples: Sequence[Mapping[str, float]], figure: str, name: str) -> Table:
    rows: list[Row] = []
    for size in SIZES:
        series = Series("ms", [sample[f"{figure} median {size}"] * 1e3 for sample in samples])
        base = rows[0] if rows else None
        goal = Goal(1.5, of_ratio=True) if base and figure in {"register", "unregister"} else None
        rows.append(Row(f"median, {size:,} models", series, base, goal, short="1 model"))
    for size in SIZES:
        series = Series("ms", [sample[f"{figure} p99 {size}"] * 1e3 for sample in samples])
        rows.append(
            Row(f"p99, {size:,} models", series, goal=None if figure in {"register", "unregister"} else Goal(5))
        )
    return Table(f"Control plane: {name}", rows)


def _ask(manager: ModelManager, folder: Path, size: int) -> Sample:
    names = iter([f"more-{number}" for number in range(_EACH)] * 2)
    one = f"model-{size // 2:05}"
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "register": (lambda: manager.register(folder, model_name=next(names), initial_workers=0), _EACH),
        "unregister": (lambda: manager.unregister(next(names)), _EACH),
        "describe": (lambda: manager.describe(one).to_dict(), _CALLS),
        "page": (lambda: manager.models(start=max(0, size - _PAGE), limit=_PAGE), _CALLS),
    }
    return _summary({name: time_each(call, count) for name, (call, count) in calls.items()})


def _ask_over_http(session: requests.Session, url: str, size: int) -> Sample:
    def get(path: str) -> None:
        session.get(url + path, timeout=30).raise_for_status()

    one, page = f"/models/model-{size // 2:05}", f"/models?limit={_PAGE}&next_page_token={max(0, size - _PAGE)}"
    return _summary(
        {
            "http describe": time_each(lambda: get(one), _HTTP_CALLS),
            "http page": time_each(lambda: get(page), _HTTP_CALLS),
        }
    )


def _summary(calls: Mapping[str, list[float]]) -> Sample:
    summary = {f"{name} median": statistics.median(seconds) for name, seconds in calls.items()}
    return {**summary, **{f"{name} p99": seconds[int(len(seconds) * 0.99)] for name, seconds in calls.items()}}


def _recording(folder: Path, scratch: Path, runs: int) -> Table:
    """Measure registering with a state file, which is on the disk when the call returns."""
    values: dict[int, list[float]] = {size: [] for size in (1, MOST)}
    for number in range(min(runs, 2)):
        with ModelManager(state_file=scratch / f"state-{number}.json") as manager:
            fill(manager, folder, 1)
            values[1].append(_median_of_registering(manager, folder, "first"))
            fill(manager, folder, MOST - _EACH, "more")
            values[MOST].append(_median_of_registering(manager, folder, "last"))
    few = Row("median, 1 model", Series("ms", values[1]), short="1 model")
    many = Row(f"median, {MOST:,} models", Series("ms", values[MOST]), few, Goal(1.5, of_ratio=True))
    return Table("Control plane: register, with a state file", [few, many])


def _median_of_registering(manager: ModelManager, folder: Path, prefix: str) -> float:
    names = iter(range(_EACH))
    seconds = time_each(
        lambda: manager.register(folder, model_name=f"{prefix}-{next(names)}", initial_workers=0), _EACH
    )
    return statistics.median(seconds) * 1e3


def _starts(scratch: Path, runs: int) -> Table:
    slow = models.write_slow(scratch / "slow", _LOAD_S)
    (slow / "slow.py").write_text((slow / "slow.py").read_text().replace("time.monotonic", "time.process_time"))
    cores = len(os.sched_getaffinity(0))
    variants: dict[str, Callable[[], Sample]] = {"start": lambda: _start_many(slow)}
    result = interleave("growth, starts", variants, min(runs, 3), warm_ups=0)
    one = result.series("start", "one", "s", scale=_STARTS / cores)
    bound = Row(f"1 model, times {_STARTS} over {cores} cores", one, short="one load")
    many = Row(f"{_STARTS} models at once", result.series("start", "many", "s"), bound, Goal(1.0, of_ratio=True))
    peak = Row(f"{_STARTS} models: memory", result.series("start", "pss", "MB"))
    note = (
        f"1 worker each, whose `initialize` computes for {_LOAD_S:g} s; from the first registration until all are ready."
        " Memory is the PSS of the program and all its processes."
    )
    return Table(f"{_STARTS} models of 1 worker that start at once", [bound, many, peak], (note,))


def _start_many(folder: Path) -> Sample:
    with ModelManager() as manager:
        manager.register(folder, model_name="warm-up")
        alone = [_start_one(manager, folder) for _ in range(5)]
        started = time.perf_counter()
        registered = [
            manager.register(folder, model_name=f"model-{number:03}", synchronous=False) for number in range(_STARTS)
        ]
        for model in registered:
            model.wait_ready()
        took_s = time.perf_counter() - started
        return {"one": statistics.median(alone), "many": took_s, "pss": _tree_mb()}


def _start_one(manager: ModelManager, folder: Path) -> float:
    started = time.perf_counter()
    with manager.register(folder, model_name="alone"):
        return time.perf_counter() - started


def _tree_mb() -> float:
    return pss_mb(process.pid for process in tree(os.getpid()))
