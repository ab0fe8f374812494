"""WorkerPool: the workers of one model version. It starts them, hands them batches, watches them and lets them go.

What shall be is stored (``Scale``), and every change, a scale call as well as a death, ends in the same place:
``autoscaling.decide`` says what brings the pool nearer to it, and then that is done.

One thread decides and acts: the dispatcher of the backend. Others only hand it what they want, and wait.
"""

from __future__ import annotations

import _thread
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from attrs import define, field

from torchmgmt import forks
from torchmgmt.answer_future import AnswerFuture
from torchmgmt.backends import Backend, Outcome
from torchmgmt.backends.process import ProcessBackend
from torchmgmt.checks import check_number
from torchmgmt.encoding import encode, encode_with_code
from torchmgmt.errors import (
    DeadlineExceeded,
    ManagerClosed,
    TorchmgmtError,
    WorkerDied,
    WorkerStartFailed,
    copy_of,
)
from torchmgmt.events import HandlerMetrics, Listener, WorkerReady, WorkerStopped
from torchmgmt.exchange import Encoded, WorkerRequest
from torchmgmt.lifecycle import VersionEvent, VersionState, WorkerEvent, WorkerState
from torchmgmt.pool.actions import Actions
from torchmgmt.pool.dispatch import JobDispatch
from torchmgmt.pool.jobs import Job, JobQueue, JobSource, OwnJob, Seating
from torchmgmt.pool.results import Ran, Results, error_of_death
from torchmgmt.pool.starter import FIRST_WORKER_ID, WorkerStarter
from torchmgmt.pool.supervisor import Supervisor
from torchmgmt.pool.version import PoolVersion
from torchmgmt.pool.workers import NEVER, PoolWorker, PoolWorkers
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

__all__ = ["WorkerPool"]

# So long after all of them were to be gone a worker that is still there is given up: the system does not end it.
_JOIN_GRACE_S = 10.0


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

    Thread-safe. Making one starts nothing; ``with`` and :meth:`scale` do. A copy in a forked process raises ManagerClosed.

    Args:
        spec: what to load, and the limits to keep.
        workers: how many workers ``with`` starts and waits for, at least 0.
        backend: how workers are run. None: a ProcessBackend of the pool's own, closed with it.
        worker_ids: where the workers' ids come from.
        listener: called with each event, on the dispatcher's thread; while it is false, what is told of each batch is not
            made. What it raises is logged.

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
        self._depth = forks.depth()
        self._initial = Scale(workers, workers)
        self._listener = listener
        self._owns_backend = backend is None
        self._backend: Backend = ProcessBackend() if backend is None else backend
        self._dispatcher = self._backend.dispatcher
        self._host = self._backend.host(spec)
        self._wears = spec.max_requests is not None or spec.max_memory_bytes is not None
        ids = itertools.count(FIRST_WORKER_ID) if worker_ids is None else worker_ids
        # Changed on the dispatcher's thread alone.
        self._workers = workers_ = PoolWorkers()
        self._queue = queue = JobQueue()
        self._seating: Seating | None = None
        self._actions = actions = Actions(
            spec.key, self._dispatcher, listener, on_look=self._look, on_closed=self._lose_backend
        )
        starter = WorkerStarter(
            spec, self._host, actions, functools.partial(_WorkerEvents, self), ids, can_kill=self._backend.can_kill
        )
        self._supervisor = supervisor = Supervisor(spec, workers_, queue, actions, starter)
        self._dispatch = JobDispatch(spec, workers_, queue, actions, supervisor)
        self._results = Results(spec.key, listener)
        self._version = PoolVersion(spec.key, actions)
        self._watchers: list[_Watcher] = []
        self._without_dispatcher = threading.RLock()  # held by who acts in its place once it has ended
        self._is_pumping = False
        self._is_to_pump_again = False
        self._stopped = 0
        self._lost = 0
        self._dispatcher.add_dependent(self)
        # Published for callers: what a request that came now would be told.
        self._refusal: TorchmgmtError | None = self._supervisor.no_worker_error()

    def __repr__(self) -> str:
        return f"<WorkerPool of {self.spec.key}: {self.state.name}, {self._workers.serving()} of {len(self._workers)} workers ready>"

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
        return self._supervisor.wanted

    @property
    def sharing(self) -> Sharing:
        """Which way the workers get their weights, and why."""
        return self._host.sharing

    @property
    def last_error(self) -> WorkerStartFailed | WorkerDied | None:
        """Why a worker ended unasked the last time; None once all wanted workers are there and one has served since."""
        return self._supervisor.failures.last_error

    def info(self) -> tuple[WorkerInfo, ...]:
        """Return what is known of each worker, oldest first. Does not block."""
        return tuple([worker.info() for worker in self._workers])

    def feed_from(self, source: JobSource, seating: Seating | None = None) -> None:
        """Have idle workers take batches from ``source``, after what was submitted. To be called before :meth:`scale`.

        ``seating``: the same, if its callers can hand requests over themselves.

        Whoever owns the source calls :meth:`pump` when it has a batch.
        """
        self._queue.source = source
        self._seating = seating

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
        self._check_process()
        self._call(functools.partial(self._scale, wanted, timeout))

    def wait_ready(self, timeout: float | None = None) -> None:
        """Block until at least as many workers as wanted are ready and those not wanted any more are gone.

        Args:
            timeout: the longest to wait, in seconds; None: no limit (each start has ``startup_timeout``).

        Raises:
            WorkerStartFailed: a worker could not be started meanwhile.
            DeadlineExceeded: the time was over.
            ManagerClosed: the pool was closed meanwhile.
        """
        before = self._supervisor.failures.failed_starts
        if not self._wait_until(lambda: self._is_settled(before), timeout):
            raise DeadlineExceeded(f"Scaling {self.spec.key}", timeout or 0)
        if self._version.is_over:
            raise self._closed_error()
        # A start may have failed and the next one not; then all is as it was asked for.
        error = None if self._supervisor.is_as_wanted else self.last_error or self._supervisor.no_worker_error()
        if error is not None:
            raise copy_of(error)

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

    def describe(self) -> AnswerFuture:
        """Have a worker run its handler's ``describe_handle``; return the future of what that says. Does not block."""
        return self._add(OwnJob(self.spec.key, None))

    def check_serving(self) -> None:
        """Raise ManagerClosed or NoWorker if a request that came now would never be run. Does not block."""
        refusal = self._refusal
        if refusal is not None:
            self._check_process()
            raise copy_of(refusal)

    def close(self, timeout: float = 30, *, drain: bool = True) -> CloseReport:
        """Take nothing more, let what was accepted finish, end all workers, and return what had to be done for it.

        Blocks until no worker is left. What is not finished ``timeout`` seconds from now (at once, unless ``drain``)
        fails with ManagerClosed, and its worker is killed; what nobody waits for any more is not waited for. Idempotent.
        The phases are there one by one for an owner of several pools: :meth:`retire`, :meth:`wait_quiet`, :meth:`end`,
        :meth:`join`.
        """
        check_number("timeout", timeout, minimum=0, unit="seconds", whole=False)
        if forks.depth() != self._depth:
            return CloseReport(0.0)
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
        """Take nothing more from :meth:`submit`; what ``source`` gives is still run. Blocks shortly; idempotent."""
        self._call(self._retire)

    def retire_soon(self) -> None:
        """The same, without waiting for it."""
        self._dispatcher.call_soon(self._retire)

    def wait_quiet(self, timeout: float) -> bool:
        """Block until nothing runs that anybody waits for, and nothing waits that could run; return whether it is so.

        For at most ``timeout`` seconds.
        """
        return self._wait_until(self._dispatch.is_quiet, max(0.0, timeout))

    def end(self, deadline: float) -> None:
        """Fail what is not finished, and tell all workers to end by ``deadline`` (monotonic, s). Blocks shortly."""
        self._call(functools.partial(self._end, deadline))

    def join(self, started: float) -> CloseReport:
        """Block until no worker is left, after :meth:`end`; return what closing, begun at ``started``, has done."""
        # Whoever does not end when told to is killed, and a backend reports every end, its own included.
        if not self._wait_until(lambda: not self._workers, self._join_timeout()):
            self._call(functools.partial(self._give_up_workers, "it was killed, but did not end"))
        self._host.close()
        self._call(self._vanish)
        killed = tuple(self._supervisor.killed)
        return CloseReport(time.monotonic() - started, self._stopped, killed, self._lost)

    def _check_process(self) -> None:
        if forks.depth() != self._depth:
            raise ManagerClosed(
                f"The worker pool of {self.spec.key}", "belongs to the process that this one was forked from"
            )

    def _encoded(self, row: object) -> Encoded:
        return encode_with_code(row, frozen=True)[0] if self.spec.is_trusted else encode(row, frozen=True)

    def _closed_error(self) -> ManagerClosed:
        return ManagerClosed(f"The worker pool of {self.spec.key}")

    def _add(self, job: OwnJob) -> AnswerFuture:
        self._check_process()
        self.check_serving()
        job.future.owner = self._dispatcher
        # Whatever interrupts the first comes after it, and the second is done all the same.
        try:
            self._queue.add(job)
        finally:
            self._dispatcher.call_soon(self.pump)
        return job.future

    def _call(self, act: Callable[[], object]) -> None:
        """Have the dispatcher's thread do something; where that has ended, there is nothing but what it left."""
        try:
            self._dispatcher.call(act)
        except ManagerClosed:
            with self._without_dispatcher:
                act()

    def _wait_until(self, is_so: Callable[[], bool], timeout: float | None) -> bool:
        """Block until ``is_so``, looked at after each change, is true; False if that took longer than ``timeout`` s."""
        watcher = _Watcher(is_so)
        try:
            self._call(functools.partial(self._watch, watcher))
            return watcher.wait(timeout)
        finally:
            watcher.is_over = True

    def _join_timeout(self) -> float:
        latest = max((worker.overdue_at for worker in self._workers if worker.overdue_at < NEVER), default=0.0)
        return max(0.0, latest - time.monotonic()) + _JOIN_GRACE_S

    # -- on the dispatcher's thread --------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Hand waiting batches to workers. On the dispatcher's thread, when there may be one."""
        self._close_seat()
        self._pump()
        self._actions.run()

    def _pump(self) -> None:
        if self._is_pumping:
            self._is_to_pump_again = True
            return
        self._is_pumping = True
        dispatch, queue = self._dispatch, self._queue
        try:
            while True:
                self._is_to_pump_again = False
                while (assigned := dispatch.assign()) is not None:
                    self._send(*assigned)
                    if not queue.may_have_some():
                        break
                # Else there is one that computes, and comes back for what waits.
                if dispatch.asked_from == 1 and queue.may_have_some() and dispatch.is_stuck():
                    self._see_to_stuck()
                if not self._is_to_pump_again:
                    break
        finally:
            self._is_pumping = False
        if self._seating is not None:
            self._seating.need_not_ask(below=dispatch.asked_from)
        self._offer_seat()

    def _offer_seat(self) -> None:
        """Have the next caller hand its request to an idle worker itself. Last, when all else is as it shall be."""
        if self._seating is None or self._dispatch.asked_from != 1:
            return
        if not (self._version.is_over or self._queue.may_have_some()):
            self._dispatch.offer_seat(self._seating)

    def _close_seat(self) -> None:
        """Note what came of that. First, before anything is decided or changed."""
        seating, dispatch = self._seating, self._dispatch
        if seating is None:
            return
        if dispatch.asked_from != 1:
            dispatch.asked_from = 1
            seating.need_not_ask(below=1)
        if dispatch.has_seat:
            dispatch.close_seat(seating)

    def dispatcher_ended(self) -> None:
        """Fail all that is asked of the pool: nobody will hear of its workers any more. As its thread ends."""
        self._close_seat()
        for worker in self._workers:
            worker.is_unwanted = True
            if worker.handle is not None:
                self._actions.add(worker.handle.kill)
        self._lose_backend()
        self._give_up_workers("the thread that serves it has ended")

    def abandon_unwanted(self) -> None:
        """Let workers know for whose batch nobody waits any more."""
        self._close_seat()
        unwanted = self._workers.unwanted_batches()
        # The first one that is with a worker is what it computes, and it keeps one number in mind: so that comes last.
        for handle, number in reversed(unwanted):
            handle.abandon(number)
        if unwanted:
            self._supervisor.end_unwanted_now()
        self._check_watchers()

    def _scale(self, wanted: Scale, timeout: float) -> None:
        self._close_seat()
        if self._version.is_over:
            raise self._closed_error()
        if self._dispatcher.has_ended:  # nobody would hear of a worker that is started now
            raise self._supervisor.no_worker_error() or self._closed_error()
        self._supervisor.want(wanted, NEVER if timeout < 0 else time.monotonic() + timeout)
        self._note_change()
        self.pump()

    def _retire(self) -> None:
        self._close_seat()
        if not self._version.is_over:
            self._stopped = 0  # what closing does is reported, not what was before
            self._supervisor.killed.clear()
            self._version.advance(VersionEvent.RETIRE)
            self._note_change()
        self.pump()

    def _end(self, deadline: float) -> None:
        self._close_seat()
        self._lost += self._supervisor.stop_all(deadline)
        self._lost += self._fail_waiting(self._closed_error())
        self._note_change()

    def _vanish(self) -> None:
        self._close_seat()
        if self.state is VersionState.RETIRING:
            self._version.advance(VersionEvent.VANISH)
        self._note_change()

    def _give_up_workers(self, reason: str) -> None:
        """Go on without workers that the system does not end, or whose end nobody would hear of."""
        self._close_seat()
        for worker in self._workers:
            self._on_exited(worker, WorkerExit(0, None, reason, is_final=True))

    def _send(self, worker: PoolWorker, number: int, job: Job) -> None:
        handle = worker.handle
        if handle is None:
            return
        try:
            if isinstance(job, OwnJob) and job.is_description:
                handle.describe(number)
            else:
                handle.run(number, job.items)
        except BaseException as error:  # it could not be written down: nothing of it was sent
            self._dispatch.take_off(worker, number)
            self._results.lose(worker, [job], error)

    def _see_to_stuck(self) -> None:
        """Something waits, and nobody is there for it."""
        unservable = self._supervisor.no_worker_error()
        if unservable is not None:
            self._fail_waiting(unservable)
        else:
            self._reconcile()  # somebody may be

    def _is_settled(self, failed_starts_before: int) -> bool:
        if self._version.is_over or self.state is VersionState.FAILED:
            return True
        return self._supervisor.failures.failed_starts > failed_starts_before or self._supervisor.is_as_wanted

    def _reconcile(self) -> None:
        """Bring what is nearer to what is wanted."""
        self._supervisor.adjust()
        self._note_change()

    def _note_change(self) -> None:
        """Draw what follows from a change: the version's state, what callers are told, who need wait no longer."""
        workers, gave_up = self._workers, self._supervisor.failures.gave_up
        self._version.follow(serving=workers.serving() > 0, promising=workers.any_promising(), gave_up=gave_up)
        self._publish()
        self._check_watchers()
        self._actions.run()

    def _publish(self) -> None:
        self._refusal = self._closed_error() if self._version.is_over else self._supervisor.no_worker_error()

    def _lose_backend(self) -> None:
        """Without a backend there will be no worker, and no timer that tries again."""
        self._supervisor.failures.cease()
        self._fail_waiting(self._closed_error())

    def _fail_waiting(self, error: TorchmgmtError) -> int:
        jobs = self._queue.clear()
        source = self._queue.source
        from_source = source.fail_waiting(error) if source is not None else 0
        return self._results.drop(jobs, error, further=from_source)

    def _look(self) -> None:
        """Deal with every worker whose time is over, then with what is wanted."""
        self._close_seat()
        now = time.monotonic()
        self._supervisor.look(now)
        self._dispatch.recall_late(now)
        self._reconcile()

    def _watch(self, watcher: _Watcher) -> None:
        self._close_seat()
        if not watcher.check():
            self._watchers.append(watcher)

    def _check_watchers(self) -> None:
        if self._watchers:
            self._watchers = [watcher for watcher in self._watchers if not watcher.check()]

    # -- what workers tell ---------------------------------------------------------------------------------------------

    def _on_ready(self, worker: PoolWorker) -> None:
        self._close_seat()
        if worker.state is not WorkerState.LOADING:
            return  # it was told to go while it loaded
        worker.note_ready()
        self._workers.note_idle(worker)
        self._workers.start_s = start_s = worker.ready_at - worker.spawned_at
        pid = worker.handle.pid if worker.handle else None
        self._note_change()  # the version serves first, and then it is told by whom
        self._actions.tell(WorkerReady(self.spec.key, worker.id, pid or 0, start_s))
        self._reconcile()  # the one that it takes the place of can go now
        self.pump()

    def _on_done(self, worker: PoolWorker, number: int, outcomes: Sequence[Outcome], handler_s: float | None) -> None:
        self._close_seat()
        finished = self._dispatch.finish(worker, number, handler_s)
        if finished is None:
            return
        job, ran = finished
        try:
            self._after_batch(worker, job, outcomes, ran)
        except BaseException as error:  # the batch is with nobody now: whoever has no answer gets none any more
            self._results.lose(worker, [job], error)
            raise

    def _after_batch(self, worker: PoolWorker, job: Job, outcomes: Sequence[Outcome], ran: Ran) -> None:
        is_worn = self._wears and worker.note_wear(self.spec)
        may_wait = self._queue.may_have_some()
        is_idle = worker.state is WorkerState.READY and not may_wait
        if is_idle:
            self._results.answer(worker, job, outcomes, ran)  # first, as somebody waits for this, and for nothing else
        if is_worn:
            self._reconcile()
        if may_wait:
            self._pump()
        if not is_idle:
            self._results.answer(worker, job, outcomes, ran)  # last, so that the worker computes meanwhile
        if self._watchers:
            self._check_watchers()
        self._actions.run()
        if not may_wait:
            self._offer_seat()

    def _on_skipped(self, worker: PoolWorker, number: int) -> None:
        self._close_seat()
        lost = self._dispatch.take_back(worker, number)
        if lost is not None:
            self._results.drop([lost], self._closed_error())
        self._check_watchers()  # if nobody waits for it, it was the last
        self.pump()

    def _on_refused(self, worker: PoolWorker, number: int, fault: WorkerFault) -> None:
        self._close_seat()
        job = self._dispatch.take_off(worker, number)
        if job is None:
            return
        if len(job.items) > 1 and not self._supervisor.is_ending:
            self._queue.put_first(job.split())  # one of them is at fault
        else:
            now = time.monotonic()
            self._results.answer(worker, job, [fault] * max(1, len(job.items)), (now, now, None))
        self._check_watchers()
        self.pump()

    def _on_part(self, worker: PoolWorker, number: int, index: int, part: Encoded) -> None:
        self._close_seat()
        job = worker.prolong(number, time.monotonic() + self.spec.response_timeout_s)
        if job is None:
            return
        if job.is_over():
            if worker.handle is not None:
                worker.handle.abandon(number)
        elif (on_part := job.items[index].on_part) is not None:
            on_part(part)

    def _on_measured(self, worker: PoolWorker, metrics: Sequence[RawMetric]) -> None:
        if self._listener:
            self._actions.tell(HandlerMetrics(self.spec.key, worker.id, tuple(map(MetricRecord.of, metrics))))
            self._actions.run()

    def _on_exited(self, worker: PoolWorker, exit: WorkerExit) -> None:
        self._close_seat()
        if worker.state is WorkerState.EXITED:
            return  # it was given up before
        supervisor = self._supervisor
        was_loading = worker.ready_at == NEVER
        error = error_of_death(self.spec.key, exit, end_reason=worker.end_reason, was_loading=was_loading)
        worker.advance(WorkerEvent.EXIT)
        lost, unstarted = worker.take_jobs(exit.last_started)
        self._workers.forget(worker)
        self._stopped += 1
        if not worker.is_unwanted:
            supervisor.failures.note_failure(worker, error, is_retryable=exit.is_retryable)
        if exit.is_final:
            supervisor.failures.give_up(error)
        self._results.lose(worker, lost, error)
        if supervisor.is_ending:
            self._results.drop(unstarted, self._closed_error())
        else:
            self._dispatch.hand_on(unstarted, error, lambda job, died: self._results.lose(worker, [job], died))
        self._note_change()
        self._actions.tell(WorkerStopped(self.spec.key, worker.id, exit, worker.is_unwanted))
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

    def refused(self, number: int, fault: WorkerFault) -> None:
        self._pool._on_refused(self._worker, number, fault)

    def part(self, number: int, index: int, part: Encoded) -> None:
        self._pool._on_part(self._worker, number, index, part)

    def measured(self, metrics: Sequence[RawMetric]) -> None:
        self._pool._on_measured(self._worker, metrics)

    def exited(self, exit: WorkerExit) -> None:
        self._pool._on_exited(self._worker, exit)


def _held_lock() -> _thread.LockType:
    lock = _thread.allocate_lock()
    lock.acquire()
    return lock


@define(eq=False)
class _Watcher:
    """A thread that waits until something is so."""

    _is_so: Callable[[], bool]
    is_over: bool = False
    """Whether it need not be looked at any more."""
    _waits: _thread.LockType = field(factory=_held_lock)

    def check(self) -> bool:
        """Let the thread go on if it is so; return whether it waits no more. On the dispatcher's thread."""
        if not self.is_over and self._is_so():
            self.is_over = True
            self._waits.release()
        return self.is_over

    def wait(self, timeout: float | None) -> bool:
        """Block until it is so; False if that took longer than ``timeout`` seconds."""
        return self._waits.acquire(timeout=-1 if timeout is None else min(timeout, threading.TIMEOUT_MAX))
