"""What was counted and measured of each model version, from events: cheap to fill, copied where it is read.

Only what events tell is here; how many workers there are and how many requests
wait is asked of the manager when somebody looks.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from torchmgmt.events import BatchFinished, RequestsDropped, WorkerReady, WorkerStopped
from torchmgmt.metrics.histogram import SECONDS_BOUNDS, SIZE_BOUNDS, Histogram
from torchmgmt.records import ModelKey

__all__ = ["OTHER", "Figures", "VersionFigures"]

_Batch: TypeAlias = tuple[ModelKey, Sequence[float], float, float, "float | None", Mapping[int, str], Sequence[int]]
"""A BatchFinished without its requests: key, arrived, began, ended, handler_s, failed, abandoned."""
# The more, the less each costs, and the longer takes the one that makes them so many.
_AT_ONCE = 16

OTHER = ModelKey("other", "other")
"""Stands for all versions above the most that have labels of their own."""


class VersionFigures:
    """The figures of one version, or of :data:`OTHER`. Times in s."""

    def __init__(self, key: ModelKey) -> None:
        self.key = key
        self.requests = 0
        """That ended, in whatever way."""
        self.errors: dict[str, int] = {}
        """By the class of the error."""
        self.queue = Histogram(SECONDS_BOUNDS)
        self.latency = Histogram(SECONDS_BOUNDS)
        self.batch_sizes = Histogram(SIZE_BOUNDS)
        self.handler = Histogram(SECONDS_BOUNDS)
        self.load = Histogram(SECONDS_BOUNDS)
        self.worker_load: dict[str, float] = {}
        """Of the workers that are there."""
        self.lost_workers = 0
        """That ended unasked."""
        self.last_ended = 0.0
        """When the last batch ended (``time.monotonic``); these are of that batch."""
        self.last_queue = self.last_run = self.last_handler = 0.0

    def copy(self) -> VersionFigures:
        """Return a copy that does not change any more."""
        copied = VersionFigures(self.key)
        copied.__dict__.update(self.__dict__)
        copied.errors, copied.worker_load = self.errors.copy(), self.worker_load.copy()
        for name in ("queue", "latency", "batch_sizes", "handler", "load"):
            setattr(copied, name, getattr(self, name).copy())
        return copied

    def add_batch(self, batch: _Batch) -> None:
        """Count a batch and its requests."""
        _, arrivals, began, ended, handler_s, failed, abandoned = batch
        size = len(arrivals)
        queue, latency = self.queue, self.latency
        for arrived in arrivals:
            waited = began - arrived
            queue.counts[bisect_left(SECONDS_BOUNDS, waited)] += 1
            queue.total += waited
            took = ended - arrived
            latency.counts[bisect_left(SECONDS_BOUNDS, took)] += 1
            latency.total += took
        self.batch_sizes.observe(size)
        self.requests += size - len(abandoned)
        for error in failed.values():
            self.errors[error] = self.errors.get(error, 0) + 1
        if handler_s is not None:
            self.handler.observe(handler_s)
            self.last_handler = handler_s
            self.last_queue = began - arrivals[0]
            self.last_run = ended - began
            self.last_ended = ended

    def add_dropped(self, dropped: RequestsDropped) -> None:
        """Count requests that no worker has answered."""
        self.requests += dropped.count
        self.errors[dropped.error] = self.errors.get(dropped.error, 0) + dropped.count

    def add_ready(self, ready: WorkerReady) -> None:
        """Count a worker that has come."""
        self.load.observe(ready.seconds)
        self.worker_load[ready.worker_id] = ready.seconds

    def add_stopped(self, stopped: WorkerStopped) -> None:
        """Count a worker that has gone."""
        self.worker_load.pop(stopped.worker_id, None)
        self.lost_workers += not stopped.expected


class Figures:
    """The figures of all versions that are known, at most ``limit`` of them by name, the others together. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pending: deque[_Batch] = deque()  # any thread appends, who has _lock takes
        self._lock = threading.Lock()
        # guarded by _lock
        self._by_key: dict[ModelKey, VersionFigures] = {}
        self._other = VersionFigures(OTHER)
        self._unnamed: set[ModelKey] = set()  # counted under _other

    def add_version(self, key: ModelKey) -> bool:
        """Count what is told of this version from now on; return whether it has labels of its own. Idempotent."""
        with self._lock:
            if key in self._by_key:
                return True
            if key not in self._unnamed and len(self._by_key) < self._limit and key != OTHER:
                self._by_key[key] = VersionFigures(key)
                return True
            self._unnamed.add(key)
            return False

    def remove_version(self, key: ModelKey) -> None:
        """Forget its figures, unless they are counted under others. Idempotent."""
        with self._lock:
            self._count_pending_locked()
            self._by_key.pop(key, None)
            self._unnamed.discard(key)

    def named(self, key: ModelKey) -> ModelKey:
        """Return the key by whose labels a version is shown: its own, or :data:`OTHER`."""
        return key if key in self._by_key else OTHER

    def add_batch(self, batch: BatchFinished) -> None:
        """Count a batch; as :meth:`add`, which is for all else.

        Without its requests, which hold the data, and not at once: the thread that tells of it has to read the next
        answer, and those who got theirs wait for the interpreter. Several at once take a third of the time.
        """
        pending = self._pending
        pending.append(
            (batch.key, batch.arrived, batch.began, batch.ended, batch.handler_s, batch.failed, batch.abandoned)
        )
        if len(pending) >= _AT_ONCE:
            with self._lock:
                self._count_pending_locked()

    def add(self, event: RequestsDropped | WorkerReady | WorkerStopped) -> None:
        """Count what ``event`` tells; of a version that is not known, or not any more, it tells nothing."""
        with self._lock:
            figures = self._by_key.get(event.key) or self._other_locked(event.key)
            if figures is None:
                return
            if isinstance(event, RequestsDropped):
                figures.add_dropped(event)
            elif isinstance(event, WorkerReady):
                figures.add_ready(event)
            else:
                figures.add_stopped(event)

    def _count_pending_locked(self) -> None:
        pending = self._pending
        for _ in range(len(pending)):
            batch = pending.popleft()
            figures = self._by_key.get(batch[0]) or self._other_locked(batch[0])
            if figures is not None:
                figures.add_batch(batch)

    def _other_locked(self, key: ModelKey) -> VersionFigures | None:
        return self._other if key in self._unnamed else None

    def copies(self) -> Iterator[VersionFigures]:
        """Yield a copy of the figures of each version; of the others together last, once there have been any.

        Between two of them the lock is free: whoever counts does not wait for all.
        """
        with self._lock:
            self._count_pending_locked()
            versions = list(self._by_key.values())
        for figures in versions:
            with self._lock:
                copied = figures.copy()
            yield copied
        with self._lock:
            other = self._other.copy() if self._unnamed or self._other.requests or self._other.load.total else None
        if other is not None:
            yield other
