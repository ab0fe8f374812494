"""What metrics are made of: histograms, names, and what handlers record, whatever they make up."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import prometheus_client
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pages import read, samples_of
from torchmgmt import VersionState
from torchmgmt.errors import InvalidArgument
from torchmgmt.events import BatchFinished, HandlerMetrics, ModelRegistered, RequestsDropped, VersionStateChanged
from torchmgmt.exchange import WorkerRequest
from torchmgmt.metrics import Metrics
from torchmgmt.metrics.histogram import SECONDS_BOUNDS, Histogram
from torchmgmt.metrics.host import HostLoad
from torchmgmt.metrics.names import legal_labels, legal_name
from torchmgmt.records import MetricKind, MetricRecord, ModelKey

M = ModelKey("m", "1.0")
OTHER = {"model": "other", "version": "other"}


class FakeManager:
    """A manager that has no models, but listeners."""

    def __init__(self) -> None:
        self.listeners = []

    def add_listener(self, listener) -> None:
        self.listeners.append(listener)

    def remove_listener(self, listener) -> None:
        self.listeners.remove(listener)

    def models(self) -> tuple[()]:
        return ()

    def tell(self, *events) -> None:
        for event in events:
            for listener in self.listeners:
                listener(event)


@pytest.fixture
def manager() -> FakeManager:
    return FakeManager()


@pytest.fixture
def metrics(manager) -> Metrics:
    metrics = Metrics(manager, with_host=False)
    manager.tell(ModelRegistered(M))
    return metrics


def batch(key: ModelKey = M, waits=(0.5,), run_s: float = 0.25, **more) -> BatchFinished:
    """A batch that began at 100 s, of requests that had waited so long."""
    requests = [WorkerRequest(None, "") for _ in waits]
    return BatchFinished(key, "9000", requests, [100 - wait for wait in waits], 100, 100 + run_s, 0.2, **more)


def recorded(*records: tuple, key: ModelKey = M) -> HandlerMetrics:
    return HandlerMetrics(key, "9000", [MetricRecord(name, kind, "u", *more) for name, kind, *more in records])


@given(st.lists(st.floats(min_value=-1, max_value=1e6) | st.sampled_from(SECONDS_BOUNDS)))
def test_a_histogram_counts_as_that_of_prometheus_client(values):
    """Also at the bounds themselves, which belong to the bucket below."""
    ours = Histogram(SECONDS_BOUNDS)
    theirs = prometheus_client.Histogram("h", "", buckets=SECONDS_BOUNDS, registry=None)
    for value in values:
        ours.observe(value)
        theirs.observe(value)
    samples = next(iter(theirs.collect())).samples
    assert [count for _, count in ours.buckets()] == [each.value for each in samples if each.name == "h_bucket"]
    assert [float(bound) for bound, _ in ours.buckets()] == [
        float(each.labels["le"]) for each in samples if each.name == "h_bucket"
    ]
    assert ours.total == pytest.approx(next(each.value for each in samples if each.name == "h_sum"))


@given(st.text())
def test_every_text_becomes_a_legal_name(name):
    """As Prometheus has it; what is legal stays as it is."""
    prometheus_client.core.GaugeMetricFamily(legal_name(name), "", labels=[legal_name(name)])
    assert legal_name(legal_name(name)) == legal_name(name)


@given(st.dictionaries(st.text(), st.text()))
def test_labels_are_legal_and_none_is_lost(dimensions):
    """Names that become the same are told apart."""
    labels = legal_labels(dimensions)
    assert len(labels) == len(dimensions)
    prometheus_client.core.GaugeMetricFamily("g", "", labels=list(labels))
    assert not {"le", "quantile"} & set(labels)


NAMES = st.sampled_from(["a", "a_count", "a_bucket", "a_total", "a-b", "torchmgmt_requests", "HandlerTime", "a_gauge"])
FIGURES = st.tuples(
    NAMES | st.text(max_size=5),
    st.sampled_from(MetricKind),
    st.floats(allow_nan=True) | st.integers(-3, 3).map(float),
    st.dictionaries(
        st.sampled_from(["le", "a", "a-", "ModelName", "__name__"]) | st.text(max_size=3), st.text(max_size=3)
    ),
)
KEYS = st.sampled_from([M, ModelKey("m", "2.0"), ModelKey('n"\n\\\udc80', "1.0")])


@settings(max_examples=30)
@given(st.lists(st.tuples(KEYS, FIGURES), max_size=20))
def test_no_handler_can_make_the_page_unreadable(figures):
    """Whatever names, kinds, labels and values several handlers make up: one kind for a name, each sample once."""
    manager = FakeManager()
    metrics = Metrics(manager, with_host=False)
    for key, figure in figures:
        manager.tell(ModelRegistered(key), recorded(figure, key=key))
    samples = samples_of(metrics)
    assert samples("torchmgmt_handler_metrics_left_out_total") is not None
    manager.tell(*(VersionStateChanged(key, VersionState.RETIRING, VersionState.GONE) for key, _ in figures))
    assert samples_of(metrics).names == samples_of(Metrics(FakeManager(), with_host=False)).names


def test_what_handlers_record_is_shown_by_version_and_host(manager, metrics):
    """A counter adds up, of a gauge the last counts, a histogram has buckets; names are as the handler wrote them."""
    manager.tell(recorded(("Rows", MetricKind.COUNTER, 2.0, {"Kind": "x"}), ("Load", MetricKind.GAUGE, 5.0, {})))
    manager.tell(recorded(("Rows", MetricKind.COUNTER, 3.0, {"Kind": "x"}), ("Load", MetricKind.GAUGE, 4.0, {})))
    manager.tell(recorded(("Size", MetricKind.HISTOGRAM, 7.0, {}), ("Size", MetricKind.HISTOGRAM, 0.1, {})))
    samples = samples_of(metrics)
    labels = {"ModelName": "m", "ModelVersion": "1.0"}
    assert samples("Rows", Kind="x", **labels) == 5
    assert samples("Load", **labels) == 4
    assert samples("Size_count", **labels) == 2
    assert samples("Size_bucket", le="1.0", **labels) == 1
    (of,) = samples.all("Rows")
    assert {name for name, _ in of} == {"Kind", "ModelName", "ModelVersion", "Hostname"}
    assert "# TYPE Rows counter\n" in metrics.page().decode()


def test_a_name_of_another_kind_is_shown_beside_it(manager, metrics, caplog):
    """Nothing is lost, one line in the log says so, and a name of ours stays ours."""
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            manager.tell(recorded(("A", MetricKind.COUNTER, 1.0, {}), ("A", MetricKind.GAUGE, 7.0, {})))
            manager.tell(recorded(("MemoryUsed", MetricKind.GAUGE, 3.0, {})))
    samples = samples_of(metrics)
    assert (samples("A"), samples("A_gauge"), samples("MemoryUsed_gauge")) == (2, 7, 3)
    assert len(caplog.records) == 2


def test_two_versions_with_equal_labels_are_one_sample(manager, metrics):
    """Where a handler says itself which version it is, and lies."""
    other = ModelKey("m", "2.0")
    manager.tell(ModelRegistered(other))
    for key in (M, other):
        figures = [("A", MetricKind.COUNTER, 1.0), ("H", MetricKind.HISTOGRAM, 1.0), ("G", MetricKind.GAUGE, 1.0)]
        manager.tell(recorded(*((*each, {"ModelVersion": "x"}) for each in figures), key=key))
    samples = samples_of(metrics)
    assert (samples("A"), samples("H_count"), samples("G")) == (2, 2, 1)


def test_endless_names_and_labels_of_handlers_are_left_out(manager, metrics, caplog):
    """And counted; what was there before goes on."""
    for number in range(1100):
        manager.tell(
            recorded(("A", MetricKind.COUNTER, 1.0, {"Id": str(number)}), (f"B{number}", MetricKind.GAUGE, 1.0, {}))
        )
    manager.tell(recorded(("A", MetricKind.COUNTER, 1.0, {"Id": "0"})))
    samples = samples_of(metrics)
    assert len(samples.all("A")) + sum(name.startswith("B") for name in samples.names) == 1000
    assert samples("torchmgmt_handler_metrics_left_out_total") == 1200
    assert samples("A", Id="0") == 2
    assert len([each for each in caplog.records if "too many" in each.message]) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_number_spoils_no_sum(manager, metrics, value):
    """NaN and infinity are left out where figures are added up."""
    for kind in (MetricKind.COUNTER, MetricKind.HISTOGRAM):
        manager.tell(recorded((kind.value, kind, 1.0, {}), (kind.value, kind, value, {})))
    samples = samples_of(metrics)
    assert (samples("counter"), samples("histogram_sum")) == (1, 1)


def test_what_a_handler_says_of_its_time_counts_before_what_the_worker_took(manager, metrics):
    """HandlerTime and PredictionTime are there for every version, as TorchServe's dashboards want them."""
    manager.tell(batch())
    assert samples_of(metrics)("HandlerTime", ModelName="m", Level="Model") == 200
    manager.tell(recorded(("HandlerTime", MetricKind.GAUGE, 150.0, {"ModelName": "m", "Level": "Model"})))
    samples = samples_of(metrics)
    assert (samples("HandlerTime"), samples("PredictionTime")) == (150, 200)


def test_a_batch_counts_each_of_its_requests(manager, metrics):
    """Queue time and latency one by one, size and handler's time once."""
    manager.tell(batch(waits=(0.5, 0.25, 0.0)))
    samples = samples_of(metrics)
    assert samples("torchmgmt_requests_total", model="m", version="1.0") == 3
    assert samples("torchmgmt_queue_seconds_sum") == pytest.approx(0.75)
    assert samples("torchmgmt_queue_seconds_bucket", le="0.25") == 2
    assert samples("torchmgmt_request_seconds_sum") == pytest.approx(1.5)
    assert samples("torchmgmt_batch_size_bucket", le="2.0") == 0
    assert samples("torchmgmt_batch_size_bucket", le="4.0") == 1
    assert samples("torchmgmt_handler_seconds_sum") == pytest.approx(0.2)
    assert samples("ts_inference_requests_total", model_name="m", model_version="1.0") == 3
    assert samples("ts_inference_latency_microseconds", model_name="m") == pytest.approx(1.5e6)
    assert samples("ts_queue_latency_microseconds", model_name="m") == pytest.approx(0.75e6)
    assert samples("QueueTime", Level="Host") == pytest.approx(500)
    assert samples("WorkerThreadTime", Level="Host") == pytest.approx(50)


def test_a_request_is_counted_once_however_it_ends(manager, metrics):
    """What was told of as dropped while it ran is not counted again with its batch."""
    manager.tell(RequestsDropped(M, "DeadlineExceeded"), RequestsDropped(M, "QueueFull", 4))
    manager.tell(batch(waits=(0, 0, 0), abandoned=[1], failed={2: "HandlerFailed"}))
    samples = samples_of(metrics)
    assert samples("torchmgmt_requests_total") == 7
    errors = {dict(of)["error"]: value for of, value in samples.all("torchmgmt_errors_total").items()}
    assert errors == {"DeadlineExceeded": 1, "QueueFull": 4, "HandlerFailed": 1}


def test_versions_beyond_the_limit_are_counted_together():
    """So labels are bounded; a model that is called as they are is one of them."""
    manager = FakeManager()
    metrics = Metrics(manager, max_versions=2, with_host=False)
    for number in range(5):
        key = ModelKey("m", str(number))
        manager.tell(ModelRegistered(key), batch(key), recorded(("A", MetricKind.GAUGE, 1.0, {}), key=key))
    manager.tell(ModelRegistered(ModelKey("other", "other")), batch(ModelKey("other", "other")))
    samples = samples_of(metrics)
    assert len(samples.all("torchmgmt_requests_total")) == 3
    assert samples("torchmgmt_requests_total", **OTHER) == 4
    assert samples("torchmgmt_handler_metrics_left_out_total") == 3
    manager.tell(VersionStateChanged(ModelKey("m", "0"), VersionState.RETIRING, VersionState.GONE))
    manager.tell(ModelRegistered(ModelKey("new", "1.0")), batch(ModelKey("new", "1.0")))
    assert samples_of(metrics)("torchmgmt_requests_total", model="new") == 1


def test_what_comes_after_the_end_of_a_version_leaves_nothing(manager, metrics):
    """Its labels are gone, and stay gone."""
    manager.tell(batch(), VersionStateChanged(M, VersionState.RETIRING, VersionState.GONE))
    manager.tell(batch(), RequestsDropped(M, "ManagerClosed"), recorded(("A", MetricKind.GAUGE, 1.0, {})))
    page = metrics.page().decode()
    assert 'model="m"' not in page
    assert 'ModelName="m"' not in page


def test_only_what_is_named_is_shown(metrics):
    """Metrics by the names of their families, or single samples by theirs; of others nothing."""
    assert samples_of(metrics, "torchmgmt_requests_total", "QueueTime").names == {"torchmgmt_requests_total"}
    assert samples_of(metrics, "torchmgmt_queue_seconds_count").names == {"torchmgmt_queue_seconds_count"}
    assert samples_of(metrics, "torchmgmt_queue_seconds").names == {
        f"torchmgmt_queue_seconds_{end}" for end in ("bucket", "count", "sum")
    }
    assert metrics.page(["nothing"]) == b""


@pytest.mark.parametrize("accept", ["application/openmetrics-text; version=x", "a/b;;q=,", "text/plain;version=9"])
def test_an_odd_accept_header_is_answered_in_the_usual_format(metrics, accept):
    """It is the client that chose it, but it asked for metrics."""
    assert read(metrics.page(accept=accept).decode())("torchmgmt_requests_total") == 0


def test_they_stand_beside_those_of_the_program(manager):
    """In a registry of the program's own; closing takes them out and ends the listening."""
    registry = prometheus_client.CollectorRegistry()
    prometheus_client.Counter("mine", "", registry=registry).inc()
    with Metrics(manager, registry=registry) as metrics:
        manager.tell(ModelRegistered(M), batch())
        page = read(prometheus_client.generate_latest(registry).decode())
        assert (page("mine_total"), page("torchmgmt_requests_total")) == (1, 1)
    metrics.close()
    assert manager.listeners == []
    assert "torchmgmt" not in prometheus_client.generate_latest(registry).decode()


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2"])
def test_a_wrong_number_of_versions_is_refused(manager, count):
    """With its name."""
    with pytest.raises(InvalidArgument, match="max_versions"):
        Metrics(manager, max_versions=count)


def test_the_processor_is_as_busy_as_it_was_since_the_last_look(monkeypatch):
    """In percent; idle and waiting for disks is not busy; without time in between, the last answer."""
    times = SimpleNamespace(user=100.0, system=0.0, idle=100.0, iowait=0.0)
    monkeypatch.setattr("psutil.cpu_times", lambda: times)
    load = HostLoad()
    times = SimpleNamespace(user=101.0, system=2.0, idle=104.0, iowait=5.0)
    assert load.figures()["CPUUtilization"][1] == pytest.approx(25)
    assert load.figures()["CPUUtilization"][1] == pytest.approx(25)
