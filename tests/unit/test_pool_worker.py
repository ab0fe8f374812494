"""One worker's bookkeeping, and a pool over a backend that does what a test says, at the moment that it says."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import Any

import attrs
import pytest

from tests.unit.clocks import FakeClock, FakeTimers
from torchmgmt.answer_future import AnswerFuture
from torchmgmt.backends import WorkerListener
from torchmgmt.batcher import Batcher
from torchmgmt.channel import encode
from torchmgmt.errors import ManagerClosed, WorkerDied, WorkerStartFailed
from torchmgmt.exchange import WorkerRequest
from torchmgmt.lifecycle import IllegalTransition, VersionState, WorkerEvent, WorkerState
from torchmgmt.pool import WorkerPool
from torchmgmt.pool.jobs import OwnJob
from torchmgmt.pool.workers import NEVER, PoolWorker
from torchmgmt.records import ModelKey, ModelSpec, Scale, Sharing, WorkerExit, WorkerFault

KEY = ModelKey("m", "1.0")
SPEC = ModelSpec(key=KEY, model_dir="/", handler="handler")


# -- one worker --------------------------------------------------------------------------------------------------------


def job(size: int = 1) -> OwnJob:
    return OwnJob(KEY, [WorkerRequest(encode(number), "") for number in range(size)])


@pytest.fixture
def worker() -> PoolWorker:
    """A worker that is ready."""
    worker = PoolWorker("9000", datetime.now(timezone.utc))
    worker.advance(WorkerEvent.SPAWN)
    worker.advance(WorkerEvent.READY)
    return worker


def test_its_time_runs_from_when_it_begins_a_batch(worker: PoolWorker) -> None:
    """A batch that lies behind another has its whole response_timeout from when that one is done."""
    worker.assign(1, job(), 100.0, 10.0)
    worker.assign(2, job(), 105.0, 10.0)
    assert worker.overdue_at == 110.0
    worker.finish(1, 108.0, 10.0)
    assert worker.overdue_at == 118.0
    worker.finish(2, 109.0, 10.0)
    assert worker.overdue_at == NEVER
    assert worker.busy_s == 9.0


def test_the_time_set_for_its_end_is_not_prolonged(worker: PoolWorker) -> None:
    """One that was told to go by a certain time does not get more by finishing one of its batches."""
    worker.assign(1, job(), 100.0, 10.0)
    worker.assign(2, job(), 100.0, 10.0)
    worker.overdue_at, worker.end_reason = 103.0, "the pool was scaled down"
    worker.finish(1, 102.0, 10.0)
    assert worker.overdue_at == 103.0
    worker.finish(2, 102.5, 10.0)
    assert worker.overdue_at == NEVER


def test_an_answer_to_what_is_not_with_it_is_not_heeded(worker: PoolWorker) -> None:
    """A number that is not known, or known no more, changes nothing."""
    worker.assign(1, job(), 100.0, 10.0)
    assert worker.finish(2, 101.0, 10.0) is None
    assert worker.finish(1, 101.0, 10.0) is not None
    assert worker.finish(1, 102.0, 10.0) is None
    assert (worker.answered, worker.busy_s) == (1, 1.0)


@pytest.mark.parametrize(
    "last_started, lost, unstarted",
    [
        (2, [2], [3]),  # it died in 2
        (1, [], [2, 3]),  # it had answered 1, and died before it began 2
        (3, [3], [2]),  # two threads had sent theirs in another order
        (None, [2, 3], []),  # nobody can tell
        (0, [], [2, 3]),
    ],
)
def test_only_what_it_had_begun_dies_with_it(
    worker: PoolWorker, last_started: int | None, lost: Sequence[int], unstarted: Sequence[int]
) -> None:
    """Of the batches that are with a dead worker at most the one that it ran is lost; the others come back in order."""
    jobs = {number: job() for number in (1, 2, 3)}
    for number, each in jobs.items():
        worker.assign(number, each, 100.0, 10.0)
    worker.finish(1, 101.0, 10.0)
    taken = worker.take_jobs(last_started)
    assert taken == ([jobs[number] for number in lost], [jobs[number] for number in unstarted])
    assert worker.take_jobs(last_started) == ([], [])


@attrs.define
class Handle:
    private_bytes: int
    pid: int = 77
    memory_bytes: int = 5


def test_it_is_worn_once(worker: PoolWorker) -> None:
    """It is worn when it has answered its requests or takes more memory of its own than it may; that is said once."""
    spec = attrs.evolve(SPEC, max_requests=3, max_memory_bytes=1000)
    worker.handle = Handle(1000)  # type: ignore[assignment]
    worker.assign(1, job(2), 100.0, 10.0)
    worker.finish(1, 101.0, 10.0)
    assert not worker.note_wear(spec)
    worker.assign(2, job(1), 100.0, 10.0)
    worker.finish(2, 101.0, 10.0)
    assert worker.note_wear(spec)
    assert not worker.note_wear(spec)
    assert worker.facts().is_worn

    heavy = PoolWorker("9001", datetime.now(timezone.utc), handle=Handle(1001))  # type: ignore[arg-type]
    assert heavy.note_wear(spec)
    assert not PoolWorker("9002", datetime.now(timezone.utc)).note_wear(spec)
    assert not PoolWorker("9003", datetime.now(timezone.utc), handle=Handle(10**9)).note_wear(SPEC)  # type: ignore[arg-type]


def test_it_is_shown_as_it_is(worker: PoolWorker) -> None:
    """Its pid and memory are its handle's, and there are none before it has one."""
    assert (worker.info().pid, worker.info().memory_bytes) == (None, 0)
    worker.handle = Handle(0)  # type: ignore[assignment]
    assert (worker.info().pid, worker.info().memory_bytes, worker.info().state) == (77, 5, WorkerState.READY)


def test_a_worker_that_goes_gets_no_batch(worker: PoolWorker) -> None:
    """A batch for one that drains or stops would be a defect of ours, and is refused as one."""
    worker.advance(WorkerEvent.STOP)
    with pytest.raises(IllegalTransition):
        worker.assign(1, job(), 100.0, 10.0)


# -- a pool ------------------------------------------------------------------------------------------------------------


class FakeHandle:
    """A worker of the test's: it does nothing by itself, and notes what it is told."""

    pid = 77
    memory_bytes = 0
    private_bytes = 0

    def __init__(self, host: FakeHost, listener: WorkerListener) -> None:
        self.listener = listener
        self.told: list[str] = []
        self.batches: list[int] = []
        self.recalled: list[int] = []
        self._host = host

    def start(self) -> None:
        self.told.append("start")
        if self._host.start_error is not None:
            raise self._host.start_error

    def last_lines(self) -> Sequence[str]:
        return []

    def run(self, number: int, _requests: Sequence[WorkerRequest]) -> None:
        self.batches.append(number)

    def describe(self, number: int) -> None:
        self.batches.append(number)

    def recall(self, numbers: Collection[int], *, but: int) -> None:
        self.recalled += numbers

    def stop(self) -> None:
        self.told.append("stop")

    def terminate(self) -> None:
        self.told.append("terminate")

    def kill(self) -> None:
        self.told.append("kill")

    def answers(self, *outcomes: Any) -> None:
        """Answer the oldest batch that was not answered."""
        self.listener.done(self.batches.pop(0), [encode(outcome) for outcome in outcomes or ("answer",)])

    def exits(self, started: int | None = 0) -> None:
        self.listener.exited(WorkerExit(77, 1, "it exited with status 1", last_started=started))


class FakeHost:
    sharing = Sharing()

    def __init__(self) -> None:
        self.workers: list[FakeHandle] = []
        self.start_error: Exception | None = None

    def worker(self, _worker_id: str, _threads: int, listener: WorkerListener) -> FakeHandle:
        self.workers.append(FakeHandle(self, listener))
        return self.workers[-1]

    def rest(self) -> None:
        pass

    def close(self) -> None:
        pass


class FakeBackend:
    """Its thread is the test's own, and its timers go off when a test says so."""

    can_kill = True

    def __init__(self) -> None:
        self.model = FakeHost()
        self.dispatcher = FakeTimers(FakeClock(0.0))

    def host(self, _spec: ModelSpec) -> FakeHost:
        return self.model

    def warm(self) -> None:
        pass

    def close(self) -> None:
        pass

    def look(self) -> None:
        """Have every timer go off."""
        self.dispatcher.run_all()


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def make(backend: FakeBackend) -> Iterator[Callable[..., WorkerPool]]:
    """Make a pool with ``workers`` ready ones; a worker that was told to end has ended when the test is over."""

    def make(workers: int = 1, most: int | None = None, **limits: Any) -> WorkerPool:
        spec = attrs.evolve(SPEC, **limits)
        pool = WorkerPool(spec, workers=0, backend=backend, worker_ids=itertools.count(9000))  # type: ignore[arg-type]
        pool.scale(Scale(workers, workers if most is None else most))
        for handle in backend.model.workers:
            handle.listener.ready()
        return pool

    return make


def test_a_worker_that_is_done_just_before_it_would_be_killed_still_ends(
    backend: FakeBackend, make: Callable[..., WorkerPool]
) -> None:
    """A batch that is answered after closing gave it up, and before its worker is killed, leaves no worker behind."""
    pool = make()
    (handle,) = backend.model.workers
    future = pool.submit([1])
    pool.retire()
    pool.end(0.0)
    handle.answers("in time")
    backend.look()
    assert {"stop", "terminate", "kill"} & set(handle.told), "nobody told it to end, and closing waits for it"
    handle.exits()
    pool.join(0.0)
    assert future.result(0) == ["in time"]
    assert pool.state is VersionState.GONE


def test_who_waits_for_quiet_hears_of_the_last_batch_that_was_recalled(
    backend: FakeBackend, make: Callable[..., WorkerPool]
) -> None:
    """Nobody waits for its requests any more, so it is not run anywhere, and no answer comes after it."""
    pool = make(batches_in_flight=4)
    batcher: Batcher[WorkerRequest, Any] = Batcher(batch_size=1, on_ready=pool.pump, dispatcher=backend.dispatcher)
    pool.feed_from(batcher)
    (handle,) = backend.model.workers
    pool.submit([0])
    handle.answers()  # so that it is known to be quick
    pool.submit([1])
    batcher.queue(WorkerRequest(encode(2), ""), given_up := AnswerFuture(KEY), None, None, 0)
    assert len(handle.batches) == 2
    given_up.abandon()
    pool.retire()
    with ThreadPoolExecutor() as threads:
        is_quiet = threads.submit(pool.wait_quiet, 20)
        handle.answers()
        time.sleep(0.05)  # it waits again by then
        handle.listener.skipped(handle.batches.pop())
        assert is_quiet.result(10)


@pytest.mark.parametrize("size", [1, 2])
def test_a_worker_that_drains_when_the_pool_ends_still_ends(
    backend: FakeBackend, make: Callable[..., WorkerPool], size: int
) -> None:
    """The same for one that was scaled away before, and for several batches that lie with it."""
    pool = make(batches_in_flight=4)
    (handle,) = backend.model.workers
    pool.submit([0])
    handle.answers()
    futures = [pool.submit([number]) for number in range(size)]
    assert len(handle.batches) == size
    pool.scale(Scale(0, 0))
    pool.retire()
    pool.end(0.0)
    while handle.batches:
        handle.answers()
    backend.look()
    assert {"stop", "terminate", "kill"} & set(handle.told)
    handle.exits()
    pool.join(0.0)
    assert all(future.done() for future in futures)


def test_what_is_replaced_later_has_its_time(backend: FakeBackend, make: Callable[..., WorkerPool]) -> None:
    """The time that a scale call gives to running batches is not that of a worker that is replaced afterwards."""
    pool = make(2, max_requests=1)
    pool.scale(Scale(1, 1), timeout=0)
    backend.model.workers[1].exits()
    (worn, _) = backend.model.workers
    pool.submit([1])
    worn.answers()  # it is worn now, and a successor is started
    running = pool.submit([2])
    successor = backend.model.workers[-1]
    assert successor is not worn
    successor.listener.ready()
    backend.look()
    backend.look()
    assert "kill" not in worn.told, "its running batch was cut off"
    worn.answers("whole")
    assert running.result(0) == ["whole"]
    assert "stop" in worn.told
    finish(pool, backend)


def test_a_worn_worker_goes_as_soon_as_its_successor_serves(
    backend: FakeBackend, make: Callable[..., WorkerPool]
) -> None:
    """Nothing else has to happen for that: the one is told to end when the other is ready."""
    pool = make(1, max_requests=1)
    (worn,) = backend.model.workers
    pool.submit([1])
    worn.answers()
    assert "stop" not in worn.told
    backend.model.workers[-1].listener.ready()
    assert "stop" in worn.told
    finish(pool, backend)


def test_a_batch_that_was_not_begun_goes_to_another_worker(
    backend: FakeBackend, make: Callable[..., WorkerPool]
) -> None:
    """What lay with a worker that died is handed to the next, before what waits; what it ran fails with its end."""
    pool = make(batches_in_flight=3)
    (first,) = backend.model.workers
    pool.submit([0])
    first.answers()
    running, *lying = [pool.submit([number]) for number in range(3)]
    waiting = pool.submit(["waits"])
    assert len(first.batches) == 3
    first.exits(started=first.batches[0])
    assert isinstance(running.exception(0), WorkerDied)
    second = backend.model.workers[-1]
    backend.look()  # back-off
    until_started(backend, pool)
    second = backend.model.workers[-1]
    second.listener.ready()
    for future in (*lying, waiting):
        assert not future.done()
        second.answers("second")
        assert future.result(0) == ["second"]
    finish(pool, backend)


def test_a_busy_worker_gets_more_only_where_batches_are_short(
    backend: FakeBackend, make: Callable[..., WorkerPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing lies with a worker whose batches take long: another one may be free before it."""
    pool = make(batches_in_flight=3)
    (handle,) = backend.model.workers
    monkeypatch.setattr("torchmgmt.pool.workers._LYING_S", 0.0)
    pool.submit([0])
    handle.answers()
    for number in range(3):
        pool.submit([number])
    assert len(handle.batches) == 1
    while handle.batches:
        handle.answers()
    finish(pool, backend)


def test_a_start_that_raises_is_a_start_that_failed(backend: FakeBackend, make: Callable[..., WorkerPool]) -> None:
    """A worker that cannot even be started is told of like one that failed, and is tried again after the back-off."""
    pool = make(0, 1)
    backend.model.start_error = OSError(24, "Too many open files")
    future = pool.submit([1])
    assert isinstance(pool.last_error, WorkerStartFailed)
    assert "Too many open files" in str(pool.last_error)
    backend.model.start_error = None
    until_started(backend, pool)
    backend.model.workers[-1].listener.ready()
    backend.model.workers[-1].answers("late")
    assert future.result(0) == ["late"]
    finish(pool, backend)


def test_an_end_that_is_final_is_the_end_of_trying(backend: FakeBackend, make: Callable[..., WorkerPool]) -> None:
    """After an end that another worker would meet, too, none is started, and what waits fails with the reason."""
    pool = make()
    (handle,) = backend.model.workers
    running = pool.submit([1])
    waiting = pool.submit([2])
    handle.listener.exited(WorkerExit(0, None, "it was abandoned", is_final=True))
    assert pool.state is VersionState.FAILED
    assert isinstance(running.exception(0), WorkerDied)
    assert "abandoned" in str(waiting.exception(0))
    assert len(backend.model.workers) == 1
    pool.scale(Scale(1, 1))
    assert len(backend.model.workers) == 2, "scaling tries again"
    finish(pool, backend)


def test_what_is_not_begun_when_the_pool_ends_is_told_so(backend: FakeBackend, make: Callable[..., WorkerPool]) -> None:
    """Batches that lie with a worker that closing kills fail as closed, and the running one with the worker's end."""
    pool = make(batches_in_flight=3)
    (handle,) = backend.model.workers
    pool.submit([0])
    handle.answers()
    running, lying = (pool.submit([number]) for number in range(2))
    pool.retire()
    pool.end(0.0)
    backend.look()
    assert "kill" in handle.told
    handle.exits(started=handle.batches[0])
    report = pool.join(0.0)
    assert isinstance(running.exception(0), WorkerDied)
    assert isinstance(lying.exception(0), ManagerClosed)
    assert (report.failed_requests, report.killed_pids) == (2, (77,))


def test_a_fault_in_one_answer_harms_no_other(backend: FakeBackend, make: Callable[..., WorkerPool]) -> None:
    """A worker that says that a batch failed serves the next one."""
    pool = make()
    (handle,) = backend.model.workers
    future = pool.submit([1])
    handle.listener.done(handle.batches.pop(), [WorkerFault("ValueError", "ValueError: no", "")])
    assert "ValueError: no" in str(future.exception(0))
    future = pool.submit([2])
    handle.answers("fine")
    assert future.result(0) == ["fine"]
    finish(pool, backend)


def until_started(backend: FakeBackend, pool: WorkerPool) -> None:
    """Have the timers go off until the back-off is over and a further worker is started."""
    before = len(backend.model.workers)
    while len(backend.model.workers) == before or "start" not in backend.model.workers[-1].told:
        if any(info.state is WorkerState.LOADING for info in pool.info()):
            return
        backend.look()


def finish(pool: WorkerPool, backend: FakeBackend) -> None:
    """Close ``pool``; its workers end as they are told."""
    pool.retire()
    pool.end(0.0)
    backend.look()
    for worker in list(pool._workers):
        handle = worker.handle
        assert isinstance(handle, FakeHandle)
        assert {"stop", "terminate", "kill"} & set(handle.told)
        handle.exits()
    pool.join(0.0)
