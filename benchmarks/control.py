"""control: register, describe, list and unregister beside 1, 100, 1,000 and 5,000 models that have no workers."""

from __future__ import annotations

import http.client
import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlencode

from attrs import frozen

from benchmarks import models
from benchmarks.http import beside
from benchmarks.measure import Missing, Result, Sample, interleave, pss_mb, time_each
from benchmarks.peers.managed import ManagedServer
from benchmarks.peers.ours import Ours
from benchmarks.report import Goal, Row, Table
from benchmarks.servers import LOOPBACK, Server
from benchmarks.suite import OURS, Setup
from torchmgmt import ModelManager

_SIZES = (1, 100, 1_000, 5_000)
_ROUNDS = 3
_MORE = 20
_ASKS = 200
_PAGES = 100
_PAGE = 100
_PLAIN = "plain"
_STATEFUL = "with a state file"
# Figure -> what it is, the percentile that is shown, the goal in ms
_FIGURES = {
    "register": ("register one more", 50, None),
    "describe": ("describe one, 99th percentile", 99, Goal(5)),
    "list": ("list, 99th percentile", 99, Goal(5)),
    "unregister": ("unregister one", 50, None),
}


class _Control(Protocol):
    """What is measured: the manager in this process, or a server."""

    def register(self, name: str) -> object: ...
    def describe(self, name: str) -> object: ...
    def list(self, start: int) -> object: ...
    def unregister(self, name: str) -> object: ...
    def weigh_mb(self) -> float: ...


@frozen
class _Library:
    manager: ModelManager
    model: Path

    def register(self, name: str) -> object:
        return self.manager.register(self.model, model_name=name, initial_workers=0)

    def describe(self, name: str) -> object:
        return self.manager.describe(name)

    def list(self, start: int) -> object:
        return self.manager.models(start=start, limit=_PAGE)

    def unregister(self, name: str) -> object:
        return self.manager.unregister(name)

    def weigh_mb(self) -> float:
        return pss_mb([os.getpid()])


@frozen
class _Server:
    server: Server
    connection: http.client.HTTPConnection

    def register(self, name: str) -> object:
        query = urlencode({"url": "noop.mar", "model_name": name, "initial_workers": 0, "synchronous": "true"})
        return self._ask("POST", f"/models?{query}")

    def describe(self, name: str) -> object:
        return self._ask("GET", f"/models/{name}")

    def list(self, start: int) -> object:
        return self._ask("GET", f"/models?limit={_PAGE}&next_page_token={start}")

    def unregister(self, name: str) -> object:
        return self._ask("DELETE", f"/models/{name}")

    def weigh_mb(self) -> float:
        return self.server.own_pss_mb()

    def _ask(self, method: str, path: str) -> bytes:
        try:
            self.connection.request(method, path)
            answer = self.connection.getresponse()
            said = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise Missing(f"{method} {path}: {error!r}") from error
        if answer.status >= http.client.BAD_REQUEST:
            raise Missing(f"{method} {path}: {answer.status} {said[:200]!r}")
        return said


def run(setup: Setup) -> list[Table]:
    """Measure the suite; return its tables."""
    sizes = (1, 20) if setup.is_quick else _SIZES
    with tempfile.TemporaryDirectory(prefix="torchmgmt-bench-") as scratch:
        return [_library(setup, Path(scratch), sizes), _servers(setup, Path(scratch, "store"), sizes)]


def _library(setup: Setup, scratch: Path, sizes: Sequence[int]) -> Table:
    noop = models.write_noop(scratch / "noop")
    numbers = itertools.count()

    def measured(state_file: Path | None) -> Sample:
        with ModelManager(state_file=state_file) as manager:
            return grown(_Library(manager, noop), sizes)

    variants: dict[str, Callable[[], Sample]] = {
        _PLAIN: lambda: measured(None),
        _STATEFUL: lambda: measured(scratch / f"state-{next(numbers)}.json"),
    }
    result = interleave("control, library", variants, min(setup.runs, _ROUNDS), warm_ups=0, budget_s=300)
    rows = []
    for figure, (what, _percent, goal) in _FIGURES.items():
        rows += _by_size(result, _PLAIN, figure, what, sizes, goal)
    rows += _by_size(result, _STATEFUL, "register", f"register one more, {_STATEFUL}", sizes, None)
    each = result.series(_PLAIN, "kB each", "kB")
    rows.append(Row(f"memory of this process for each of {_models(sizes[-1])}", each, goal=Goal(50)))
    notes = [
        (
            f"Python calls in this process. At each size {_MORE} more are registered and unregistered again, and {_ASKS} are"
            f" described; `list` is a page of {_PAGE}. Medians where no percentile is named; the ratio is to"
            " the smallest size. 1 kB is 1,000 bytes."
        ),
        f"At most {_ROUNDS} rounds, each with a manager of its own.",
        *result.notes,
    ]
    return Table("Control plane of the library, models without workers", rows, notes)


def _by_size(
    result: Result, variant: str, figure: str, what: str, sizes: Sequence[int], goal: Goal | None
) -> list[Row]:
    rows: list[Row] = []
    for size in sizes:
        series = result.series(variant, f"{figure} {size}", "ms", scale=1e3)
        rows.append(Row(f"{what}, {_models(size)}", series, rows[0] if rows else None, goal, short=f"{size:,}"))
    return rows


def _models(size: int) -> str:
    return f"{size:,} model{'s' if size > 1 else ''}"


def _servers(setup: Setup, store: Path, sizes: Sequence[int]) -> Table:
    title = "Control plane over HTTP, models without workers"
    try:
        models.pack_noop(store)
    except Missing as error:
        return Table(title, [], [f"Not measured. {error}."])
    peers: dict[str, ManagedServer] = {OURS: Ours(), setup.torchserve.title: setup.torchserve}
    # Each archive is unpacked anew by TorchServe, and it gets slower with their number.
    variants = {name: lambda peer=peer: _over_http(peer, store, sizes) for name, peer in peers.items()}
    result = interleave("control, servers", variants, min(setup.runs, _ROUNDS), warm_ups=0, budget_s=400)
    rows = []
    for figure, (what, _percent, goal) in _FIGURES.items():
        for size in sizes:
            rows += beside(result, list(peers), "", f"{figure} {size}", "ms", f"{what}, {_models(size)}", goal)
    rows += beside(
        result, list(peers), "", "kB each", "kB", f"memory of the server's process for each of {_models(sizes[-1])}"
    )
    notes = [
        (
            f"One connection that is kept, one call after the other; `list` is a page of {_PAGE}. The same archive under"
            " different names; no snapshots (`--ncs`) on either side. Medians where no percentile is named."
        ),
        f"At most {_ROUNDS} rounds, each with new servers. LitServe and mosec have nothing to compare.",
        *result.notes,
    ]
    return Table(title, rows, notes)


def _over_http(peer: ManagedServer, store: Path, sizes: Sequence[int]) -> Sample:
    with peer.serve(store) as server:
        connection = http.client.HTTPConnection(LOOPBACK, server.management_port, timeout=60)
        try:
            return grown(_Server(server, connection), sizes)
        finally:
            connection.close()


def grown(control: _Control, sizes: Sequence[int]) -> Sample:
    """Register more and more models; measure each call at each size."""
    sample: dict[str, float] = {}
    control.register("model-0")  # beside what only the first one costs
    count, before = 1, control.weigh_mb()
    for size in sizes:
        for number in range(count, size):
            control.register(f"model-{number}")
        count = size
        sample["kB each"] = 1e3 * (control.weigh_mb() - before) / max(1, size - 1)
        for figure, times in _timed(control, size).items():
            percent = _FIGURES[figure][1]
            sample[f"{figure} {size}"] = times[len(times) * percent // 100]
    return sample


def _timed(control: _Control, size: int) -> dict[str, list[float]]:
    more = [f"more-{number}" for number in range(_MORE)]
    new, old = iter(more), iter(more)
    asked = iter([f"model-{place * size // _ASKS}" for place in range(_ASKS)])
    starts = iter([place * max(0, size - _PAGE) // _PAGES for place in range(_PAGES)])
    return {
        "register": time_each(lambda: control.register(next(new)), _MORE),
        "describe": time_each(lambda: control.describe(next(asked)), _ASKS),
        "list": time_each(lambda: control.list(next(starts)), _PAGES),
        "unregister": time_each(lambda: control.unregister(next(old)), _MORE),
    }
