"""Recalls: takes batches back that lie with a worker which takes long for the one before them.

Batches lie with a busy worker so that it need not wait for its next one, as long as batches are short. When one turns out
not to be, those behind it would wait for it although another worker may be free, and nobody could cancel them meanwhile.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable

from torchmgmt.agenda import Agenda
from torchmgmt.assigner import Assigner
from torchmgmt.backends import WorkerHandle
from torchmgmt.endings import Endings
from torchmgmt.job import Job, JobQueue
from torchmgmt.pool_worker import LATE_S, PoolWorker, PoolWorkers

__all__ = ["Recalls"]

# After so long each side has seen what the other one wrote before: the worker that a batch is recalled, or we that it has
# begun it. It takes microseconds.
_SEEN_S = 0.002


class Recalls:
    """Has batches recalled, and queues them again.

    Args:
        lock: the pool's.
        assigner: the pool's.
        workers: all workers of the pool.
        queue: where batches go that a worker has not begun.
        agenda: the pool's.
        endings: know whether anything is still to be run.
        call_at: ``call_at(when, callback)`` runs a callback at a time of the monotonic clock.
        on_taken: called, without the lock, when batches are back in the queue.
    """

    def __init__(
        self,
        lock: threading.Lock,
        assigner: Assigner,
        workers: PoolWorkers,
        queue: JobQueue,
        agenda: Agenda,
        endings: Endings,
        call_at: Callable[[float, Callable[[], object]], object],
        on_taken: Callable[[], object],
    ) -> None:
        self._lock = lock
        self._assigner = assigner
        self._workers = workers
        self._queue = queue
        self._agenda = agenda
        self._endings = endings
        self._call_at = call_at
        self._on_taken = on_taken

    def look(self, now: float) -> None:
        """Have those recalled that lie behind a batch which takes long. With the pool's lock."""
        for worker in self._workers:
            if len(worker.jobs) < 2 or worker.handle is None or self._endings.is_ending:
                continue
            if now < worker.began_at + LATE_S:
                self._agenda.look_by(worker.began_at + LATE_S)
                continue
            last = max(worker.jobs)
            if worker.recalled < last:
                worker.recalled = last
                self._agenda.add(functools.partial(self._recall, worker, worker.handle, last))

    def skipped(self, worker: PoolWorker, number: int) -> Job | None:
        """Queue a batch again that a worker says it has not begun; return it if nothing is to be run any more. Without the lock."""
        with self._lock:
            job = self._assigner.skip(worker, number)
            if job is None or self._endings.is_ending:
                return job
            self._queue.give_back([job])
        return None

    def _recall(self, worker: PoolWorker, handle: WorkerHandle, last: int) -> None:
        handle.recall(last)
        self._call_at(time.monotonic() + _SEEN_S, functools.partial(self._take, worker, handle, last))

    def _take(self, worker: PoolWorker, handle: WorkerHandle, last: int) -> None:
        """Take what it has not begun by now: that it never does. What it skipped besides, it says."""
        started = handle.last_started()
        if started is None:
            return  # it is gone, and what it had not begun is dealt with
        with self._lock:
            if self._endings.is_ending:
                return
            jobs = worker.take_unstarted(last, started)
            self._queue.give_back(jobs)
        if jobs:
            self._on_taken()
