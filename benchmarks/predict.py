"""predict: what predictions cost beside the bare exchange of messages, and beside a bare loop over the same batches."""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from benchmarks import models, payloads, saturation
from benchmarks.machine import pinned
from benchmarks.measure import Sample, interleave, time_each
from benchmarks.peers.bare import PingPong, ThreadedPingPong
from benchmarks.report import Goal, Row, Table
from benchmarks.suite import Setup
from torchmgmt import Model, ModelManager

_CALLS = 2000
_THREADS = 16
_BATCH_SIZE = 8
_THROUGHPUT_S = 0.6


def run(setup: Setup) -> list[Table]:
    """Measure the suite; return its tables."""
    runs = setup.runs
    with tempfile.TemporaryDirectory(prefix="torchmgmt-bench-") as scratch, ModelManager() as manager:
        noop = models.write_noop(Path(scratch, "noop"))
        single = manager.register(noop, model_name="single")
        batched = manager.register(noop, model_name="batched", batch_size=_BATCH_SIZE)
        with PingPong() as ping, ThreadedPingPong() as threaded:
            tables = [_latency(single, ping, threaded, runs), _throughput(single, batched, ping, runs)]
    return [*tables, saturation.table(setup), payloads.table(runs)]


def _latency(model: Model, ping: PingPong, threaded: PingPong, runs: int) -> Table:
    here, there = os.getpid(), {worker.pid for worker in model.describe().workers if worker.pid}
    two_cores = {here: 0, ping.pid: 1, threaded.pid: 1}
    one_core = dict.fromkeys([*two_cores, *there], 0)
    variants: dict[str, Callable[[], Sample]] = {
        "ping, two cores": lambda: _pinned(two_cores, ping.round_trip),
        "threaded, two cores": lambda: _pinned(two_cores, threaded.round_trip),
        "predict, two cores": lambda: _pinned({here: 0, **dict.fromkeys(there, 1)}, lambda: model.predict(b"x")),
        "predict": lambda: _pinned({}, lambda: model.predict(b"x")),
        "ping, one core": lambda: _pinned(one_core, ping.round_trip),
        "threaded, one core": lambda: _pinned(one_core, threaded.round_trip),
        "predict, one core": lambda: _pinned(one_core, lambda: model.predict(b"x")),
    }
    result = interleave("predict, 1 thread", variants, runs)
    goal = Goal(2.5, of_ratio=True)
    rows = []
    for place, where in (("two cores", "two cores"), ("one core", "one core")):
        bare = Row(f"bare ping-pong, {where}", result.series(f"ping, {place}", "p50", "µs", scale=1e6))
        floor = result.series(f"threaded, {place}", "p50", "µs", scale=1e6)
        own = result.series(f"predict, {place}", "p50", "µs", scale=1e6)
        rows += [bare, Row(f"the same + a reading thread, {where}", floor, bare), Row(f"predict, {where}", own, bare)]
    free = Row("predict, not pinned", result.series("predict", "p50", "µs", scale=1e6), rows[0], goal)
    tail = Row("predict, not pinned, 99th percentile", result.series("predict", "p99", "µs", scale=1e6))
    notes = (
        (
            f"No-op handler, 1 worker, batch_size 1, 1 byte of data; {_CALLS} calls one after the other in each round, and the"
            " median of those (or the 99th percentile). The table then shows the median of the rounds."
        ),
        "Bare ping-pong: two Python processes, one AF_UNIX socket pair, 160 bytes each way, nothing pickled.",
        (
            "Two cores: the program on one, the other process on the other; each way costs the wake-up of a sleeping core."
            " One core: all on the same; what is left is the work itself. Not pinned, the kernel drifts between the two,"
            " and the bare ping-pong with it, from second to second; hence the pins. The goal is judged against two cores,"
            " where a worker that computes belongs."
        ),
        (
            "With a reading thread: a second thread receives and wakes the caller through a Future: the least that a"
            " library does whose worker many threads share."
        ),
    )
    return Table("One prediction from one thread", [*rows, free, tail], notes)


def _pinned(cores: dict[int, int], call: Callable[[], object]) -> Sample:
    with pinned(cores):
        return _percentiles(call)


def _percentiles(call: Callable[[], object]) -> Sample:
    seconds = time_each(call, _CALLS)
    return {"p50": seconds[_CALLS // 2], "p99": seconds[_CALLS * 99 // 100]}


def _throughput(single: Model, batched: Model, ping: PingPong, runs: int) -> Table:
    variants: dict[str, Callable[[], Sample]] = {
        "ping": lambda: _pinned_rate({os.getpid(): 0, ping.pid: 1}, ping.round_trip),
        "ping, one core": lambda: _pinned_rate({os.getpid(): 0, ping.pid: 0}, ping.round_trip),
        "batched": lambda: _rate(_THREADS, lambda: batched.predict(b"x")),
        "single": lambda: _rate(_THREADS, lambda: single.predict(b"x")),
        "map": lambda: _rate_of_map(batched),
    }
    result = interleave("predict, throughput", variants, runs)
    bare = Row("bare ping-pong, two cores", result.series("ping", "rate", "/s"))
    goal = Goal(1, at_least=True, of_ratio=True)
    rows = [
        bare,
        Row("bare ping-pong, one core", result.series("ping, one core", "rate", "/s"), bare),
        Row(f"predict, {_THREADS} threads, batch_size 8", result.series("batched", "rate", "/s"), bare, goal),
        Row(f"predict, {_THREADS} threads, batch_size 1", result.series("single", "rate", "/s"), bare),
        Row("map, 1 thread, batch_size 8", result.series("map", "rate", "/s"), bare),
    ]
    notes = (
        (
            f"Answers a second, over {_THROUGHPUT_S:g} s a round; 1 worker; each thread waits for its answer before it asks"
            " again. max_batch_delay is the default, 100 ms."
        ),
    )
    return Table("Predictions per second", rows, notes)


def _pinned_rate(cores: dict[int, int], call: Callable[[], object]) -> Sample:
    with pinned(cores):
        return _rate(1, call)


def _rate(threads: int, call: Callable[[], object]) -> Sample:
    """Call in a loop from so many threads for a while; return the calls a second that ended."""
    counts = [0] * threads
    started = time.perf_counter()
    until = started + _THROUGHPUT_S

    def loop(place: int) -> None:
        while time.perf_counter() < until:
            call()
            counts[place] += 1

    callers = [threading.Thread(target=loop, args=(place,)) for place in range(threads)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return {"rate": sum(counts) / (time.perf_counter() - started)}


def _rate_of_map(model: Model) -> Sample:
    started = time.perf_counter()
    items = itertools.takewhile(lambda _: time.perf_counter() < started + _THROUGHPUT_S, itertools.repeat(b"x"))
    numbered = enumerate(model.map(items), start=1)
    count, _answer = deque(numbered, maxlen=1).pop()
    return {"rate": count / (time.perf_counter() - started)}
