"""OpenTelemetry: one span for each request, with its wait, its batch and its handler in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.handlers import Deployer, Gate, run_program, until
from torchmgmt import ModelManager, ProcessBackend, Settings
from torchmgmt.answer_future import AnswerFuture
from torchmgmt.channel import encode
from torchmgmt.errors import DeadlineExceeded, HandlerFailed, NoWorker, QueueFull, WorkerDied
from torchmgmt.exchange import WorkerRequest
from torchmgmt.records import ModelKey
from torchmgmt.tracing import tracing_of

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """A tracer provider of the program, and what it was given."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    return exporter


@pytest.fixture
def manager(spans: InMemorySpanExporter, backend: ProcessBackend) -> Iterator[ModelManager]:
    with ModelManager(backend=backend) as manager:
        yield manager


def ended(spans: InMemorySpanExporter, count: int) -> list[ReadableSpan]:
    """The spans of requests, once there are so many."""

    def found() -> list[ReadableSpan]:
        return [span for span in spans.get_finished_spans() if span.name.startswith("predict")]

    until(lambda: len(found()) >= count, f"{count} spans")
    return found()


def test_requests_with_the_same_id_have_a_span_each(spans, deploy: Deployer) -> None:
    """As a gateway gives that asks several times for one request of its own."""
    model = deploy()
    futures = [model.submit(each, request_id="same") for each in ("1", "1", "1 / 0")]
    assert [future.exception(20) is None for future in futures] == [True, True, False]
    assert sorted(span.status.is_unset for span in ended(spans, 3)) == [False, True, True]


def test_a_request_is_a_span_in_the_callers_trace(spans, deploy: Deployer) -> None:
    """With its parts in order, in which it does not end before them; its id and model are told."""
    model = deploy()
    future = model.submit("time.sleep(0.02)", headers={"TraceParent": PARENT})
    future.result()
    (span,) = ended(spans, 1)
    assert span.name == "predict m"
    assert (span.context.trace_id, span.parent.span_id) == (int(TRACE, 16), 0xB7AD6B7169203331)
    assert span.kind is trace.SpanKind.SERVER
    assert span.attributes["torchmgmt.version"] == "1.0"
    assert span.status.is_unset
    parts = {each.name: each for each in spans.get_finished_spans()}
    queue, batch, handler = (parts[name] for name in ("queue", "batch", "handler"))
    assert queue.parent.span_id == batch.parent.span_id == span.context.span_id
    assert handler.parent.span_id == batch.context.span_id
    assert queue.end_time == batch.start_time <= handler.start_time
    assert handler.end_time <= batch.end_time == span.end_time
    assert handler.end_time - handler.start_time >= 20e6
    assert batch.attributes["torchmgmt.batch_size"] == 1


def test_the_handler_gets_the_requests_own_span(spans, deploy: Deployer) -> None:
    """In place of the caller's, beside the other headers; so its own spans are below it."""
    model = deploy()
    expression = "[context.get_request_header(0, name) for name in ('traceparent', 'X-Other')]"
    traceparent, other = model.predict(expression, headers={"Traceparent": PARENT, "X-Other": "x"})
    (span,) = ended(spans, 1)
    assert traceparent == f"00-{TRACE}-{span.context.span_id:016x}-01"
    assert other == "x"


def test_without_headers_the_span_is_below_the_callers_current_one(spans, deploy: Deployer) -> None:
    """In the program that embeds the library."""
    model = deploy()
    with trace.get_tracer_provider().get_tracer("test").start_as_current_span("outer") as outer:
        model.predict("1")
    (span,) = ended(spans, 1)
    assert span.parent.span_id == outer.get_span_context().span_id
    assert span.kind is trace.SpanKind.INTERNAL


def test_a_request_that_is_given_up_ends_its_span(spans, manager, deploy: Deployer, gate: Gate) -> None:
    """At once, although it still runs."""
    future = deploy().submit(gate.expression)
    until(gate.reached)
    future.abandon()
    (span,) = ended(spans, 1)
    assert span.attributes["error.type"] == "Cancelled"


def test_every_span_ends_and_says_how_the_request_did(spans, manager, deploy: Deployer, gate: Gate) -> None:
    """Also of those that no worker has run; none is kept."""
    model = deploy(config="jobQueueSize: 1\n", batches_in_flight=1)
    with pytest.raises(HandlerFailed):
        model.predict("1 / 0")
    with pytest.raises(WorkerDied):
        model.predict("os._exit(1)")
    until(lambda: model.state.name == "READY")
    running = model.submit(gate.expression, timeout=0.5)
    until(gate.reached)
    waiting = model.submit("1")
    with pytest.raises(QueueFull):
        model.submit("2")
    waiting.cancel()
    with pytest.raises(DeadlineExceeded):
        running.result()
    gate.open()
    model.scale(0)
    with pytest.raises(NoWorker):
        model.predict("3")
    errors = sorted(span.attributes["error.type"] for span in ended(spans, 6))
    assert errors == ["Cancelled", "DeadlineExceeded", "HandlerFailed", "NoWorker", "QueueFull", "WorkerDied"]
    assert all(span.status.status_code is trace.StatusCode.ERROR for span in ended(spans, 6))


def test_a_request_that_was_dropped_from_its_queue_first_ends_its_span(spans) -> None:
    """Its time is over when a batch is cut, which drops it, and the timer that says so comes a moment later."""
    tracing = tracing_of("auto")
    key = ModelKey("m", "1.0")
    request, future = WorkerRequest(encode("a"), "id"), AnswerFuture(key)
    tracing.begin(key, request, future)
    del request
    future.set_exception(TimeoutError())
    (span,) = ended(spans, 1)
    assert span.attributes["error.type"] == "TimeoutError"


@pytest.mark.parametrize("wish, is_on", [("off", False), ("auto", True), ("on", True)])
def test_the_setting_decides(spans, backend: ProcessBackend, wish: str, is_on: bool) -> None:
    """Where the program has a tracer provider, only off is off."""
    with ModelManager(backend=backend, settings=Settings(tracing=wish)) as manager:
        assert (manager._intake.tracing is not None) is is_on


def test_without_a_provider_only_on_is_on(backend: ProcessBackend) -> None:
    """To have OpenTelemetry in the program is not to use it."""
    for wish, is_on in (("auto", False), ("on", True)):
        with ModelManager(backend=backend, settings=Settings(tracing=wish)) as manager:
            assert (manager._intake.tracing is not None) is is_on


def test_nobody_needs_opentelemetry() -> None:
    """Without it auto is off, and on says what is missing."""
    program = """
import sys
sys.modules["opentelemetry.trace"] = sys.modules["opentelemetry.propagate"] = None
from torchmgmt import ModelManager, Settings
with ModelManager() as manager:
    assert manager._intake.tracing is None
assert "torchmgmt.tracing" not in sys.modules
import opentelemetry
with ModelManager() as manager:
    assert manager._intake.tracing is None
try:
    ModelManager(settings=Settings(tracing="on"))
except Exception as error:
    print(error)
"""
    assert "torchmgmt[otel]" in run_program(program).stdout
