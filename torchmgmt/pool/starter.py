"""Starts the workers of a pool, and gives up what is kept loaded for further ones."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

from torchmgmt.backends import ModelHost, WorkerListener
from torchmgmt.errors import ManagerClosed
from torchmgmt.lifecycle import WorkerEvent, WorkerState
from torchmgmt.pool.actions import Actions
from torchmgmt.pool.autoscaling import default_threads
from torchmgmt.pool.workers import PoolWorker
from torchmgmt.records import ModelSpec, WorkerExit

__all__ = ["FIRST_WORKER_ID", "WorkerStarter"]

FIRST_WORKER_ID = 9000


class WorkerStarter:
    """Notes a start, and does it as an action. For the dispatcher's thread.

    Args:
        spec: what the workers load, and the limits to keep.
        host: runs them.
        actions: the pool's.
        listener_of: returns who is told what becomes of a worker.
        worker_ids: where their ids come from.
        can_kill: whether one that hangs can be ended.
    """

    def __init__(
        self,
        spec: ModelSpec,
        host: ModelHost,
        actions: Actions,
        listener_of: Callable[[PoolWorker], WorkerListener],
        worker_ids: Iterator[int],
        *,
        can_kill: bool,
    ) -> None:
        self.can_kill = can_kill
        self.is_loaded = False
        """Whether something may be kept loaded for further workers."""
        self._spec = spec
        self._host = host
        self._actions = actions
        self._listener_of = listener_of
        self._worker_ids = worker_ids

    def new_id(self) -> str:
        """Return the id of one more worker."""
        return str(next(self._worker_ids))

    def start(self, worker: PoolWorker, max_workers: int) -> None:
        """Start ``worker``, one of at most ``max_workers``. If that fails, its listener hears that it ended."""
        worker.advance(WorkerEvent.SPAWN)
        worker.spawned_at = time.monotonic()
        worker.overdue_at = worker.spawned_at + self._spec.startup_timeout_s
        self._actions.look_by(worker.overdue_at)
        self.is_loaded = True
        threads = self._spec.threads_per_worker or default_threads(_cores(), max_workers)
        self._actions.add(lambda: self._start(worker, threads))

    def rest(self) -> None:
        """Give up what is kept loaded; the next worker loads anew."""
        self.is_loaded = False
        self._actions.add(self._host.rest)

    def _start(self, worker: PoolWorker, threads: int) -> None:
        """Start the worker's process, or whatever it is."""
        listener = self._listener_of(worker)
        try:
            worker.handle = self._host.worker(worker.id, threads, listener)
            worker.handle.start()
        except Exception as error:  # whatever it is, there is no worker, and one that is waited for would never come
            reason = f"its process could not be started: {str(error) or type(error).__name__}"
            listener.exited(WorkerExit(0, None, reason, is_final=isinstance(error, ManagerClosed)))
            return
        if worker.state is WorkerState.STOPPING:
            worker.handle.terminate()


def _cores() -> int:
    """Return how many cores this program may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
