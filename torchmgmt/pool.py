"""WorkerPool: the workers of one model version. It starts them, hands them batches, watches them and lets them go.

What shall be is stored (``Scale``), and every change, a scale call as well as a death, ends in the same place: under the
lock ``scaling.decide`` says what brings the pool nearer to it, and after the lock is released that is done. A worker is
busy from the moment a batch is assigned to it, under the lock, so it is never taken for idle in between.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torchmgmt.answer_future import AnswerFuture
from torchmgmt.backends import Backend, Outcome
from torchmgmt.backends.process import ProcessBackend
from torchmgmt.channel import encode
from torchmgmt.checks import check_number
from torchmgmt.errors import (
    DeadlineExceeded,
    ManagerClosed,
    NoWorker,
    TorchmgmtError,
    WorkerDied,
    WorkerStartFailed,
)
from torchmgmt.events import (
    NO_FAILURES,
    BatchFinished,
    Event,
    HandlerMetrics,
    Listener,
    RequestsDropped,
    VersionStateChanged,
    WorkerReady,
    WorkerStopped,
)
from torchmgmt.exchange import Encoded, WorkerRequest
from torchmgmt.job import Job, JobQueue, JobSource, OwnJob, Ran, answers_of, error_of_death, failures_of, size_of
from torchmgmt.lifecycle import VersionEvent, VersionState, WorkerEvent, WorkerState, advance_version
from torchmgmt.pool_worker import NEVER, PoolWorker, PoolWorkers
from torchmgmt.records import (
    CloseReport,
    MetricRecord,
    ModelSpec,
    RawMetric,
    Scale,
    Sharing,
    WorkerExit,
    WorkerFault,
    WorkerInfo,
)
from torchmgmt.scaling import Failures, Load, Plan, Situation, decide, default_threads

__all__ = ["WorkerPool"]

log = logging.getLogger(__name__)

# What a worker that was told to end may take before SIGTERM, and then before SIGKILL.
STOP_GRACE_S = 5.0
TERMINATE_GRACE_S = 2.0
# A worker that ended after it had been ready for this long was well: its end is the first failure, not one more.
WELL_AFTER_S = 10.0
FIRST_WORKER_ID = 9000

# The load is looked at so soon after a request came that may call for another worker.
_FIRST_LOOK_S = 0.25

_OVER = (VersionState.RETIRING, VersionState.GONE)
# The steps of a version from where it stands to where its workers say it is.
_ROUTES: Mapping[tuple[VersionState, VersionState], Sequence[VersionEvent]] = {
    **{(state, state): () for state in VersionState},
    (VersionState.REGISTERED, VersionState.LOADING): (VersionEvent.WANT,),
    (VersionState.REGISTERED, VersionState.READY): (VersionEvent.WANT, VersionEvent.SERVE),
    (VersionState.REGISTERED, VersionState.FAILED): (VersionEvent.WANT, VersionEvent.GIVE_UP),
    (VersionState.LOADING, VersionState.REGISTERED): (VersionEvent.UNWANT,),
    (VersionState.LOADING, VersionState.READY): (VersionEvent.SERVE,),
    (VersionState.LOADING, VersionState.FAILED): (VersionEvent.GIVE_UP,),
    (VersionState.READY, VersionState.REGISTERED): (VersionEvent.UNWANT,),
    (VersionState.READY, VersionState.LOADING): (VersionEvent.LOSE,),
    (VersionState.READY, VersionState.FAILED): (VersionEvent.LOSE, VersionEvent.GIVE_UP),
    (VersionState.FAILED, VersionState.REGISTERED): (VersionEvent.UNWANT,),
    (VersionState.FAILED, VersionState.LOADING): (VersionEvent.WANT,),
    (VersionState.FAILED, VersionState.READY): (VersionEvent.SERVE,),
}


class WorkerPool:
    """Keeps worker processes that run one handler, between a least and a most number.

    >>> import pathlib, tempfile
    >>> from torchmgmt.records import ModelKey, ModelSpec
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> code = "def handle(data, context): return data and [row['body'].upper() for row in data]"
    >>> _ = (folder / "shout.py").write_text(code)
    >>> spec = ModelSpec(key=ModelKey("shout", "1.0"), model_dir=str(folder), handler="shout.py")
    >>> with WorkerPool(spec, workers=2) as pool:
    ...     pool.run([{"body": "hello"}, {"body": "world"}])
    ['HELLO', 'WORLD']

    Thread-safe. Making one starts nothing; ``with`` and :meth:`scale` do.

    Args:
        spec: what to load, and the limits to keep.
        workers: how many workers ``with`` starts and waits for, at least 0.
        backend: how workers are run. None: a ProcessBackend of the pool's own, closed with it.
        worker_ids: where the workers' ids come from.
        listener: called with each event, with no lock held; while it is false, what is told of each batch is not made.

    Raises:
        InvalidArgument: ``workers`` is not a whole number of at least 0.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        workers: int = 1,
        backend: Backend | None = None,
        worker_ids: Iterator[int] | None = None,
        listener: Listener | None = None,
    ) -> None:
        check_number("workers", workers, minimum=0)
        self.spec = spec
        self._initial = Scale(workers, workers)
        self._owns_backend = backend is None
        self._backend: Backend = ProcessBackend() if backend is None else backend
        self._host = self._backend.host(spec)
        self._worker_ids = itertools.count(FIRST_WORKER_ID) if worker_ids is None else worker_ids
        self._listener = listener
        self._numbers = itertools.count(1)
        self._wears = spec.max_requests is not None or spec.max_memory_bytes is not None
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        # guarded by _lock
        self._workers = PoolWorkers()
        self._queue = JobQueue()
        self._scale = Scale(0, 0)
        self._state = VersionState.REGISTERED
        self._is_ending = False
        self._drain_until = NEVER
        self._failures = Failures()
        self._jitter = 1.0
        self._starts_failed = 0
        self._gave_up = False
        self._load = Load()
        self._is_loaded = False  # whether something may be kept loaded for further workers
        self._last_error: WorkerStartFailed | WorkerDied | None = None
        self._look_at = NEVER
        self._stopped = 0
        self._lost = 0
        self._killed: list[int] = []
        self._actions: list[Callable[[], object]] = []

    def __repr__(self) -> str:
        with self._lock:
            ready, workers = self._workers.serving(), len(self._workers)
        return f"<WorkerPool of {self.spec.key}: {self._state.name}, {ready} of {workers} workers ready>"

    def __enter__(self) -> WorkerPool:
        self.scale(self._initial)
        try:
            self.wait_ready()
        except BaseException:
            self.close(drain=False)
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # -- for any thread ------------------------------------------------------------------------------------------------

    @property
    def state(self) -> VersionState:
        """The state of the version that this pool serves."""
        return self._state

    @property
    def wanted(self) -> Scale:
        """How many workers are wanted."""
        return self._scale

    @property
    def sharing(self) -> Sharing:
        """Which way the workers get their weights, and why."""
        return self._host.sharing

    @property
    def last_error(self) -> WorkerStartFailed | WorkerDied | None:
        """Why a worker ended unasked the last time; None once all wanted workers are there and one has served since."""
        return self._last_error

    def info(self) -> tuple[WorkerInfo, ...]:
        """Return what is known of each worker, oldest first. Does not block."""
        with self._lock:
            return tuple(worker.info() for worker in self._workers)

    def feed_from(self, source: JobSource) -> None:
        """Have idle workers take batches from ``source``, after what was submitted. To be called before :meth:`scale`.

        Whoever owns the source calls :meth:`pump` when it may have a batch.
        """
        self._queue.source = source

    def scale(self, wanted: Scale, *, timeout: float = -1) -> None:
        """Set how many workers shall be; return at once. Asking again makes a pool that had given up try again.

        Args:
            wanted: the least and the most workers.
            timeout: how many seconds a worker that is to go may take to finish its batch; -1: as long as that takes.

        Raises:
            ManagerClosed: the pool was closed.
            InvalidArgument: ``timeout`` is less than -1 or no number.
        """
        check_number("timeout", timeout, minimum=-1, unit="seconds (-1: no limit)", whole=False)
        with self._lock:
            if self._state in _OVER:
                raise self._closed_error()
            self._scale = wanted
            self._drain_until = drain_until = NEVER if timeout < 0 else time.monotonic() + timeout
            self._gave_up = False
            self._failures = Failures()
        self._reconcile()
        with self._lock:
            if self._drain_until == drain_until:
                self._drain_until = NEVER  # a worker that goes later, to be replaced or for lack of work, has its time
        self.pump()

    def wait_ready(self, timeout: float | None = None) -> None:
        """Block until at least as many workers as wanted are ready and those not wanted any more are gone.

        Args:
            timeout: the longest to wait, in seconds; None: no limit (each start has ``startup_timeout``).

        Raises:
            WorkerStartFailed: a worker could not be started meanwhile.
            DeadlineExceeded: the time was over.
            ManagerClosed: the pool was closed meanwhile.
        """
        with self._changed:
            before = self._starts_failed
            if not self._changed.wait_for(lambda: self._is_settled_locked(before), timeout):
                raise DeadlineExceeded(f"Scaling {self.spec.key}", timeout or 0)
            if self._state in _OVER:
                raise self._closed_error()
            # A start may have failed and the next one not; then all is as it was asked for.
            error = None if self._is_as_wanted_locked() else self._last_error or self._no_worker_error_locked()
            if error is not None:
                raise error

    def run(self, rows: Sequence[Any], *, timeout: float | None = None) -> list[Any]:
        """Run one batch and return its answers, in order; block for at most ``timeout`` seconds.

        Raises:
            HandlerFailed: the handler raised, or gave a wrong number of answers.
            WorkerDied: the worker ended while it ran the batch.
            NoWorker: there is no worker, and there will be none by itself.
            ManagerClosed: the pool was closed.
            TimeoutError: the time was over; the batch may still run.
        """
        answers: list[Any] = self.submit(rows).result(timeout)
        return answers

    def submit(self, rows: Sequence[Any]) -> AnswerFuture:
        """Queue one batch of rows, which must be picklable, and return the future of its answers. Does not block.

        It goes before what ``source`` has. Raises NoWorker and ManagerClosed as :meth:`run` does.
        """
        return self._add(OwnJob(self.spec.key, [WorkerRequest(encode(row, frozen=True), "") for row in rows]))

    def describe(self) -> AnswerFuture:
        """Have a worker run its handler's ``describe_handle``; return the future of what that says. Does not block."""
        return self._add(OwnJob(self.spec.key, None))

    def abandon_unwanted(self) -> None:
        """Let workers know for whose batch nobody waits any more. Does not block."""
        with self._lock:
            unwanted = [
                (worker.handle, number)
                for worker in self._workers
                for number, job in worker.jobs.items()
                if worker.handle is not None and job.is_over()
            ]
        # The first one that is with a worker is what it computes, and it keeps one number in mind: so that comes last.
        for handle, number in reversed(unwanted):
            handle.abandon(number)

    def check_serving(self) -> None:
        """Raise ManagerClosed or NoWorker if a request that came now would never be run. Does not block."""
        if self._state is VersionState.READY:
            return  # what changes at this moment is dealt with when the request is there
        with self._lock:
            if self._state in _OVER:
                raise self._closed_error()
            if error := self._no_worker_error_locked():
                raise error

    def pump(self) -> None:
        """Hand waiting batches to workers. To be called when there may be one; does not block."""
        while (assigned := self._assign()) is not None:
            worker, number, job = assigned
            handle = worker.handle
            if handle is None:
                continue
            if isinstance(job, OwnJob) and job.is_description:
                handle.describe(number)
            else:
                handle.run(number, job.items)
            if not self._queue.may_have_some():
                break
        if self._actions:
            self._flush()

    def close(self, timeout: float = 30, *, drain: bool = True) -> CloseReport:
        """Take nothing more, let what was accepted finish, end all workers, and return what had to be done for it.

        Blocks until no worker is left. What is not finished ``timeout`` seconds from now (at once, unless ``drain``)
        fails with ManagerClosed, and its worker is killed. Idempotent. The phases are there one by one for an owner of
        several pools: :meth:`retire`, :meth:`wait_quiet`, :meth:`end`, :meth:`join`.
        """
        check_number("timeout", timeout, minimum=0, unit="seconds", whole=False)
        started = time.monotonic()
        self.retire()
        if drain:
            self.wait_quiet(timeout)
        self.end(started + timeout)
        report = self.join(started)
        if self._owns_backend:
            self._backend.close()
        return report

    def retire(self) -> None:
        """Take nothing more from :meth:`submit`; what ``source`` gives is still run. Does not block; idempotent."""
        with self._lock:
            if self._state not in _OVER:
                self._stopped, self._killed = 0, []  # what closing does is reported, not what was before
                self._advance_locked(VersionEvent.RETIRE)
        self.pump()

    def wait_quiet(self, timeout: float) -> bool:
        """Block until nothing runs and nothing waits that could; at most ``timeout`` seconds. Return whether it is so."""
        with self._changed:
            return self._changed.wait_for(self._is_quiet_locked, max(0.0, timeout))

    def end(self, deadline: float) -> None:
        """Fail what is not finished, and tell all workers to end by ``deadline`` (monotonic, s). Does not block."""
        with self._lock:
            self._is_ending = True
            self._lost += self._end_all_locked(deadline)
        self._flush()
        self._lost += self._fail_waiting(self._closed_error())

    def join(self, started: float) -> CloseReport:
        """Block until no worker is left, after :meth:`end`; return what closing, begun at ``started``, has done."""
        with self._changed:
            # No time limit: whoever does not end when told to is killed, and a backend reports every end, its own included.
            self._changed.wait_for(lambda: not self._workers)
        self._host.close()
        with self._lock:
            if self._state is VersionState.RETIRING:
                self._advance_locked(VersionEvent.VANISH)
        self._flush()
        return CloseReport(time.monotonic() - started, self._stopped, tuple(self._killed), self._lost)

    # -- deciding: under the lock --------------------------------------------------------------------------------------

    def _assign(self) -> tuple[PoolWorker, int, Job] | None:
        """Assign the next batch to a worker; None if there is no such pair."""
        with self._lock:
            if not self._queue.may_have_some():
                return None
            if (worker := self._workers.take_idle()) is not None:
                if (job := self._queue.take()) is not None:
                    return self._assign_locked(worker, job)
                self._workers.note_idle(worker)
                return None
            busy = self._workers.busy_with_room(self.spec.batches_in_flight)
            if busy is not None and (job := self._queue.take(full=True)) is not None:
                return self._assign_locked(busy, job)
            # In this order: counting what waits takes its time, and under load this is asked for every request.
            if self._workers.any_promising() or len(self._queue) == 0:
                return None
            unservable = self._no_worker_error_locked()
        if unservable is not None:
            self._fail_waiting(unservable)
        else:
            self._reconcile()  # nobody is there for what waits, and somebody may be
        return None

    def _assign_locked(self, worker: PoolWorker, job: Job) -> tuple[PoolWorker, int, Job]:
        number, now = next(self._numbers), time.monotonic()
        worker.assign(number, job, now, self.spec.response_timeout_s)
        look_at = worker.overdue_at
        if self._scale.min_workers < self._scale.max_workers:
            look_at = min(look_at, now + _FIRST_LOOK_S)
        if look_at < self._look_at:
            self._look_by_locked(look_at)
        return worker, number, job

    def _no_worker_error_locked(self) -> NoWorker | None:
        key = self.spec.key
        if self._workers.any_promising():
            return None
        if self._scale.max_workers == 0:
            return NoWorker(key.name, key.version, "it is scaled to 0 workers; scale it up first")
        if self._gave_up:
            reason = self._last_error.reason if self._last_error else "its workers could not be started"
            return NoWorker(key.name, key.version, f"{reason}; starting workers was given up, scale it to try again")
        return None

    def _closed_error(self) -> ManagerClosed:
        return ManagerClosed(f"The worker pool of {self.spec.key}")

    def _is_settled_locked(self, starts_failed_before: int) -> bool:
        if self._state in (*_OVER, VersionState.FAILED) or self._starts_failed > starts_failed_before:
            return True
        return self._is_as_wanted_locked()

    def _is_as_wanted_locked(self) -> bool:
        return self._workers.serving() >= self._scale.min_workers and len(self._workers) <= self._scale.max_workers

    def _is_quiet_locked(self) -> bool:
        """Whether nothing runs, and nothing waits that a worker could still take."""
        if self._workers.any_with_jobs():
            return False
        return len(self._queue) == 0 or self._no_worker_error_locked() is not None

    def _reconcile(self) -> None:
        """Bring what is nearer to what is wanted."""
        with self._lock:
            while not self._is_ending:
                if self._scale.min_workers < self._scale.max_workers:
                    self._load = self._load.observed(self._workers.observe(self._queue))
                plan = decide(self._situation_locked())
                self._apply_locked(plan)
                if plan.is_empty:
                    if plan.wake_at is not None:
                        self._look_by_locked(plan.wake_at)
                    break
            self._follow_workers_locked()
            self._changed.notify_all()
        self._flush()

    def _situation_locked(self) -> Situation:
        return Situation(
            scale=self._scale,
            workers=[worker.facts() for worker in self._workers],
            waiting=len(self._queue),
            now=time.monotonic(),
            load=self._load,
            scale_down_delay_s=self.spec.scale_down_delay_s,
            failures=self._failures,
            jitter=self._jitter,
            max_retry_timeout_s=self.spec.max_retry_timeout_s,
            gave_up=self._gave_up,
            is_loaded=self._is_loaded,
            empty_since=self._workers.empty_since,
            template_idle_timeout_s=self.spec.template_idle_timeout_s,
        )

    def _apply_locked(self, plan: Plan) -> None:
        for _ in range(plan.add):
            self._workers.add(str(next(self._worker_ids)))
        for worker_id in plan.spawn:
            self._spawn_locked(self._workers[worker_id])
        for worker_id in plan.remove:
            self._remove_locked(self._workers[worker_id])
        if plan.give_up:
            self._give_up_locked()
        if plan.rest:
            self._is_loaded = False
            self._actions.append(self._host.rest)

    def _give_up_locked(self) -> None:
        self._gave_up = True
        error = self._last_error
        self._actions.append(lambda: log.error("Starting workers of %s was given up: %s", self.spec.key, error))
        self._actions.append(self.pump)  # fails what waits, if nobody is left to take it

    def _spawn_locked(self, worker: PoolWorker) -> None:
        worker.advance(WorkerEvent.SPAWN)
        worker.spawned_at = time.monotonic()
        worker.overdue_at = worker.spawned_at + self.spec.startup_timeout_s
        self._look_by_locked(worker.overdue_at)
        self._is_loaded = True
        threads = self.spec.threads_per_worker or default_threads(_cores(), self._scale.max_workers)
        self._actions.append(lambda: self._start(worker, threads))

    def _remove_locked(self, worker: PoolWorker) -> None:
        """Let a worker go: at once if it does nothing, else when its batch is done or the time for that is over."""
        worker.is_unwanted = True
        if worker.state is WorkerState.BUSY:
            worker.advance(WorkerEvent.DRAIN)
            self._hurry_locked(worker, self._drain_until, "the pool was scaled down and its time to finish was over")
        else:
            self._stop_locked(worker, STOP_GRACE_S)

    def _hurry_locked(self, worker: PoolWorker, overdue_at: float, reason: str) -> None:
        """Give a worker that runs a batch no longer than until ``overdue_at``."""
        if overdue_at < worker.overdue_at:
            worker.overdue_at, worker.end_reason = overdue_at, reason
            self._look_by_locked(overdue_at)

    def _stop_locked(self, worker: PoolWorker, grace_s: float) -> None:
        """Tell a worker without a batch to end."""
        worker.is_unwanted = True
        if worker.state is WorkerState.WANTED:
            worker.advance(WorkerEvent.EXIT)
            self._workers.forget(worker)
            self._changed.notify_all()
            return
        # One that is still loading would not read a message before it is done with that.
        worker.is_terminated = worker.state is WorkerState.LOADING
        worker.advance(WorkerEvent.STOP)
        worker.overdue_at = time.monotonic() + grace_s
        self._look_by_locked(worker.overdue_at)
        if worker.handle is not None:
            self._actions.append(worker.handle.terminate if worker.is_terminated else worker.handle.stop)

    def _end_all_locked(self, deadline: float) -> int:
        """Tell all workers to end by ``deadline``; one that still runs a batch has had its time. Return the batches lost."""
        now = time.monotonic()
        lost = 0
        for worker in self._workers:
            worker.is_unwanted = True
            if worker.jobs:
                lost += size_of(worker.jobs.values())
                self._hurry_locked(worker, now, "the pool was closed and its time to finish was over")
            elif worker.state is not WorkerState.STOPPING:
                # Even without any time left, an idle worker gets a moment to go by itself.
                self._stop_locked(worker, min(STOP_GRACE_S, max(1.0, deadline - now)))
        return lost

    def _look_by_locked(self, when: float) -> None:
        """Have :meth:`_look` called at ``when`` at the latest: one timer is enough, however many batches run."""
        if when < self._look_at:
            self._look_at = when
            self._actions.append(lambda: self._backend.call_at(when, lambda: self._look(when)))

    def _escalate_locked(self, worker: PoolWorker) -> None:
        """Make a worker whose time is over end: SIGTERM if it was told to go by a message, else SIGKILL."""
        handle = worker.handle
        if worker.state is not WorkerState.STOPPING:
            worker.end_reason = worker.end_reason or self._overdue_reason(worker.state)
            worker.advance(WorkerEvent.STOP)
        elif not worker.is_terminated:
            worker.is_terminated = True
            worker.overdue_at = time.monotonic() + TERMINATE_GRACE_S
            if handle is not None:
                self._actions.append(handle.terminate)
            return
        worker.overdue_at = NEVER
        if not self._backend.can_kill:
            self._gave_up = True  # before anybody thinks of one in its place
        elif handle is not None and handle.pid is not None:
            self._killed.append(handle.pid)
        if handle is not None:
            self._actions.append(handle.kill)

    def _overdue_reason(self, state: WorkerState) -> str:
        if state is WorkerState.LOADING:
            return f"it was not ready within startup_timeout ({self.spec.startup_timeout_s:g} s)"
        return f"it did not answer within response_timeout ({self.spec.response_timeout_s:g} s)"

    def _follow_workers_locked(self) -> None:
        """Bring the version's state in line with what its workers are."""
        if self._state in _OVER:
            return
        if self._workers.serving():
            target = VersionState.READY
        elif self._workers.any_promising():
            target = VersionState.LOADING
        else:
            target = VersionState.FAILED if self._gave_up else VersionState.REGISTERED
        for event in _ROUTES[self._state, target]:
            self._advance_locked(event)

    def _advance_locked(self, event: VersionEvent) -> None:
        before, self._state = self._state, advance_version(self._state, event)
        self._tell_locked(VersionStateChanged(self.spec.key, before, self._state))
        self._changed.notify_all()

    def _tell_locked(self, event: Event) -> None:
        listener = self._listener
        if listener is not None:
            self._actions.append(lambda: listener(event))

    # -- acting: without the lock --------------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Do what was decided under the lock."""
        while self._actions:
            with self._lock:
                actions, self._actions = self._actions, []
            for action in actions:
                try:
                    action()
                except ManagerClosed:
                    log.debug("The backend of %s is closed", self.spec.key, exc_info=True)
                    self._abandon()
                except Exception:
                    log.exception("Something that the pool of %s set off failed", self.spec.key)

    def _abandon(self) -> None:
        """Without a backend there will be no worker, and no timer that tries again."""
        with self._lock:
            self._gave_up = True
        self._fail_waiting(self._closed_error())

    def _start(self, worker: PoolWorker, threads: int) -> None:
        handle = self._host.worker(worker.id, threads, _WorkerEvents(self, worker))
        with self._lock:
            worker.handle = handle
        try:
            handle.start()
        except (OSError, TorchmgmtError) as error:
            reason = f"its process could not be started: {error}"
            self._on_exited(worker, WorkerExit(0, None, reason, is_final=isinstance(error, ManagerClosed)))
            return
        with self._lock:
            is_stopping = worker.state is WorkerState.STOPPING
        if is_stopping:
            handle.terminate()

    def _add(self, job: OwnJob) -> AnswerFuture:
        with self._lock:
            if self._state in _OVER:
                raise self._closed_error()
            if error := self._no_worker_error_locked():
                raise error
            self._queue.add(job)
        self.pump()
        return job.future

    def _fail_waiting(self, error: TorchmgmtError) -> int:
        with self._lock:
            jobs = self._queue.clear()
        for job in jobs:
            job.fail(error)
        source = self._queue.source
        from_source = source.fail_waiting(error) if source is not None else 0
        self._tell_dropped(error, sum(len(job.items) for job in jobs) + from_source)
        return size_of(jobs) + from_source

    def _tell_dropped(self, error: BaseException, count: int) -> None:
        if self._listener and count:
            self._listener(RequestsDropped(self.spec.key, type(error).__name__, count))

    def _look(self, when: float) -> None:
        """Deal with every worker whose time is over, then with what is wanted."""
        now = time.monotonic()
        with self._lock:
            if when != self._look_at:
                return  # an earlier look was asked for since, and sees to the next one
            self._look_at = NEVER
            for worker in self._workers:
                if worker.overdue_at <= now:
                    self._escalate_locked(worker)
            self._look_by_locked(self._workers.next_overdue_at())
        self._reconcile()

    # -- what workers tell, on the backend's thread --------------------------------------------------------------------

    def _on_ready(self, worker: PoolWorker) -> None:
        with self._lock:
            if worker.state is not WorkerState.LOADING:
                return  # it was told to go while it loaded
            worker.advance(WorkerEvent.READY)
            worker.ready_at = time.monotonic()
            worker.overdue_at = NEVER
            self._workers.note_idle(worker)
            self._follow_workers_locked()
            pid = worker.handle.pid if worker.handle else None
            self._tell_locked(WorkerReady(self.spec.key, worker.id, pid or 0, worker.ready_at - worker.spawned_at))
            self._changed.notify_all()
        self._reconcile()  # the one that it takes the place of can go now
        self.pump()

    def _on_done(self, worker: PoolWorker, number: int, outcomes: Sequence[Outcome], handler_s: float | None) -> None:
        with self._lock:
            now = time.monotonic()
            ran = (worker.began_at, now, handler_s)
            job = worker.finish(number, now, self.spec.response_timeout_s)
            if job is None:
                return
            self._workers.note_run(now - ran[0])
            is_worn = self._wears and worker.note_wear(self.spec)
            self._after_batch_locked(worker)
            is_idle = worker.state is WorkerState.READY and not self._queue.may_have_some()
        if is_idle:
            self._answer(worker, job, outcomes, ran)  # first, as somebody waits for this, and for nothing else
        if is_worn:
            self._reconcile()
        if self._actions or self._queue.may_have_some():
            self.pump()
        if not is_idle:
            self._answer(worker, job, outcomes, ran)  # last, so that the worker computes meanwhile

    def _answer(self, worker: PoolWorker, job: Job, outcomes: Sequence[Outcome], ran: Ran) -> None:
        has_faults = any(isinstance(outcome, WorkerFault) for outcome in outcomes)
        lines = worker.handle.last_lines() if has_faults and worker.handle is not None else ()
        items = job.items
        answers = answers_of(self.spec.key, items, outcomes, lines)
        abandoned = job.finish(answers)
        if self._listener and items:
            failed = failures_of(answers, abandoned) if has_faults else NO_FAILURES
            self._listener(BatchFinished(self.spec.key, worker.id, items, job.arrived, *ran, failed, abandoned))

    def _after_batch_locked(self, worker: PoolWorker) -> None:
        """Let a worker that has nothing more to do wait for the next batch, or go."""
        if self._last_error is not None and worker.state is WorkerState.BUSY:
            self._note_success_locked()
        if not worker.jobs:
            if self._is_ending and worker.state in {WorkerState.BUSY, WorkerState.DRAINING}:
                self._stop_locked(worker, STOP_GRACE_S)  # it was done just before it would have been killed
            elif worker.state is WorkerState.BUSY:
                worker.advance(WorkerEvent.FINISH)
                self._workers.note_idle(worker)
            elif worker.state is WorkerState.DRAINING:
                self._stop_locked(worker, STOP_GRACE_S)
        elif worker.overdue_at < self._look_at:
            self._look_by_locked(worker.overdue_at)
        if self._state is VersionState.RETIRING:
            self._changed.notify_all()

    def _on_part(self, worker: PoolWorker, number: int, index: int, part: Encoded) -> None:
        with self._lock:
            job = worker.prolong(number, time.monotonic() + self.spec.response_timeout_s)
        if job is None:
            return
        if job.is_over():
            if worker.handle is not None:
                worker.handle.abandon(number)
        elif (on_part := job.items[index].on_part) is not None:
            on_part(part)

    def _on_measured(self, worker: PoolWorker, metrics: Sequence[RawMetric]) -> None:
        if not self._listener:
            return
        event = HandlerMetrics(self.spec.key, worker.id, tuple(map(MetricRecord.of, metrics)))
        with self._lock:
            self._tell_locked(event)
        self._flush()

    def _on_exited(self, worker: PoolWorker, exit: WorkerExit) -> None:
        with self._lock:
            was = worker.state
            error = error_of_death(
                self.spec.key, exit, end_reason=worker.end_reason, was_loading=worker.ready_at == NEVER
            )
            worker.advance(WorkerEvent.EXIT)
            lost, unstarted = worker.take_jobs(exit.last_started)
            self._workers.forget(worker)
            self._stopped += 1
            if not self._is_ending:
                self._queue.give_back(unstarted)
            if not worker.is_unwanted:
                self._note_failure_locked(worker, error, is_retryable=exit.is_retryable)
            if exit.is_final:
                self._last_error = error
                self._give_up_locked()
            self._follow_workers_locked()
            self._tell_locked(WorkerStopped(self.spec.key, worker.id, exit, worker.is_unwanted))
            self._changed.notify_all()
        log.debug("Worker %s of %s went from %s to its end", worker.id, self.spec.key, was.name)
        for job in lost:
            self._fail_lost(worker, job, error)
        for job in unstarted if self._is_ending else ():
            job.fail(self._closed_error())
            self._tell_dropped(self._closed_error(), len(job.items))
        self._reconcile()
        self.pump()

    def _fail_lost(self, worker: PoolWorker, job: Job, error: WorkerStartFailed | WorkerDied) -> None:
        abandoned = job.fail(error)
        items = job.items
        if self._listener and items:
            failed = failures_of([error] * len(items), abandoned)
            ran = (worker.began_at, time.monotonic(), None)
            self._listener(BatchFinished(self.spec.key, worker.id, items, job.arrived, *ran, failed, abandoned))

    def _note_success_locked(self) -> None:
        """A worker has served: back-off begins anew, and once all that are wanted are there, all is well again."""
        self._failures = Failures()
        if self._workers.serving() >= self._scale.min_workers:
            self._last_error = None

    def _note_failure_locked(
        self, worker: PoolWorker, error: WorkerStartFailed | WorkerDied, *, is_retryable: bool
    ) -> None:
        now = time.monotonic()
        earlier = Failures() if now - worker.ready_at >= WELL_AFTER_S else self._failures
        self._failures = earlier.another(now, worker.spawned_at)
        self._jitter = random.uniform(0.5, 1.5)
        self._last_error = error
        # Whoever waits for a start need not hear of what another attempt, which is made in a moment, may well set right.
        self._starts_failed += isinstance(error, WorkerStartFailed) and not is_retryable
        self._actions.append(lambda: log.warning("%s", error))


class _WorkerEvents:
    """Hands what a backend tells of one worker on to its pool."""

    def __init__(self, pool: WorkerPool, worker: PoolWorker) -> None:
        self._pool = pool
        self._worker = worker

    def ready(self) -> None:
        self._pool._on_ready(self._worker)

    def done(self, number: int, outcomes: Sequence[Outcome], handler_s: float | None = None) -> None:
        self._pool._on_done(self._worker, number, outcomes, handler_s)

    def part(self, number: int, index: int, part: Encoded) -> None:
        self._pool._on_part(self._worker, number, index, part)

    def measured(self, metrics: Sequence[RawMetric]) -> None:
        self._pool._on_measured(self._worker, metrics)

    def exited(self, exit: WorkerExit) -> None:
        self._pool._on_exited(self._worker, exit)


def _cores() -> int:
    """Return how many cores this program may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
