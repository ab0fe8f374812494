"""From figures to what Prometheus knows: families of samples under the names of :mod:`torchmgmt.metrics`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from torchmgmt import VersionState
from torchmgmt.metrics.figures import OTHER, VersionFigures
from torchmgmt.metrics.histogram import Histogram
from torchmgmt.metrics.names import text
from torchmgmt.metrics.recorded import Family
from torchmgmt.records import MetricKind, ModelInfo, ModelKey

__all__ = ["PlainCounter", "families_of_figures", "families_of_infos", "family_of_handlers"]

LABELS = ("model", "version")

_Figure: TypeAlias = Callable[[VersionFigures], Histogram]
_HISTOGRAMS: Sequence[tuple[str, str, _Figure]] = (
    ("torchmgmt_queue_seconds", "How long a request waited until a worker began it.", lambda each: each.queue),
    ("torchmgmt_request_seconds", "From when a request was accepted until it was answered.", lambda each: each.latency),
    ("torchmgmt_batch_size", "How many requests a worker ran together.", lambda each: each.batch_sizes),
    (
        "torchmgmt_handler_seconds",
        "How long a worker took for a batch, with unpacking requests and packing answers.",
        lambda each: each.handler,
    ),
    ("torchmgmt_worker_load_seconds", "From the start of a worker until it was ready.", lambda each: each.load),
)


class PlainCounter(Metric):
    """A counter whose name does not end in ``_total``, as TorchServe's do; OpenMetrics would not call that a counter."""

    def __init__(self, name: str, documentation: str) -> None:
        super().__init__(name, documentation, "unknown")


def labels_of(key: ModelKey) -> list[str]:
    """Return the values of :data:`LABELS`."""
    return [text(key.name), text(key.version)]


def families_of_figures(versions: Sequence[VersionFigures]) -> Iterator[Metric]:
    """Yield what was counted of requests and workers."""
    requests = CounterMetricFamily("torchmgmt_requests", "Requests that have ended, in whatever way.", labels=LABELS)
    errors = CounterMetricFamily(
        "torchmgmt_errors", "Requests that ended with an error, by its class.", labels=(*LABELS, "error")
    )
    deaths = CounterMetricFamily("torchmgmt_worker_deaths", "Workers that ended unasked.", labels=LABELS)
    for each in versions:
        labels = labels_of(each.key)
        requests.add_metric(labels, each.requests)
        deaths.add_metric(labels, each.lost_workers)
        for error, count in each.errors.items():
            errors.add_metric([*labels, error], count)
    yield from (requests, errors, deaths)
    for name, documentation, figure in _HISTOGRAMS:
        histogram = HistogramMetricFamily(name, documentation, labels=LABELS)
        for each in versions:
            found = figure(each)
            histogram.add_metric(labels_of(each.key), list(found.buckets()), found.total)
        yield histogram


def families_of_infos(infos: Iterable[ModelInfo], named: Callable[[ModelKey], ModelKey]) -> Iterator[Metric]:
    """Yield how versions are at this moment; ``named`` says by whose labels each is shown."""
    sums: dict[str, Counter[tuple[str, ...]]] = {name: Counter() for name in _GAUGES}
    for info in infos:
        key = named(info.spec.key)
        labels = tuple(labels_of(key))
        sums["torchmgmt_ready"][labels] += info.state is VersionState.READY
        sums["torchmgmt_queue_length"][labels] += info.queue_length
        sums["torchmgmt_queue_capacity"][labels] += info.queue_capacity
        for bound, number in (("min", info.scale.min_workers), ("max", info.scale.max_workers)):
            place = (*labels, bound)
            sums["torchmgmt_workers_wanted"][place] += number
        for worker in info.workers:
            by_state = (*labels, worker.state.value)
            sums["torchmgmt_workers"][by_state] += 1
            by_worker = (*labels, OTHER.name if key == OTHER else worker.id)
            sums["torchmgmt_worker_memory_bytes"][by_worker] += worker.memory_bytes
    for name, (documentation, more_labels) in _GAUGES.items():
        gauge = GaugeMetricFamily(name, documentation, labels=(*LABELS, *more_labels))
        for values, value in sums[name].items():
            gauge.add_metric(values, value)
        yield gauge


_GAUGES: dict[str, tuple[str, Sequence[str]]] = {
    "torchmgmt_ready": ("Whether the version takes requests and has a worker for them (1) or not (0).", ()),
    "torchmgmt_queue_length": ("Requests that wait.", ()),
    "torchmgmt_queue_capacity": ("Requests that may wait.", ()),
    "torchmgmt_workers": ("Workers by their states.", ("state",)),
    "torchmgmt_workers_wanted": ("The least and the most workers that there shall be.", ("bound",)),
    "torchmgmt_worker_memory_bytes": (
        "Memory of a worker: its share of what it shares, and what is its own.",
        ("worker",),
    ),
}


def family_of_handlers(family: Family) -> Metric:
    """Return what handlers have measured under one name."""
    documentation = f"Measured by handlers, in {family.unit}."
    metric: Metric
    if family.kind is MetricKind.GAUGE:
        metric = Metric(family.name, documentation, "gauge")
    elif family.kind is MetricKind.HISTOGRAM:
        metric = Metric(family.name, documentation, "histogram")
    elif family.name.endswith("_total"):
        metric = Metric(family.name.removesuffix("_total"), documentation, "counter")
    else:
        metric = PlainCounter(family.name, documentation)
    for labels, value in family.series.items():
        _add_figure(metric, family.name, dict(labels), value)
    return metric


def _add_figure(metric: Metric, name: str, labels: dict[str, str], value: float | Histogram) -> None:
    if not isinstance(value, Histogram):
        metric.add_sample(name, labels, value)
        return
    for bound, count in value.buckets():
        metric.add_sample(f"{name}_bucket", {**labels, "le": bound}, count)
    if value.total >= 0:  # what falls would be taken for a counter that began anew; and neither is there alone
        metric.add_sample(f"{name}_count", labels, sum(value.counts))
        metric.add_sample(f"{name}_sum", labels, value.total)
