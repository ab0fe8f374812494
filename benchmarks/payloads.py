"""Large payloads, a table of the suite ``predict``: megabytes to a worker and back, beside a bare socket."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.measure import Sample, interleave, time_each
from benchmarks.peers.bare import BulkPingPong
from benchmarks.report import Row, Table
from torchmgmt import ModelManager

# MB (1e6 bytes) -> round trips in each round
_SIZES = {1: 30, 16: 6}


def table(runs: int) -> Table:
    """Measure in ``runs`` rounds; return the table."""
    kinds, notes = _kinds()
    with tempfile.TemporaryDirectory(prefix="torchmgmt-bench-") as scratch, ExitStack() as stack:
        manager = stack.enter_context(ModelManager())
        model = manager.register(models.write_noop(Path(scratch, "noop")))
        variants: dict[str, Callable[[], Sample]] = {}
        for size, calls in _SIZES.items():
            ping = stack.enter_context(BulkPingPong(size * 1_000_000))
            variants[f"socket {size}"] = partial(_median, ping.round_trip, calls)
            for kind, make in kinds.items():
                variants[f"{kind} {size}"] = partial(_median, partial(model.predict, make(size * 1_000_000)), calls)
        result = interleave("predict, large payloads", variants, runs)
    rows = []
    for size in _SIZES:
        bare = Row(f"bare socket, {size} MB", result.series(f"socket {size}", "p50", "ms", scale=1e3))
        rows.append(bare)
        times = {kind: result.series(f"{kind} {size}", "p50", "ms", scale=1e3) for kind in kinds}
        rows += [Row(f"predict, {kind}, {size} MB", series, bare) for kind, series in times.items()]
    return Table("Large payloads: round trip", rows, notes)


def _kinds() -> tuple[dict[str, Callable[[int], Any]], list[str]]:
    kinds: dict[str, Callable[[int], Any]] = {"bytes": bytes}
    notes = [
        "A no-op handler gives back what it got; median of the calls of a round, one after the other. MB are 1e6 bytes.",
        (
            "Bare socket: two Python processes and an AF_UNIX socket pair; the other end receives all of it into one buffer,"
            " then sends it back."
        ),
    ]
    try:
        import numpy as np
    except ImportError:
        notes.append("numpy arrays: not measured. numpy is not installed.")
    else:
        kinds["numpy array"] = lambda size: np.zeros(size // 4, np.float32)
    return kinds, notes


def _median(call: Callable[[], object], count: int) -> Sample:
    return {"p50": time_each(call, count)[count // 2]}
