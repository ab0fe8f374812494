"""Histograms that cost as little as one can in Python: a binary search and two additions for each figure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

__all__ = ["ANY_BOUNDS", "SECONDS_BOUNDS", "SIZE_BOUNDS", "Histogram"]

SECONDS_BOUNDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
)
"""For durations, in s: from what a small model takes to the default response_timeout."""
SIZE_BOUNDS = tuple(float(1 << power) for power in range(11))
"""For sizes of batches."""
ANY_BOUNDS = tuple(step * 10.0**power for power in range(-3, 6) for step in (1, 2.5, 5))
"""For what handlers measure: nobody knows in which unit."""


class Histogram:
    """Counts figures by the buckets that they fall into. Not thread-safe: its owner has a lock."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """How many figures are at most as large as each bound, and larger than the one before; the last: than all."""
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count ``value``, which is no NaN."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> Histogram:
        """Return one with the same figures."""
        copied = Histogram(self.bounds)
        copied.counts = self.counts.copy()
        copied.total = self.total
        return copied

    def add(self, other: Histogram) -> None:
        """Count the figures of ``other``, which has the same bounds, too."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def buckets(self) -> Iterator[tuple[str, float]]:
        """Yield each bound as Prometheus writes it, with the number of all figures that are at most as large."""
        so_far = 0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            so_far += count
            yield repr(bound), so_far
        yield "+Inf", so_far + self.counts[-1]
