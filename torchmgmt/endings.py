"""Endings: how the workers of a pool are made to end: by a message, else by SIGTERM, else by SIGKILL, each in its time."""

from __future__ import annotations

import time

from torchmgmt.agenda import Agenda
from torchmgmt.attempts import Attempts
from torchmgmt.job import size_of
from torchmgmt.lifecycle import WorkerEvent, WorkerState
from torchmgmt.pool_worker import NEVER, PoolWorker, PoolWorkers
from torchmgmt.records import ModelSpec

__all__ = ["Endings"]

# What a worker that was told to end may take before SIGTERM, and then before SIGKILL.
STOP_GRACE_S = 5.0
TERMINATE_GRACE_S = 2.0


class Endings:
    """Tells workers to end, and sees to it that they do. Every method is to be called with the pool's lock.

    Args:
        spec: the limits to keep.
        workers: all workers of the pool.
        agenda: the pool's.
        attempts: ceases where a worker that hangs cannot be ended.
        can_kill: whether it can.
    """

    def __init__(
        self, spec: ModelSpec, workers: PoolWorkers, agenda: Agenda, attempts: Attempts, *, can_kill: bool
    ) -> None:
        self._spec = spec
        self._workers = workers
        self._agenda = agenda
        self._attempts = attempts
        self._can_kill = can_kill
        self.drain_until = NEVER
        """How long a worker that is let go may take to finish its batch."""
        self.is_ending = False
        """Whether all workers are to end, and no other is to come."""
        self.killed: list[int] = []
        """The processes that had to be killed."""

    def let_go(self, worker: PoolWorker) -> None:
        """Let a worker go: at once if it does nothing, else when its batch is done or the time for that is over."""
        worker.is_unwanted = True
        if worker.state is WorkerState.BUSY:
            worker.advance(WorkerEvent.DRAIN)
            self._hurry(worker, self.drain_until, "the pool was scaled down and its time to finish was over")
        else:
            self.stop(worker)

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
        self._agenda.look_by(worker.overdue_at)
        if worker.handle is not None:
            self._agenda.add(worker.handle.terminate if worker.is_terminated else worker.handle.stop)

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
                lost += size_of(worker.jobs.values())
                self._hurry(worker, now, "the pool was closed and its time to finish was over")
            elif worker.state is not WorkerState.STOPPING:
                # Even without any time left, an idle worker gets a moment to go by itself.
                self.stop(worker, min(STOP_GRACE_S, max(1.0, deadline - now)))
        return lost

    def escalate(self, now: float) -> None:
        """Go a step further with every worker whose time is over, and have the pool look again when the next one's is."""
        for worker in self._workers:
            if worker.overdue_at <= now:
                self._escalate_one(worker)
        self._agenda.look_by(self._workers.next_overdue_at())

    def _hurry(self, worker: PoolWorker, overdue_at: float, reason: str) -> None:
        """Give a worker that runs a batch no longer than until ``overdue_at``."""
        if overdue_at < worker.overdue_at:
            worker.overdue_at, worker.end_reason = overdue_at, reason
            self._agenda.look_by(overdue_at)

    def _escalate_one(self, worker: PoolWorker) -> None:
        """Make a worker whose time is over end: SIGTERM if it was told to go by a message, else SIGKILL."""
        handle = worker.handle
        if worker.state is not WorkerState.STOPPING:
            worker.end_reason = worker.end_reason or self._overdue_reason(worker.state)
            worker.advance(WorkerEvent.STOP)
        elif not worker.is_terminated:
            worker.is_terminated = True
            worker.overdue_at = time.monotonic() + TERMINATE_GRACE_S
            if handle is not None:
                self._agenda.add(handle.terminate)
            return
        worker.overdue_at = NEVER
        if not self._can_kill:
            self._attempts.cease()  # before anybody thinks of one in its place
        elif handle is not None and handle.pid is not None:
            self.killed.append(handle.pid)
        if handle is not None:
            self._agenda.add(handle.kill)

    def _overdue_reason(self, state: WorkerState) -> str:
        if state is WorkerState.LOADING:
            return f"it was not ready within startup_timeout ({self._spec.startup_timeout_s:g} s)"
        return f"it did not answer within response_timeout ({self._spec.response_timeout_s:g} s)"
