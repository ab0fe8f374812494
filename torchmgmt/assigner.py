"""Assigner: which worker of a pool gets which batch, and what the worker does when it has run it."""

from __future__ import annotations

import itertools
import time
from typing import TypeAlias

from torchmgmt.agenda import Agenda
from torchmgmt.endings import Endings
from torchmgmt.job import Job, JobQueue
from torchmgmt.lifecycle import WorkerEvent, WorkerState
from torchmgmt.outcomes import Ran
from torchmgmt.pool_worker import LATE_S, PoolWorker, PoolWorkers
from torchmgmt.records import ModelSpec
from torchmgmt.staffing import Staffing

__all__ = ["Assigner", "Assignment"]

# The load is looked at so soon after a request came that may call for another worker.
_FIRST_LOOK_S = 0.25

Assignment: TypeAlias = tuple[PoolWorker, int, Job]
"""A worker, and the batch that it is to run, with its number."""


class Assigner:
    """Pairs what waits with who can run it. Every method is to be called with the pool's lock.

    A worker is busy from the moment a batch is assigned to it, before that is sent, so it is never taken for idle between.

    Args:
        spec: the limits to keep.
        workers: all workers of the pool.
        queue: what waits for them.
        agenda: the pool's.
        staffing: is told when a worker serves, and knows whether the load is to be looked at.
        endings: ends the workers that were only to finish their batch.
    """

    def __init__(
        self,
        spec: ModelSpec,
        workers: PoolWorkers,
        queue: JobQueue,
        agenda: Agenda,
        staffing: Staffing,
        endings: Endings,
    ) -> None:
        self._spec = spec
        self._workers = workers
        self._queue = queue
        self._agenda = agenda
        self._staffing = staffing
        self._endings = endings
        self._numbers = itertools.count(1)

    def assign(self) -> Assignment | None:
        """Assign the next batch to a worker; None if there is no such pair."""
        now = time.monotonic()
        worker = self._workers.take_idle()
        if worker is not None:
            job = self._queue.take()
            if job is None:
                self._workers.note_idle(worker)
        else:
            worker = self._workers.busy_with_room(self._spec.batches_in_flight, now)
            job = self._queue.take(full=True) if worker is not None else None
        if worker is None or job is None:
            return None
        number = next(self._numbers)
        worker.assign(number, job, now, self._spec.response_timeout_s)
        look_at = worker.overdue_at if len(worker.jobs) < 2 else min(worker.overdue_at, worker.began_at + LATE_S)
        if self._staffing.is_flexible:
            look_at = min(look_at, now + _FIRST_LOOK_S)
        self._agenda.look_by(look_at)
        return worker, number, job

    def is_stuck(self) -> bool:
        """Return whether something waits, and nobody takes batches or will soon."""
        # In this order: counting what waits takes its time, and under load this is asked for every request.
        return not self._workers.any_promising() and len(self._queue) > 0

    def is_quiet(self) -> bool:
        """Return whether nothing runs, and nothing waits that a worker could still take."""
        if self._workers.any_with_jobs():
            return False
        return len(self._queue) == 0 or self._staffing.no_worker_error() is not None

    def finish(self, worker: PoolWorker, number: int, handler_s: float | None) -> tuple[Job, Ran] | None:
        """Take a batch back that ``worker`` has run, in ``handler_s`` seconds; the worker waits for the next one, or goes.

        Returns the batch and when it ran; None if it is not with this worker (any more).
        """
        now = time.monotonic()
        ran = (worker.began_at, now, handler_s)
        job = worker.finish(number, now, self._spec.response_timeout_s)
        if job is None:
            return None
        self._workers.note_run(now - ran[0])
        if worker.state is WorkerState.BUSY:
            self._staffing.note_success()
        self._settle(worker)
        return job, ran

    def skip(self, worker: PoolWorker, number: int) -> Job | None:
        """Take a batch back that ``worker`` was told not to begin, as after :meth:`finish`; None if it was taken already."""
        job = worker.skip(number, time.monotonic(), self._spec.response_timeout_s)
        if job is not None:
            self._settle(worker)
        return job

    def _settle(self, worker: PoolWorker) -> None:
        """Have it wait for the next batch, or go, if it has none left."""
        if worker.jobs:
            self._agenda.look_by(worker.overdue_at)
        elif worker.state is WorkerState.BUSY and not self._endings.is_ending:
            worker.advance(WorkerEvent.FINISH)
            self._workers.note_idle(worker)
        elif worker.state in (WorkerState.BUSY, WorkerState.DRAINING):
            self._endings.stop(worker)  # perhaps it was done just before it would have been killed
