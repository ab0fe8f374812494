"""Metrics as TorchServe's first handlers have them: kept in a store, and told when somebody emits them.

The names are those of ``ts.metrics.metrics_store``, ``ts.metrics.metric`` and ``ts.service.emit_metrics``.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torchmgmt.handlers.metric_types import Dimension, MetricTypes, NamedValue, pairs_of
from torchmgmt.handlers.metrics import CachingMetric

__all__ = ["Metric", "MetricsStore", "emit_metrics"]

log = logging.getLogger(__name__)

_TIME_UNITS = ("ms", "s")
_SIZE_UNITS = ("MB", "kB", "GB", "B")


class Metric:
    """One figure with its name, unit and dimensions. :meth:`update` records another one of them."""

    def __init__(
        self,
        name: str,
        value: Any,
        unit: str,
        dimensions: Sequence[NamedValue],
        request_id: str | None = None,
        metric_method: str | None = None,
    ) -> None:
        self.metric_type = MetricTypes.COUNTER if metric_method in {None, "counter"} else MetricTypes.GAUGE
        self.dimensions = dimensions
        self._values = pairs_of(dimensions)
        self._metric = CachingMetric(name, unit, list(self._values), self.metric_type)
        self.name = self._metric.metric_name
        self.unit = self._metric.unit
        self.metric_method = metric_method
        self.value = value
        self.request_id = request_id

    def update(self, value: Any) -> None:
        """Record a figure at once."""
        self._metric.add(value, self._values)

    def reset(self) -> None:
        """Record 0."""
        self.update(0)

    def __str__(self) -> str:
        dimensions = ",".join(f"{name}:{value}" for name, value in self._values.items())
        request = f",{self.request_id}" if self.request_id else ""
        return f"{self.name}.{self.unit}:{self.value}|#{dimensions}|#hostname:{socket.gethostname()},{int(time.time())}{request}"

    def to_dict(self) -> OrderedDict[str, Any]:
        """Return it with TorchServe's names for what there is to it."""
        return OrderedDict(
            MetricName=self.name,
            Value=self.value,
            Unit=self.unit,
            Dimensions=self.dimensions,
            Timestamp=int(time.time()),
            HostName=socket.gethostname(),
            RequestId=self.request_id,
        )


def emit_metrics(metrics: Iterable[Metric] | None) -> None:
    """Record what each of ``metrics`` holds, such as the ``store`` of a :class:`MetricsStore`."""
    for metric in metrics or ():
        metric.update(metric.value)


class MetricsStore:
    """Keeps metrics in ``store`` until :func:`emit_metrics`; what is said again of one that is there is recorded at once."""

    def __init__(self, request_ids: Any, model_name: str) -> None:
        self.store: list[Metric] = []
        self.request_ids = request_ids
        self.model_name = model_name
        self.cache: dict[tuple[object, ...], Metric] = {}

    def add_counter(self, name: str, value: float, idx: int | None = None, dimensions: list[Any] | None = None) -> None:
        """Note a count. ``idx``, here and below, is which request it is about."""
        self._add(name, value, "count", self._request(idx), "counter", dimensions)

    def add_time(
        self, name: str, value: float, idx: int | None = None, unit: str = "ms", dimensions: list[Any] | None = None
    ) -> None:
        """Note a duration, in ``ms`` or ``s``; raise ValueError for another unit."""
        _check_unit(unit, _TIME_UNITS)
        self._add(name, value, unit, self._request(idx), "gauge", dimensions)

    def add_size(
        self, name: str, value: float, idx: int | None = None, unit: str = "MB", dimensions: list[Any] | None = None
    ) -> None:
        """Note a size, in ``B``, ``kB``, ``MB`` or ``GB``; raise ValueError for another unit."""
        _check_unit(unit, _SIZE_UNITS)
        self._add(name, value, unit, self._request(idx), "gauge", dimensions)

    def add_percent(self, name: str, value: float, idx: int | None = None, dimensions: list[Any] | None = None) -> None:
        """Note a percentage."""
        self._add(name, value, "percent", self._request(idx), "gauge", dimensions)

    def add_error(self, name: str, value: Any, dimensions: list[Any] | None = None) -> None:
        """Count an error, and log ``value``, its text; a number counts as so many."""
        if isinstance(value, (str, BaseException)):
            log.error("%s: %s", name, value)
            value = 1
        self._add(name, value, "", None, "counter", dimensions)

    def add_metric(
        self, name: str, value: float, unit: str, idx: int | None = None, dimensions: list[Any] | None = None
    ) -> None:
        """Note any figure, in any unit."""
        self._add(name, value, unit, self._request(idx), "gauge", dimensions)

    def _request(self, idx: int | None) -> str:
        ids = self.request_ids
        if not isinstance(ids, Mapping):
            return str(ids)
        return str(ids[idx]) if idx in ids else ",".join(map(str, ids.values()))

    def _add(
        self, name: str, value: Any, unit: str, request: str | None, method: str, dimensions: list[Any] | None
    ) -> None:
        if dimensions is not None and not isinstance(dimensions, list):
            raise ValueError(f"dimensions must be a list of Dimension(name, value), not {dimensions!r}")
        own = [Dimension("Level", "Error")]
        if request is not None:
            own = [Dimension("ModelName", self.model_name), Dimension("Level", "Model")]
        everything = [*(dimensions or ()), *own]
        key = (name, unit, request, *map(str, everything))
        if key in self.cache:
            self.cache[key].update(value)
            return
        self.cache[key] = metric = Metric(name, value, unit, everything, request, method)
        self.store.append(metric)


def _check_unit(unit: str, units: Sequence[str]) -> None:
    if unit not in units:
        raise ValueError(f"unit is {unit!r}, but must be one of {', '.join(units)}")
