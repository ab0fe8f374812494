"""Metrics: listens to a manager, and tells Prometheus what it has heard."""

from __future__ import annotations

import logging
import socket
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from torchmgmt import VersionState
from torchmgmt.checks import check_number
from torchmgmt.errors import ManagerClosed, ModelNotFound
from torchmgmt.events import (
    BatchFinished,
    Event,
    HandlerMetrics,
    ModelRegistered,
    RequestsDropped,
    VersionStateChanged,
    WorkerReady,
    WorkerStopped,
)
from torchmgmt.metrics import torchserve
from torchmgmt.metrics.families import PlainCounter, families_of_figures, families_of_infos, family_of_handlers
from torchmgmt.metrics.figures import Figures, VersionFigures
from torchmgmt.metrics.host import HostLoad
from torchmgmt.metrics.names import text
from torchmgmt.metrics.recorded import Family, Recorded
from torchmgmt.records import MetricKind, ModelInfo, ModelKey

if TYPE_CHECKING:
    from torchmgmt import ModelManager

__all__ = ["Metrics", "Page"]

log = logging.getLogger(__name__)

MOST_VERSIONS = 200
MOST_RECORDED_OF_ONE = 1000
MOST_RECORDED = 10_000


class Metrics:
    """The metrics of one manager, for Prometheus.

    >>> from torchmgmt import ModelManager
    >>> with ModelManager() as manager, Metrics(manager) as metrics:
    ...     "torchmgmt_requests" in metrics.page().decode()
    True

    Making one has the manager tell it what happens from then on; :meth:`close`, or leaving ``with``, ends that. It keeps
    no manager alive and starts nothing. Thread-safe; nothing blocks. A request costs it about a microsecond.

    Args:
        manager: whose metrics.
        registry: where to register them, beside what the program has there itself, such as
            ``prometheus_client.REGISTRY``. None: a registry of their own, which has the process's figures, too.
        max_versions: so many model versions have labels of their own, at least 1; further ones are counted together,
            under the model ``other`` with the version ``other``.
        with_host: whether the machine's processor, memory and disk are measured, too.

    Raises:
        InvalidArgument: ``max_versions`` is no whole number of at least 1.
    """

    def __init__(
        self,
        manager: ModelManager,
        *,
        registry: CollectorRegistry | None = None,
        max_versions: int = MOST_VERSIONS,
        with_host: bool = True,
    ) -> None:
        check_number("max_versions", max_versions, minimum=1)
        self._manager = weakref.ref(manager)  # the manager keeps this object: it is one of its listeners
        self._host_name = text(socket.gethostname())
        self._host = HostLoad() if with_host else None
        self._figures = Figures(max_versions)
        self._recorded = Recorded(
            torchserve.NAMES, (MOST_RECORDED_OF_ONE, MOST_RECORDED), {"Hostname": self._host_name}
        )
        for name in torchserve.HANDLER_GAUGES:
            self._recorded.fix(name, MetricKind.GAUGE, "Milliseconds")
        self._codes: dict[int, int] = {}  # guarded by _lock
        self._lock = threading.Lock()
        self._on: dict[type[Any], Callable[[Any], object]] = {
            BatchFinished: self._figures.add_batch,
            **dict.fromkeys((RequestsDropped, WorkerReady, WorkerStopped), self._figures.add),
            HandlerMetrics: self._recorded.add,
            ModelRegistered: lambda event: self._add_version(event.key),
            VersionStateChanged: self._on_state,
        }
        self._collector: _Collector | None = _Collector(self)
        self.registry = CollectorRegistry() if registry is None else registry
        """Where they are registered."""
        if registry is None:
            ProcessCollector(registry=self.registry)
        self.registry.register(self._collector)
        manager.add_listener(self._listen)
        for info in self._infos():
            self._add_version(info.spec.key)

    def __repr__(self) -> str:
        return f"<Metrics of {self._manager()!r}>"

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Count nothing more, and leave the registry. Idempotent."""
        with self._lock:
            collector, self._collector = self._collector, None
        if collector is None:
            return
        self.registry.unregister(collector)
        manager = self._manager()
        if manager is not None:
            manager.remove_listener(self._listen)

    def count_response(self, code: int) -> None:
        """Count an answer that was given over HTTP, whatever it was to. To be called by whoever serves it."""
        with self._lock:
            self._codes[code] = self._codes.get(code, 0) + 1

    def page(self, names: Collection[str] = (), accept: str = "") -> bytes:
        """Return all metrics, or those of these ``names``, as Prometheus reads them; see :class:`Page`."""
        return b"".join(Page(accept).parts(self.registry, names))

    def collect(self) -> Iterator[Metric]:
        """Yield our own metrics, as prometheus_client has them."""
        versions = list(self._figures.copies())
        yield from families_of_infos(self._infos(), self._figures.named)
        yield from families_of_figures(versions)
        yield from torchserve.inference_families(versions, self._host_name)
        yield from self._http_families()
        yield from self._recorded_families(versions)
        if self._host is not None:
            yield from torchserve.host_families(self._host.figures(), self._host_name)

    def _http_families(self) -> Iterator[Metric]:
        with self._lock:
            codes = self._codes.copy()
        responses = CounterMetricFamily("torchmgmt_http_responses", "Answers over HTTP.", labels=("code",))
        for code, count in sorted(codes.items()):
            responses.add_metric([str(code)], count)
        yield responses
        yield from torchserve.response_families(codes, self._host_name)

    def _recorded_families(self, versions: list[VersionFigures]) -> Iterator[Metric]:
        families = self._recorded.families()
        times = torchserve.handler_times(versions, self._host_name)
        for name in torchserve.HANDLER_GAUGES:
            family = families.setdefault(name, Family(name, MetricKind.GAUGE, "Milliseconds"))
            family.series = {**times, **family.series}
        for family in families.values():
            yield family_of_handlers(family)
        yield CounterMetricFamily(
            "torchmgmt_handler_metrics_left_out",
            "Figures of handlers that had no place here: too many, or of a name that is in use.",
            value=self._recorded.left_out,
        )

    def _infos(self) -> list[ModelInfo]:
        manager = self._manager()
        infos: list[ModelInfo] = []
        if manager is None:
            return infos
        try:
            for model in manager.models():
                try:
                    infos += manager.versions(model.name)
                except ModelNotFound:
                    log.debug("%s was unregistered since it was listed", model.name)
        except ManagerClosed:
            return []
        return infos

    def _listen(self, event: Event) -> None:
        do = self._on.get(type(event))
        if do is not None:
            do(event)

    def _on_state(self, event: VersionStateChanged) -> None:
        if event.after is VersionState.GONE:  # and not at once when it is unregistered: then it still answers some
            self._figures.remove_version(event.key)
            self._recorded.remove_version(event.key)
        else:
            self._add_version(event.key)

    def _add_version(self, key: ModelKey) -> None:
        if self._figures.add_version(key):
            self._recorded.add_version(key)


class _Collector(Collector):
    """Stands for a Metrics object in a registry, and does not keep it alive."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = weakref.ref(metrics)

    def describe(self) -> list[Metric]:
        """Return nothing: names come and go."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        metrics = self._metrics()
        if metrics is not None:
            yield from metrics.collect()


class Page:
    """The form in which a client wants metrics: Prometheus' text, or OpenMetrics where its header ``Accept`` says so."""

    def __init__(self, accept: str = "") -> None:
        try:
            self._encode, self.content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # of a version that is no number
            self._encode, self.content_type = choose_encoder("")
        self._is_open = self.content_type.startswith("application/openmetrics-text")

    def parts(self, registry: Collector, names: Collection[str] = ()) -> Iterator[bytes]:
        """Yield the page metric by metric, so that an event loop can do something else in between.

        ``names``: of metrics, or of single samples; of one that there is not nothing is shown. Empty: all.
        """
        for metric in registry.collect():
            for shown in _restricted(metric, names) if names else [metric]:
                yield self._part(shown)
        if self._is_open:
            yield b"# EOF\n"

    def _part(self, metric: Metric) -> bytes:
        part = self._encode(_Just(metric))
        if self._is_open:
            return part.removesuffix(b"# EOF\n")
        if isinstance(metric, PlainCounter):
            return part.replace(b" untyped\n", b" counter\n", 1)
        return part


class _Just(Collector):
    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> list[Metric]:
        return [self._metric]


def _restricted(metric: Metric, names: Collection[str]) -> list[Metric]:
    """Return ``metric`` if it is named; else those of its samples that are, each name as a metric of no known kind."""
    if metric.name in names or f"{metric.name}_total" in names:
        return [metric]
    found: dict[str, Metric] = {}
    for sample in metric.samples:
        if sample.name in names:
            alone = found.setdefault(sample.name, Metric(sample.name, metric.documentation, "unknown"))
            alone.samples.append(sample)
    return list(found.values())
