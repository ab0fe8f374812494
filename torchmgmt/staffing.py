"""Staffing: which workers a pool has, brought step by step nearer to how many it shall have."""

from __future__ import annotations

import time
from collections.abc import Iterator

from torchmgmt.agenda import Agenda
from torchmgmt.attempts import Attempts
from torchmgmt.endings import Endings
from torchmgmt.errors import NoWorker
from torchmgmt.job import JobQueue
from torchmgmt.pool_worker import PoolWorkers
from torchmgmt.records import ModelSpec, Scale
from torchmgmt.scaling import Load, Plan, Situation, decide
from torchmgmt.starter import Starter

__all__ = ["Staffing"]


class Staffing:
    """Does what :func:`torchmgmt.scaling.decide` says. Every method is to be called with the pool's lock.

    Args:
        spec: what the workers load, and the limits to keep.
        workers: all workers of the pool.
        queue: what waits for them.
        agenda: the pool's.
        attempts: how starting them has gone.
        endings: how they are let go.
        starter: how they are started.
        worker_ids: where their ids come from.
    """

    def __init__(
        self,
        spec: ModelSpec,
        workers: PoolWorkers,
        queue: JobQueue,
        agenda: Agenda,
        attempts: Attempts,
        endings: Endings,
        starter: Starter,
        worker_ids: Iterator[int],
    ) -> None:
        self._spec = spec
        self._workers = workers
        self._queue = queue
        self._agenda = agenda
        self._attempts = attempts
        self._endings = endings
        self._worker_ids = worker_ids
        self._starter = starter
        self.wanted = Scale(0, 0)
        """How many workers shall be; may be read without the lock."""
        self._load = Load()

    @property
    def is_flexible(self) -> bool:
        """Whether the number of workers follows the load."""
        return self.wanted.min_workers < self.wanted.max_workers

    @property
    def has_enough(self) -> bool:
        """Whether as many workers serve as shall do so at least."""
        return self._workers.serving() >= self.wanted.min_workers

    @property
    def is_as_wanted(self) -> bool:
        """Whether neither one is missing nor one too many is there."""
        return self.has_enough and len(self._workers) <= self.wanted.max_workers

    def want(self, wanted: Scale) -> None:
        """Note how many workers shall be; what failed before does not count any more."""
        self.wanted = wanted
        self._attempts.begin_anew()

    def adjust(self) -> None:
        """Do all that there is to do now, and have the pool look again when more may be."""
        while True:
            if self.is_flexible:
                self._load = self._load.observed(self._workers.observe(self._queue))
            plan = decide(self._situation())
            self._apply(plan)
            if plan.is_empty:
                if plan.wake_at is not None:
                    self._agenda.look_by(plan.wake_at)
                return

    def note_success(self) -> None:
        """Note that a worker has served."""
        if self._attempts.last_error is not None:
            self._attempts.note_success(all_there=self.has_enough)

    def no_worker_error(self) -> NoWorker | None:
        """Return why there is no worker and there will be none by itself; None if that is not so."""
        key = self._spec.key
        if self._workers.any_promising():
            return None
        if self.wanted.max_workers == 0:
            return NoWorker(key.name, key.version, "it is scaled to 0 workers; scale it up first")
        if self._attempts.gave_up:
            error = self._attempts.last_error
            reason = error.reason if error else "its workers could not be started"
            return NoWorker(key.name, key.version, f"{reason}; starting workers was given up, scale it to try again")
        return None

    def _situation(self) -> Situation:
        return Situation(
            scale=self.wanted,
            workers=[worker.facts() for worker in self._workers],
            waiting=len(self._queue),
            now=time.monotonic(),
            load=self._load,
            scale_down_delay_s=self._spec.scale_down_delay_s,
            failures=self._attempts.failures,
            jitter=self._attempts.jitter,
            max_retry_timeout_s=self._spec.max_retry_timeout_s,
            gave_up=self._attempts.gave_up,
            is_loaded=self._starter.is_loaded,
            empty_since=self._workers.empty_since,
            template_idle_timeout_s=self._spec.template_idle_timeout_s,
        )

    def _apply(self, plan: Plan) -> None:
        for _ in range(plan.add):
            self._workers.add(str(next(self._worker_ids)))
        for worker_id in plan.spawn:
            self._starter.spawn(self._workers[worker_id], self.wanted.max_workers)
        for worker_id in plan.remove:
            self._endings.let_go(self._workers[worker_id])
        if plan.give_up:
            self._attempts.give_up()
        if plan.rest:
            self._starter.rest()
