"""Which workers a pool has: started, watched and made to end, step by step nearer to what is wanted.

A worker is made to end by a message, else by ``terminate``, else by ``kill``, each in its time.
"""

from __future__ import annotations

import math
import time

from torchmgmt.errors import NoWorker
from torchmgmt.lifecycle import WorkerEvent, WorkerState
from torchmgmt.pool.actions import Actions
from torchmgmt.pool.autoscaling import Load, Plan, Situation, decide
from torchmgmt.pool.failures import StartFailures
from torchmgmt.pool.jobs import JobQueue, size_of
from torchmgmt.pool.starter import WorkerStarter
from torchmgmt.pool.workers import NEVER, PoolWorker, PoolWorkers
from torchmgmt.records import CancelRunning, ModelSpec, Scale

__all__ = ["Supervisor"]

# What a worker that was told to end may take before it is terminated, and then before it is killed.
STOP_GRACE_S = 5.0
TERMINATE_GRACE_S = 2.0
# For so long, at least, somebody has waited before a worker is ended that runs a batch for which nobody waits any more.
NEEDED_AFTER_S = 0.5


class Supervisor:
    """Does what :func:`torchmgmt.pool.autoscaling.decide` says. For the dispatcher's thread.

    Args:
        spec: the limits to keep.
        workers: all workers of the pool.
        queue: what waits for them.
        actions: the pool's.
        starter: starts workers.
    """

    def __init__(
        self, spec: ModelSpec, workers: PoolWorkers, queue: JobQueue, actions: Actions, starter: WorkerStarter
    ) -> None:
        self.failures = StartFailures(spec.key, actions)
        self.wanted = Scale(0, 0)
        """How many workers shall be; may be read on any thread."""
        self.is_ending = False
        """Whether all workers are to end, and no other is to come."""
        self.killed: list[int] = []
        """The processes that had to be killed."""
        self._spec = spec
        self._workers = workers
        self._queue = queue
        self._actions = actions
        self._starter = starter
        self._load = Load()
        self._drain_until = NEVER

    # -- how many --------------------------------------------------------------------------------------------------------

    @property
    def is_flexible(self) -> bool:
        """Whether the number of workers follows the load."""
        return self.wanted.min_workers < self.wanted.max_workers

    @property
    def is_as_wanted(self) -> bool:
        """Whether neither one is missing nor one too many is there."""
        return self._has_enough and len(self._workers) <= self.wanted.max_workers

    @property
    def _has_enough(self) -> bool:
        return self._workers.serving() >= self.wanted.min_workers

    def want(self, wanted: Scale, drain_until: float) -> None:
        """Have so many workers from now on; what failed before does not count any more.

        Workers that are too many have until ``drain_until`` to finish their batches; one that goes later, to be replaced or
        for lack of work, has its time.
        """
        self.wanted = wanted
        self.failures.begin_anew()
        self._drain_until = drain_until
        try:
            self.adjust()
        finally:
            self._drain_until = NEVER

    def adjust(self) -> None:
        """Do all that there is to do now, and have the pool look again when more may be."""
        while not self.is_ending:
            if self.is_flexible:
                self._load = self._load.observed(self._workers.observe(self._queue))
            plan = decide(self._situation())
            self._apply(plan)
            if plan.is_empty:
                if plan.wake_at is not None:
                    self._actions.look_by(plan.wake_at)
                return

    def look(self, now: float) -> None:
        """Go a step further with every worker whose time is over, and have the pool look again when the next one's is."""
        for worker in self._workers:
            if worker.overdue_at <= now:
                self._escalate(worker)
        self._end_unwanted(now)
        self._actions.look_by(self._workers.next_overdue_at())

    def note_success(self) -> None:
        """Note that a worker has served."""
        if self.failures.last_error is not None:
            self.failures.note_success(all_there=self._has_enough)

    def no_worker_error(self) -> NoWorker | None:
        """Return why there is no worker and there will be none by itself; None if that is not so."""
        key = self._spec.key
        if self._workers.any_promising():
            return None
        if self.wanted.max_workers == 0:
            return NoWorker(key.name, key.version, "it is scaled to 0 workers; scale it up first")
        if self.failures.gave_up:
            error = self.failures.last_error
            reason = error.reason if error else "its workers could not be started"
            return NoWorker(key.name, key.version, f"{reason}; starting workers was given up, scale it to try again")
        return None

    def _situation(self) -> Situation:
        return Situation(
            scale=self.wanted,
            workers=[worker.facts() for worker in self._workers],
            waiting=len(self._queue),
            now=time.monotonic(),
            load=self._load,
            scale_down_delay_s=self._spec.scale_down_delay_s,
            failures=self.failures.failures,
            jitter=self.failures.jitter,
            max_retry_timeout_s=self._spec.max_retry_timeout_s,
            gave_up=self.failures.gave_up,
            is_loaded=self._starter.is_loaded,
            empty_since=self._workers.empty_since,
            template_idle_timeout_s=self._spec.template_idle_timeout_s,
        )

    def _apply(self, plan: Plan) -> None:
        for _ in range(plan.add):
            self._workers.add(self._starter.new_id())
        for worker_id in plan.spawn:
            self._starter.start(self._workers[worker_id], self.wanted.max_workers)
        for worker_id in plan.remove:
            self._let_go(self._workers[worker_id])
        if plan.give_up:
            self.failures.give_up()
        if plan.rest:
            self._starter.rest()

    # -- ending ----------------------------------------------------------------------------------------------------------

    def stop(self, worker: PoolWorker, grace_s: float = STOP_GRACE_S) -> None:
        """Tell a worker without a batch to end."""
        worker.is_unwanted = True
        if worker.state is WorkerState.WANTED:
            worker.advance(WorkerEvent.EXIT)
            self._workers.forget(worker)
            return
        # One that is still loading would not read a message before it is done with that.
        worker.is_terminated = worker.state is WorkerState.LOADING
        worker.advance(WorkerEvent.STOP)
        worker.overdue_at = time.monotonic() + grace_s
        self._actions.look_by(worker.overdue_at)
        if worker.handle is not None:
            self._actions.add(worker.handle.terminate if worker.is_terminated else worker.handle.stop)

    def stop_all(self, deadline: float) -> int:
        """Tell all workers to end by ``deadline``, for good; one that still runs a batch has had its time.

        Returns how many requests are lost by that.
        """
        self.is_ending = True
        now = time.monotonic()
        lost = 0
        for worker in self._workers:
            worker.is_unwanted = True
            if worker.jobs:
                lost += size_of(job for job in worker.jobs.values() if not job.is_over())
                self._hurry(worker, now, "the pool was closed and its time to finish was over")
            elif worker.state is not WorkerState.STOPPING:
                # Even without any time left, an idle worker gets a moment to go by itself.
                self.stop(worker, min(STOP_GRACE_S, max(1.0, deadline - now)))
        return lost

    def end_unwanted_now(self) -> None:
        """End workers that run batches for which nobody waits any more, if the model wants that at once."""
        if self._spec.cancel_running is CancelRunning.NOW:
            self._end_unwanted(math.inf)
        elif self._spec.cancel_running is CancelRunning.WHEN_NEEDED:
            self._actions.look_by(time.monotonic() + NEEDED_AFTER_S)

    def _end_unwanted(self, now: float) -> None:
        """End a worker that runs a batch for which nobody waits, if others wait that could have it meanwhile.

        They could not before it was started anew: so they must have waited for as long as that takes, or it is no gain.
        """
        policy = self._spec.cancel_running
        if policy is CancelRunning.NEVER or not self._starter.can_kill or self.is_ending:
            return
        unwanted = [worker for worker in self._workers if worker.unwanted_job() is not None and not worker.end_reason]
        if not unwanted:
            return
        needed_after_s = max(NEEDED_AFTER_S, self._workers.start_s)
        if policy is CancelRunning.WHEN_NEEDED and (
            self._workers.any_idle() or not self._is_waited_for(unwanted, needed_after_s)
        ):
            self._actions.look_by(now + needed_after_s)
            return
        for worker in unwanted if policy is CancelRunning.NOW else unwanted[:1]:
            worker.is_unwanted = True
            self._hurry(worker, time.monotonic(), "it ran a batch for which nobody waited any more")

    def _is_waited_for(self, unwanted: list[PoolWorker], seconds: float) -> bool:
        if self._queue.waited_s() >= seconds:
            return True
        return any(not job.is_over() for worker in unwanted for job in worker.jobs.values())

    def _let_go(self, worker: PoolWorker) -> None:
        """Let a worker go: at once if it does nothing, else when its batch is done or the time for that is over."""
        worker.is_unwanted = True
        if worker.state is WorkerState.BUSY:
            worker.advance(WorkerEvent.DRAIN)
            self._hurry(worker, self._drain_until, "the pool was scaled down and its time to finish was over")
        else:
            self.stop(worker)

    def _hurry(self, worker: PoolWorker, overdue_at: float, reason: str) -> None:
        """Give a worker that runs a batch no longer than until ``overdue_at``."""
        if overdue_at < worker.overdue_at:
            worker.overdue_at, worker.end_reason = overdue_at, reason
            self._actions.look_by(overdue_at)

    def _escalate(self, worker: PoolWorker) -> None:
        """Make a worker whose time is over end: terminate it if it was told to go by a message, else kill it."""
        handle = worker.handle
        if worker.state is not WorkerState.STOPPING:
            worker.end_reason = worker.end_reason or self._overdue_reason(worker.state)
            worker.advance(WorkerEvent.STOP)
        elif not worker.is_terminated:
            worker.is_terminated = True
            worker.overdue_at = time.monotonic() + TERMINATE_GRACE_S
            if handle is not None:
                self._actions.add(handle.terminate)
            return
        worker.overdue_at = NEVER
        if not self._starter.can_kill:
            self.failures.cease()  # before anybody thinks of one in its place
        elif handle is not None and handle.pid is not None:
            self.killed.append(handle.pid)
        if handle is not None:
            self._actions.add(handle.kill)

    def _overdue_reason(self, state: WorkerState) -> str:
        if state is WorkerState.LOADING:
            return f"it was not ready within startup_timeout ({self._spec.startup_timeout_s:g} s)"
        return f"it did not answer within response_timeout ({self._spec.response_timeout_s:g} s)"
