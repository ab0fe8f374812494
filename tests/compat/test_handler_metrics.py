"""What handlers measure and what they set beside an answer reach the program that embeds torchmgmt."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.compat.real import Packer
from tests.handlers import ECHO, EVAL, PATIENCE_S, Deployer, write_folder
from torchmgmt import ModelManager, ProcessBackend
from torchmgmt.errors import WorkerStartFailed
from torchmgmt.events import Event, HandlerMetrics
from torchmgmt.records import MetricKind, MetricRecord


@attrs.define
class Listener:
    """Keeps what handlers measured, and lets a test wait for it."""

    records: list[tuple[str, MetricRecord]] = attrs.field(factory=list)
    changed: threading.Condition = attrs.field(factory=threading.Condition)

    def __call__(self, event: Event) -> None:
        if isinstance(event, HandlerMetrics):
            with self.changed:
                self.records += [(event.worker_id, record) for record in event.records]
                self.changed.notify_all()

    def wait_for(self, name: str, count: int = 1) -> list[MetricRecord]:
        def found() -> list[MetricRecord]:
            return [record for _, record in self.records if record.name == name]

        with self.changed:
            assert self.changed.wait_for(lambda: len(found()) >= count, PATIENCE_S), self.records
            return found()


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def manager(backend: ProcessBackend, listener: Listener) -> Iterator[ModelManager]:
    """A manager that tells a listener of its events."""
    with ModelManager(backend=backend, listeners=[listener]) as manager:
        yield manager


# In the styles of handlers in the field: the context's methods, metrics declared in initialize and in metrics.yaml, objects
# made without the context, and the store of the first releases.
HANDLER = """
from ts.metrics.caching_metric import CachingMetric
from ts.metrics.dimension import Dimension
from ts.metrics.metric_type_enum import MetricTypes
from ts.metrics.metrics_store import MetricsStore
from ts.service import emit_metrics
from ts.torch_handler.base_handler import BaseHandler

OWN = CachingMetric("Own", "MB", ["Part"], MetricTypes.HISTOGRAM)

class Handler(BaseHandler):
    def initialize(self, context):
        self.context = context
        self.calls = context.metrics.add_metric_to_cache("Calls", "count", ["ModelName"], MetricTypes.COUNTER)
        context.metrics.add_time("LoadTime", 2, unit="s")
        self.initialized = True

    def preprocess(self, data):
        metrics = self.context.metrics
        metrics.add_counter("Rows", len(data), dimensions=[Dimension("Kind", "text")])
        metrics.add_counter("Rows", 1, 0, [Dimension("Kind", "text")])
        metrics.add_size("Size", 3, None, "kB")
        metrics.add_percent("Share", 50)
        metrics.add_error("Trouble", "it broke")
        metrics.add_metric("Any", value=1.5, unit="", metric_type=MetricTypes.GAUGE)
        self.calls.add_or_update(1, ["m"])
        metrics.get_metric("FromYaml", MetricTypes.HISTOGRAM).add_or_update(7, ["x"])
        OWN.add_or_update(1, ["a"])
        OWN.add_or_update(2, ["a"])
        store = MetricsStore(self.context.request_ids, "m")
        store.add_counter("Stored", 4)
        emit_metrics(store.store)
        metrics.add_counter("Rows", -1)
        self.calls.add_or_update(1, ["too", "many"])
        return data

    def inference(self, data):
        return data

    def postprocess(self, data):
        return [row["body"] for row in data]
"""
METRICS_YAML = """
dimensions:
  - &model_name "ModelName"
ts_metrics:
  counter:
    - {name: Requests2XX, unit: Count, dimensions: [Level, Hostname]}
model_metrics:
  histogram:
    - {name: FromYaml, unit: ms, dimensions: [*model_name]}
"""


def test_what_a_handler_measures_arrives_as_an_event(tmp_path: Path, manager: ModelManager, listener: Listener) -> None:
    """Every way to record arrives with name, kind, unit, figure and dimensions; a counter's figures are added up."""
    (tmp_path / "store").mkdir()
    packer = Packer(tmp_path, tmp_path / "store")
    archive = packer.pack("m", HANDLER, None, files={"metrics.yaml": METRICS_YAML})
    served = manager.register(archive, model_name="m")
    assert served.predict("x") == "x"
    (handler_time,) = listener.wait_for("HandlerTime")
    assert handler_time.value >= 0
    both = {"ModelName": "m", "Level": "Model"}
    kinds = MetricKind
    assert listener.wait_for("LoadTime") == [MetricRecord("LoadTime", kinds.GAUGE, "Seconds", 2, both)]
    assert listener.wait_for("Rows") == [MetricRecord("Rows", kinds.COUNTER, "Count", 2, {"Kind": "text"} | both)]
    assert listener.wait_for("Size") == [MetricRecord("Size", kinds.GAUGE, "Kilobytes", 3, both)]
    assert listener.wait_for("Share") == [MetricRecord("Share", kinds.GAUGE, "Percent", 50, both)]
    assert listener.wait_for("Trouble") == [MetricRecord("Trouble", kinds.COUNTER, "unit", 1, {"Level": "Error"})]
    assert listener.wait_for("Any") == [MetricRecord("Any", kinds.GAUGE, "unit", 1.5, both)]
    assert listener.wait_for("Calls") == [MetricRecord("Calls", kinds.COUNTER, "Count", 1, {"ModelName": "m"})]
    assert listener.wait_for("FromYaml") == [
        MetricRecord("FromYaml", kinds.HISTOGRAM, "Milliseconds", 7, {"ModelName": "x"})
    ]
    own = [MetricRecord("Own", kinds.HISTOGRAM, "Megabytes", value, {"Part": "a"}) for value in (1, 2)]
    assert listener.wait_for("Own", 2) == own
    assert listener.wait_for("Stored") == [MetricRecord("Stored", kinds.COUNTER, "Count", 4, both)]
    assert {worker for worker, _ in listener.records} == {served.describe().workers[0].id}


@pytest.mark.parametrize("backend_name", ["process", "thread"])
def test_metrics_come_from_every_worker_and_only_where_some_were_recorded(
    deploy: Deployer, listener: Listener, backend_name: str
) -> None:
    """Each batch's figures come once; a handler that records nothing sends nothing."""
    silent = deploy(ECHO, model_name="silent", backend=backend_name)
    source = (
        "def handle(data, context):\n    context.metrics.add_counter('Seen', len(data or 'load'))\n    return data\n"
    )
    served = deploy(source, backend=backend_name)
    for number in range(3):
        silent.predict(number)
        served.predict(number)
    assert sum(record.value for record in listener.wait_for("Seen", 4)) == 4 + 3
    assert {record.name for _, record in listener.records} == {"Seen"}


def test_endless_dimensions_are_bounded(deploy: Deployer, listener: Listener) -> None:
    """A handler that makes up a dimension for each request grows nobody's memory; the worker warns once."""
    source = """
from ts.metrics.dimension import Dimension
def handle(data, context):
    for number in range(data and data[0]["body"] or 0):
        context.metrics.add_counter(f"Name{number % 7}", 1, dimensions=[Dimension("Request", number)])
    context.metrics.add_counter("Last", 1)
    return data and [len(context.metrics.cache_keys())]
"""
    served = deploy(source)
    assert served.predict(5000) < 20
    listener.wait_for("Last")
    served.predict(5000)
    listener.wait_for("Last", 2)
    assert len({(record.name, *record.dimensions.items()) for _, record in listener.records}) == 1000


@pytest.mark.parametrize(
    "content, says",
    [
        ("a: [", "metrics.yaml is not YAML"),
        ("model_metrics:\n  meter:\n    - {name: a, unit: b}", "kind 'meter'"),
        ("model_metrics:\n  gauge:\n    - {name: a}", "name and unit"),
    ],
)
def test_metrics_that_are_declared_wrongly_fail_the_start(
    manager: ModelManager, tmp_path: Path, content: str, says: str
) -> None:
    """The error says what is wrong."""
    folder = write_folder(tmp_path / "m", ECHO)
    (folder / "metrics.yaml").write_text(content)
    with pytest.raises(WorkerStartFailed) as caught:
        manager.register(folder, model_name="m", handler="handler.py")
    assert says in caught.value.reason


@pytest.mark.parametrize("backend_name", ["process", "thread"])
def test_what_is_set_beside_an_answer_comes_with_it(deploy: Deployer, backend_name: str) -> None:
    """Status, phrase, headers and content type go with the one answer of the batch; Python callers get the plain answer."""
    source = """
def handle(data, context):
    for index, row in enumerate(data or ()):
        if row["body"] == "set":
            context.set_response_status(code=201, phrase="Made", idx=index)
            context.set_response_content_type(index, "text/plain")
            context.set_response_header(index, "x-size", 5)
        elif row["body"] == "direct":
            context.request_processor[index].report_status(404)
            context.request_processor[index].get_response_headers()["X-Other"] = "1"
        elif row["body"] == "wrong":
            context.set_response_status(code="many", idx=index)
    return data and [row["body"] for row in data]
"""
    served = deploy(source, batch_size=3, max_batch_delay=500, backend=backend_name)
    plain, made, direct = (served.submit(body) for body in ("plain", "set", "direct"))
    assert [future.result(20) for future in (plain, made, direct)] == ["plain", "set", "direct"]
    assert plain.response_properties(0) is None
    properties = made.response_properties(0)
    assert properties is not None
    assert (properties.status, properties.phrase, properties.content_type) == (201, "Made", "text/plain")
    assert properties.headers == {"content-type": "text/plain", "x-size": "5"}
    properties = direct.response_properties(0)
    assert properties is not None
    assert (properties.status, dict(properties.headers)) == (404, {"X-Other": "1"})
    error: Any = served.submit("wrong").exception(20)
    assert "the status of an answer must be a number, not 'many'" in error.reason


def test_a_batch_does_not_inherit_from_the_one_before(deploy: Deployer) -> None:
    """What one handler call sets is gone with its batch."""
    served = deploy(EVAL)
    made = served.submit("context.set_response_header(0, 'x', '1')")
    made.result(20)
    assert made.response_properties() is not None
    later = served.submit("context.get_response_headers(0)")
    assert later.result(20) == {}
    assert later.response_properties() is None


def test_the_sequence_of_a_request_is_in_its_headers(deploy: Deployer) -> None:
    """By TorchServe's name for it, in any case."""
    served = deploy(EVAL)
    assert served.predict("context.get_sequence_id(0)", headers={"TS_Request_Sequence_Id": "7"}) == "7"
    assert served.predict("context.get_sequence_id(0)") is None


def test_an_answer_in_parts_is_sent_by_the_names_of_torchserve(deploy: Deployer) -> None:
    """Both names are one function, whose parts callers get before what the handler returns."""
    source = """
from ts.handler_utils.utils import send_intermediate_predict_response
from ts.protocol.otf_message_handler import send_intermediate_predict_response as old
def handle(data, context):
    if data:
        assert old is send_intermediate_predict_response
        send_intermediate_predict_response(["a"], context.request_ids, "Intermediate", 200, context)
    return data and [row["body"] for row in data]
"""
    model = deploy(source)
    assert list(model.stream("x")) == ["a", "x"]
    assert model.predict("x") == ["a", "x"]
