"""The policy of a WorkerPool as a pure function: what is, what is wanted, what failed and the time go in, a plan comes out.

It starts nothing, stops nothing and knows no clock but the one it is told, so each rule of it is a line in a table of
tests.

Between the least and the most number of workers the pool follows the load. A worker is added when requests wait longer
than they should or the workers are nearly always busy, and removed when one less would have been enough for a quiet
period, by far. The two conditions are far apart, and what is looked at begins anew after each change: a worker that
was just removed is not needed again at once.

A worn worker (one that has served as many requests, or takes as much memory, as it may) goes on serving until its
successor does. While one is being replaced there is one worker more than ``Scale.max_workers`` allows, never two more.

When to decide: after each event of a worker, after each change of what is wanted, at ``Plan.wake_at``, and when work
arrives for which nothing of that is due within :data:`LOOK_S`, each time with the load observed just before.
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import Factory, evolve, field, frozen

from torchmgmt.lifecycle import WorkerState
from torchmgmt.records import Scale

__all__ = [
    "LOOK_S",
    "Failures",
    "Load",
    "Observation",
    "Plan",
    "Situation",
    "Targets",
    "WorkerFacts",
    "back_off_s",
    "decide",
    "default_threads",
]

FIRST_BACK_OFF_S = 0.1
LONGEST_BACK_OFF_S = 10.0

# How often to look at the load while something runs, and while something waits that another worker might take.
LOOK_S = 1.0
LOOK_AT_WAITING_S = 0.1
# Loads are averaged over this long, so that one batch more or less at a time is no peak.
STRETCH_S = 1.0
# What is remembered of the load gets coarser with its age: a stretch is no longer than this part of it.
COARSENESS = 1 / 16
# Waiting for so many times the target means that one worker more would not be enough.
SEVERAL = 4

_STARTING = (WorkerState.WANTED, WorkerState.LOADING)
_SERVING = (WorkerState.READY, WorkerState.BUSY)
_KEPT = (*_STARTING, *_SERVING)


@frozen
class WorkerFacts:
    """What the policy needs to know of one worker."""

    id: str
    state: WorkerState
    is_worn: bool = False
    """Whether it is to be replaced: it has served as many requests, or takes as much memory, as it may."""

    @property
    def is_starting(self) -> bool:
        """Whether it will serve, but does not yet."""
        return self.state in _STARTING

    @property
    def is_serving(self) -> bool:
        """Whether it takes batches."""
        return self.state in _SERVING


# -- what failed -------------------------------------------------------------------------------------------------------


@frozen
class Failures:
    """The attempts that failed since a worker was last known to be well. Times are of one monotonic clock, in s."""

    count: int = 0
    first_at: float = 0.0
    last_at: float = 0.0
    counted_at: float = field(default=Factory(lambda self: self.last_at, takes_self=True))
    """When the last failure came that raised ``count``; what had been started before belongs to the same attempt."""

    def another(self, now: float, started_at: float) -> Failures:
        """Return these failures and one more at ``now``, of a worker whose process was started at ``started_at``.

        Eight workers that wait for one load that fails are one failure, not eight.
        """
        if self.count and started_at < self.counted_at:
            return evolve(self, last_at=now)
        return Failures(self.count + 1, self.first_at if self.count else now, now)


def back_off_s(failures: int, jitter: float = 1.0) -> float:
    """Return how many seconds to wait after the last of ``failures`` failures before the next start."""
    if failures <= 0:
        return 0.0
    return min(LONGEST_BACK_OFF_S, FIRST_BACK_OFF_S * 2.0 ** min(failures - 1, 30)) * jitter


# -- the load ----------------------------------------------------------------------------------------------------------


@frozen(kw_only=True)
class Observation:
    """What there is to do at one moment."""

    now: float
    """Of a monotonic clock, in s."""
    busy_s: float
    """Worker-seconds of computing so far: a running total that includes the past part of batches that still run."""
    serving: int
    """How many workers are READY or BUSY."""
    busy: int
    """How many of them are BUSY."""
    waiting: int
    """How many requests wait for a worker or for their batch to fill."""
    waited_s: float
    """How long the oldest of them has waited, in s."""

    @property
    def is_pressed(self) -> bool:
        """Whether something waits because all workers are busy. What waits beside an idle one waits for its batch."""
        return 0 < self.serving <= self.busy and self.waiting > 0


@frozen
class Stretch:
    """What is remembered of the time between observations."""

    since: float
    until: float
    work_s: float
    """Worker-seconds of computing in it."""
    peak: float
    """How many workers were busy in its busiest second, on average."""
    serving: int
    """The least number of workers that served."""
    waited_s: float
    """The longest that a request was seen to wait while all workers were busy."""

    @classmethod
    def between(cls, earlier: Observation, later: Observation) -> Stretch:
        """Return what two observations, one after the other, tell of the time between them."""
        work_s = max(0.0, later.busy_s - earlier.busy_s)
        return cls(
            since=earlier.now,
            until=later.now,
            work_s=work_s,
            peak=work_s / max(STRETCH_S, later.now - earlier.now),
            serving=min(earlier.serving, later.serving),
            waited_s=later.waited_s if later.is_pressed else 0.0,
        )

    def joined(self, later: Stretch) -> Stretch:
        """Return this stretch and the one that follows it as one."""
        work_s = self.work_s + later.work_s
        return Stretch(
            since=self.since,
            until=later.until,
            work_s=work_s,
            peak=max(self.peak, later.peak, work_s / max(STRETCH_S, later.until - self.since)),
            serving=min(self.serving, later.serving),
            waited_s=max(self.waited_s, later.waited_s),
        )


@frozen
class Load:
    """What has been observed of a pool's load. ``Load()``: nothing yet.

    Its size grows with the logarithm of the time that it covers.
    """

    last: Observation | None = None
    pressed_since: float = 0.0
    """Since when each observation found requests that wait for busy workers; meaningless if the last did not."""
    grown_at: float = 0.0
    """When more workers served than before; what was seen before that says nothing of so many."""
    stretches: Sequence[Stretch] = ()
    """The past, oldest first, without gaps."""

    def observed(self, observation: Observation) -> Load:
        """Return this load and what was observed after it. Pure."""
        last = self.last
        if last is None:
            return Load(observation, observation.now, observation.now)
        return Load(
            last=observation,
            pressed_since=self.pressed_since if last.is_pressed and observation.is_pressed else observation.now,
            grown_at=observation.now if observation.serving > last.serving else self.grown_at,
            stretches=self._followed_by(Stretch.between(last, observation)),
        )

    def _followed_by(self, stretch: Stretch) -> Sequence[Stretch]:
        if stretch.until <= stretch.since:
            return self.stretches
        if self.stretches and stretch.until - self.stretches[-1].since <= STRETCH_S:
            return (*self.stretches[:-1], self.stretches[-1].joined(stretch))
        return (*_thinned(self.stretches, stretch.until), stretch)

    def pressed_s(self) -> float:
        """Return for how long, in s, requests have been waiting for as many busy workers as there are now."""
        if self.last is None or not self.last.is_pressed:
            return 0.0
        return self.last.now - max(self.pressed_since, self.grown_at)

    def busy_in(self, seconds: float) -> float:
        """Return how many workers were busy on average in the last ``seconds``; 0 if not so many served all the time."""
        if self.last is None or self.last.now - self.grown_at < seconds:
            return 0.0
        work_s = 0.0
        for stretch in reversed(self.stretches):
            work_s += stretch.work_s
            if self.last.now - stretch.since >= seconds:
                return work_s / (self.last.now - stretch.since)
        return 0.0

    def level(self) -> int:
        """Return how many workers serve, not counting one that has served for no more than a moment."""
        if self.last is None:
            return 0
        recent = [stretch.serving for stretch in self.stretches[-2:] if self.last.now - stretch.until < STRETCH_S]
        return min(recent, default=self.last.serving)


def _thinned(stretches: Sequence[Stretch], now: float) -> Sequence[Stretch]:
    if len(stretches) % 16:
        return stretches  # now and then is often enough, and cheaper
    thinned: list[Stretch] = []
    for stretch in stretches:
        if thinned and stretch.until - thinned[-1].since <= (now - stretch.until) * COARSENESS:
            thinned[-1] = thinned[-1].joined(stretch)
        else:
            thinned.append(stretch)
    return tuple(thinned)


@frozen(kw_only=True)
class Targets:
    """What to hold to when following the load."""

    queue_s: float = 0.1
    """How long a request may wait for a worker, in s."""
    queue_for_s: float = 0.5
    """How long, in s, requests must have been waiting for busy workers before one that waits too long adds a worker."""
    busy_share: float = 0.8
    """Which part of the time workers may compute while requests wait for them."""
    busy_for_s: float = 5.0
    """Over how long, in s, that part is taken."""
    comfortable_share: float = 0.6
    """Which part of its busiest second one worker less may compute for one to be removed; well under busy_share."""


# -- the policy --------------------------------------------------------------------------------------------------------


@frozen(kw_only=True)
class Situation:
    """All that :func:`decide` looks at. Times are of one monotonic clock, in s."""

    scale: Scale
    workers: Sequence[WorkerFacts]
    """All that there are, the oldest first."""
    now: float
    waiting: int = 0
    """How many requests wait for a worker."""
    load: Load = field(factory=Load)
    """What has been observed up to now. Nothing: the load is not followed."""
    targets: Targets = field(factory=Targets)
    scale_down_delay_s: float = 60.0
    """For how long, in s, one worker less must have been enough before one is removed."""
    failures: Failures = field(factory=Failures)
    jitter: float = 1.0
    """A factor from 0.5 to 1.5 on the back-off, so that workers that died together do not come back together."""
    max_retry_timeout_s: float = 300.0
    gave_up: bool = False
    is_loaded: bool = False
    """Whether something is kept loaded for further workers."""
    empty_since: float | None = None
    """Since when there has been no worker at all. None: there is one."""
    template_idle_timeout_s: float = 600.0
    """How long that may stay loaded without a worker, in s."""
    kept: Sequence[WorkerFacts] = field(init=False, eq=False, repr=False)
    """The workers that serve or will serve: all but those that leave or are gone."""

    @kept.default
    def _those_kept(self) -> Sequence[WorkerFacts]:
        return [worker for worker in self.workers if worker.state in _KEPT]

    @property
    def serving(self) -> int:
        """How many workers take batches."""
        return sum(worker.is_serving for worker in self.kept)

    @property
    def busy(self) -> int:
        """How many of them run one."""
        return sum(worker.state is WorkerState.BUSY for worker in self.kept)

    @property
    def is_starting(self) -> bool:
        """Whether a worker is about to serve: what it will change is not seen yet."""
        return any(worker.is_starting for worker in self.kept)

    @property
    def is_worn(self) -> bool:
        """Whether a worker is to be replaced."""
        return any(worker.is_worn for worker in self.kept)

    @property
    def is_replacing(self) -> bool:
        """Whether a worker is on its way that a worn one waits for."""
        return self.is_worn and self.is_starting

    @property
    def size(self) -> int:
        """How many workers are kept; a worn one and its successor are one."""
        return len(self.kept) - self.is_replacing

    @property
    def is_following(self) -> bool:
        """Whether the number of workers depends on the load."""
        return self.scale.min_workers < self.scale.max_workers and self.load.last is not None


@frozen(kw_only=True)
class Plan:
    """What is to be done now. Once it is done, decide again; a plan that is empty says until when nothing is to do."""

    add: int = 0
    """How many workers to want in addition."""
    spawn: Sequence[str] = ()
    """The wanted workers whose process is to be started."""
    remove: Sequence[str] = ()
    """The workers to let go: idle ones at once, busy ones after their batch."""
    wake_at: float | None = None
    """When to decide again even if nothing happens: a back-off or a quiet period is over, the load is to be looked at."""
    give_up: bool = False
    """Whether starting workers has failed for too long; then none is added until someone scales again."""
    rest: bool = False
    """Whether to let go of what is kept loaded for further workers; the next one loads again."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be done now."""
        return not (self.add or self.spawn or self.remove or self.give_up or self.rest)


def default_threads(cores: int, max_workers: int) -> int:
    """Return how many intra-op threads each of up to ``max_workers`` workers gets of ``cores`` cores; at least 1."""
    return max(1, cores // max(1, max_workers))


def decide(situation: Situation) -> Plan:
    """Return what brings the pool nearer to what is wanted. Pure; the same situation always gives the same plan."""
    superfluous = _beyond_max(situation) or _replaced(situation) or _not_needed(situation)
    if superfluous:
        return Plan(remove=_dispensable(situation.kept, superfluous))
    if situation.gave_up or _is_hopeless(situation):
        wanted = [worker.id for worker in situation.kept if worker.state is WorkerState.WANTED]
        if wanted or not situation.gave_up:
            return Plan(give_up=not situation.gave_up, remove=wanted)
        return _rest(situation)
    return _start(situation, _below_min(situation) or _overloaded(situation) or _to_be_replaced(situation))


# -- how many are too many ---------------------------------------------------------------------------------------------


def _beyond_max(situation: Situation) -> int:
    most = situation.scale.max_workers
    # A successor may be there beside the worn one: else there would be a gap between the two.
    return max(0, len(situation.kept) - most - (most > 0 and situation.is_replacing))


def _replaced(situation: Situation) -> int:
    """Return how many worn workers have a successor that serves."""
    if situation.is_starting:
        return 0
    wanted = min(situation.scale.max_workers, max(situation.scale.min_workers, situation.load.level()))
    return min(sum(worker.is_worn for worker in situation.kept), max(0, situation.serving - wanted))


def _not_needed(situation: Situation) -> int:
    """Return 1 if one worker less would have been enough, by far, for the whole quiet period, else 0."""
    size = situation.size
    if not situation.is_following or size <= situation.scale.min_workers or situation.waiting or situation.busy >= size:
        return 0
    return int(situation.now >= _quiet_until(situation))


def _quiet_until(situation: Situation) -> float:
    """Return when the quiet period is over if nothing happens."""
    load, targets, rest = situation.load, situation.targets, situation.size - 1
    since = load.stretches[0].since if load.stretches else situation.now
    for stretch in reversed(load.stretches):
        is_comfortable = stretch.peak <= rest * targets.comfortable_share and stretch.waited_s <= targets.queue_s / 2
        is_after_the_last_removal = stretch.serving <= situation.size
        if not is_comfortable or not is_after_the_last_removal:
            since = stretch.until
            break
        if stretch.since + situation.scale_down_delay_s <= situation.now:
            since = stretch.since
            break
    return since + situation.scale_down_delay_s


def _dispensable(kept: Sequence[WorkerFacts], count: int) -> list[str]:
    """Return the ``count`` workers that have cost least and would be missed least."""

    # Who does not serve yet goes before the worn, for which it may be the successor: so there is no gap.
    # Among equals the youngest goes first: the oldest has the warmest caches.
    def missed(at: tuple[int, WorkerFacts]) -> tuple[bool, bool, int, int]:
        age, worker = at
        return worker.is_serving, not worker.is_worn, _KEPT.index(worker.state), -age

    return [worker.id for _, worker in sorted(enumerate(kept), key=missed)[:count]]


# -- how many are too few ----------------------------------------------------------------------------------------------


def _below_min(situation: Situation) -> int:
    # Scaled to zero is not closed: what waits is worth one worker, if there may be one.
    wanted = max(situation.scale.min_workers, min(1, situation.waiting, situation.scale.max_workers))
    return max(0, wanted - len(situation.kept))


def _overloaded(situation: Situation) -> int:
    """Return how many workers more the load needs, at most as many as serve now."""
    load, targets, last = situation.load, situation.targets, situation.load.last
    room = situation.scale.max_workers - len(situation.kept)
    if last is None or not last.is_pressed or situation.is_starting or room <= 0:
        return 0
    if last.waited_s > targets.queue_s and load.pressed_s() >= targets.queue_for_s:
        several = min(last.waiting, last.serving) if last.waited_s > SEVERAL * targets.queue_s else 1
        return min(room, several)
    return int(load.busy_in(targets.busy_for_s) > targets.busy_share * last.serving)


def _to_be_replaced(situation: Situation) -> int:
    """Return 1 if a worn worker needs a successor and no other is being replaced, else 0."""
    return int(situation.is_worn and not situation.is_starting and len(situation.kept) <= situation.scale.max_workers)


def _is_hopeless(situation: Situation) -> bool:
    """Whether workers have failed to start for longer than the retry time, and none is on its way that might not."""
    failures = situation.failures
    if not failures.count or any(worker.state is WorkerState.LOADING for worker in situation.workers):
        return False
    return situation.now - failures.first_at >= situation.max_retry_timeout_s


def _start(situation: Situation, add: int) -> Plan:
    wanted = [worker.id for worker in situation.kept if worker.state is WorkerState.WANTED]
    if not add and not wanted:
        return _rest(situation)
    start_at = situation.failures.last_at + back_off_s(situation.failures.count, situation.jitter)
    if situation.failures.count and situation.now < start_at:
        look_at = _look_at(situation)
        return Plan(add=add, wake_at=start_at if look_at is None else min(start_at, look_at))
    return Plan(add=add, spawn=wanted)


# -- when there is nothing to start or stop ----------------------------------------------------------------------------


def _rest(situation: Situation) -> Plan:
    """Return the plan for a pool that has the workers it needs: wait, and do not stay loaded for nothing."""
    is_empty = all(worker.state is WorkerState.EXITED for worker in situation.workers)
    if not situation.is_loaded or not is_empty or situation.waiting:
        return Plan(wake_at=_look_at(situation))
    empty_since = situation.now if situation.empty_since is None else situation.empty_since
    rest_at = empty_since + situation.template_idle_timeout_s
    is_time = situation.scale.max_workers == 0 or situation.gave_up or situation.now >= rest_at
    return Plan(rest=True) if is_time else Plan(wake_at=rest_at)


def _look_at(situation: Situation) -> float | None:
    """Return when to look at the load again. None: only when something happens."""
    if not situation.is_following:
        return None
    times: list[float] = []
    if situation.serving and (situation.waiting or situation.busy):
        has_room = len(situation.kept) < situation.scale.max_workers and not situation.gave_up
        may_grow = has_room and situation.waiting and not situation.is_starting
        times.append(situation.now + (LOOK_AT_WAITING_S if may_grow else LOOK_S))
    if situation.size > situation.scale.min_workers:
        times.append(_quiet_until(situation))
    return min((at for at in times if at > situation.now), default=None)
