"""http: predictions over HTTP beside the peers: throughput and latency, floods, large bodies; http-memory: memory over many requests."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from attrs import evolve

from benchmarks import flood, models, wrk
from benchmarks.measure import Missing, Result, Sample, interleave
from benchmarks.peers.deployment import Deployment, Endpoint, Peer
from benchmarks.peers.scripted import bare_uvicorn
from benchmarks.report import Bar, Goal, Row, Table
from benchmarks.suite import OURS, THEIRS, Setup

_CONNECTIONS = (1, 16, 64)
_BATCH_SIZES = (1, 8)
_DELAY_MS = 5
_AT_LEAST = {1: Goal(4, at_least=True, of_ratio=True), 8: Goal(3, at_least=True, of_ratio=True)}
# MB (1e6 bytes) -> connections
_BODIES = {1: 4, 16: 2}
_MIXED = (10, 100, 1_000, 10_000, 100_000)
_NUMBERED = f"{OURS}, {_CONNECTIONS[-1]} connections, no two heads the same"

FAIRNESS = (
    (
        "Client (wrk, 1 thread, keep-alive) and server share this machine's cores, so a server that needs more processes or"
        " threads for a request has less left; every server has 1 worker and is otherwise as its own documentation starts it."
    ),
    (
        "LitServe runs with fast_queue (ZeroMQ), which its documentation advises for such loads. LitServe and mosec serve one"
        " model that is fixed when they start; torchmgmt and TorchServe route by model and version and can be managed meanwhile."
    ),
    (
        "mosec's HTTP side and batching are Rust; its Python is only the model. torchmgmt and TorchServe write a line of log for"
        " each request, as they do by default; LitServe and mosec run with that switched off."
    ),
)


def run(setup: Setup) -> list[Table]:
    """Measure the suite; return its tables."""
    with tempfile.TemporaryDirectory(prefix="torchmgmt-bench-") as scratch:
        store = Path(scratch)
        try:
            models.pack_noop(store)
            models.pack_sleeper(store, flood.SLEEP_S)
        except Missing as error:
            return [Table("Predictions over HTTP", [], [f"Not measured. {error}."])]
        tables = [table for size in _BATCH_SIZES for table in _no_op(setup, store, size)]
        return [*tables, flood.table(setup, store), _bodies(setup, store)]


def run_memory(setup: Setup) -> list[Table]:
    """Measure the memory after many requests, a suite of its own because it takes long; return its table."""
    with tempfile.TemporaryDirectory(prefix="torchmgmt-bench-") as scratch:
        store = Path(scratch)
        try:
            models.pack_noop(store)
        except Missing as error:
            return [Table("HTTP, memory after many requests", [], [f"Not measured. {error}."])]
        return [_growth(setup, store)]


def _no_op(setup: Setup, store: Path, batch_size: int) -> list[Table]:
    """All servers run beside each other, idle but for the one that is asked."""
    deployment = Deployment("noop", store, "json", batch_size=batch_size, max_batch_delay_ms=_DELAY_MS)
    with ExitStack() as stack:
        endpoints = {name: _deploy(stack, peer, deployment) for name, peer in setup.peers.items()}
        variants = {
            f"{name}, {count}": partial(_load, endpoint, count, setup.seconds)
            for count in _CONNECTIONS
            for name, endpoint in endpoints.items()
        }
        if OURS in endpoints:
            numbered = wrk.Requests(is_numbered=True)
            variants[_NUMBERED] = partial(_load, endpoints[OURS], _CONNECTIONS[-1], setup.seconds, numbered)
        # Two rounds of warming up: Java compiles what is used often while it runs.
        budget_s = 2.0 * (setup.runs + 2) * len(variants) * setup.seconds
        result = interleave(f"http, batch_size {batch_size}", variants, setup.runs, warm_ups=2, budget_s=budget_s)
    return _no_op_tables(result, list(endpoints), batch_size)


def _deploy(stack: ExitStack, peer: Peer, deployment: Deployment) -> Endpoint | Missing:
    """Serve until the stack is closed, or return why that cannot be."""
    try:
        return stack.enter_context(peer.deploy(deployment))
    except Missing as error:
        return error


def _load(endpoint: Endpoint | Missing, connections: int, seconds: int, requests: wrk.Requests | None = None) -> Sample:
    if isinstance(endpoint, Missing):
        raise endpoint
    load = wrk.run(endpoint.url, connections, seconds, requests)
    return {"rate": load.rate, "p50": load.p50_s, "p99": load.p99_s}


def _no_op_tables(result: Result, names: list[str], batch_size: int) -> list[Table]:
    delay = "" if batch_size == 1 else f", max_batch_delay {_DELAY_MS} ms"
    title = f"HTTP, no-op, batch_size {batch_size}{delay}"
    rates, latencies = [], []
    for count in _CONNECTIONS:
        where = f"{count} connection{'s' if count > 1 else ''}"
        rates += beside(result, names, f", {count}", "rate", "/s", where, _AT_LEAST[batch_size] if count > 1 else None)
        for figure, what in (("p50", "median"), ("p99", "99th percentile")):
            alone = Goal(0.4) if (count, batch_size, figure) == (1, 1, "p50") else None
            latencies += beside(result, names, f", {count}", figure, "ms", f"{where}, {what}", alone)
    if result.has(_NUMBERED):
        own = next(row for row in rates if row.what == f"{OURS}: {where}")
        rates.append(Row(_NUMBERED, result.series(_NUMBERED, "rate", "/s"), own))
    notes = [
        (
            f"wrk, POST of {len(wrk.Requests().body)} bytes of JSON, which each server decodes, hands to a Python worker that"
            " gives it back, and encodes; median over the rounds."
        ),
        (
            "wrk sends the same head each time, as a client does that asks again and again with bodies of one size. torchmgmt"
            " recognizes such heads; the last row has another X-Request-Id in each, so that each is parsed."
        ),
        *FAIRNESS,
        *result.notes,
    ]
    return [Table(f"{title}: answers a second", rates, notes), Table(f"{title}: latency", latencies, notes[:1])]


def beside(
    result: Result, names: list[str], suffix: str, figure: str, unit: str, what: str, goal: Goal | None = None
) -> list[Row]:
    """The rows of one figure: ours with its ratio to TorchServe, and the peers with theirs to ours."""
    measured = [name for name in names if result.has(name + suffix)]
    scale = 1e3 if unit == "ms" else 1.0
    series = {name: result.series(name + suffix, figure, unit, scale=scale) for name in measured}
    rows = {name: Row(f"{name}: {what}", series[name], short=name, bar=Bar(what, name)) for name in measured}
    if OURS not in rows:
        return list(rows.values())
    own = rows[OURS]
    # A goal that is a ratio to TorchServe cannot be judged without it.
    judged = None if goal is not None and goal.of_ratio and THEIRS not in rows else goal
    ours = evolve(own, base=rows.get(THEIRS), goal=judged)
    return [ours, *(evolve(row, base=None if name == THEIRS else own) for name, row in rows.items() if name != OURS)]


def _bodies(setup: Setup, store: Path) -> Table:
    deployment = Deployment("noop", store, "raw", max_batch_delay_ms=_DELAY_MS)
    peers = {**setup.peers, "bare uvicorn": bare_uvicorn()}
    with ExitStack() as stack:
        endpoints = {name: _deploy(stack, peer, deployment) for name, peer in peers.items()}
        variants: dict[str, Callable[[], Sample]] = {}
        for size, count in _BODIES.items():
            body = wrk.Requests.of_sizes(size * 1_000_000)
            for name, endpoint in endpoints.items():
                variants[f"{name}, {size} MB"] = partial(_load, endpoint, count, 2 * setup.seconds, body)
        budget_s = 4.0 * (setup.runs + 1) * len(variants) * setup.seconds
        result = interleave("http, bodies", variants, setup.runs, budget_s=budget_s)
    rows = [row for size in _BODIES for row in _body_rows(result, list(peers), size)]
    notes = [
        "MB (1e6 bytes) a second of requests; as much comes back. "
        + "; ".join(f"{size} MB over {count} connections" for size, count in _BODIES.items())
        + ".",
        "Bare uvicorn (uvloop, httptools) gathers the body and sends it back: no worker, no other process.",
        *result.notes,
    ]
    return Table("HTTP, large bodies", rows, notes)


def _body_rows(result: Result, names: list[str], size: int) -> list[Row]:
    def row(name: str, base: Row | None, goal: Goal | None) -> Row:
        series = result.series(f"{name}, {size} MB", "rate", "MB/s", scale=size)
        return Row(f"{name}, {size} MB", series, base, goal, short=name, bar=Bar(f"{size} MB", name))

    measured = [name for name in names if result.has(f"{name}, {size} MB")]
    bare = row("bare uvicorn", None, None) if "bare uvicorn" in measured else None
    goal = Goal(0.5, at_least=True, of_ratio=True) if bare else None
    rows = [row(name, bare, goal if name == OURS else None) for name in measured if name != "bare uvicorn"]
    return [*rows, bare] if bare else rows


def _growth(setup: Setup, store: Path) -> Table:
    first, last = (500, 2_000) if setup.is_quick else (10_000, 100_000)
    deployment = Deployment("noop", store, "raw", max_batch_delay_ms=_DELAY_MS)
    variants = {name: partial(_grown, peer, deployment, first, last) for name, peer in setup.peers.items()}
    at_most = {name: 1 for name in variants if name != OURS}
    result = interleave("http, growth", variants, min(setup.runs, 3), warm_ups=0, at_most=at_most, budget_s=600)
    rows = []
    for name in variants:
        if result.has(name):
            before = Row(f"{name}: after {first:,} requests", result.series(name, "first", "MB"), short="before")
            rows += [before, Row(f"{name}: after {last:,}", result.series(name, "last", "MB"), before)]
    notes = [
        (
            f"Sum of the proportional set sizes of the whole server. Bodies of {', '.join(f'{size:,}' for size in _MIXED)} bytes"
            " in turn, over 16 connections, sent back. A new server for each row; the peers in one round only."
        ),
        *result.notes,
    ]
    return Table("HTTP, memory after many requests", rows, notes)


def _grown(peer: Peer, deployment: Deployment, first: int, last: int) -> Sample:
    sample: dict[str, float] = {}
    requests = wrk.Requests.of_sizes(*_MIXED)
    with peer.deploy(deployment) as endpoint:
        done, rate = 0, 0.0
        for figure, count in (("first", first), ("last", last)):
            while done < count:
                seconds = min(10, max(1, math.ceil((count - done) / rate))) if rate else 1
                load = wrk.run(endpoint.url, 16, seconds, requests)
                done, rate = done + load.requests, load.rate
            sample[figure] = endpoint.server.pss_mb()
    return sample
