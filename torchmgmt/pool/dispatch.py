"""Which worker of a pool gets which batch, and what becomes of a batch that its worker has run, or has not begun.

More than one batch may lie with a worker (prefetch), so that it need not wait for its next one. When the one that it runs
turns out to take long, those behind it are recalled: another worker may be free, and nobody could cancel them there.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from torchmgmt.errors import WorkerDied, WorkerStartFailed
from torchmgmt.lifecycle import WorkerEvent, WorkerState
from torchmgmt.pool.actions import Actions
from torchmgmt.pool.jobs import Job, JobQueue, Seating
from torchmgmt.pool.results import Ran
from torchmgmt.pool.supervisor import Supervisor
from torchmgmt.pool.workers import LATE_S, PoolWorker, PoolWorkers
from torchmgmt.records import ModelSpec
from torchmgmt.seat import Seat

__all__ = ["Assignment", "JobDispatch"]

# The load is looked at so soon after a request came that may call for another worker.
_FIRST_LOOK_S = 0.25
MOST_HANDOVERS = 2
"""A batch that so many workers have ended with before they had begun it, after the first one, is not handed on again."""

Assignment: TypeAlias = tuple[PoolWorker, int, Job]
"""A worker, and the batch that it is to run, with its number."""


class JobDispatch:
    """Pairs what waits with who can run it. For the dispatcher's thread.

    A worker is busy from the moment a batch is assigned to it, before that is sent, so it is never taken for idle between.

    Args:
        spec: the limits to keep.
        workers: all workers of the pool.
        queue: what waits for them.
        actions: the pool's.
        supervisor: ends the workers that were only to finish their batch.
    """

    def __init__(
        self, spec: ModelSpec, workers: PoolWorkers, queue: JobQueue, actions: Actions, supervisor: Supervisor
    ) -> None:
        self._spec = spec
        self._workers = workers
        self._queue = queue
        self._actions = actions
        self._supervisor = supervisor
        self._numbers = itertools.count(1)
        self._seat: tuple[PoolWorker, Seat] | None = None
        self.asked_from: float = 1
        """So many requests must wait for another look at them to be worth it, until one of the workers is heard of."""

    def assign(self) -> Assignment | None:
        """Assign the next batch to a worker; None if there is no such pair."""
        now = time.monotonic()
        worker = self._workers.take_idle()
        if worker is not None:
            job = self._queue.take()
            if job is None:
                self._workers.note_idle(worker)
            self.asked_from = 1 if job is None or self._workers.any_idle() else self._spec.batch_size
        else:
            worker = self._workers.busy_with_room(self._spec.batches_in_flight, now)
            job = self._queue.take(full=True) if worker is not None else None
            if worker is not None:
                self.asked_from = self._spec.batch_size
            else:
                self.asked_from = math.inf if self._workers.any_busy() else 1
        if worker is None or job is None:
            return None
        number = next(self._numbers)
        self._note_assigned(worker, number, job, now)
        return worker, number, job

    def offer_seat(self, seating: Seating) -> None:
        """Have the next caller hand its request to an idle worker itself, if there is one, and nothing waits."""
        if self._seat is not None or not seating.is_immediate or self._supervisor.is_ending:
            return
        worker = self._workers.take_idle()
        if worker is None:
            return
        self._workers.note_idle(worker)
        if worker.handle is not None and (seat := worker.handle.seat(next(self._numbers))) is not None:
            self._seat = worker, seat
            seating.offer(seat)

    @property
    def has_seat(self) -> bool:
        """Whether a seat is offered."""
        return self._seat is not None

    def close_seat(self, seating: Seating) -> None:
        """Take the seat back, if one is offered; if it was taken, note what its worker has been handed."""
        if self._seat is None:
            return
        worker, seat = self._seat
        self._seat = None
        seating.offer(None)
        entry = seat.close()
        if entry is None:
            return
        self._workers.forget_idle(worker)
        job = seating.take_seated(entry)
        self._note_assigned(worker, seat.number, job, job.arrived[0])
        if not seat.was_sent() and worker.handle is not None:
            worker.handle.see_to_seat(seat)

    def _note_assigned(self, worker: PoolWorker, number: int, job: Job, now: float) -> None:
        worker.assign(number, job, now, self._spec.response_timeout_s)
        look_at = worker.overdue_at if len(worker.jobs) < 2 else min(worker.overdue_at, worker.began_at + LATE_S)
        if self._supervisor.is_flexible:
            look_at = min(look_at, now + _FIRST_LOOK_S)
        self._actions.look_by(look_at)

    def is_stuck(self) -> bool:
        """Return whether something waits, and nobody takes batches or will soon."""
        # In this order: counting what waits takes its time, and under load this is asked for every request.
        return not self._workers.any_promising() and len(self._queue) > 0

    def is_quiet(self) -> bool:
        """Return whether nothing runs that anybody waits for, and nothing waits that a worker could still take."""
        if self._workers.any_with_wanted_jobs():
            return False
        return len(self._queue) == 0 or self._supervisor.no_worker_error() is not None

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
            self._supervisor.note_success()
        self._settle(worker)
        return job, ran

    def take_off(self, worker: PoolWorker, number: int) -> Job | None:
        """Take a batch back that ``worker`` does not begin; None if it is not with this worker (any more)."""
        job = worker.skip(number, time.monotonic(), self._spec.response_timeout_s)
        if job is not None:
            self._settle(worker)
        return job

    def take_back(self, worker: PoolWorker, number: int) -> Job | None:
        """Queue a batch again that ``worker`` does not begin; return it if nothing is to be run any more."""
        job = self.take_off(worker, number)
        if job is None or self._supervisor.is_ending:
            return job
        self._queue.give_back([job])
        return None

    def recall_late(self, now: float) -> None:
        """Have those batches recalled that lie behind one which takes long."""
        for worker in self._workers:
            if len(worker.jobs) < 2 or worker.handle is None or self._supervisor.is_ending:
                continue
            if now < worker.began_at + LATE_S:
                self._actions.look_by(worker.began_at + LATE_S)
                continue
            first, *behind = worker.jobs
            if worker.recalled < max(behind):
                worker.recalled = max(behind)
                self._actions.add(functools.partial(worker.handle.recall, behind, but=first))

    def hand_on(
        self,
        unstarted: Sequence[Job],
        error: WorkerStartFailed | WorkerDied,
        fail: Callable[[Job, WorkerStartFailed | WorkerDied], object],
    ) -> None:
        """Queue the batches again that a worker has ended with, for ``error``, before it had begun them.

        The first of them may be why: what is in it may not fit into a worker, or not be readable there. So its requests are
        run one by one from now on, and those with which this has happened too often are told of it with ``fail``.
        """
        if not unstarted:
            return
        first, *others = unstarted
        self._queue.give_back(others)
        if not first.items:
            self._queue.put_first([first])
            return
        again = []
        for job in first.split():
            for request in job.items:
                request.handovers += 1
            if job.items[0].handovers > MOST_HANDOVERS:
                fail(job, _not_received(error))
            else:
                again.append(job)
        if first.items[0].handovers == 1 and len(again) == 1:
            self._queue.give_back(again)
        else:
            self._queue.put_first(again)

    def _settle(self, worker: PoolWorker) -> None:
        """Have it wait for the next batch, or go, if it has none left."""
        if worker.jobs:
            self._actions.look_by(worker.overdue_at)
        elif worker.state is WorkerState.BUSY and not self._supervisor.is_ending:
            worker.advance(WorkerEvent.FINISH)
            self._workers.note_idle(worker)
        elif worker.state in (WorkerState.BUSY, WorkerState.DRAINING):
            self._supervisor.stop(worker)  # perhaps it was done just before it would have been killed


def _not_received(error: WorkerStartFailed | WorkerDied) -> WorkerDied:
    """Return the error of a request with which too many workers have ended before they had begun it."""
    reason = (
        f"{error.reason}; so have {MOST_HANDOVERS} workers before it, each before it had begun this request: it may be too"
        " large for a worker's memory"
    )
    return WorkerDied(error.name, error.version, error.pid, error.exitcode, reason, error.last_lines)
