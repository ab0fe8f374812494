"""Recalls: takes batches back that lie with a worker which takes long for the one before them.

Batches lie with a busy worker so that it need not wait for its next one, as long as batches are short. When one turns out
not to be, those behind it would wait for it although another worker may be free, and nobody could cancel them meanwhile.
"""

from __future__ import annotations

import functools

from torchmgmt.agenda import Agenda
from torchmgmt.assigner import Assigner
from torchmgmt.endings import Endings
from torchmgmt.job import Job, JobQueue
from torchmgmt.pool_worker import LATE_S, PoolWorker, PoolWorkers

__all__ = ["Recalls"]


class Recalls:
    """Has batches recalled, and queues them again. Every method is to be called with the pool's lock.

    Args:
        workers: all workers of the pool.
        queue: where batches go that a worker has not begun.
        agenda: the pool's.
        assigner: the pool's.
        endings: know whether anything is still to be run.
    """

    def __init__(
        self, workers: PoolWorkers, queue: JobQueue, agenda: Agenda, assigner: Assigner, endings: Endings
    ) -> None:
        self._workers = workers
        self._queue = queue
        self._agenda = agenda
        self._assigner = assigner
        self._endings = endings

    def look(self, now: float) -> None:
        """Have those recalled that lie behind a batch which takes long."""
        for worker in self._workers:
            if len(worker.jobs) < 2 or worker.handle is None or self._endings.is_ending:
                continue
            if now < worker.began_at + LATE_S:
                self._agenda.look_by(worker.began_at + LATE_S)
                continue
            first, *behind = worker.jobs
            if worker.recalled < max(behind):
                worker.recalled = max(behind)
                self._agenda.add(functools.partial(worker.handle.recall, behind, but=first))

    def take_back(self, worker: PoolWorker, number: int) -> Job | None:
        """Queue a batch again that a worker does not begin; return it if nothing is to be run any more."""
        job = self._assigner.skip(worker, number)
        if job is None or self._endings.is_ending:
            return job
        self._queue.give_back([job])
        return None
