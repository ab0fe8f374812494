"""Starter: starts the workers of a pool, and gives up what is kept loaded for further ones."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from torchmgmt.agenda import Agenda
from torchmgmt.backends import ModelHost, WorkerListener
from torchmgmt.errors import ManagerClosed, TorchmgmtError
from torchmgmt.lifecycle import WorkerEvent, WorkerState
from torchmgmt.pool_worker import PoolWorker
from torchmgmt.records import ModelSpec, WorkerExit
from torchmgmt.scaling import default_threads

__all__ = ["Starter"]


class Starter:
    """Decides under the pool's lock, with which every method is to be called, and has the rest done by its agenda.

    Args:
        spec: what the workers load, and the limits to keep.
        host: runs them.
        lock: the pool's.
        agenda: the pool's.
        listener_of: returns who is told what becomes of a worker.
    """

    def __init__(
        self,
        spec: ModelSpec,
        host: ModelHost,
        lock: threading.Lock,
        agenda: Agenda,
        listener_of: Callable[[PoolWorker], WorkerListener],
    ) -> None:
        self._spec = spec
        self._host = host
        self._lock = lock
        self._agenda = agenda
        self._listener_of = listener_of
        self.is_loaded = False
        """Whether something may be kept loaded for further workers."""

    def spawn(self, worker: PoolWorker, max_workers: int) -> None:
        """Start ``worker``, one of at most ``max_workers``. If that fails, its listener hears that it ended."""
        worker.advance(WorkerEvent.SPAWN)
        worker.spawned_at = time.monotonic()
        worker.overdue_at = worker.spawned_at + self._spec.startup_timeout_s
        self._agenda.look_by(worker.overdue_at)
        self.is_loaded = True
        threads = self._spec.threads_per_worker or default_threads(_cores(), max_workers)
        self._agenda.add(lambda: self._start(worker, threads))

    def rest(self) -> None:
        """Give up what is kept loaded; the next worker loads anew."""
        self.is_loaded = False
        self._agenda.add(self._host.rest)

    def _start(self, worker: PoolWorker, threads: int) -> None:
        """Start the worker's process, or whatever it is. Without the lock."""
        listener = self._listener_of(worker)
        handle = self._host.worker(worker.id, threads, listener)
        with self._lock:
            worker.handle = handle
        try:
            handle.start()
        except (OSError, TorchmgmtError) as error:
            reason = f"its process could not be started: {error}"
            listener.exited(WorkerExit(0, None, reason, is_final=isinstance(error, ManagerClosed)))
            return
        with self._lock:
            is_stopping = worker.state is WorkerState.STOPPING
        if is_stopping:
            handle.terminate()


def _cores() -> int:
    """Return how many cores this program may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
