"""scaling: how long more workers take, what memory they cost, and how soon there is one where there was none."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
from attrs import frozen

from benchmarks import models
from benchmarks.measure import Missing, Result, Sample, interleave, pss_mb, timed
from benchmarks.peers import bare
from benchmarks.peers.torchserve import TorchServe
from benchmarks.processes import descendant_above, tree
from benchmarks.report import Bar, Goal, Row, Table
from benchmarks.script import end, start, wait_ready
from benchmarks.suite import Setup
from torchmgmt import Model, ModelManager

_STEPS = (8, 4, 1)
_SLOW_ROUNDS = 2
_LOADING_ROUNDS = 3
_PREDICTIONS = 32
_WEIGHTS = models.HEAVY_WEIGHTS_MB
_IDLE_WITHIN_S = 20.0

_NOOP = "no-op"
_TEMPLATE = "400 MB, warm template"
_FOLDER = "400 MB, each loads, from a folder"
_ARCHIVE = "400 MB, each loads, from a .mar"
_BARE = "7 bare processes that load 400 MB"
_THEIRS = "TorchServe"


@frozen
class _Way:
    """A model and the way in which its workers get their weights."""

    source: Path
    item: object
    options: Mapping[str, Any]


def run(setup: Setup) -> list[Table]:
    """Measure the suite; return its tables."""
    with tempfile.TemporaryDirectory(prefix="torchmgmt-bench-") as scratch:
        noop = models.write_noop(Path(scratch, "noop"))
        heavy = models.write_heavy(Path(scratch, "heavy"), setup.device)
        store = Path(scratch, "store")
        result = _run_alone(noop, heavy, store, setup.torchserve, setup.runs)
        return [_times(result), _memory(result), _first_workers(noop, heavy, setup.runs)]


def _run_alone(noop: Path, heavy: models.Files, store: Path, torchserve: TorchServe, runs: int) -> Result:
    """Run each variant with nothing else of this program's beside it: shared libraries would weigh less, too."""
    try:
        models.pack_noop(store)
        models.pack_linear(store, "heavy", heavy)
    except Missing as error:
        packed, why = False, str(error)
    else:
        packed, why = True, ""

    def with_store(call: Callable[[], Sample]) -> Callable[[], Sample]:
        def checked() -> Sample:
            if not packed:
                raise Missing(why)
            return call()

        return checked

    own: Mapping[str, Any] = {"share_weights": "never"}
    variants: dict[str, Callable[[], Sample]] = {
        _NOOP: lambda: _scale(_Way(noop, b"x", {})),
        _TEMPLATE: lambda: _scale(_Way(heavy.folder, models.HEAVY_ITEM, {})),
        _FOLDER: lambda: _scale(_Way(heavy.folder, models.HEAVY_ITEM, own)),
        _ARCHIVE: with_store(lambda: _scale(_Way(store / "heavy.mar", models.HEAVY_ITEM, own))),
        _BARE: lambda: _bare(bare.LOAD, heavy.model_file, heavy.model_class, heavy.state_dict),
        _THEIRS: with_store(lambda: _torchserve(torchserve, store)),
    }
    at_most = {_FOLDER: _LOADING_ROUNDS, _ARCHIVE: _LOADING_ROUNDS, _BARE: _SLOW_ROUNDS, _THEIRS: _SLOW_ROUNDS}
    return interleave("scaling", variants, runs, warm_ups=0, at_most=at_most, budget_s=170)


def _times(result: Result) -> Table:
    bars = {name: Bar(f"1 → 8 workers, {name}", "TorchServe") for name in _PEER}
    load = Row(_BARE, result.series(_BARE, "up", "s"), short="7 bare processes", bar=Bar(bars["400 MB"].group, _BARE))
    theirs = {
        name: _row(result, f"TorchServe: 1 → 8 workers, {name}", _THEIRS, f"up {name}", "s", bar)
        for name, bar in bars.items()
    }
    bar = Bar(bars["no-op"].group, "torchmgmt")
    rows = [Row("1 → 8 workers, no-op", result.series(_NOOP, "up", "s"), theirs["no-op"], bar=bar)]
    for variant in (_TEMPLATE, _FOLDER, _ARCHIVE):
        if result.has(variant):
            goal = Goal(0.3) if variant == _TEMPLATE else None
            bar = Bar(bars["400 MB"].group, variant.replace("400 MB", "torchmgmt"))
            rows.append(Row(f"1 → 8 workers, {variant}", result.series(variant, "up", "s"), load, goal, bar=bar))
    rows += [load, *(row for row in theirs.values() if row)]
    rows += [Row(f"8 → 4 workers, {name}", result.series(name, "down", "s")) for name in (_NOOP, _TEMPLATE)]
    notes = (
        "Synchronous `scale`, on a manager of its own whose model has 1 worker that has answered.",
        (
            "Warm template: `share_weights` is the default; the model is loaded once, and the process that holds it forks the"
            ' workers. Each loads: `share_weights="never"`; files unpacked from an archive belong to the manager and may be'
            " mapped, those of a folder may be written to at any time."
        ),
        (
            "The bare processes are what a server without a warm process does for 7 more workers: start 7 interpreters at"
            " once, import torch, load the file. Until the last one is ready."
        ),
        "TorchServe is asked over HTTP, with the same archive.",
        (
            f"At most {_SLOW_ROUNDS} rounds of the bare processes and TorchServe, {_LOADING_ROUNDS} of workers that each load,"
            " because they take long; a ratio is over the rounds that both have."
        ),
    )
    return Table("Time to scale", rows, [*notes, *result.notes])


_PEER = ("no-op", "400 MB")


def _row(result: Result, what: str, variant: str, figure: str, unit: str, bar: Bar | None = None) -> Row | None:
    return Row(what, result.series(variant, figure, unit), short=variant, bar=bar) if result.has(variant) else None


def _memory(result: Result) -> Table:
    theirs = _row(result, "TorchServe: 8 workers, 400 MB", _THEIRS, "pss 8", "MB")
    rows = []
    for variant in (_NOOP, _TEMPLATE, _FOLDER, _ARCHIVE):
        if result.has(variant):
            rows += _weights_of(result, variant, theirs if variant != _NOOP else None)
    rows.append(Row(f"{_BARE}, all 7", result.series(_BARE, "pss", "MB")))
    rows += [theirs] if theirs else []
    rows.append(Row("embedding program, in no other row", result.series(_TEMPLATE, "pss program", "MB")))
    notes = (
        (
            "Sum of the proportional set sizes (a page that n processes share counts 1/n in each) of the workers, the process"
            " that loaded the model (the template), and the torch-only process from which all descend: everything but"
            " the program that embeds torchmgmt. MB are 1e6 bytes."
        ),
        (
            f"Weighed after {_PREDICTIONS} predictions, so that weights that are mapped are in memory; nothing else of this"
            " benchmark runs then."
        ),
        (
            f"400 MB stands for {_WEIGHTS} MB of float32 weights: 24 linear layers of 2048 x 2048, from a state dict. The goal"
            " is 1.5 times the weights and 40 MB for each worker."
        ),
        "TorchServe: Java and its workers, without the Python process that has only started Java.",
    )
    return Table("Memory of workers", rows, [*notes, *result.notes])


def _weights_of(result: Result, variant: str, peer: Row | None) -> list[Row]:
    """The rows of one way: totals, and what the total of 8 workers is made of."""
    shared = variant in {_NOOP, _TEMPLATE}
    rows = [
        Row(f"{count} worker{'s' if count > 1 else ''}, {variant}", result.series(variant, f"pss {count}", "MB"))
        for count in sorted(_STEPS)
        if shared and count != 8
    ]
    goal = Goal(1.5 * _WEIGHTS + 40 * 8) if variant == _TEMPLATE else None
    rows.append(Row(f"8 workers, {variant}", result.series(variant, "pss 8", "MB"), peer, goal))
    parts = ("the 8 workers", "the template", "the torch-only process")
    return [*rows, *(Row(f"  of that, {part}", result.series(variant, part, "MB")) for part in parts)]


def _scale(way: _Way) -> Sample:
    """Scale from 1 to 8 workers, and down again; weigh them at each step."""
    sample: dict[str, float] = {}
    with ModelManager() as manager:
        model = manager.register(way.source, initial_workers=1, **way.options)
        model.predict(way.item)
        with timed(sample, "up"):
            model.scale(8)
        for count in _STEPS:
            with timed(sample, "down" if count == 4 else "last step"):
                model.scale(count)
            _predict_many(model, way.item)
            sample[f"pss {count}"] = _total(model)
            if count == 8:
                sample.update(_parts(model))
    sample["pss program"] = pss_mb([psutil.Process().pid])
    return sample


def _predict_many(model: Model, item: object) -> None:
    for future in [model.submit(item) for _ in range(_PREDICTIONS)]:
        future.result()


def _total(model: Model) -> float:
    return pss_mb(process.pid for process in tree(_torch_only_pid(model)))


def _parts(model: Model) -> Sample:
    """What each kind of process weighs. What is neither a worker nor the torch-only process is the template."""
    root, workers = _torch_only_pid(model), _worker_pids(model)
    rest = {process.pid for process in tree(root)} - {root, *workers}
    return {
        "the 8 workers": pss_mb(workers),
        "the template": pss_mb(rest),
        "the torch-only process": pss_mb([root]),
    }


def _worker_pids(model: Model) -> list[int]:
    return [worker.pid for worker in model.describe().workers if worker.pid]


def _torch_only_pid(model: Model) -> int:
    """The child of this process that the workers descend from."""
    return descendant_above(_worker_pids(model)[0]).pid


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


def _torchserve(peer: TorchServe, store: Path) -> Sample:
    sample: dict[str, float] = {}
    with peer.serve(store) as server:
        for name, what, data in (("noop", "no-op", "x"), ("heavy", "400 MB", models.HEAVY_ITEM)):
            server.register(f"{name}.mar")
            server.predict_many(name, data, 1)
            with timed(sample, f"up {what}"):
                server.scale(name, 8)
            server.check_ready(name, 8)
            server.predict_many(name, data, _PREDICTIONS)
            sample["pss 8"] = server.pss_mb()  # what stays is that of the last one
            server.unregister(name)
    return sample


def _first_workers(noop: Path, heavy: models.Files, runs: int) -> Table:
    with ModelManager() as manager:
        manager.register(noop, model_name="first")
        to_zero: Mapping[str, Any] = {"initial_workers": 0, "max_workers": 1, "scale_down_delay": 0}
        asleep = {"no-op": manager.register(noop, **to_zero), "400 MB": manager.register(heavy.folder, **to_zero)}
        items: Mapping[str, object] = {"no-op": b"x", "400 MB": models.HEAVY_ITEM}
        variants: dict[str, Callable[[], Sample]] = {
            "register": lambda: _register(manager, noop),
            "no-op": lambda: _wake(asleep["no-op"], items["no-op"]),
            "400 MB": lambda: _wake(asleep["400 MB"], items["400 MB"]),
        }
        result = interleave("scaling, first workers", variants, runs)
    times = result.series("register", "register", "ms", scale=1e3)
    rows = [Row("register a no-op model, 1 worker", times, goal=Goal(150))]
    for name in asleep:
        first, second = (result.series(name, figure, "ms", scale=1e3) for figure in ("first", "second"))
        again = Row(f"second answer, {name}", second, short="second answer")
        rows += [Row(f"no worker → first answer, {name}", first, again, Goal(200)), again]
    notes = (
        "On one manager that has served all of these models before: its torch-only process runs, and so do templates.",
        (
            "No worker → first answer: a model that may have 0 to 1 workers is asked when its worker has gone because nobody"
            " asked for a moment (scale_down_delay=0). The second answer comes from the worker that is there then."
        ),
        "TorchServe does not start a worker for a request; its time to register is in the suite `server`.",
    )
    return Table("The first worker", rows, notes)


def _register(manager: ModelManager, folder: Path) -> Sample:
    sample: dict[str, float] = {}
    with timed(sample, "register"):
        model = manager.register(folder, model_name="another")
    model.unregister()
    return sample


def _wake(model: Model, item: object) -> Sample:
    """Let a model that may have 0 or 1 workers answer, wait until its worker has gone by itself, and ask again."""
    model.predict(item)
    _wait_without_workers(model)
    sample: dict[str, float] = {}
    with timed(sample, "first"):
        model.predict(item)
    with timed(sample, "second"):
        model.predict(item)
    return sample


def _wait_without_workers(model: Model) -> None:
    until = time.monotonic() + _IDLE_WITHIN_S
    while model.describe().workers:
        if time.monotonic() > until:
            raise RuntimeError(f"{model} still has workers {_IDLE_WITHIN_S:g} s after it was scaled to zero")
        time.sleep(0.01)
