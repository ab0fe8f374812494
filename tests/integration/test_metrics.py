"""Metrics of a manager with real workers: every request counted once, by how it ended."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from tests.handlers import EVAL, Deployer, Gate, until
from tests.pages import Samples, samples_of
from torchmgmt import ModelManager, ProcessBackend
from torchmgmt.errors import DeadlineExceeded, HandlerFailed, NoWorker, QueueFull, WorkerDied
from torchmgmt.metrics import Metrics


@pytest.fixture
def metrics(manager: ModelManager) -> Iterator[Metrics]:
    with Metrics(manager, with_host=False) as metrics:
        yield metrics


def errors_of(samples: Samples) -> dict[str, float]:
    return {dict(of)["error"]: value for of, value in samples.all("torchmgmt_errors_total").items()}


def when_counted(metrics: Metrics, requests: int) -> Samples:
    """The samples once so many requests have ended: they are counted after they are answered."""

    def found() -> Samples | None:
        samples = samples_of(metrics)
        return samples if (samples("torchmgmt_requests_total") or 0) >= requests else None

    samples = until(found, f"{requests} requests counted")
    assert samples("torchmgmt_requests_total") == requests
    return samples


@pytest.mark.parametrize("backend_name", ["process", "thread"])
def test_answered_requests_are_measured(metrics: Metrics, deploy: Deployer, backend_name: str) -> None:
    """Wait, batch, handler and whole time; the whole is no less than its parts."""
    model = deploy(batch_size=4, max_batch_delay=2000, backend=backend_name)
    futures = [model.submit("time.sleep(0.01)") for _ in range(4)]
    assert [future.result() for future in futures] == [None] * 4
    samples = when_counted(metrics, 4)
    assert errors_of(samples) == {}
    assert samples("torchmgmt_batch_size_sum") == 4
    handler, whole = samples("torchmgmt_handler_seconds_sum"), samples("torchmgmt_request_seconds_sum")
    queue = samples("torchmgmt_queue_seconds_sum")
    assert handler >= 0.04
    assert whole >= handler + queue - 1e-6
    assert samples("torchmgmt_ready", model="m", version="1.0") == 1
    assert samples("torchmgmt_workers", state="READY") == 1
    assert samples("torchmgmt_workers_wanted", bound="min") == 1
    assert samples("torchmgmt_queue_capacity") == 100
    assert samples("torchmgmt_worker_load_seconds_count") == 1
    (load,) = samples.all("WorkerLoadTime")
    assert dict(load)["WorkerName"].endswith("-m_1.0")


def test_every_request_is_counted_once_by_how_it_ended(metrics: Metrics, deploy: Deployer, gate: Gate) -> None:
    """Failed, died with its worker, refused, expired waiting and running, taken back; and answered."""
    model = deploy(config="jobQueueSize: 1\n", batches_in_flight=1)
    with pytest.raises(HandlerFailed):
        model.predict("1 / 0")
    with pytest.raises(WorkerDied):
        model.predict("os._exit(1)")
    until(lambda: model.describe().workers and model.state.name == "READY")
    running = model.submit(gate.expression, timeout=0.5)
    until(gate.reached)
    waiting = model.submit("1")
    with pytest.raises(QueueFull):
        model.submit("2")
    assert waiting.cancel()
    assert waiting.cancel()
    expired = model.submit("3", timeout=0.01)
    for future in (expired, running):
        with pytest.raises(DeadlineExceeded):
            future.result()
    gate.open()
    assert model.predict("4") == 4
    samples = when_counted(metrics, 7)
    assert errors_of(samples) == {
        "HandlerFailed": 1,
        "WorkerDied": 1,
        "QueueFull": 1,
        "Cancelled": 1,
        "DeadlineExceeded": 2,
    }
    assert samples("torchmgmt_worker_deaths_total") == 1
    model.scale(0)
    with pytest.raises(NoWorker):
        model.predict("5")
    assert errors_of(when_counted(metrics, 8))["NoWorker"] == 1


def test_a_running_request_that_is_given_up_is_counted_once(metrics: Metrics, deploy: Deployer, gate: Gate) -> None:
    """As taken back, and not again when its batch is done."""
    model = deploy()
    running = model.submit(gate.expression)
    until(gate.reached)
    running.abandon()
    running.abandon()
    gate.open()
    assert model.predict("1") == 1
    assert errors_of(when_counted(metrics, 2)) == {"Cancelled": 1}


def test_what_a_handler_measures_is_on_the_page(metrics: Metrics, deploy: Deployer) -> None:
    """Under its own name, with its dimensions."""
    model = deploy(EVAL)
    model.predict('context.metrics.add_counter("Rows", 2)')
    until(lambda: found_in(metrics, "Rows"))
    samples = samples_of(metrics)
    assert samples("Rows", ModelName="m", Level="Model", ModelVersion="1.0") == 2


def found_in(metrics: Metrics, name: str) -> bool:
    return bool(metrics.page([name]))


def test_a_version_that_is_unregistered_takes_its_labels_along(metrics: Metrics, deploy: Deployer) -> None:
    """Its requests, its workers, what its handler measured; those of the other stay."""
    for name in ("m", "n"):
        deploy(model_name=name).predict('context.metrics.add_counter("Rows", 2)')
    until(lambda: len(samples_of(metrics).all("Rows")) == 2)
    metrics_of_m = deploy.manager["m"]
    metrics_of_m.unregister()
    page = metrics.page().decode()
    assert '"m"' not in page
    assert "W-" in page
    assert samples_of(metrics)("Rows", ModelName="n") == 2


def test_models_that_were_there_before_are_counted_from_then_on(manager: ModelManager, deploy: Deployer) -> None:
    """Metrics may come to a manager that runs, and leave it again."""
    model = deploy()
    model.predict("1")
    with Metrics(manager) as metrics:
        assert samples_of(metrics)("torchmgmt_ready", model="m") == 1
        assert samples_of(metrics)("MemoryUsed") > 0
        model.predict("1")
        when_counted(metrics, 1)
    model.predict("1")
    assert samples_of(metrics)("torchmgmt_requests_total") is None


def test_metrics_keep_no_manager_alive(backend: ProcessBackend) -> None:
    """Who drops it is done with it; the page then says nothing of it."""
    manager = ModelManager(backend=backend)
    metrics = Metrics(manager)
    reference = weakref.ref(manager)
    del manager
    gc.collect()
    assert reference() is None
    assert samples_of(metrics)("torchmgmt_ready") is None
    metrics.close()


def test_a_closed_manager_has_a_page_without_models(manager: ModelManager, metrics: Metrics, deploy: Deployer) -> None:
    """Whoever reads it at the end gets an answer."""
    deploy()
    manager.close()
    assert samples_of(metrics)("torchmgmt_ready") is None
