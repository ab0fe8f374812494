"""Measuring: variants run in turn (A B C A B C ...), so that a noisy machine hits all of them alike."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TypeAlias

import psutil
from attrs import field, frozen

BUDGET_S = 60.0


class Missing(Exception):
    """A variant cannot be measured here; the message says why."""


Sample: TypeAlias = Mapping[str, float]
"""What one run of a variant measured: each figure by its name."""


@frozen
class Series:
    """The values of one figure, one for each round, in the order of the rounds."""

    unit: str
    values: Sequence[float]

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def least(self) -> float:
        """The smallest value."""
        return min(self.values)

    @property
    def most(self) -> float:
        """The largest value."""
        return max(self.values)

    def over(self, base: Series) -> Series:
        """Return the ratio to ``base`` in each round that both have: they were measured side by side there."""
        return Series("x", [mine / theirs for mine, theirs in zip(self.values, base.values, strict=False)])

    def minus(self, base: Series) -> Series:
        """Return the difference from ``base`` in each round that both have."""
        return Series(self.unit, [mine - theirs for mine, theirs in zip(self.values, base.values, strict=False)])


@frozen
class Result:
    """What the rounds measured, by variant."""

    samples: Mapping[str, Sequence[Sample]]
    missing: Mapping[str, str] = field(factory=dict)
    """The variants that could not be measured, and why; they have no samples."""

    @property
    def notes(self) -> list[str]:
        """A line for each reason why variants are missing."""
        reasons: dict[str, list[str]] = {}
        for variant, why in self.missing.items():
            reasons.setdefault(why, []).append(variant)
        return [f"Not measured: {'; '.join(variants)}. {why}." for why, variants in reasons.items()]

    def has(self, variant: str) -> bool:
        """Return whether ``variant`` was measured."""
        return bool(self.samples.get(variant))

    def series(self, variant: str, figure: str, unit: str, *, scale: float = 1.0) -> Series:
        """Return one figure of one variant, each value times ``scale``."""
        return Series(unit, [sample[figure] * scale for sample in self.samples[variant]])


def interleave(
    title: str,
    variants: Mapping[str, Callable[[], Sample]],
    runs: int,
    *,
    warm_ups: int = 1,
    at_most: Mapping[str, int] | None = None,
    budget_s: float = BUDGET_S,
) -> Result:
    """Run every variant once in each round: ``warm_ups`` rounds that do not count, then ``runs`` that do.

    ``at_most`` bounds the rounds of variants that take long; they take part in the first ones. No round is begun after
    ``budget_s`` seconds, so that a busy machine gives fewer rounds (each report says how many) and not an endless run.
    A variant that raises :class:`Missing` is left out from then on, and what it measured before does not count.
    """
    until = time.monotonic() + budget_s
    limits = {name: (at_most or {}).get(name, runs) for name in variants}
    samples: dict[str, list[Sample]] = {name: [] for name in variants}
    missing: dict[str, str] = {}
    for number in range(-warm_ups, runs):
        if number > 0 and time.monotonic() > until:
            say(f"{title}: no more rounds, {budget_s:g} s are over")
            break
        say(f"{title}: " + ("warm-up" if number < 0 else f"round {number + 1} of {runs}"))
        for name in [each for each in samples if number < limits[each]]:
            try:
                sample = variants[name]()
            except Missing as error:
                say(f"{title}: not measured: {name}: {error}")
                missing[name] = str(error)
                del samples[name]
                continue
            if number >= 0:
                samples[name].append(sample)
    return Result(samples, missing)


def say(text: str) -> None:
    """Tell how far it is, on stderr: stdout is for the report."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def timed(sample: dict[str, float], figure: str) -> Iterator[None]:
    """Note the seconds that the block takes as ``figure``."""
    started = time.perf_counter()
    yield
    sample[figure] = time.perf_counter() - started


def time_each(call: Callable[[], object], count: int) -> list[float]:
    """Call ``count`` times; return the seconds of each call, sorted."""
    clock = time.perf_counter
    seconds = []
    for _ in range(count):
        started = clock()
        call()
        seconds.append(clock() - started)
    return sorted(seconds)


def pss_mb(pids: Iterable[int]) -> float:
    """Return the sum of the proportional set sizes in MB (1e6 bytes): a page that n processes share is 1/n in each.

    A process that is gone weighs nothing.
    """
    total = 0
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            total += psutil.Process(pid).memory_full_info().pss
    return total / 1e6
