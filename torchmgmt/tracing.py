"""OpenTelemetry: one span for each request, with its wait and its batch in it, in the trace that its headers name.

Imported only where the extra ``otel`` is there and tracing may be on; otherwise it costs nothing.
"""

from __future__ import annotations

import functools
import time
import weakref
from concurrent.futures import CancelledError, Future
from typing import Any

from opentelemetry import propagate, trace
from opentelemetry.trace import Span, Tracer

from torchmgmt.batch import Promise
from torchmgmt.events import BatchFinished, Event
from torchmgmt.exchange import WorkerRequest
from torchmgmt.records import ModelKey

__all__ = ["Tracing", "tracing_of"]

# What a request ends with that a worker has had: its batch tells of it.
_RAN = frozenset({"HandlerFailed", "WorkerDied"})


def tracing_of(wish: str) -> Tracing | None:
    """Return what makes spans, as the setting ``tracing`` says, "auto" or "on"; None if nothing does.

    ``auto``: if the program has set a tracer provider. ``on``: with the one that there is, or will be.
    """
    if wish == "auto" and isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return None
    return Tracing(trace.get_tracer("torchmgmt"))


class Tracing:
    """Makes the spans of requests; each lies with its request while it is open. Thread-safe; listens to the manager's events."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def begin(self, key: ModelKey, request: WorkerRequest, future: Promise[Any]) -> None:
        """Begin the span of a request, below that which its header ``traceparent`` names, else the caller's current one.

        The handler gets headers that name this span. It ends with the batch that ran the request, or with ``future`` if
        none did.
        """
        headers = request.headers or {}
        given = {name.lower(): value for name, value in headers.items()}
        parent = propagate.extract(given) if "traceparent" in given else None
        span = self._tracer.start_span(
            f"predict {key.name}",
            context=parent,
            kind=trace.SpanKind.INTERNAL if parent is None else trace.SpanKind.SERVER,
            attributes={
                "torchmgmt.model": key.name,
                "torchmgmt.version": key.version,
                "torchmgmt.request_id": request.request_id,
            },
        )
        carrier: dict[str, str] = {}
        propagate.inject(carrier, trace.set_span_in_context(span))
        request.headers = {name: value for name, value in headers.items() if name.lower() not in carrier} | carrier
        if span.is_recording():
            request.span = span
            # A future outlives its request, and must not keep its payload.
            future.add_done_callback(functools.partial(self._on_settled, span, weakref.ref(request)))

    def refuse(self, request: WorkerRequest, error: BaseException) -> None:
        """End the span of a request that was not accepted."""
        self._end_early(request, type(error).__name__)

    def listen(self, event: Event) -> None:
        """End the spans of the requests of a batch."""
        if not isinstance(event, BatchFinished):
            return
        epoch_s = time.time() - time.monotonic()  # one for all times of a batch, or they would not fit together
        for place, request in enumerate(event.requests):
            span, request.span = request.span, None
            if span is not None:
                self._add_children(span, event, place, epoch_s)
                _end(span, event.failed.get(place), _ns(epoch_s + event.ended))

    def _on_settled(self, span: Span, request_ref: weakref.ref[WorkerRequest], future: Future[Any]) -> None:
        """End the span if no batch is going to: the request was taken back, or failed without having been run."""
        error = CancelledError() if future.cancelled() else future.exception()
        if error is None:
            return
        name = "Cancelled" if isinstance(error, CancelledError) else type(error).__name__
        request = request_ref()
        if request is None:  # it was dropped from the queue; nothing else is going to end a span that is open yet
            if span.is_recording():
                _end(span, name)
        elif name not in _RAN:
            self._end_early(request, name)

    def _end_early(self, request: WorkerRequest, error: str) -> None:
        span, request.span = request.span, None
        if span is not None:
            _end(span, error)

    def _add_children(self, span: Span, batch: BatchFinished, place: int, epoch_s: float) -> None:
        """Add what became of the request: its times are all known now."""
        inside = trace.set_span_in_context(span)
        began, ended = _ns(epoch_s + batch.began), _ns(epoch_s + batch.ended)
        arrived = min(began, _ns(epoch_s + batch.arrived[place]))
        self._tracer.start_span("queue", context=inside, start_time=arrived).end(began)
        run = self._tracer.start_span(
            "batch",
            context=inside,
            start_time=began,
            attributes={"torchmgmt.batch_size": len(batch.arrived), "torchmgmt.worker": batch.worker_id},
        )
        if batch.handler_s is not None:
            # How long it took is known, and when it began is not: as long after the batch went out as before it was back.
            took = _ns(batch.handler_s)
            start = began + max(0, (ended - began - took) // 2)
            self._tracer.start_span("handler", context=trace.set_span_in_context(run), start_time=start).end(
                start + took
            )
        run.end(ended)


def _end(span: Span, error: str | None, at_ns: int | None = None) -> None:
    """End a span, with the name of an error if there was one; now, or ``at_ns`` nanoseconds after 1970."""
    if error is not None:
        span.set_attribute("error.type", error)
        span.set_status(trace.StatusCode.ERROR, error)
    span.end(at_ns)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
