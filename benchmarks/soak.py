"""soak: ``python -m benchmarks.soak [--seconds 3600] [--seed N]``: whether it runs for as long as it has to.

Clients ask all the time, in process (with payloads of 10 bytes to 4 MB) and over HTTP (to 2 MB), while models are scaled (also
over HTTP), registered and unregistered and processes are killed and stopped at random: the storm of ``tests/faults``. Those
over HTTP keep their connections, and leave one in ten requests in the middle. At the end stands a verdict: no request was lost,
nothing is left, and memory, descriptors, threads, processes and latency were at the end what they were after warming up.
The exit status is 1 if one of that is not so.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random

import attrs
import psutil

from benchmarks.measure import pss_mb, say
from tests.faults.storm import Report, storm
from tests.faults.storm_actors import World
from tests.leaks import carries

__all__ = ["Gauge", "Sample", "Trend", "Verdict", "main", "soak", "trends_of"]

_SAMPLES = 400
"""So many are taken in all, but not more than one in a second."""
_FEW = 10
"""So many answers there must be for their median to be a sample of the latency."""
_M_MMAP_THRESHOLD = -3  # from glibc's <malloc.h>


@attrs.frozen
class Sample:
    """What there was at one moment."""

    at_s: float
    """Since the beginning, in s."""
    parent_mb: float
    """The proportional set size of the program that embeds torchmgmt, without what malloc keeps of freed memory."""
    torch_only_mb: float | None
    """What the torch-only process has of its own; None while there is none, or one that has just been started."""
    descriptors: int
    """Of this program."""
    threads: int
    """Of this program."""
    processes: int
    latency_ms: float | None
    """The median of what small requests took that were answered since the sample before; None if they were few."""
    http_latency_ms: float | None
    """The same of those over HTTP."""


@attrs.define
class Gauge:
    """Takes samples of a storm."""

    samples: list[Sample] = attrs.field(factory=list)
    _began_at: float = attrs.field(factory=time.monotonic)
    _settled: dict[int, float] = attrs.field(factory=dict)
    """When each torch-only process was first seen: it grows while it imports torch."""

    def look(self, world: World, left_s: float) -> None:
        """Take a sample. When the storm is over there is none to take: what rests is not what rages."""
        if left_s <= 0:
            return
        _give_back_freed_memory()
        self.samples.append(
            Sample(
                at_s=time.monotonic() - self._began_at,
                parent_mb=pss_mb([os.getpid()]),
                torch_only_mb=self._torch_only_mb(world.run),
                descriptors=len(os.listdir("/proc/self/fd")),  # noqa: PTH208 - their number is enough
                threads=threading.active_count(),
                processes=sum(carries(pid, world.run) for pid in psutil.pids() if pid != os.getpid()),
                latency_ms=_median_ms(world.took_s),
                http_latency_ms=_median_ms(world.http_took_s),
            )
        )

    def _torch_only_mb(self, run: str) -> float | None:
        now = time.monotonic()
        for child in psutil.Process().children():
            if carries(child.pid, run) and now - self._settled.setdefault(child.pid, now) > 5.0:
                return _own_mb(child.pid)
        return None


def _give_back_freed_memory() -> None:
    """Have glibc give back what was freed: of the payloads of up to 4 MB that its clients make on dozens of threads, each of
    malloc's arenas keeps some, which grows for an hour (136 to 235 MB, of which 20 are in use) and would hide a leak, or
    look like one."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _keep_no_freed_memory() -> None:
    """Have glibc give large blocks back as they are freed, for as long as this process runs.

    By itself it learns: the first block of 9 MB that is freed anywhere has each arena keep up to 18 MB from then on, and
    malloc_trim(3) does not reach what lies at the end of an arena. Seen in an hour's run: 37 MB more at one stroke, after 48
    minutes, and in a shorter one 100. Saying a threshold, here the one that it starts with, ends the learning, mallopt(3).
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, 128 << 10)


def _median_ms(took_s: deque[float]) -> float | None:
    """Take what has come, which is more all the time, and return its median."""
    new = [took_s.popleft() for _ in range(len(took_s))]
    return statistics.median(new) * 1e3 if len(new) >= _FEW else None


def _own_mb(pid: int) -> float | None:
    """Return a process's anonymous memory, shared with its children or not: of its PSS they have a part that varies."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) * 1024 / 1e6
    return None


@attrs.frozen
class Trend:
    """How one figure went: at first (the second fifth of the time, the first one is for warming up), and at last."""

    what: str
    first: float
    last: float
    growth: float
    """From the first moment after warming up to the last, along a straight line through all samples between."""
    limit: float
    unit: str
    is_ratio: bool = False

    @property
    def is_well(self) -> bool:
        """Whether it grew by no more than it may."""
        return (self.last / self.first if self.is_ratio else self.growth) <= self.limit

    @property
    def cells(self) -> tuple[str, ...]:
        """It as a line of a table."""
        grew = f"{self.last / self.first:.2f} x" if self.is_ratio else f"{self.growth:+.1f}"
        limit = f"≤ {self.limit:g} x" if self.is_ratio else f"≤ {self.limit:+g}"
        return (
            self.what,
            f"{self.first:.1f}",
            f"{self.last:.1f}",
            grew,
            limit,
            self.unit,
            "ok" if self.is_well else "BAD",
        )


_FIGURES: Mapping[str, tuple[str, Callable[[Sample], float | None], str]] = {
    "memory of the program": ("parent", lambda sample: sample.parent_mb, "MB"),
    "memory of the torch-only process": ("torch_only", lambda sample: sample.torch_only_mb, "MB"),
    "descriptors": ("descriptors", lambda sample: sample.descriptors, ""),
    "threads": ("threads", lambda sample: sample.threads, ""),
    "processes": ("processes", lambda sample: sample.processes, ""),
}


_LATENCIES: Mapping[str, tuple[str, Callable[[Sample], float | None]]] = {
    "latency, median": ("latency", lambda sample: sample.latency_ms),
    "latency over HTTP, median": ("http_latency", lambda sample: sample.http_latency_ms),
}


@attrs.frozen
class Limits:
    """By how much the figures may grow while it rages: what is normal unrest, and far from a leak at each kill."""

    parent: float = 16.0
    torch_only: float = 16.0
    descriptors: float = 40.0
    threads: float = 6.0
    processes: float = 12.0
    latency: float = 1.5
    """The most that the latency may become of what it was."""
    http_latency: float = 2.0
    """The same over HTTP, where fewer ask, and now and then."""


SHORT = Limits(parent=48.0, descriptors=100.0, processes=24.0, latency=4.0, http_latency=6.0)
"""For half a minute, in which all is still warming up, beside other tests on a busy machine."""
SHORT_S = 120.0


def trends_of(samples: Sequence[Sample], limits: Limits) -> list[Trend]:
    """Return how each figure went that was seen both early and late."""
    end = samples[-1].at_s if samples else 0.0
    trends = []
    for what, (name, value_of, unit) in _FIGURES.items():
        points = [(each.at_s, value) for each in samples if (value := value_of(each)) is not None]
        if trend := _trend(what, points, end, getattr(limits, name), unit):
            trends.append(trend)
    for what, (name, value_of) in _LATENCIES.items():
        points = [(each.at_s, value) for each in samples if (value := value_of(each)) is not None]
        if trend := _trend(what, points, end, getattr(limits, name), "ms", is_ratio=True):
            trends.append(trend)
    return trends


def _trend(
    what: str, points: Sequence[tuple[float, float]], end: float, limit: float, unit: str, *, is_ratio: bool = False
) -> Trend | None:
    after = [point for point in points if point[0] >= end / 5]
    first = [value for at, value in after if at < end * 2 / 5]
    last = [value for at, value in after if at >= end * 4 / 5]
    if not first or not last:
        return None
    line = statistics.linear_regression([at for at, _ in after], [value for _, value in after])
    growth = line.slope * (after[-1][0] - after[0][0])
    return Trend(what, statistics.median(first), statistics.median(last), growth, limit, unit, is_ratio)


@attrs.frozen
class Verdict:
    """What a soak has found."""

    report: Report
    trends: Sequence[Trend]
    samples: Sequence[Sample]

    @property
    def complaints(self) -> list[str]:
        """All that is wrong."""
        missing = [] if {trend.what for trend in self.trends} >= _MUST_BE_SEEN else ["too little was seen to judge it"]
        bad = [f"{trend.what} went from {trend.first:.1f} to {trend.last:.1f} {trend.unit}" for trend in self.trends]
        wrong = [text for text, trend in zip(bad, self.trends, strict=True) if not trend.is_well]
        return [*self.report.complaints, *wrong, *missing]

    def __str__(self) -> str:
        head = ("what", "at first", "at last", "growth", "limit", "unit", "")
        cells = [head, *(trend.cells for trend in self.trends)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        verdict = "all is well" if not self.complaints else f"NOT WELL: {len(self.complaints)} complaints"
        over_http = sum(self.report.predictions.values())
        well = "BAD" if self.report.complaints else "ok"
        ends = f"requests: {self.report.requests}, {over_http} of them over HTTP, each ended once: {well}"
        return "\n".join([str(self.report), "", *(line.rstrip() for line in lines), ends, verdict])


_MUST_BE_SEEN = {"memory of the program", "descriptors", "threads", "processes", *_LATENCIES}


def soak(seconds: float, seed: int) -> Verdict:
    """Run for ``seconds`` seconds, at least 10, and some more to come to rest; return what was found."""
    gauge = Gauge()
    limits, peace_s = (SHORT, 0.5) if seconds < SHORT_S else (Limits(), 2.0)
    report = storm(seconds, seed, look=gauge.look, look_period_s=max(1.0, seconds / _SAMPLES), peace_s=peace_s)
    return Verdict(report, trends_of(gauge.samples, limits), gauge.samples)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=_seconds, default=3600.0, help="for how long, at least 10 (default: 3600)")
    parser.add_argument("--samples", type=Path, metavar="FILE", help="write every sample to a file, too (JSON)")
    parser.add_argument("--seed", type=int, help="what its choices follow from (default: another each time)")
    options = parser.parse_args(arguments)
    seed = Random().randrange(1 << 32) if options.seed is None else options.seed
    logging.getLogger("torchmgmt").setLevel(logging.CRITICAL)  # of deaths there is no end
    _keep_no_freed_memory()
    say(f"soak of {options.seconds:g} s, seed {seed}")
    verdict = soak(options.seconds, seed)
    print(verdict, flush=True)
    if options.samples is not None:
        options.samples.write_text(json.dumps([attrs.asdict(each) for each in verdict.samples], indent=1))
    return 1 if verdict.complaints else 0


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 10 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds of at least 10")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
