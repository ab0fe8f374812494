"""What handlers have measured, kept for the page: bounded, and such that no two handlers can make the page unreadable."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterable, Mapping

from attrs import define, field

from torchmgmt.events import HandlerMetrics
from torchmgmt.metrics.histogram import ANY_BOUNDS, Histogram
from torchmgmt.metrics.names import Names, legal_labels, legal_name, text
from torchmgmt.records import MetricKind, MetricRecord, ModelKey

__all__ = ["Family", "Labels", "Recorded"]

log = logging.getLogger(__name__)

Labels = tuple[tuple[str, str], ...]


@define
class Family:
    """All figures of one name, those of all versions together."""

    name: str
    kind: MetricKind
    unit: str
    series: dict[Labels, float | Histogram] = field(factory=dict)


class Recorded:
    """The figures of handlers, by version. Thread-safe.

    Args:
        reserved: names that no handler may have.
        most: how many figures with different names or labels one version, and all versions together, may have.
        more_labels: labels that every figure gets, beside those of its version.
    """

    def __init__(self, reserved: Iterable[str], most: tuple[int, int], more_labels: Mapping[str, str]) -> None:
        self._most_of_one, self._most = most
        self._more_labels = more_labels
        self._lock = threading.Lock()
        # guarded by _lock
        self._names = Names(reserved)
        self._families: dict[str, Family] = {}  # without figures
        self._fixed: set[str] = set()
        self._series: dict[ModelKey, dict[tuple[str, Labels], float | Histogram]] = {}
        self._count = 0
        self._left_out = 0
        self._warned: set[str] = set()

    @property
    def left_out(self) -> int:
        """How many figures had no place on the page."""
        return self._left_out

    def fix(self, name: str, kind: MetricKind, unit: str) -> None:
        """Have ``name`` be of ``kind`` for ever, whatever handlers record."""
        with self._lock:
            self._names.claim(name, kind)
            self._families[name] = Family(name, kind, unit)
            self._fixed.add(name)

    def add_version(self, key: ModelKey) -> None:
        """Take what the handlers of a version measure from now on. Idempotent."""
        with self._lock:
            self._series.setdefault(key, {})

    def remove_version(self, key: ModelKey) -> None:
        """Forget what the handlers of a version have measured, and take no more of it. Idempotent."""
        with self._lock:
            gone = self._series.pop(key, {})
            self._count -= len(gone)
            used = {name for series in self._series.values() for name, _ in series}
            unused = {name for name, _ in gone} - used - self._fixed
            self._names.release(unused)
            for name in unused:
                del self._families[name]

    def add(self, event: HandlerMetrics) -> None:
        """Take what a handler has measured; of a version that is not known there is no place for it."""
        for record in event.records:
            if _adds_up(record):
                self._add(event.key, record)

    def families(self) -> dict[str, Family]:
        """Return all figures, copied: counters and histograms of equal labels added up, of gauges one."""
        families: dict[str, Family] = {}
        with self._lock:
            for series in self._series.values():
                for (name, labels), value in series.items():
                    known = self._families[name]
                    family = families.setdefault(name, Family(name, known.kind, known.unit))
                    _merge(family, labels, value)
        return families

    def _add(self, key: ModelKey, record: MetricRecord) -> None:
        labels = self._labels(key, record.dimensions)
        with self._lock:
            series = self._series.get(key)
            if series is None:
                self._leave_out_locked(f"{key} is one of too many versions to be shown", str(key))
                return
            is_full = len(series) >= self._most_of_one or self._count >= self._most
            name = (self._names.find if is_full else self._names.claim)(record.name, record.kind)
            if name is None or (is_full and (name, labels) not in series):
                why = f"{key} records too many" if is_full else f"the name {record.name!r} is in use for something else"
                self._leave_out_locked(why, str(key) if is_full else record.name)
                return
            if name not in self._families:
                self._families[name] = Family(name, record.kind, text(record.unit))
            if name != legal_name(record.name):
                self._warn_once_locked(f"{record.name!r} is something else already; this one is shown as {name}", name)
            self._count += (name, labels) not in series
            _note(series, (name, labels), record.kind, record.value)

    def _labels(self, key: ModelKey, dimensions: Mapping[str, str]) -> Labels:
        labels = legal_labels(dimensions)
        for name, value in {"ModelName": key.name, "ModelVersion": key.version, **self._more_labels}.items():
            labels.setdefault(name, text(value))
        return tuple(sorted(labels.items()))

    def _leave_out_locked(self, why: str, about: str) -> None:
        self._left_out += 1
        self._warn_once_locked(f"{why}: left out", about)

    def _warn_once_locked(self, what: str, about: str) -> None:
        if about not in self._warned and len(self._warned) < self._most_of_one:
            self._warned.add(about)
            log.warning("A metric of a handler: %s", what)


def _adds_up(record: MetricRecord) -> bool:
    """Whether the figure can be added to others: one NaN would spoil a whole sum, and what is counted does not shrink."""
    if record.kind is MetricKind.GAUGE:
        return True
    return math.isfinite(record.value) and (record.kind is MetricKind.HISTOGRAM or record.value >= 0)


def _note(
    series: dict[tuple[str, Labels], float | Histogram], place: tuple[str, Labels], kind: MetricKind, value: float
) -> None:
    before = series.get(place)
    if kind is MetricKind.GAUGE:
        series[place] = value
    elif kind is MetricKind.COUNTER:
        series[place] = value + (before if isinstance(before, float) else 0.0)
    else:
        histogram = before if isinstance(before, Histogram) else Histogram(ANY_BOUNDS)
        histogram.observe(value)
        series[place] = histogram


def _merge(family: Family, labels: Labels, value: float | Histogram) -> None:
    before = family.series.get(labels)
    if isinstance(value, Histogram):
        merged = value.copy()
        if isinstance(before, Histogram):
            merged.add(before)
        family.series[labels] = merged
    elif family.kind is MetricKind.COUNTER and isinstance(before, float):
        family.series[labels] = before + value
    else:
        family.series[labels] = value
