"""What handlers measure, before it leaves the worker: kinds, dimensions, declarations and bounds."""

from __future__ import annotations

import pytest

from torchmgmt.handlers import recorder as recorders
from torchmgmt.handlers.metric_types import (
    Dimension,
    MetricsCacheKeyError,
    MetricsCacheTypeError,
    MetricsCacheValueError,
    MetricTypes,
    Units,
)
from torchmgmt.handlers.metrics import Metrics
from torchmgmt.handlers.metrics_store import Metric, MetricsStore, emit_metrics
from torchmgmt.handlers.recorder import MAX_DIMENSIONS, MAX_OBSERVATIONS, MAX_SERIES, MAX_TEXT, Recorder
from torchmgmt.records import MetricKind, RawMetric


def taken(metrics: Metrics) -> list[RawMetric]:
    return list(metrics.recorder.take())


def test_counters_add_up_gauges_keep_the_last_and_histograms_all() -> None:
    """Between two takings; afterwards all begins anew."""
    recorder = Recorder()
    for value in (1.0, 2.0):
        recorder.record("c", MetricKind.COUNTER, "Count", value)
        recorder.record("g", MetricKind.GAUGE, "Count", value)
        recorder.record("h", MetricKind.HISTOGRAM, "Count", value)
    assert [(name, value) for name, _, _, value, _ in recorder.take()] == [("c", 3), ("g", 2), ("h", 1), ("h", 2)]
    assert not recorder.take()
    recorder.record("c", MetricKind.COUNTER, "Count", 5)
    assert [value for _, _, _, value, _ in recorder.take()] == [5]


def test_what_goes_beyond_the_bounds_is_left_out_with_one_warning_each(caplog: pytest.LogCaptureFixture) -> None:
    """Names, dimensions, texts and observations without end are; what was there before is still recorded."""
    recorder = Recorder()
    for number in range(2 * MAX_SERIES):
        recorder.record(f"name{number}", MetricKind.COUNTER, "Count", 1)
    recorder.record("x" * (MAX_TEXT + 1), MetricKind.COUNTER, "Count", 1)
    recorder.record("a", MetricKind.COUNTER, "Count", 1, (("d", "x" * (MAX_TEXT + 1)),))
    many = tuple((str(number), "") for number in range(MAX_DIMENSIONS + 1))
    recorder.record("a", MetricKind.COUNTER, "Count", 1, many)
    recorder.record("name5", MetricKind.COUNTER, "Count", 1)
    found = {name: value for name, _, _, value, _ in recorder.take()}
    assert len(found) == MAX_SERIES
    assert found["name5"] == 2
    recorder = Recorder()
    for number in range(2 * MAX_OBSERVATIONS):
        recorder.record("h", MetricKind.HISTOGRAM, "Count", number)
    assert len(recorder.take()) == MAX_OBSERVATIONS
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 4
    beyond = (f"{MAX_SERIES} different", f"{MAX_TEXT} characters", f"{MAX_DIMENSIONS} dim", f"{MAX_OBSERVATIONS} obs")
    for words in beyond:
        assert sum(words in text for text in texts) == 1


def test_endless_names_do_not_fill_the_cache_of_metrics() -> None:
    """Neither those that are recorded nor those that are declared; what is declared beyond can be used all the same."""
    metrics = Metrics("m")
    for number in range(2 * MAX_SERIES):
        metrics.add_counter(f"c{number}", 1)
        metrics.add_metric_to_cache(f"d{number}", "count").add_or_update(1)
    assert len(metrics.cache_keys()) == MAX_SERIES


def test_while_muted_nothing_is_recorded() -> None:
    """As for a warm-up."""
    recorder = Recorder()
    with recorder.muted():
        recorder.record("c", MetricKind.COUNTER, "Count", 1)
    assert not recorder.take()


def test_units_have_their_long_names() -> None:
    """As TorchServe calls them; any other text is a unit of its own."""
    metrics = Metrics("m")
    for unit in ("ms", "s", "us"):
        metrics.add_time(unit, 1, unit=unit)
    for unit in ("B", "kB", "MB", "GB"):
        metrics.add_size(unit, 1, unit=unit)
    metrics.add_metric("own", 1, "furlongs")
    names = {name: unit for name, _, unit, _, _ in taken(metrics)}
    assert names.pop("own") == "furlongs"
    assert names == {name: Units().units[name] for name in names}
    with pytest.raises(ValueError, match="unit is 'h', but must be one of ms, s, us"):
        metrics.add_time("t", 1, unit="h")
    with pytest.raises(MetricsCacheValueError, match="unit is 'TB'"):
        metrics.add_size("t", 1, unit="TB")


def test_dimensions_belong_to_the_metric(caplog: pytest.LogCaptureFixture) -> None:
    """Those of the first figure hold for the others; a declared metric has those that were declared, in any order."""
    metrics = Metrics("m")
    metrics.add_counter("c", 1, dimensions=[Dimension("A", 1)])
    metrics.add_counter("c", 1, dimensions=[Dimension("B", 1)])
    metrics.add_metric_to_cache("d", "count", ["B", "A"])
    metrics.add_counter("d", 2, dimensions=[Dimension("A", 1), Dimension("B", 2)])
    metrics.add_counter("d", 2, dimensions=[Dimension("A", 1)])
    metrics.add_counter("d", 2, dimensions=[Dimension("A", 1), Dimension("B", 2), Dimension("C", 3)])
    assert [(name, value, dict(dimensions)) for name, _, _, value, dimensions in taken(metrics)] == [
        ("c", 1, {"A": "1", "ModelName": "m", "Level": "Model"}),
        ("d", 2, {"B": "2", "A": "1"}),
    ]
    assert len([record for record in caplog.records if "is left out" in record.getMessage()]) == 3
    with pytest.raises(ValueError, match=r"list of Dimension\(name, value\)"):
        metrics.add_counter("c", 1, dimensions=["A:1"])  # type: ignore[list-item]


@pytest.mark.parametrize("value", ["many", None, -1, object()])
def test_a_figure_that_is_none_is_logged_and_left_out(value: object, caplog: pytest.LogCaptureFixture) -> None:
    """A request does not fail because something could not be counted."""
    metrics = Metrics("m")
    metrics.add_counter("c", value)  # type: ignore[arg-type]
    assert taken(metrics) == []
    assert "is left out with the value" in caplog.text


def test_a_metric_is_found_by_name_and_kind() -> None:
    """One that is not there is an error that lists what is."""
    metrics = Metrics("m")
    made = metrics.add_metric_to_cache("a", "ms", ["D"], MetricTypes.GAUGE)
    assert metrics.get_metric("a", MetricTypes.GAUGE) is made
    with pytest.raises(MetricsCacheKeyError, match="There is no counter 'a'; there are: none"):
        metrics.get_metric("a")
    with pytest.raises(KeyError, match="HandlerTime, PredictionTime, a"):
        metrics.get_metric("b", MetricTypes.GAUGE)
    with pytest.raises(MetricsCacheTypeError, match="metric_type must be a"):
        metrics.get_metric("a", "gauge")  # type: ignore[arg-type]
    with pytest.raises(MetricsCacheTypeError, match="dimension_names must be a list or tuple"):
        metrics.add_metric_to_cache("a", "ms", "D")


def test_the_store_tells_what_it_holds_when_it_is_emitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As TorchServe's: the first figure waits for emit_metrics, another one of the same metric is recorded at once."""
    recorder = Recorder()
    monkeypatch.setattr(recorders, "_current", recorder)
    store = MetricsStore({0: "id"}, "m")
    store.add_time("t", 1.5)
    assert not recorder.take()
    emit_metrics(store.store)
    store.add_time("t", 2.5)
    assert [value for _, _, _, value, _ in recorder.take()] == [2.5]
    (metric,) = store.store
    assert str(metric).startswith("t.Milliseconds:1.5|#ModelName:m,Level:Model|#hostname:")
    assert str(metric).endswith(",id")
    assert metric.to_dict()["MetricName"] == "t"
    Metric("r", 1, "count", []).reset()
    assert [(name, value) for name, _, _, value, _ in recorder.take()] == [("r", 0)]
