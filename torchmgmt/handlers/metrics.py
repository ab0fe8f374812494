"""``context.metrics``: what handlers measure. It is told to the program that embeds us, as events; no log is parsed.

The methods are those of TorchServe's ``ts.metrics.metric_cache_yaml_impl.MetricsCacheYamlImpl``. A wrong figure is logged as an
error and left out: a request does not fail for it.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torchmgmt.handlers.metric_types import (
    MetricsCacheKeyError,
    MetricsCacheTypeError,
    MetricsCacheValueError,
    MetricTypes,
    NamedValue,
    pairs_of,
    unit_name,
)
from torchmgmt.handlers.recorder import MAX_SERIES, Recorder, current

__all__ = ["CachingMetric", "MetricAbstract", "Metrics"]

log = logging.getLogger(__name__)

_TIME_UNITS = ("ms", "s", "us")
_SIZE_UNITS = ("B", "kB", "MB", "GB")
_OWN_DIMENSIONS = ("ModelName", "Level")
# What handlers record without declaring it, as TorchServe's own file of metrics declares it.
_KNOWN = ("HandlerTime", "PredictionTime")


class MetricAbstract(abc.ABC):
    """One metric: a name, a unit, a kind, and the names of its dimensions."""

    def __init__(
        self,
        metric_name: str,
        unit: str,
        dimension_names: Sequence[str] | None = None,
        metric_type: MetricTypes = MetricTypes.COUNTER,
    ) -> None:
        self.metric_name = metric_name
        self.unit = unit_name(unit)
        self.dimension_names = list(dimension_names or ())
        self.metric_type = metric_type

    @abc.abstractmethod
    def add_or_update(self, value: float, dimension_values: Sequence[object], request_id: str = "") -> None:
        """Note one figure, with a value for each of the dimensions."""


class CachingMetric(MetricAbstract):
    """A metric whose figures are recorded for the worker in which it was made."""

    def __init__(
        self,
        metric_name: str,
        unit: str,
        dimension_names: Sequence[str] | None = None,
        metric_type: MetricTypes = MetricTypes.COUNTER,
    ) -> None:
        super().__init__(metric_name, unit, dimension_names, metric_type)
        self.recorder: Recorder | None = None
        """Where its figures go; None: to the worker of this process."""
        self.is_declared = False
        """Whether its dimensions were stated, and not taken from its first figure."""

    def __repr__(self) -> str:
        return f"<CachingMetric {self.metric_name}, a {self.metric_type.value} of {self.unit}>"

    def add_or_update(self, value: float, dimension_values: Sequence[object] = (), request_id: str = "") -> None:
        """Note one figure, with a value for each of the dimensions, in their order. ``request_id`` counts for nothing."""
        values = tuple(dimension_values or ())
        if len(values) != len(self.dimension_names):
            log.error("%s is left out: it has the dimensions %s, not %s", self, self.dimension_names, list(values))
            return
        self.add(value, dict(zip(self.dimension_names, map(str, values), strict=True)))

    def update(self, value: float, request_id: str = "", dimensions: Iterable[NamedValue] = ()) -> None:
        """Note one figure with these dimensions, which are the metric's from now on."""
        given = pairs_of(dimensions)
        self.dimension_names = list(given)
        self.add(value, given)

    def add(self, value: float, dimensions: Mapping[str, str]) -> None:
        """Note one figure with the values of its dimensions by their names; others than its own must not be there."""
        try:
            figure = _number(value)
            if self.metric_type is MetricTypes.COUNTER and figure < 0:
                raise ValueError("a counter cannot grow by less than 0")
            values = tuple((name, dimensions[name]) for name in self.dimension_names)
            if len(values) != len(dimensions):
                raise ValueError(f"its dimensions are {self.dimension_names}, not {list(dimensions)}")
        except KeyError as error:
            log.error("%s is left out: its dimension %s has no value", self, error)
        except (TypeError, ValueError) as error:
            log.error("%s is left out with the value %r: %s", self, value, error)
        else:
            (self.recorder or current()).record(self.metric_name, self.metric_type, self.unit, figure, values)


class Metrics:
    """The metrics of one worker's handler. Any thread.

    A figure gets the dimensions ``ModelName`` and ``Level`` beside those that are given with it, unless the metric was
    declared without them.
    """

    def __init__(self, model_name: str | None = None) -> None:
        self.model_name = model_name
        self.request_ids: Mapping[int, str] | str | None = None
        self.recorder = Recorder()
        self.cache: dict[MetricTypes, dict[str, CachingMetric]] = {}
        for name in _KNOWN:
            self.add_metric_to_cache(name, "ms", list(_OWN_DIMENSIONS), MetricTypes.GAUGE)

    def add_counter(
        self, name: str, value: float, idx: int | None = None, dimensions: Iterable[NamedValue] | None = None
    ) -> None:
        """Add ``value``, at least 0, to a count. ``idx``, here and below, is which request it is about."""
        self._add(name, value, "count", dimensions, MetricTypes.COUNTER)

    def add_time(
        self,
        name: str,
        value: float,
        idx: int | None = None,
        unit: str = "ms",
        dimensions: Iterable[NamedValue] | None = None,
        metric_type: MetricTypes = MetricTypes.GAUGE,
    ) -> None:
        """Note a duration, in ``ms``, ``s`` or ``us``; raise MetricsCacheValueError for another unit."""
        _check_unit(unit, _TIME_UNITS)
        self._add(name, value, unit, dimensions, metric_type)

    def add_size(
        self,
        name: str,
        value: float,
        idx: int | None = None,
        unit: str = "MB",
        dimensions: Iterable[NamedValue] | None = None,
        metric_type: MetricTypes = MetricTypes.GAUGE,
    ) -> None:
        """Note a size, in ``B``, ``kB``, ``MB`` or ``GB``; raise MetricsCacheValueError for another unit."""
        _check_unit(unit, _SIZE_UNITS)
        self._add(name, value, unit, dimensions, metric_type)

    def add_percent(
        self,
        name: str,
        value: float,
        idx: int | None = None,
        dimensions: Iterable[NamedValue] | None = None,
        metric_type: MetricTypes = MetricTypes.GAUGE,
    ) -> None:
        """Note a percentage."""
        self._add(name, value, "percent", dimensions, metric_type)

    def add_error(self, name: str, value: object = 1, dimensions: Iterable[NamedValue] | None = None) -> None:
        """Count errors: ``value`` is how many, or the text of one, which is logged."""
        count = value
        if isinstance(value, (str, BaseException)):
            log.error("%s: %s", name, value)
            count = 1
        self._add(name, count, "", dimensions, MetricTypes.COUNTER, level="Error")

    def add_metric(
        self,
        name: str,
        value: float,
        unit: str = "unit",
        idx: int | None = None,
        dimensions: Iterable[NamedValue] | None = None,
        metric_type: MetricTypes = MetricTypes.COUNTER,
    ) -> None:
        """Note any figure, in any unit."""
        self._add(name, value, unit, dimensions, metric_type)

    def add_metric_to_cache(
        self,
        metric_name: str,
        unit: str,
        dimension_names: Sequence[str] = (),
        metric_type: MetricTypes = MetricTypes.COUNTER,
    ) -> CachingMetric:
        """Declare a metric, in place of one of the same name and kind, and return it.

        Raises:
            MetricsCacheTypeError: an argument has the wrong type.
        """
        _check_type("metric_name", metric_name, str)
        _check_type("unit", unit, str)
        _check_type("metric_type", metric_type, MetricTypes)
        _check_type("dimension_names", dimension_names, (list, tuple))
        metric = self._make(metric_name, unit, dimension_names, metric_type)
        metric.is_declared = True
        return metric

    def get_metric(self, metric_name: str, metric_type: MetricTypes = MetricTypes.COUNTER) -> CachingMetric:
        """Return a metric that was declared or recorded before.

        Raises:
            MetricsCacheTypeError: an argument has the wrong type.
            MetricsCacheKeyError: there is none of this name and kind.
        """
        _check_type("metric_name", metric_name, str)
        _check_type("metric_type", metric_type, MetricTypes)
        metric = self.cache.get(metric_type, {}).get(metric_name)
        if metric is None:
            known = ", ".join(sorted(self.cache.get(metric_type, {}))) or "none"
            raise MetricsCacheKeyError(f"There is no {metric_type.value} {metric_name!r}; there are: {known}")
        return metric

    def set_request_ids(self, request_ids: Mapping[int, str] | str | None) -> None:
        """Set ``request_ids``; no figure carries them."""
        self.request_ids = request_ids

    def cache_keys(self) -> list[str]:
        """Return all metrics as ``kind:name``."""
        return [f"{kind.value}:{name}" for kind, metrics in self.cache.items() for name in metrics]

    def declare(self, section: object) -> None:
        """Declare what the section ``model_metrics`` of a metrics.yaml lists: for each kind, names, units and dimensions.

        Raises:
            MetricsCacheValueError: it does not have that form.
        """
        if not isinstance(section, Mapping):
            raise MetricsCacheValueError(f"model_metrics must list metrics by their kinds, not be {section!r}")
        for kind, metrics in section.items():
            try:
                metric_type = MetricTypes(kind)
            except ValueError:
                kinds = ", ".join(each.value for each in MetricTypes)
                raise MetricsCacheValueError(f"model_metrics has the kind {kind!r}; kinds are: {kinds}") from None
            for metric in metrics or ():
                self._declare_one(metric, metric_type)

    def _declare_one(self, metric: Any, metric_type: MetricTypes) -> None:
        try:
            name, unit, dimensions = metric["name"], metric["unit"], metric.get("dimensions") or []
            self.add_metric_to_cache(name, unit, dimensions, metric_type)
        except (AttributeError, KeyError, TypeError) as error:
            raise MetricsCacheValueError(
                f"model_metrics must say of each {metric_type.value} its name and unit (texts) and its dimensions (a list);"
                f" found: {metric!r}"
            ) from error

    def _add(
        self,
        name: str,
        value: Any,
        unit: str,
        dimensions: Iterable[NamedValue] | None,
        kind: MetricTypes,
        *,
        level: str = "Model",
    ) -> None:
        given = pairs_of(dimensions)
        if level == "Model":
            given.setdefault("ModelName", str(self.model_name))
        given.setdefault("Level", level)
        metric = self.cache.get(kind, {}).get(name)
        if metric is None:
            metric = self._make(name, unit, list(given), kind)
        elif metric.is_declared:
            for own in _OWN_DIMENSIONS:
                if own not in metric.dimension_names:
                    given.pop(own, None)
        metric.add(value, given)

    def _make(self, name: str, unit: str, dimension_names: Sequence[str], kind: MetricTypes) -> CachingMetric:
        metric = CachingMetric(name, unit, dimension_names, kind)
        metric.recorder = self.recorder
        metrics = self.cache.setdefault(kind, {})
        # Beyond what the recorder takes there is no use in keeping them.
        if name in metrics or sum(map(len, self.cache.values())) < MAX_SERIES:
            metrics[name] = metric
        return metric


def _number(value: Any) -> float:
    if isinstance(value, (str, bytes)):
        raise TypeError("it is not a number")
    return float(value)  # a tensor or an array of one number, too


def _check_unit(unit: str, units: Sequence[str]) -> None:
    if unit not in units:
        raise MetricsCacheValueError(f"unit is {unit!r}, but must be one of {', '.join(units)}")


def _check_type(argument: str, value: object, expected: type | tuple[type, ...]) -> None:
    if not isinstance(value, expected):
        names = " or ".join(each.__name__ for each in (expected if isinstance(expected, tuple) else (expected,)))
        raise MetricsCacheTypeError(f"{argument} must be a {names}, not {value!r}")
