"""What a worker's handler has measured and nobody was told of yet: bounded, whatever the handler does."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from torchmgmt.records import MetricKind, RawMetric

__all__ = [
    "MAX_DIMENSIONS",
    "MAX_OBSERVATIONS",
    "MAX_SERIES",
    "MAX_TEXT",
    "Dimensions",
    "Recorder",
    "current",
    "make_current",
]

log = logging.getLogger(__name__)

MAX_SERIES = 1000
"""So many different metrics, or dimensions of one, may a worker have in its life."""
MAX_OBSERVATIONS = 10_000
"""So many observations of histograms are kept until they are told."""
MAX_TEXT = 200
"""The most characters of a name, a unit, a dimension."""
MAX_DIMENSIONS = 20
"""The most dimensions of a metric."""

Dimensions: TypeAlias = tuple[tuple[str, str], ...]
_Series: TypeAlias = tuple[str, MetricKind, str, Dimensions]


class Recorder:
    """Collects figures until they are taken. Thread-safe.

    What goes beyond the bounds is left out, with one warning for each: a handler that puts a request's id into a
    dimension must not fill the memory of its worker, nor that of the program.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # guarded by _lock
        self._series: set[_Series] = set()
        self._totals: dict[_Series, float] = {}
        self._observations: list[tuple[_Series, float]] = []
        self._warned: set[str] = set()
        self._is_muted = False

    def record(self, name: str, kind: MetricKind, unit: str, value: float, dimensions: Dimensions = ()) -> None:
        """Note one figure: added to those of a counter, in place of that of a gauge, beside those of a histogram."""
        series = (name, kind, unit, dimensions)
        with self._lock:
            if self._is_muted or not self._may_have_locked(series):
                return
            if kind is MetricKind.COUNTER:
                self._totals[series] = self._totals.get(series, 0.0) + value
            elif kind is MetricKind.GAUGE:
                self._totals[series] = value
            elif len(self._observations) < MAX_OBSERVATIONS:
                self._observations.append((series, value))
            else:
                self._warn_once_locked(f"more than {MAX_OBSERVATIONS} observations in one batch", name)

    def take(self) -> Sequence[RawMetric]:
        """Return what was recorded since the last call; empty if nothing."""
        if not (self._totals or self._observations):
            return ()
        with self._lock:
            totals, self._totals = self._totals, {}
            observations, self._observations = self._observations, []
        figures = [*totals.items(), *observations]
        return [(name, kind.value, unit, value, dimensions) for (name, kind, unit, dimensions), value in figures]

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        """Meanwhile, record nothing."""
        self._is_muted = True
        try:
            yield
        finally:
            self._is_muted = False

    def _may_have_locked(self, series: _Series) -> bool:
        if series in self._series:
            return True
        name, _, unit, dimensions = series
        if any(len(text) > MAX_TEXT for text in (name, unit, *(text for pair in dimensions for text in pair))):
            self._warn_once_locked(f"one with a text of more than {MAX_TEXT} characters", name[:MAX_TEXT])
            return False
        if len(dimensions) > MAX_DIMENSIONS:
            self._warn_once_locked(f"one with more than {MAX_DIMENSIONS} dimensions", name)
            return False
        if len(self._series) >= MAX_SERIES:
            self._warn_once_locked(f"more than {MAX_SERIES} different metrics and dimensions", name)
            return False
        self._series.add(series)
        return True

    def _warn_once_locked(self, what: str, name: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            log.warning("The handler records %s, as of %r; those beyond that are left out", what, name)


# A metric that a handler makes without its context belongs to the worker all the same.
_current = Recorder()


def current() -> Recorder:
    """Return what takes the figures of metrics that were made without a context: the worker's, in a worker process."""
    return _current


def make_current(recorder: Recorder) -> None:
    """Have metrics that are made without a context recorded in ``recorder`` from now on."""
    global _current  # noqa: PLW0603 - a process has one worker
    _current = recorder
