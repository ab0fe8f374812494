"""A WorkerPool whose workers are threads. It needs a pool that asks ``Backend.host`` for its workers."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import attrs
import psutil
import pytest

from tests.handlers import EVAL, PATIENCE_S, until, write_folder, write_manifest
from torchmgmt.backends.thread import ThreadBackend
from torchmgmt.errors import HandlerFailed, NoWorker, WorkerDied, WorkerStartFailed
from torchmgmt.lifecycle import VersionState
from torchmgmt.pool import WorkerPool
from torchmgmt.records import ModelKey, ModelSpec, Scale

HANG = "context.model_yaml_config['gate'].wait()"
MODEL = """
import torch
class Double(torch.nn.Module):
    def forward(self, x):
        return x * 2
"""


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Opened at the end of the test, so that a thread that hung at it can go."""
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def threads(gate: threading.Event) -> Iterator[ThreadBackend]:
    backend = ThreadBackend()
    yield backend
    backend.close()


@pytest.fixture
def spec(tmp_path: Path, gate: threading.Event) -> ModelSpec:
    folder = write_folder(tmp_path / "model", EVAL)
    config = {"gate": gate, "barrier": threading.Barrier(2)}
    return ModelSpec(key=ModelKey("m", "1.0"), model_dir=str(folder), handler="handler.py", config=config)


def bodies(*expressions: str) -> list[dict[str, str]]:
    return [{"body": expression} for expression in expressions]


def test_a_pool_of_threads_serves(spec: ModelSpec, threads: ThreadBackend) -> None:
    """The same pool, no process: batches are answered in order, and each worker tells of this process."""
    children = set(psutil.Process().children())
    with WorkerPool(spec, workers=2, backend=threads) as pool:
        assert pool.run(bodies("1 + 1", "'x' * 3")) == [2, "xxx"]
        assert {info.pid for info in pool.info()} == {psutil.Process().pid}
        assert all(info.memory_bytes > 0 for info in pool.info())
        assert pool.describe().result(PATIENCE_S) == {}
        assert set(psutil.Process().children()) == children
    assert pool.state is VersionState.GONE


def test_two_threads_compute_at_once(spec: ModelSpec, threads: ThreadBackend) -> None:
    """Two batches run at the same time: they can only pass the barrier together."""
    passing = bodies(f"context.model_yaml_config['barrier'].wait({PATIENCE_S}) in (0, 1)")
    with WorkerPool(attrs.evolve(spec, batches_in_flight=1), workers=2, backend=threads) as pool:
        futures = [pool.submit(passing) for _ in range(2)]
        assert [future.result(PATIENCE_S) for future in futures] == [[True], [True]]


def test_faults_are_those_of_any_backend(spec: ModelSpec, threads: ThreadBackend) -> None:
    """A batch that raises is HandlerFailed; sys.exit() is WorkerDied, and another worker takes its place."""
    with WorkerPool(spec, backend=threads) as pool:
        with pytest.raises(HandlerFailed) as failed:
            pool.run(bodies("1 / 0"))
        assert failed.value.error_type == "ZeroDivisionError"
        with pytest.raises(WorkerDied) as died:
            pool.run(bodies("sys.exit(3)"))
        assert died.value.exitcode is None
        assert "SystemExit: 3" in died.value.reason
        assert pool.run(bodies("'again'")) == ["again"]


def test_a_model_that_cannot_be_loaded_is_told(spec: ModelSpec, threads: ThreadBackend) -> None:
    """What loading raises is in the error, as with a process."""
    broken = write_folder(Path(spec.model_dir), "raise OSError('no weights')")
    pool = WorkerPool(attrs.evolve(spec, model_dir=str(broken), max_retry_timeout_s=0), backend=threads)
    with pytest.raises(WorkerStartFailed) as failed, pool:
        pass
    assert failed.value.reason == "OSError: no weights"
    assert "handler.py" in failed.value.traceback


def test_a_hang_is_final_until_the_pool_is_scaled_again(
    spec: ModelSpec, threads: ThreadBackend, gate: threading.Event
) -> None:
    """A hung thread is not replaced: its version is unhealthy, says why, and recovers when somebody scales it."""
    pool = WorkerPool(attrs.evolve(spec, response_timeout_s=0.2), backend=threads)
    with pool:
        before = threading.active_count()
        with pytest.raises(WorkerDied) as died:
            pool.run(bodies(HANG))
        assert any("handler.py" in line for line in died.value.last_lines)
        until(lambda: pool.state is VersionState.FAILED, "the version's failure")
        until(lambda: threading.active_count() == before)
        with pytest.raises(NoWorker):
            pool.run(bodies("1"))
        gate.set()
        pool.scale(Scale(1, 1))
        pool.wait_ready(PATIENCE_S)
        assert pool.run(bodies("'well'")) == ["well"]


def test_what_lay_with_a_hung_worker_goes_to_another(spec: ModelSpec, threads: ThreadBackend) -> None:
    """Only the batch that hangs fails; those that were given to the same worker are run by the one that is left."""
    with WorkerPool(attrs.evolve(spec, response_timeout_s=1, batches_in_flight=4), workers=2, backend=threads) as pool:
        hung = pool.submit(bodies(HANG))
        others = [pool.submit(bodies(str(number))) for number in range(8)]
        assert [future.result(PATIENCE_S) for future in others] == [[number] for number in range(8)]
        with pytest.raises(WorkerDied):
            hung.result(PATIENCE_S)


def test_closing_a_pool_with_a_hung_worker_ends(spec: ModelSpec, threads: ThreadBackend) -> None:
    """close() returns when its time is over, with the batch answered by an error, although the thread stays."""
    pool = WorkerPool(spec, backend=threads)
    with pool:
        hung = pool.submit(bodies(HANG))
        report = pool.close(timeout=0.1)
    assert hung.exception(0) is not None
    assert report.stopped_workers == 1
    assert not report.clean


def test_the_shipped_handler_leaves_no_name_of_its_models_file(tmp_path: Path, threads: ThreadBackend) -> None:
    """base_handler imports ``modelFile`` under a name of its own: ``model`` may mean something to the program."""
    folder = write_folder(tmp_path / "model", "", model=MODEL)
    write_manifest(folder, modelFile="model.py", handler="base_handler")
    spec = ModelSpec(
        key=ModelKey("m", "1.0"),
        model_dir=str(folder),
        handler="base_handler",
        manifest={"model": {"modelFile": "model.py"}},
    )
    before = set(sys.modules)
    with WorkerPool(spec, workers=2, backend=threads) as pool:
        assert pool.run([{"body": [1.0, 2.0]}]) == [[2.0, 4.0]]
        new = set(sys.modules) - before
        assert "model" not in new
    until(lambda: not [name for name in sys.modules if name.startswith("_torchmgmt_thread")], "no name of theirs")
