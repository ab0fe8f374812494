"""WorkerPool: the workers of one model version. It starts them, hands them batches, watches them and lets them go.

What shall be is stored (``Scale``), and every change, a scale call as well as a death, ends in the same place: under the
lock ``scaling.decide`` says what brings the pool nearer to it, and after the lock is released that is done.

The pool has the lock, and those who wait for it. What is decided under the lock has rooms of its own: which batch goes to
whom (``assigner``), which workers there are (``staffing``), how starting them has gone (``attempts``), how they end
(``endings``), and what that makes of the version (``pool_version``). What is to be done afterwards is noted in the
``agenda``; ``starter`` starts workers then, and ``outcomes`` answers requests.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from torchmgmt.agenda import Agenda
from torchmgmt.answer_future import AnswerFuture
from torchmgmt.assigner import Assigner, Assignment
from torchmgmt.attempts import Attempts
from torchmgmt.backends import Backend, Outcome
from torchmgmt.backends.process import ProcessBackend
from torchmgmt.checks import check_number
from torchmgmt.encoding import encode, encode_with_code
from torchmgmt.endings import Endings
from torchmgmt.errors import DeadlineExceeded, ManagerClosed, TorchmgmtError, WorkerDied, WorkerStartFailed
from torchmgmt.events import HandlerMetrics, Listener, WorkerReady, WorkerStopped
from torchmgmt.exchange import Encoded, WorkerRequest
from torchmgmt.job import JobQueue, JobSource, OwnJob
from torchmgmt.lifecycle import VersionEvent, VersionState, WorkerEvent, WorkerState
from torchmgmt.outcomes import Outcomes, error_of_death
from torchmgmt.pool_version import PoolVersion
from torchmgmt.pool_worker import NEVER, PoolWorker, PoolWorkers
from torchmgmt.recalls import Recalls
from torchmgmt.records import (
    CloseReport,
    MetricRecord,
    ModelSpec,
    RawMetric,
    Scale,
    Sharing,
    WorkerExit,
    WorkerInfo,
)
from torchmgmt.staffing import Staffing
from torchmgmt.starter import Starter

__all__ = ["WorkerPool"]

log = logging.getLogger(__name__)

FIRST_WORKER_ID = 9000


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
        self._listener = listener
        self._outcomes = Outcomes(spec.key, listener)
        self._owns_backend = backend is None
        self._backend: Backend = ProcessBackend() if backend is None else backend
        self._host = self._backend.host(spec)
        self._wears = spec.max_requests is not None or spec.max_memory_bytes is not None
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        # guarded by _lock
        self._workers = crew = PoolWorkers()
        self._queue = queue = JobQueue()
        self._agenda = agenda = Agenda(
            spec.key, self._lock, listener, self._backend.call_at, on_look=self._look, on_closed=self._abandon
        )
        self._version = PoolVersion(spec.key, agenda)
        self._attempts = attempts = Attempts(spec.key, agenda, on_given_up=self.pump)
        self._endings = endings = Endings(spec, crew, agenda, attempts, can_kill=self._backend.can_kill)
        starter = Starter(spec, self._host, self._lock, agenda, lambda worker: _WorkerEvents(self, worker))
        ids = itertools.count(FIRST_WORKER_ID) if worker_ids is None else worker_ids
        self._staffing = staffing = Staffing(spec, crew, queue, agenda, attempts, endings, starter, ids)
        self._assigner = Assigner(spec, crew, queue, agenda, staffing, endings)
        self._recalls = Recalls(crew, queue, agenda, self._assigner, endings)
        self._stopped = 0
        self._lost = 0

    def __repr__(self) -> str:
        with self._lock:
            ready, workers = self._workers.serving(), len(self._workers)
        return f"<WorkerPool of {self.spec.key}: {self.state.name}, {ready} of {workers} workers ready>"

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
        return self._version.state

    @property
    def wanted(self) -> Scale:
        """How many workers are wanted."""
        return self._staffing.wanted

    @property
    def sharing(self) -> Sharing:
        """Which way the workers get their weights, and why."""
        return self._host.sharing

    @property
    def last_error(self) -> WorkerStartFailed | WorkerDied | None:
        """Why a worker ended unasked the last time; None once all wanted workers are there and one has served since."""
        return self._attempts.last_error

    def info(self) -> tuple[WorkerInfo, ...]:
        """Return what is known of each worker, oldest first. Does not block."""
        with self._lock:
            return tuple([worker.info() for worker in self._workers]) if self._workers else ()

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
            if self._version.is_over:
                raise self._closed_error()
            self._staffing.want(wanted)
            self._endings.drain_until = drain_until = NEVER if timeout < 0 else time.monotonic() + timeout
        self._reconcile()
        with self._lock:
            if self._endings.drain_until == drain_until:
                # A worker that goes later, to be replaced or for lack of work, has its time.
                self._endings.drain_until = NEVER
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
            before = self._attempts.failed_starts
            if not self._changed.wait_for(lambda: self._is_settled_locked(before), timeout):
                raise DeadlineExceeded(f"Scaling {self.spec.key}", timeout or 0)
            if self._version.is_over:
                raise self._closed_error()
            # A start may have failed and the next one not; then all is as it was asked for.
            error = None if self._staffing.is_as_wanted else self.last_error or self._staffing.no_worker_error()
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
        return self._add(OwnJob(self.spec.key, [WorkerRequest(self._encoded(row), "") for row in rows]))

    def _encoded(self, row: object) -> Encoded:
        return encode_with_code(row, frozen=True)[0] if self.spec.is_trusted else encode(row, frozen=True)

    def describe(self) -> AnswerFuture:
        """Have a worker run its handler's ``describe_handle``; return the future of what that says. Does not block."""
        return self._add(OwnJob(self.spec.key, None))

    def abandon_unwanted(self) -> None:
        """Let workers know for whose batch nobody waits any more. Does not block."""
        with self._lock:
            unwanted = self._workers.unwanted_batches()
        # The first one that is with a worker is what it computes, and it keeps one number in mind: so that comes last.
        for handle, number in reversed(unwanted):
            handle.abandon(number)

    def check_serving(self) -> None:
        """Raise ManagerClosed or NoWorker if a request that came now would never be run. Does not block."""
        if self.state is VersionState.READY:
            return  # what changes at this moment is dealt with when the request is there
        with self._lock:
            self._check_serving_locked()

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
        if self._agenda.actions:
            self._agenda.flush()

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
            if not self._version.is_over:
                self._stopped = 0  # what closing does is reported, not what was before
                self._endings.killed.clear()
                self._version.advance(VersionEvent.RETIRE)
                self._changed.notify_all()
        self.pump()

    def wait_quiet(self, timeout: float) -> bool:
        """Block until nothing runs and nothing waits that could; at most ``timeout`` seconds. Return whether it is so."""
        with self._changed:
            return self._changed.wait_for(self._assigner.is_quiet, max(0.0, timeout))

    def end(self, deadline: float) -> None:
        """Fail what is not finished, and tell all workers to end by ``deadline`` (monotonic, s). Does not block."""
        with self._lock:
            self._lost += self._endings.stop_all(deadline)
            self._changed.notify_all()
        self._agenda.flush()
        self._lost += self._fail_waiting(self._closed_error())

    def join(self, started: float) -> CloseReport:
        """Block until no worker is left, after :meth:`end`; return what closing, begun at ``started``, has done."""
        with self._changed:
            # No time limit: whoever does not end when told to is killed, and a backend reports every end, its own included.
            self._changed.wait_for(lambda: not self._workers)
        self._host.close()
        with self._lock:
            if self.state is VersionState.RETIRING:
                self._version.advance(VersionEvent.VANISH)
                self._changed.notify_all()
        self._agenda.flush()
        return CloseReport(time.monotonic() - started, self._stopped, tuple(self._endings.killed), self._lost)

    # -- deciding: under the lock --------------------------------------------------------------------------------------

    def _assign(self) -> Assignment | None:
        """Assign the next batch to a worker; None if there is no such pair."""
        with self._lock:
            if not self._queue.may_have_some():
                return None
            if (assigned := self._assigner.assign()) is not None:
                return assigned
            if not self._assigner.is_stuck():
                return None
            unservable = self._staffing.no_worker_error()
        if unservable is not None:
            self._fail_waiting(unservable)
        else:
            self._reconcile()  # nobody is there for what waits, and somebody may be
        return None

    def _check_serving_locked(self) -> None:
        """Raise why a request that came now would never be run, if that is so."""
        if self._version.is_over:
            raise self._closed_error()
        if error := self._staffing.no_worker_error():
            raise error

    def _closed_error(self) -> ManagerClosed:
        return ManagerClosed(f"The worker pool of {self.spec.key}")

    def _is_settled_locked(self, failed_starts_before: int) -> bool:
        if self._version.is_over or self.state is VersionState.FAILED:
            return True
        return self._attempts.failed_starts > failed_starts_before or self._staffing.is_as_wanted

    def _reconcile(self) -> None:
        """Bring what is nearer to what is wanted."""
        with self._lock:
            if not self._endings.is_ending:
                self._staffing.adjust()
            self._version.follow(self._workers, gave_up=self._attempts.gave_up)
            self._changed.notify_all()
        self._agenda.flush()

    # -- acting: without the lock --------------------------------------------------------------------------------------

    def _abandon(self) -> None:
        """Without a backend there will be no worker, and no timer that tries again."""
        with self._lock:
            self._attempts.cease()
        self._fail_waiting(self._closed_error())

    def _add(self, job: OwnJob) -> AnswerFuture:
        with self._lock:
            self._check_serving_locked()
            self._queue.add(job)
        self.pump()
        return job.future

    def _fail_waiting(self, error: TorchmgmtError) -> int:
        with self._lock:
            jobs = self._queue.clear()
        source = self._queue.source
        from_source = source.fail_waiting(error) if source is not None else 0
        return self._outcomes.drop(jobs, error, further=from_source)

    def _look(self, when: float) -> None:
        """Deal with every worker whose time is over, then with what is wanted."""
        now = time.monotonic()
        with self._lock:
            if not self._agenda.take_look(when):
                return
            self._endings.escalate(now)
            self._recalls.look(now)
        self._reconcile()

    # -- what workers tell, on the backend's thread --------------------------------------------------------------------

    def _on_ready(self, worker: PoolWorker) -> None:
        with self._lock:
            if worker.state is not WorkerState.LOADING:
                return  # it was told to go while it loaded
            worker.note_ready()
            self._workers.note_idle(worker)
            self._version.follow(self._workers, gave_up=self._attempts.gave_up)
            pid = worker.handle.pid if worker.handle else None
            self._agenda.tell(WorkerReady(self.spec.key, worker.id, pid or 0, worker.ready_at - worker.spawned_at))
            self._changed.notify_all()
        self._reconcile()  # the one that it takes the place of can go now
        self.pump()

    def _on_done(self, worker: PoolWorker, number: int, outcomes: Sequence[Outcome], handler_s: float | None) -> None:
        with self._lock:
            finished = self._assigner.finish(worker, number, handler_s)
            if finished is None:
                return
            is_worn = self._wears and worker.note_wear(self.spec)
            if self.state is VersionState.RETIRING:
                self._changed.notify_all()
            is_idle = worker.state is WorkerState.READY and not self._queue.may_have_some()
        job, ran = finished
        if is_idle:
            self._outcomes.answer(worker, job, outcomes, ran)  # first, as somebody waits for this, and for nothing else
        if is_worn:
            self._reconcile()
        if self._agenda.actions or self._queue.may_have_some():
            self.pump()
        if not is_idle:
            self._outcomes.answer(worker, job, outcomes, ran)  # last, so that the worker computes meanwhile

    def _on_skipped(self, worker: PoolWorker, number: int) -> None:
        with self._lock:
            lost = self._recalls.take_back(worker, number)
            if self.state is VersionState.RETIRING:
                self._changed.notify_all()  # if nobody waits for it, it was the last
        if lost is not None:
            self._outcomes.drop([lost], self._closed_error())
        self.pump()

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
            self._agenda.tell(event)
        self._agenda.flush()

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
            if not self._endings.is_ending:
                self._queue.give_back(unstarted)
            if not worker.is_unwanted:
                self._attempts.note_failure(worker, error, is_retryable=exit.is_retryable)
            if exit.is_final:
                self._attempts.give_up(error)
            self._version.follow(self._workers, gave_up=self._attempts.gave_up)
            self._agenda.tell(WorkerStopped(self.spec.key, worker.id, exit, worker.is_unwanted))
            self._changed.notify_all()
        log.debug("Worker %s of %s went from %s to its end", worker.id, self.spec.key, was.name)
        self._outcomes.lose(worker, lost, error)
        for job in unstarted if self._endings.is_ending else ():
            self._outcomes.drop([job], self._closed_error())
        self._reconcile()
        self.pump()


class _WorkerEvents:
    """Hands what a backend tells of one worker on to its pool."""

    def __init__(self, pool: WorkerPool, worker: PoolWorker) -> None:
        self._pool = pool
        self._worker = worker

    def ready(self) -> None:
        self._pool._on_ready(self._worker)

    def done(self, number: int, outcomes: Sequence[Outcome], handler_s: float | None = None) -> None:
        self._pool._on_done(self._worker, number, outcomes, handler_s)

    def skipped(self, number: int) -> None:
        self._pool._on_skipped(self._worker, number)

    def part(self, number: int, index: int, part: Encoded) -> None:
        self._pool._on_part(self._worker, number, index, part)

    def measured(self, metrics: Sequence[RawMetric]) -> None:
        self._pool._on_measured(self._worker, metrics)

    def exited(self, exit: WorkerExit) -> None:
        self._pool._on_exited(self._worker, exit)
