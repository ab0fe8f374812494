"""server: ``python -m torchmgmt.http`` from its command to a healthy ``/ping``, its memory, and registering over HTTP."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import models
from benchmarks.measure import Missing, Result, Sample, interleave, timed
from benchmarks.peers.managed import ManagedServer
from benchmarks.peers.ours import Ours
from benchmarks.report import Goal, Row, Table
from benchmarks.servers import Server
from benchmarks.suite import OURS, THEIRS, Setup

_THEIR_ROUNDS = 3
_WORKERS = 4
_TIMES = {
    "healthy": ("command → healthy /ping", Goal(0.6)),
    "first": ("then at once: register digits, 1 worker", None),
    "scale": (f"1 → {_WORKERS} workers, digits", None),
    "register": ("register a no-op model, 1 worker", Goal(0.15)),
    "up": ("1 → 8 workers, no-op", None),
    "unregister": ("unregister it", None),
}
_MEMORY = {
    "pss 0": ("server without a model, healthy", None),
    "pss 1": ("server, 1 worker of digits", Goal(280)),
    "pss 4": (f"server, {_WORKERS} workers of digits", Goal(320)),
}


def run(setup: Setup) -> list[Table]:
    """Measure the suite; return its tables."""
    with tempfile.TemporaryDirectory(prefix="torchmgmt-bench-") as scratch:
        try:
            store = _store(Path(scratch))
        except Missing as error:
            return [Table("The server program", [], [f"Not measured. {error}."])]
        variants: dict[str, Callable[[], Sample]] = {
            OURS: lambda: _run(Ours(), store),
            THEIRS: lambda: _run(setup.torchserve, store),
        }
        result = interleave("server", variants, setup.runs, warm_ups=0, at_most={THEIRS: _THEIR_ROUNDS}, budget_s=100)
    if not result.has(OURS):
        return [Table("The server program", [], result.notes)]
    return [_times(result), _memory(result)]


def _store(scratch: Path) -> Path:
    """A model store of archives, for the other server knows nothing else."""
    store = scratch / "store"
    models.pack_digits(store)
    models.pack_noop(store)
    return store


def _run(peer: ManagedServer, store: Path) -> Sample:
    with peer.serve(store) as server:
        return _measure(server)


def _measure(server: Server) -> Sample:
    """Ask for the same of either server, in the same order."""
    sample = {"healthy": server.healthy_after_s, "pss 0": server.pss_mb()}
    with timed(sample, "first"):
        server.register("digits.mar")
    server.check_ready("digits", 1)
    sample["pss 1"] = server.pss_mb()
    with timed(sample, "scale"):
        server.scale("digits", _WORKERS)
    server.check_ready("digits", _WORKERS)
    sample["pss 4"] = server.pss_mb()
    with timed(sample, "register"):
        server.register("noop.mar")
    server.check_ready("noop", 1)
    with timed(sample, "up"):
        server.scale("noop", 8)
    server.check_ready("noop", 8)
    with timed(sample, "unregister"):
        server.unregister("noop")
    return sample


def _times(result: Result) -> Table:
    notes = (
        (
            "Synchronous calls over HTTP on the loopback address, a new connection for each; archives of"
            " torch-model-archiver from a model store, the same for both; batch_size 1."
        ),
        (
            "Each round starts a new server. The first model is registered as soon as it is healthy, when torchmgmt's"
            " torch-only process still imports torch; the no-op model while the 4 workers of the first one wait for work."
        ),
        (
            f"TorchServe runs in at most {_THEIR_ROUNDS} rounds, because they take long; a ratio is over the rounds that both"
            " have. Its system metrics are switched off, all else is its default."
        ),
    )
    return Table("The server program: time", _rows(result, _TIMES, "s"), [*notes, *result.notes])


def _memory(result: Result) -> Table:
    notes = (
        (
            "Sum of the proportional set sizes of the whole server: ours with its torch-only process, templates and workers;"
            " TorchServe with Java and its workers, without the Python process that has only started Java. MB are 1e6 bytes."
        ),
        "Weighed as soon as all workers are ready, before any prediction.",
    )
    return Table("The server program: memory", _rows(result, _MEMORY, "MB"), [*notes, *result.notes])


def _rows(result: Result, figures: dict[str, tuple[str, Goal | None]], unit: str) -> list[Row]:
    rows = []
    for figure, (what, goal) in figures.items():
        theirs = _their_row(result, what, figure, unit)
        rows.append(Row(what, result.series(OURS, figure, unit), theirs, goal))
        rows += [theirs] if theirs else []
    return rows


def _their_row(result: Result, what: str, figure: str, unit: str) -> Row | None:
    if not result.has(THEIRS):
        return None
    return Row(f"TorchServe: {what}", result.series(THEIRS, figure, unit), short="TorchServe")
