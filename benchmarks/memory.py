"""memory: what a whole server weighs with 1, 4 and 8 workers, and how long it takes until they are ready, beside the peers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from attrs import frozen

from benchmarks import models
from benchmarks.http import beside
from benchmarks.measure import Missing, Sample, interleave
from benchmarks.peers.deployment import Deployment, Peer
from benchmarks.report import Table
from benchmarks.suite import Setup

_ROUNDS = 3
_PREDICTIONS = 32


@frozen
class _Subject:
    name: str
    title: str
    files: models.Files
    item: list[float]


def run(setup: Setup) -> list[Table]:
    """Measure the suite; return its tables."""
    counts = (1, 2) if setup.is_quick else (1, 4, 8)
    with tempfile.TemporaryDirectory(prefix="torchmgmt-bench-") as scratch:
        folder, store = Path(scratch), Path(scratch, "store")
        subjects = [
            _Subject("small", "a small network", models.write_small(folder / "small", setup.device), models.SMALL_ITEM),
            _Subject("heavy", "400 MB", models.write_heavy(folder / "heavy", setup.device), models.HEAVY_ITEM),
        ]
        try:
            for subject in subjects:
                models.pack_linear(store, subject.name, subject.files)
        except Missing as error:
            return [Table("Memory of servers", [], [f"Not measured. {error}."])]
        return [table for subject in subjects for table in _tables(setup, subject, store, counts)]


def _tables(setup: Setup, subject: _Subject, store: Path, counts: tuple[int, ...]) -> list[Table]:
    variants: dict[str, Callable[[], Sample]] = {}
    for count in counts:
        deployment = Deployment(subject.name, store, "linear", subject.files, workers=count, device=setup.device)
        for name, peer in setup.peers.items():
            variants[f"{name}, {count}"] = partial(_measure, peer, deployment, subject.item)
    rounds = min(setup.runs, _ROUNDS)
    result = interleave(f"memory, {subject.title}", variants, rounds, warm_ups=0, budget_s=600)
    memory, times = [], []
    for count in counts:
        what = f"{count} worker{'s' if count > 1 else ''}"
        memory += beside(result, list(setup.peers), f", {count}", "pss", "MB", what)
        times += beside(result, list(setup.peers), f", {count}", "ready", "s", what)
    notes = [
        (
            "Sum of the proportional set sizes (a page that n processes share counts 1/n in each) of all processes of the server,"
            f" after {_PREDICTIONS} predictions; memory of an accelerator is not in it. At most {_ROUNDS} rounds."
        ),
        (
            "The same module from the same state dict everywhere. TorchServe, LitServe and mosec have each worker import torch and"
            " load for itself; mosec and LitServe could map the file or fork by code of the user's, which nobody measures here."
        ),
        *result.notes,
    ]
    ready = [
        (
            "From the command to the moment when all workers have loaded the model: for torchmgmt and TorchServe with one"
            " synchronous registration in between; LitServe and mosec start with their workers, whose number is fixed then."
        ),
        *result.notes,
    ]
    return [
        Table(f"Memory of a server, {subject.title}", memory, notes),
        Table(f"From the command to N workers, {subject.title}", times, ready),
    ]


def _measure(peer: Peer, deployment: Deployment, item: list[float]) -> Sample:
    with peer.deploy(deployment) as endpoint:
        endpoint.server.post_many(endpoint.path, item, _PREDICTIONS)
        return {"pss": endpoint.server.pss_mb(), "ready": endpoint.ready_after_s}
