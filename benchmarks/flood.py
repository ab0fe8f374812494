"""Floods, a table of the suite ``http``: what others have to wait while 64 connections keep one model busy."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks import wrk
from benchmarks.measure import Missing, Sample, interleave
from benchmarks.peers.managed import ManagedServer
from benchmarks.peers.ours import Ours
from benchmarks.report import Bar, Goal, Row, Table
from benchmarks.servers import LOOPBACK, Server, ServerFailed
from benchmarks.suite import OURS, Setup

SLEEP_S = 1.0
_CONNECTIONS = 64
_BODY = b'{"x": 1}'
_ASKED = {"/ping": "ping", "/models": "models", "a second model": "second", "/models/noop": "describe"}
_FLOODS = {
    "nobody else": ("/ping", "/models", "a second model"),
    "a slow model": ("/ping", "/models", "a second model"),
    "a no-op model": ("/models", "/models/noop"),
}
_GOALS = {"a slow model": Goal(50), "a no-op model": Goal(25)}


def table(setup: Setup, store: Path) -> Table:
    """Measure the servers that have a Management API beside their inference; return the table."""
    peers: Mapping[str, ManagedServer] = {OURS: Ours(), setup.torchserve.title: setup.torchserve}
    with ExitStack() as stack:
        variants: dict[str, Callable[[], Sample]] = {}
        for what, asked in _FLOODS.items():
            for name, peer in peers.items():
                server = _serve(stack, peer, store)
                if what == "a slow model" and isinstance(server, Server):
                    _keep_busy(stack, server)
                call = partial(_asked_beside_no_op if what == "a no-op model" else _asked, server, asked, setup.seconds)
                variants[f"{name}, {what}"] = call
        budget_s = 2.0 * (setup.runs + 1) * len(variants) * setup.seconds
        result = interleave("http, floods", variants, setup.runs, budget_s=budget_s)
    rows = []
    for what, asked in _FLOODS.items():
        for path in asked:
            for name in [each for each in peers if result.has(f"{each}, {what}")]:
                series = result.series(f"{name}, {what}", f"{_ASKED[path]} p99", "ms", scale=1e3)
                goal = _GOALS.get(what) if name == OURS else None
                rows.append(Row(f"{name}: {path}, beside {what}", series, goal=goal, bar=Bar(f"{path}, {what}", name)))
    notes = [
        "99th percentile of requests one after the other over one connection, which ask for each in turn.",
        (
            f"A slow model: it sleeps for {SLEEP_S:g} s at each request, has 1 worker, and {_CONNECTIONS} connections ask for it"
            f" all the time. A no-op model: {_CONNECTIONS} connections keep the server, and so this machine, as busy as it gets."
        ),
        "LitServe and mosec serve one model and have no Management API; they are not asked.",
        *result.notes,
    ]
    return Table("HTTP, what others wait during a flood", rows, notes)


def _serve(stack: ExitStack, peer: ManagedServer, store: Path) -> Server | Missing:
    """A server of its own for each flood, for what a flood leaves in queues is still there after it."""
    try:
        server = stack.enter_context(peer.serve(store))
        server.register("noop.mar")
        server.register("sleeper.mar")
    except (Missing, ServerFailed) as error:
        return error if isinstance(error, Missing) else Missing(f"{peer.title} failed: {error}")
    return server


def _keep_busy(stack: ExitStack, server: Server) -> None:
    stack.enter_context(wrk.flood(_url(server, "sleeper"), _CONNECTIONS))


def _url(server: Server, model: str) -> str:
    return f"http://{LOOPBACK}:{server.inference_port}/predictions/{model}"


def _asked_beside_no_op(server: Server | Missing, asked: tuple[str, ...], seconds: float) -> Sample:
    if isinstance(server, Missing):
        raise server
    with wrk.flood(_url(server, "noop"), _CONNECTIONS):
        return _asked(server, asked, seconds)


def _asked(server: Server | Missing, asked: tuple[str, ...], seconds: float) -> Sample:
    """Ask for so long; return the 99th percentile of each."""
    if isinstance(server, Missing):
        raise server
    inference = http.client.HTTPConnection(LOOPBACK, server.inference_port, timeout=60)
    management = http.client.HTTPConnection(LOOPBACK, server.management_port, timeout=60)
    times: dict[str, list[float]] = {path: [] for path in asked}
    until = time.perf_counter() + seconds
    try:
        while time.perf_counter() < until:
            for path in asked:
                started = time.perf_counter()
                _ask(management if path.startswith("/models") else inference, path)
                times[path].append(time.perf_counter() - started)
    except (OSError, http.client.HTTPException) as error:
        raise Missing(f"asking failed: {error!r}") from error
    finally:
        inference.close()
        management.close()
    return {f"{_ASKED[path]} p99": sorted(each)[len(each) * 99 // 100] for path, each in times.items()}


def _ask(connection: http.client.HTTPConnection, path: str) -> None:
    if path == "a second model":
        connection.request("POST", "/predictions/noop", _BODY, {"Content-Type": "application/json"})
    else:
        connection.request("GET", path)
    answer = connection.getresponse()
    said = answer.read()
    if answer.status != http.client.OK:
        raise Missing(f"{path}: {answer.status} {said[:200]!r}")
