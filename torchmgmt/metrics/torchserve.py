"""The same figures under the names and labels that TorchServe gives them, for dashboards that know those.

See its ``ts/configs/metrics.yaml``. Different from there: ``model_version`` is the version that ran a request even if the
request named none, and figures of models have the label ``ModelVersion``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from torchmgmt.metrics.families import PlainCounter
from torchmgmt.metrics.figures import VersionFigures
from torchmgmt.metrics.names import text
from torchmgmt.metrics.recorded import Labels

__all__ = ["HANDLER_GAUGES", "NAMES", "handler_times", "host_families", "inference_families", "response_families"]

HANDLER_GAUGES = ("HandlerTime", "PredictionTime")
"""What handlers may record themselves; where they do not, a worker's time for a batch stands for it."""
NAMES = (
    *("Requests2XX", "Requests4XX", "Requests5XX"),
    *("ts_inference_requests", "ts_inference_requests_total"),
    *("ts_inference_latency_microseconds", "ts_queue_latency_microseconds"),
    *("QueueTime", "WorkerThreadTime", "WorkerLoadTime"),
    *("CPUUtilization", "MemoryUsed", "MemoryAvailable", "MemoryUtilization"),
    *("DiskUsage", "DiskUtilization", "DiskAvailable"),
)
"""All others: no handler may have them."""

_OF_HOST = ("Level", "Hostname")
_OF_VERSION = ("model_name", "model_version", "hostname")


def response_families(codes: Mapping[int, int], host: str) -> Iterator[Metric]:
    """Yield how many answers were given over HTTP, by the first digit of their codes."""
    for digit in (2, 4, 5):
        metric = PlainCounter(f"Requests{digit}XX", f"Answers over HTTP with the codes {digit}00 to {digit}99.")
        count = sum(count for code, count in codes.items() if code // 100 == digit)
        metric.add_sample(metric.name, {"Level": "Host", "Hostname": host}, count)
        yield metric


def inference_families(versions: Sequence[VersionFigures], host: str) -> Iterator[Metric]:
    """Yield what TorchServe counts of predictions and of workers."""
    requests = CounterMetricFamily("ts_inference_requests", "Requests that have ended.", labels=_OF_VERSION)
    latency = PlainCounter("ts_inference_latency_microseconds", "The time of all requests together.")
    queue = PlainCounter("ts_queue_latency_microseconds", "The time that all requests have waited together.")
    load = GaugeMetricFamily(
        "WorkerLoadTime", "How long a worker took to be ready, in ms.", labels=("WorkerName", *_OF_HOST)
    )
    for each in versions:
        name, version = text(each.key.name), text(each.key.version)
        labels = dict(zip(_OF_VERSION, (name, version, host), strict=True))
        requests.add_metric([name, version, host], each.requests)
        latency.add_sample(latency.name, labels, each.latency.total * 1e6)
        queue.add_sample(queue.name, labels, each.queue.total * 1e6)
        for worker, seconds in each.worker_load.items():
            load.add_metric([f"W-{worker}-{name}_{version}", "Host", host], seconds * 1e3)
    yield from (requests, latency, queue, load)
    yield from _last_batch(versions, host)


def _last_batch(versions: Sequence[VersionFigures], host: str) -> Iterator[Metric]:
    waited = GaugeMetricFamily("QueueTime", "How long the last batch has waited, in ms.", labels=_OF_HOST)
    thread = GaugeMetricFamily(
        "WorkerThreadTime", "What the last batch took beside its worker's own time, in ms.", labels=_OF_HOST
    )
    last = max(versions, key=lambda each: each.last_ended, default=None)
    if last is not None and last.last_ended:
        waited.add_metric(["Host", host], last.last_queue * 1e3)
        thread.add_metric(["Host", host], max(0.0, last.last_run - last.last_handler) * 1e3)
    yield from (waited, thread)


def handler_times(versions: Sequence[VersionFigures], host: str) -> dict[Labels, float]:
    """Return a worker's time for the last batch of each version, in ms, by the labels of :data:`HANDLER_GAUGES`."""
    return {
        (
            ("Hostname", host),
            ("Level", "Model"),
            ("ModelName", text(each.key.name)),
            ("ModelVersion", text(each.key.version)),
        ): each.last_handler * 1e3
        for each in versions
        if each.last_ended
    }


def host_families(figures: Mapping[str, tuple[str, float]], host: str) -> Iterator[Metric]:
    """Yield how busy this machine is."""
    for name, (documentation, value) in figures.items():
        gauge = GaugeMetricFamily(name, documentation, labels=_OF_HOST)
        gauge.add_metric(["Host", host], value)
        yield gauge
