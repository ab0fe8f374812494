"""Saturation, a table of the suite ``predict``: a model that never waits for requests, beside a bare loop of it."""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from attrs import frozen

from benchmarks import models
from benchmarks.measure import Result, Sample, interleave
from benchmarks.peers.loop import BareLoop
from benchmarks.report import Bar, Goal, Row, Table
from benchmarks.suite import Setup
from torchmgmt import Model, ModelManager

BATCH_SIZE = 8
"""Requests in a batch."""
_BATCHES_UNDER_WAY = 6
_SECONDS = 0.8
_GOAL = Goal(0.95, at_least=True, of_ratio=True)
# A batch takes about 2 and about 20 ms where there is a core for each thread and the memory gives 10 GB/s.
_MLP_LAYERS = (5, 45)


@frozen
class Subject:
    """A model that is measured beside a bare loop of its handler."""

    handler: Path
    """Its file, in the folder that can be registered."""
    handler_class: str
    item: Path
    """The body of a request."""

    def bare_loop(self, batch_size: int, *, is_tuned: bool = True) -> BareLoop:
        """Return a process that does nothing but answer batches of this many requests; see :class:`BareLoop`."""
        return BareLoop(self.handler, self.handler_class, self.item, batch_size=batch_size, is_tuned=is_tuned)


def table(setup: Setup) -> Table:
    """Measure the small models that are written here; return the table."""
    with tempfile.TemporaryDirectory(prefix="torchmgmt-bench-") as scratch:
        folder = Path(scratch)
        with ModelManager() as manager, manager.register(models.write_threads(folder / "threads")) as probe:
            default = int(probe.predict())
        counts = sorted({1, default})
        subjects = {name: each for threads in counts for name, each in _subjects(folder, threads, setup.device).items()}
        rows = rows_of("predict, saturation", subjects, setup.runs)
    return Table("A model at saturation: answers a second", rows, _notes(default))


def rows_of(title: str, subjects: Mapping[str, Subject], runs: int, goal: Goal | None = _GOAL) -> list[Row]:
    """Measure each subject beside its bare loop, in batches of 8; return the rows."""
    variants: dict[str, Callable[[], Sample]] = {}
    with ModelManager() as manager, ExitStack() as stack:
        for number, (name, subject) in enumerate(subjects.items()):
            loop = stack.enter_context(subject.bare_loop(BATCH_SIZE))
            model = manager.register(subject.handler.parent, model_name=f"model{number}", batch_size=BATCH_SIZE)
            variants[f"bare, {name}"] = partial(_loop_rate, loop)
            variants[f"torchmgmt, {name}"] = partial(_rate, model, subject.item.read_bytes())
        result = interleave(title, variants, runs)
    return [row for name in subjects for row in _rows(result, name, goal)]


def _rows(result: Result, name: str, goal: Goal | None) -> list[Row]:
    rate = result.series(f"bare, {name}", "rate", "/s")
    bare = Row(f"bare loop, {name}", rate, short="bare loop", bar=Bar(name, "bare loop"))
    batch = Row(f"bare loop, {name}, one batch", result.series(f"bare, {name}", "batch", "ms", scale=1e3))
    own = result.series(f"torchmgmt, {name}", "rate", "/s")
    return [batch, bare, Row(f"torchmgmt, {name}", own, bare, goal, bar=Bar(name, "torchmgmt"))]


def _notes(default: int) -> list[str]:
    return [
        (
            f"1 worker, batch_size {BATCH_SIZE}; torch computes with as many threads as the row says, in the worker and in"
            f" the bare loop alike ({default} is what a worker has here by default). {_SECONDS:g} s a round. One thread"
            f" submits, and keeps {_BATCHES_UNDER_WAY} batches under way. Timed from the end of a batch to that of another."
        ),
        (
            "The bare loop is one process that runs the same handler on the same requests: it unpickles each request and"
            " pickles each answer, and after loading it calls gc.freeze() and has freed memory kept, as a worker does. It has no"
            " queue and nobody to talk to."
        ),
        (
            "With as many threads as cores, whatever else runs holds up all of them at the end of each layer: on a busy"
            " machine those rows move by factors, the ones with 1 thread do not."
        ),
        (
            f"digits decodes a PGM image and answers a dict. The MLPs, layers of {models.MLP_WIDTH} x {models.MLP_WIDTH},"
            " take and give raw float32."
        ),
    ]


def _subjects(folder: Path, threads: int, device: str) -> Mapping[str, Subject]:
    """The models by name, each with this number of threads."""
    suffix = f"{threads} thread{'' if threads == 1 else 's'}"
    digits = models.write_digits(folder / f"digits, {suffix}").handler
    models.put_on(device, digits, models.DIGITS_HANDLER)
    subjects = {f"digits, {suffix}": _subject(digits, models.DIGITS_HANDLER, models.digits_image())}
    for layers in _MLP_LAYERS:
        name = f"MLP of {layers} layers, {suffix}"
        handler = models.write_mlp(folder / name, layers, device) / "mlp.py"
        subjects[name] = _subject(handler, models.MLP_HANDLER, bytes(4 * models.MLP_WIDTH))
    for subject in subjects.values():
        models.fix_threads(subject.handler, subject.handler_class, threads)
    return subjects


def _subject(handler: Path, handler_class: str, item: bytes) -> Subject:
    file = handler.parent / "item"
    file.write_bytes(item)
    return Subject(handler, handler_class, file)


def _loop_rate(loop: BareLoop) -> Sample:
    rate = loop.rate(_SECONDS)
    return {"rate": rate, "batch": BATCH_SIZE / rate}


def _rate(model: Model, item: bytes) -> Sample:
    """Keep the model busy; return the answers a second."""
    waiting: deque[Future[Any]] = deque()
    for _ in range(_BATCHES_UNDER_WAY * BATCH_SIZE):
        waiting.append(model.submit(item))
    _one_batch(model, item, waiting)
    batches, started = 0, time.perf_counter()
    until = now = started + _SECONDS
    while batches == 0 or now < until:
        _one_batch(model, item, waiting)
        batches += 1
        now = time.perf_counter()
    for future in waiting:
        future.result()
    return {"rate": batches * BATCH_SIZE / (now - started)}


def _one_batch(model: Model, item: bytes, waiting: deque[Future[Any]]) -> None:
    """Wait for the oldest batch, then submit another one."""
    for _ in range(BATCH_SIZE):
        waiting.popleft().result()
    for _ in range(BATCH_SIZE):
        waiting.append(model.submit(item))
