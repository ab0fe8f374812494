"""The workers as their pool sees them: the state of each, the batches that are with it, and who gets the next one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timezone

from attrs import define, field

from torchmgmt.backends import WorkerHandle
from torchmgmt.lifecycle import WorkerEvent, WorkerState, advance_worker
from torchmgmt.pool.autoscaling import Observation, WorkerFacts
from torchmgmt.pool.jobs import Job, JobQueue
from torchmgmt.records import ModelSpec, WorkerInfo

__all__ = ["LATE_S", "NEVER", "PoolWorker", "PoolWorkers"]

NEVER = float("inf")
# No more work than this lies with a worker: what one would lose by waiting for its next batch is nothing beside a long
# one, and a batch that lies there cannot go to whoever is free first.
_LYING_S = 0.05
LATE_S = 2 * _LYING_S
"""What lies with a worker for so long, because the batch before it takes longer than usual, is taken back."""
_NEW_SHARE = 0.1  # of each new run time in their moving average
_SERVING = (WorkerState.READY, WorkerState.BUSY)
_PROMISING = (WorkerState.WANTED, WorkerState.LOADING, *_SERVING)


@define(eq=False)
class PoolWorker:
    """Facts and bookkeeping of one worker. Changed on the dispatcher's thread; may be read on any."""

    id: str
    wanted_at: datetime
    state: WorkerState = WorkerState.WANTED
    handle: WorkerHandle | None = None
    spawned_at: float = 0.0
    ready_at: float = NEVER
    jobs: dict[int, Job] = field(factory=dict)
    """The batches that are with it, by their numbers, in the order in which it runs them."""
    recalled: int = 0
    """The last batch that it was told not to begin, if it had not."""
    began_at: float = 0.0
    """When it began the one that it runs."""
    busy_s: float = 0.0
    """For how long it has computed, not counting the batch that it runs."""
    answered: int = 0
    """How many requests it has answered."""
    overdue_at: float = NEVER
    """When it has to be ready, done with its batch, or gone."""
    end_reason: str = ""
    """Why it was made to end, if it was."""
    is_unwanted: bool = False
    """Whether it is made to end: that it ends is no failure then."""
    is_terminated: bool = False
    is_worn: bool = False
    """Whether another one shall take its place: it has answered or grown as much as one may."""

    def advance(self, event: WorkerEvent) -> None:
        """Go to the next state; raise IllegalTransition if there is none."""
        self.state = advance_worker(self.state, event)

    def note_ready(self) -> None:
        """Note that it has loaded, and takes batches from now on."""
        self.advance(WorkerEvent.READY)
        self.ready_at = time.monotonic()
        self.overdue_at = NEVER

    def assign(self, number: int, job: Job, now: float, response_timeout_s: float) -> None:
        """Note that a batch goes to it; its time runs from when it begins it."""
        if not self.jobs:
            self.began_at = now
            self.overdue_at = now + response_timeout_s
        self.advance(WorkerEvent.ASSIGN)
        self.jobs[number] = job

    def finish(self, number: int, now: float, response_timeout_s: float) -> Job | None:
        """Note that it has answered a batch, and begins the next; None if that batch is not with it (any more)."""
        job = self.jobs.pop(number, None)
        if job is None:
            return None
        self.answered += len(job.items)
        self.busy_s += now - self.began_at
        self.began_at = now
        # What was set for its end, when it was told to go, stays.
        if not self.end_reason:
            self.overdue_at = now + response_timeout_s if self.jobs else NEVER
        elif not self.jobs:
            self.overdue_at = NEVER
        return job

    def skip(self, number: int, now: float, response_timeout_s: float) -> Job | None:
        """Note that it does not begin a batch that was recalled, and return that; None if it is not with it any more."""
        is_first = next(iter(self.jobs), None) == number  # the time of that one runs
        job = self.jobs.pop(number, None)
        if is_first and not self.end_reason:
            self.began_at = now
            self.overdue_at = now + response_timeout_s if self.jobs else NEVER
        return job

    def prolong(self, number: int, overdue_at: float) -> Job | None:
        """Note that a part of the answers to a batch is there, and return that; None if it is not with it any more."""
        job = self.jobs.get(number)
        if job is not None and not self.end_reason:
            self.overdue_at = overdue_at
        return job

    def take_jobs(self, last_started: int | None) -> tuple[list[Job], list[Job]]:
        """Take away all batches: those that died with it, and those that it had not begun.

        It answers one before it begins the next, so of those that are not answered it can have begun but one.
        """
        jobs, self.jobs = self.jobs, {}
        if last_started is None:
            return list(jobs.values()), []
        lost = [jobs.pop(last_started)] if last_started in jobs else []
        return lost, list(jobs.values())

    def unwanted_job(self) -> int | None:
        """Return the number of the batch that it runs, if nobody waits for that any more; None otherwise."""
        first = next(iter(self.jobs), None)
        return first if first is not None and self.jobs[first].is_over() else None

    def computed_s(self, now: float) -> float:
        """For how long it has computed until now."""
        return self.busy_s + (now - self.began_at if self.jobs else 0.0)

    def note_wear(self, spec: ModelSpec) -> bool:
        """Look whether it has answered or grown as much as one may; return whether that is so since now."""
        if self.is_worn:
            return False
        grown = self.handle.private_bytes if self.handle is not None else 0
        self.is_worn = (spec.max_requests is not None and self.answered >= spec.max_requests) or (
            spec.max_memory_bytes is not None and grown > spec.max_memory_bytes
        )
        return self.is_worn

    def facts(self) -> WorkerFacts:
        """Return what the policy needs to know of it."""
        return WorkerFacts(self.id, self.state, self.is_worn)

    def info(self) -> WorkerInfo:
        """Return what ``describe`` shows of it."""
        handle = self.handle
        return WorkerInfo(
            id=self.id,
            state=self.state,
            start_time=self.wanted_at,
            pid=handle.pid if handle is not None else None,
            memory_bytes=handle.memory_bytes if handle is not None else 0,
        )


class PoolWorkers:
    """All workers of a pool, by their ids, oldest first. For the dispatcher's thread, but for :meth:`__iter__`."""

    def __init__(self) -> None:
        self.empty_since: float | None = time.monotonic()
        """Since when there has been none at all; None if there is one."""
        self._by_id: dict[str, PoolWorker] = {}
        self._idle: dict[str, PoolWorker] = {}  # the last one in is the first one out: its caches are warm
        self._run_s = 0.0  # what a batch takes, as a moving average
        self._past_busy_s = 0.0  # of workers that are gone
        self.start_s = 0.0
        """How long the last one that became ready took for that."""

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[PoolWorker]:
        return iter(list(self._by_id.values()))

    def __getitem__(self, worker_id: str) -> PoolWorker:
        return self._by_id[worker_id]

    def add(self, worker_id: str) -> None:
        """Note that one more is wanted."""
        self._by_id[worker_id] = PoolWorker(worker_id, datetime.now(timezone.utc))
        self.empty_since = None

    def forget(self, worker: PoolWorker) -> None:
        """Drop one that is gone. Idempotent."""
        self._past_busy_s += worker.busy_s
        self._by_id.pop(worker.id, None)
        self._idle.pop(worker.id, None)
        if not self._by_id:
            self.empty_since = time.monotonic()

    def note_idle(self, worker: PoolWorker) -> None:
        """Note that one is ready and has nothing to do."""
        self._idle[worker.id] = worker

    def forget_idle(self, worker: PoolWorker) -> None:
        """Note that one has something to do."""
        self._idle.pop(worker.id, None)

    def note_run(self, seconds: float) -> None:
        """Note how long a batch has taken."""
        self._run_s += _NEW_SHARE * (seconds - self._run_s) if self._run_s else seconds

    def take_idle(self) -> PoolWorker | None:
        """Return one that has nothing to do, no longer to be found here; None if there is none."""
        while self._idle:
            _, worker = self._idle.popitem()
            if worker.state is WorkerState.READY:  # else it was told to go since
                return worker
        return None

    def busy_with_room(self, most: int, now: float) -> PoolWorker | None:
        """Return one that computes, and with which a further batch may lie meanwhile: the one with the fewest."""
        fewest = min(most, 1 + int(_LYING_S / self._run_s)) if self._run_s else 1
        found = None
        if fewest > 1:
            for worker in self._by_id.values():
                is_late = now - worker.began_at > _LYING_S  # who knows when it will be done
                if worker.state is WorkerState.BUSY and len(worker.jobs) < fewest and not is_late:
                    found, fewest = worker, len(worker.jobs)
        return found

    def serving(self) -> int:
        """Return how many take batches now."""
        return sum(worker.state in _SERVING for worker in self._by_id.values())

    def any_promising(self) -> bool:
        """Return whether there is one that takes batches, or will."""
        return any(worker.state in _PROMISING for worker in self._by_id.values())

    def any_with_wanted_jobs(self) -> bool:
        """Return whether a batch is with one for which somebody waits."""
        return any(not job.is_over() for worker in self._by_id.values() for job in worker.jobs.values())

    def unwanted_batches(self) -> list[tuple[WorkerHandle, int]]:
        """Return the batches for which nobody waits any more: with whom each is, and its number; oldest first."""
        return [
            (worker.handle, number)
            for worker in self._by_id.values()
            for number, job in worker.jobs.items()
            if worker.handle is not None and job.is_over()
        ]

    def any_busy(self) -> bool:
        """Return whether one computes that takes further batches."""
        for worker in self._by_id.values():  # noqa: SIM110 - half as long as any(), and done for every batch
            if worker.state is WorkerState.BUSY:
                return True
        return False

    def any_idle(self) -> bool:
        """Return whether one has nothing to do."""
        return any(worker.state is WorkerState.READY for worker in self._idle.values())

    def next_overdue_at(self) -> float:
        """Return when the first one's time is over."""
        return min((worker.overdue_at for worker in self._by_id.values()), default=NEVER)

    def observe(self, queue: JobQueue) -> Observation:
        """Return what the policy learns of the load from this moment."""
        now = time.monotonic()
        workers = self._by_id.values()
        return Observation(
            now=now,
            busy_s=self._past_busy_s + sum(worker.computed_s(now) for worker in workers),
            serving=self.serving(),
            busy=sum(worker.state is WorkerState.BUSY for worker in workers),
            waiting=len(queue),
            waited_s=queue.waited_s(),
        )
