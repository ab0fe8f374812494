"""The policy of a WorkerPool as a pure function: what is, what is wanted, what failed and the time go in, a plan comes out.

It starts nothing, stops nothing and knows no clock but the one it is told, so each rule of it is a line in a table of
tests.
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import field, frozen

from torchmgmt.lifecycle import WorkerState
from torchmgmt.records import Scale

__all__ = ["Failures", "Plan", "Situation", "WorkerFacts", "back_off_s", "decide"]

FIRST_BACK_OFF_S = 0.1
LONGEST_BACK_OFF_S = 10.0

_STARTING = (WorkerState.WANTED, WorkerState.LOADING)
_KEPT = (*_STARTING, WorkerState.READY, WorkerState.BUSY)
# Which worker goes first when there are too many: the one that has cost least and would be missed least.
_DISPENSABLE = (WorkerState.WANTED, WorkerState.LOADING, WorkerState.READY, WorkerState.BUSY)


@frozen
class WorkerFacts:
    """What the policy needs to know of one worker."""

    id: str
    state: WorkerState


@frozen
class Failures:
    """The workers that ended unasked since one was last known to be well. Times are of one monotonic clock, in s."""

    count: int = 0
    first_at: float = 0.0
    last_at: float = 0.0

    def another(self, now: float) -> Failures:
        """Return these failures and one more at ``now``."""
        return Failures(self.count + 1, self.first_at if self.count else now, now)


@frozen(kw_only=True)
class Situation:
    """All that :func:`decide` looks at."""

    scale: Scale
    workers: Sequence[WorkerFacts]
    now: float
    waiting: int = 0
    """How many requests wait for a worker."""
    failures: Failures = field(factory=Failures)
    jitter: float = 1.0
    """A factor from 0.5 to 1.5 on the back-off, so that workers that died together do not come back together."""
    max_retry_timeout_s: float = 300.0
    gave_up: bool = False


@frozen(kw_only=True)
class Plan:
    """What is to be done now."""

    add: int = 0
    """How many workers to want in addition."""
    spawn: Sequence[str] = ()
    """The wanted workers whose process is to be started."""
    remove: Sequence[str] = ()
    """The workers to let go: idle ones at once, busy ones after their batch."""
    wake_at: float | None = None
    """When to decide again, because a back-off is over then."""
    give_up: bool = False
    """Whether starting workers has failed for too long; then none is added until someone scales again."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be done now."""
        return not (self.add or self.spawn or self.remove or self.give_up)


def back_off_s(failures: int, jitter: float = 1.0) -> float:
    """Return how many seconds to wait after the last of ``failures`` failures before the next start."""
    if failures <= 0:
        return 0.0
    return min(LONGEST_BACK_OFF_S, FIRST_BACK_OFF_S * 2.0 ** min(failures - 1, 30)) * jitter


def decide(situation: Situation) -> Plan:
    """Return what brings the pool nearer to what is wanted. Pure; the same situation always gives the same plan."""
    kept = [worker for worker in situation.workers if worker.state in _KEPT]
    if len(kept) > situation.scale.max_workers:
        return Plan(remove=_dispensable(kept, len(kept) - situation.scale.max_workers))
    if situation.gave_up:
        return Plan(remove=[worker.id for worker in kept if worker.state is WorkerState.WANTED])
    if _is_hopeless(situation):
        return Plan(give_up=True, remove=[worker.id for worker in kept if worker.state is WorkerState.WANTED])
    return _grow(situation, kept)


def _grow(situation: Situation, kept: Sequence[WorkerFacts]) -> Plan:
    # Scaled to zero is not closed: what waits is worth one worker, if there may be one.
    wanted = max(situation.scale.min_workers, min(1, situation.waiting, situation.scale.max_workers))
    add = max(0, wanted - len(kept))
    waiting = [worker.id for worker in kept if worker.state is WorkerState.WANTED]
    if not add and not waiting:
        return Plan()
    start_at = situation.failures.last_at + back_off_s(situation.failures.count, situation.jitter)
    if situation.failures.count and situation.now < start_at:
        return Plan(add=add, wake_at=start_at)
    return Plan(add=add, spawn=waiting)


def _is_hopeless(situation: Situation) -> bool:
    """Whether workers have failed to start for longer than the retry time, and none is on its way that might not."""
    failures = situation.failures
    if not failures.count or any(worker.state is WorkerState.LOADING for worker in situation.workers):
        return False
    return situation.now - failures.first_at >= situation.max_retry_timeout_s


def _dispensable(kept: Sequence[WorkerFacts], count: int) -> list[str]:
    # Among equals the youngest goes first: the oldest has the warmest caches.
    ordered = sorted(enumerate(kept), key=lambda at: (_DISPENSABLE.index(at[1].state), -at[0]))
    return [worker.id for _, worker in ordered[:count]]
