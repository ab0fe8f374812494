"""One worker as its pool sees it: its state, the batches that are with it, and when its time is over."""

from __future__ import annotations

from datetime import datetime

from attrs import define, field

from torchmgmt.backends import WorkerHandle
from torchmgmt.job import Job
from torchmgmt.lifecycle import WorkerEvent, WorkerState, advance_worker
from torchmgmt.records import ModelSpec, WorkerInfo
from torchmgmt.scaling import WorkerFacts

__all__ = ["NEVER", "PROMISING", "SERVING", "PoolWorker"]

NEVER = float("inf")
SERVING = (WorkerState.READY, WorkerState.BUSY)
PROMISING = (WorkerState.WANTED, WorkerState.LOADING, *SERVING)


@define(eq=False)
class PoolWorker:
    """Facts and bookkeeping of one worker. All of it is guarded by its pool's lock."""

    id: str
    wanted_at: datetime
    state: WorkerState = WorkerState.WANTED
    handle: WorkerHandle | None = None
    spawned_at: float = 0.0
    ready_at: float = NEVER
    jobs: dict[int, Job] = field(factory=dict)
    """The batches that are with it, by their numbers: it runs one, the others lie there.

    Two threads may send it theirs in another order than that in which they were assigned.
    """
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
    is_terminated: bool = False
    is_worn: bool = False
    """Whether another one shall take its place: it has answered or grown as much as one may."""

    def advance(self, event: WorkerEvent) -> None:
        """Go to the next state; raise IllegalTransition if there is none."""
        self.state = advance_worker(self.state, event)

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

    def take_jobs(self, last_started: int | None) -> tuple[list[Job], list[Job]]:
        """Take away all batches: those that died with it, and those that it had not begun.

        It answers one before it begins the next, so of those that are not answered it can have begun but one.
        """
        jobs, self.jobs = self.jobs, {}
        if last_started is None:
            return list(jobs.values()), []
        lost = [jobs.pop(last_started)] if last_started in jobs else []
        return lost, list(jobs.values())

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
