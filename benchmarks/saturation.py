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
from benchmarks.report import Goal, Row, Table
from torchmgmt import Model, ModelManager

_BATCH_SIZE = 8
_BATCHES_UNDER_WAY = 6
_SECONDS = 0.8
# A batch takes about 2 and about 20 ms where there is a core for each thread and the memory gives 10 GB/s.
_MLP_LAYERS = (5, 45)


@frozen
class _Subject:
    """A model that is measured."""

    handler: Path
    handler_class: str
    item: Path
    """The body of a request."""


def table(runs: int) -> Table:
    """Measure in ``runs`` rounds; return the table."""
    with tempfile.TemporaryDirectory(prefix="torchmgmt-bench-") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        manager = stack.enter_context(ModelManager())
        with manager.register(models.write_threads(folder / "threads")) as probe:
            default = int(probe.predict())
        subjects = {name: each for threads in sorted({1, default}) for name, each in _subjects(folder, threads).items()}
        variants: dict[str, Callable[[], Sample]] = {}
        for number, (name, subject) in enumerate(subjects.items()):
            loop = stack.enter_context(_bare_loop(subject))
            model = manager.register(subject.handler.parent, model_name=f"model{number}", batch_size=_BATCH_SIZE)
            variants[f"bare, {name}"] = partial(_loop_rate, loop)
            variants[f"torchmgmt, {name}"] = partial(_rate, model, subject.item.read_bytes())
        result = interleave("predict, saturation", variants, runs)
    rows = [row for name in subjects for row in _rows(result, name)]
    return Table("A model at saturation: answers a second", rows, _notes(default))


def _rows(result: Result, name: str) -> list[Row]:
    bare = Row(f"bare loop, {name}", result.series(f"bare, {name}", "rate", "/s"), short="bare loop")
    batch = Row(f"bare loop, {name}, one batch", result.series(f"bare, {name}", "batch", "ms", scale=1e3))
    own = result.series(f"torchmgmt, {name}", "rate", "/s")
    return [batch, bare, Row(f"torchmgmt, {name}", own, bare, Goal(0.95, at_least=True, of_ratio=True))]


def _notes(default: int) -> list[str]:
    return [
        (
            f"1 worker, batch_size {_BATCH_SIZE}; torch computes with as many threads as the row says, in the worker and in"
            f" the bare loop alike ({default} is what a worker has here by default). {_SECONDS:g} s a round. One thread"
            f" submits, and keeps {_BATCHES_UNDER_WAY} batches under way. Timed from the end of a batch to that of another."
        ),
        (
            "The bare loop is one process that runs the same handler on the same requests: it unpickles each request and"
            " pickles each answer, as a worker does, and has no queue and nobody to talk to."
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


def _subjects(folder: Path, threads: int) -> Mapping[str, _Subject]:
    """The models by name, each with this number of threads."""
    suffix = f"{threads} thread{'' if threads == 1 else 's'}"
    digits = models.write_digits(folder / f"digits, {suffix}").handler
    subjects = {f"digits, {suffix}": _subject(digits, models.DIGITS_HANDLER, models.digits_image())}
    for layers in _MLP_LAYERS:
        name = f"MLP of {layers} layers, {suffix}"
        handler = models.write_mlp(folder / name, layers) / "mlp.py"
        subjects[name] = _subject(handler, models.MLP_HANDLER, bytes(4 * models.MLP_WIDTH))
    for subject in subjects.values():
        models.fix_threads(subject.handler, subject.handler_class, threads)
    return subjects


def _subject(handler: Path, handler_class: str, item: bytes) -> _Subject:
    file = handler.parent / "item"
    file.write_bytes(item)
    return _Subject(handler, handler_class, file)


def _bare_loop(subject: _Subject) -> BareLoop:
    return BareLoop(subject.handler, subject.handler_class, subject.item, batch_size=_BATCH_SIZE)


def _loop_rate(loop: BareLoop) -> Sample:
    rate = loop.rate(_SECONDS)
    return {"rate": rate, "batch": _BATCH_SIZE / rate}


def _rate(model: Model, item: bytes) -> Sample:
    """Keep the model busy; return the answers a second."""
    waiting: deque[Future[Any]] = deque()
    for _ in range(_BATCHES_UNDER_WAY * _BATCH_SIZE):
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
    return {"rate": batches * _BATCH_SIZE / (now - started)}


def _one_batch(model: Model, item: bytes, waiting: deque[Future[Any]]) -> None:
    """Wait for the oldest batch, then submit another one."""
    for _ in range(_BATCH_SIZE):
        waiting.popleft().result()
    for _ in range(_BATCH_SIZE):
        waiting.append(model.submit(item))
