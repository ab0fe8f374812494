"""The policy over time: a pool of simulated workers follows simulated load, event by event, a day in a few seconds."""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Any

import pytest
from attrs import define, field, frozen

from torchmgmt.lifecycle import WorkerState
from torchmgmt.pool.autoscaling import LOOK_S, Load, Observation, Plan, Situation, WorkerFacts, decide
from torchmgmt.records import Scale

WANTED, LOADING, READY, BUSY = WorkerState.WANTED, WorkerState.LOADING, WorkerState.READY, WorkerState.BUSY
DRAINING = WorkerState.DRAINING

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S


@frozen
class Request:
    """When it comes, and how long it takes, in s."""

    at: float
    takes_s: float


@define
class SimulatedPool:
    """Carries out plans as a pool does: it decides at the events of workers, at wake_at, and when work arrives."""

    scale: Scale
    start_s: float = 0.1
    max_requests: float = math.inf
    settings: dict[str, Any] = field(factory=dict)
    now: float = 0.0
    load: Load = field(factory=Load)
    states: dict[str, WorkerState] = field(factory=dict)
    served: dict[str, int] = field(factory=dict)
    idle: list[str] = field(factory=list)
    queue: deque[Request] = field(factory=deque)
    events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = field(factory=list)
    numbers: Iterator[int] = field(factory=count)
    busy: int = 0
    busy_s: float = 0.0
    worker_s: float = 0.0
    look_at: float = math.inf
    wakes: int = 0
    waits: list[float] = field(factory=list)
    starts: list[float] = field(factory=list)
    removals: list[float] = field(factory=list)
    sizes: list[tuple[float, int]] = field(factory=list)
    is_loaded: bool = False
    empty_since: float | None = 0.0
    rests: list[float] = field(factory=list)

    def run(self, requests: Iterable[Request], until: float) -> SimulatedPool:
        """Let the requests come, and then time pass."""
        self.reconcile()
        for request in requests:
            self.pass_until(request.at)
            self.queue.append(request)
            self.pump()
            if self.look_at > self.now + LOOK_S:
                self.reconcile()
        self.pass_until(until)
        return self

    def pass_until(self, until: float) -> None:
        while self.events and self.events[0][0] <= until:
            at, _, what, arguments = heapq.heappop(self.events)
            self.advance(at)
            what(*arguments)
        self.advance(until)

    def advance(self, now: float) -> None:
        self.busy_s += self.busy * (now - self.now)
        self.worker_s += len(self.states) * (now - self.now)
        self.now = now

    def at(self, when: float, what: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self.events, (when, next(self.numbers), what, arguments))

    def pump(self) -> None:
        while self.idle and self.queue:
            request, worker = self.queue.popleft(), self.idle.pop()
            self.waits.append(self.now - request.at)
            self.states[worker] = BUSY
            self.busy += 1
            self.at(self.now + request.takes_s, self.done, worker)

    def done(self, worker: str) -> None:
        self.busy -= 1
        self.served[worker] += 1
        if self.states[worker] is DRAINING:
            self.exit(worker)
            return
        self.states[worker] = READY
        self.idle.append(worker)
        is_worn = self.served[worker] == self.max_requests
        self.pump()
        if is_worn:
            self.reconcile()

    def ready(self, worker: str) -> None:
        if worker in self.states:
            self.states[worker] = READY
            self.idle.append(worker)
            self.pump()
            self.reconcile()

    def wake(self, when: float) -> None:
        if when == self.look_at:
            self.wakes += 1
            self.reconcile()

    def reconcile(self) -> None:
        for _ in range(10):
            plan = decide(self.situation())
            self.carry_out(plan)
            if plan.is_empty:
                break
        else:
            raise AssertionError(f"it does not come to rest: {self.situation()}")
        self.look_at = math.inf if plan.wake_at is None else plan.wake_at
        if plan.wake_at is not None:
            assert plan.wake_at > self.now
            self.at(plan.wake_at, self.wake, plan.wake_at)

    def situation(self) -> Situation:
        waited_s = self.now - self.queue[0].at if self.queue else 0.0
        serving = len(self.idle) + sum(state is BUSY for state in self.states.values())
        busy = serving - len(self.idle)
        self.load = self.load.observed(
            Observation(
                now=self.now,
                busy_s=self.busy_s,
                serving=serving,
                busy=busy,
                waiting=len(self.queue),
                waited_s=waited_s,
            )
        )
        workers = [
            WorkerFacts(each, state, self.served[each] >= self.max_requests) for each, state in self.states.items()
        ]
        return Situation(
            scale=self.scale,
            workers=workers,
            now=self.now,
            waiting=len(self.queue),
            load=self.load,
            is_loaded=self.is_loaded,
            empty_since=self.empty_since,
            **self.settings,
        )

    def carry_out(self, plan: Plan) -> None:
        for _ in range(plan.add):
            worker = f"w{next(self.numbers)}"
            self.states[worker] = WANTED
            self.served[worker] = 0
            self.empty_since = None
        for each in plan.spawn:
            self.states[each] = LOADING
            self.starts.append(self.now)
            self.is_loaded = True
            self.at(self.now + self.start_s, self.ready, each)
        for each in plan.remove:
            self.removals.append(self.now)
            if self.states[each] is BUSY:
                self.states[each] = DRAINING
            else:
                self.exit(each)
        if plan.rest:
            self.is_loaded = False
            self.rests.append(self.now)
        if plan.add or plan.remove:
            self.sizes.append((self.now, sum(state is not DRAINING for state in self.states.values())))

    def exit(self, worker: str) -> None:
        if worker in self.idle:
            self.idle.remove(worker)
        del self.states[worker]
        if not self.states:
            self.empty_since = self.now


# -- load --------------------------------------------------------------------------------------------------------------


def poisson(rate: Callable[[float], float], until: float, *, seed: int, takes_s: float = 0.4) -> list[Request]:
    """Requests that come by chance, so many a second at each second, and take a log-normal time."""
    chance = random.Random(seed)
    requests = []
    for second in range(int(until)):
        if (per_s := rate(second)) > 0:
            at = chance.expovariate(per_s)
            while at < 1:
                takes = takes_s * chance.lognormvariate(-0.32, 0.8)
                requests.append(Request(second + at, min(10 * takes_s, takes)))
                at += chance.expovariate(per_s)
    return requests


def a_day(seed: int) -> list[Request]:
    """Working hours with a peak, each five minutes different, a dozen bursts, and hardly anything at night."""
    chance = random.Random(seed)
    noise = [chance.lognormvariate(0, 0.25) for _ in range(24 * 12)]
    bursts = [(chance.uniform(7, 22) * HOUR_S, chance.uniform(20, 240), chance.uniform(1.5, 4)) for _ in range(12)]

    def rate(second: float) -> float:
        hour = second / HOUR_S
        curve = math.sin(math.pi * (hour - 6) / 17) ** 2 if 6 <= hour <= 23 else 0.0
        factor = max((times for since, lasts, times in bursts if since <= second < since + lasts), default=1.0)
        return 6 * curve * noise[int(second // 300)] * factor + 0.002

    return poisson(rate, DAY_S, seed=seed + 1)


def square(period_s: float, high: float, low: float = 0.0) -> Callable[[float], float]:
    return lambda second: high if second % period_s < period_s / 2 else low


def quantile(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))] if values else 0.0


def sizes_between(pool: SimulatedPool, since: float, until: float) -> set[int]:
    """How many workers were kept at any time between the two."""
    before = [size for at, size in pool.sizes if at <= since]
    return {*before[-1:], *(size for at, size in pool.sizes if since < at <= until)}


def assert_changes_are_bounded(pool: SimulatedPool, delay_s: float = 60.0) -> None:
    """No two workers are removed within a quiet period, so none is started for one that just went but in each of those.

    What is remembered gets coarser with its age, so a quiet period may end a little early.
    """
    for earlier, later in zip(pool.removals, pool.removals[1:], strict=False):
        assert later - earlier >= 0.9 * delay_s
    assert len(pool.starts) <= len(pool.removals) + pool.scale.max_workers


# -- a day -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def day() -> SimulatedPool:
    return SimulatedPool(Scale(1, 16)).run(a_day(seed=1), DAY_S)


def test_on_a_day_hardly_anyone_waits(day: SimulatedPool):
    """Nine of ten do not wait at all, one of a thousand for longer than growing takes, nobody for long."""
    assert len(day.waits) > 100_000
    assert quantile(day.waits, 0.9) < 0.01
    assert quantile(day.waits, 0.99) < 0.25
    assert quantile(day.waits, 0.999) < 0.75
    assert max(day.waits) < 3


def test_on_a_day_workers_come_and_go_with_the_load_not_with_the_noise(day: SimulatedPool):
    """The day goes up to the peak and down once, with a dozen bursts: a start for each of 1,500 requests is plenty."""
    assert 20 < len(day.starts) < 150
    assert_changes_are_bounded(day)


def test_a_day_costs_a_quarter_of_what_it_would_with_all_workers_always_there(day: SimulatedPool):
    """What is kept follows what is used, with room for the next minute."""
    assert day.busy_s < day.worker_s < 5 * day.busy_s
    assert day.worker_s < 0.25 * day.scale.max_workers * DAY_S


def test_at_night_there_is_the_least_and_by_day_never_more_than_the_most(day: SimulatedPool):
    """Between min and max, and at min when there is nothing to do."""
    assert sizes_between(day, 0.0, 5 * HOUR_S) == {1}
    assert sizes_between(day, DAY_S - 300, DAY_S) == {1}
    assert max(size for _, size in day.sizes) <= 16
    assert min(size for _, size in day.sizes) >= 1


def test_looking_at_the_load_costs_at_most_one_look_a_second_and_little_memory(day: SimulatedPool):
    """Nobody looks while nothing runs, and what is remembered of a day is short."""
    assert day.wakes < DAY_S
    assert len(day.load.stretches) < 300


def test_the_same_day_again_is_the_same(day: SimulatedPool):
    """There is no chance in the policy: the first hours again give the same starts at the same times."""
    again = SimulatedPool(Scale(1, 16)).run((each for each in a_day(seed=1) if each.at < 9 * HOUR_S), 9 * HOUR_S)
    assert again.starts == [at for at in day.starts if at < 9 * HOUR_S]


def test_a_model_used_twice_a_day_is_there_twice_a_day():
    """At min 0 each use wakes one worker, which goes after the quiet period, and then its template; nothing ticks."""
    uses = [Request(hour * HOUR_S + 2 * number, 0.3) for hour in (9, 15) for number in range(20)]
    pool = SimulatedPool(Scale(0, 2)).run(uses, DAY_S)
    assert len(pool.starts) == 2
    assert len(pool.removals) == 2
    assert max(pool.waits) == pytest.approx(pool.start_s)
    assert pool.worker_s < 2 * (40 + 65)
    assert [at - removed for at, removed in zip(pool.rests, pool.removals, strict=True)] == pytest.approx([600, 600])
    assert pool.wakes < 2 * 50


# -- single shapes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period_s", [2, 10, 30, 60, 120, 240, 600, 3600])
def test_square_waves_change_the_pool_at_most_once_a_quiet_period(period_s: float):
    """On and off at any period, the one that is just as long as the quiet period included."""
    pool = SimulatedPool(Scale(1, 8)).run(poisson(square(period_s, 8), 2 * HOUR_S, seed=1), 2 * HOUR_S)
    assert_changes_are_bounded(pool)
    assert len(pool.starts) < 80
    assert quantile(pool.waits, 0.9) < 0.25


@pytest.mark.parametrize("period_s", [2, 10, 30, 60])
def test_square_waves_shorter_than_the_quiet_period_leave_the_pool_alone(period_s: float):
    """Once there are as many as the wave needs they stay."""
    pool = SimulatedPool(Scale(1, 8)).run(poisson(square(period_s, 8), 2 * HOUR_S, seed=1), 2 * HOUR_S)
    assert len([at for at in pool.starts if at > 600]) <= 4


def test_a_step_up_is_followed_at_once():
    """Within seconds there are workers enough, and from then on nobody waits for long."""
    requests = poisson(lambda second: 8 if second > 600 else 0.1, HOUR_S, seed=1)
    pool = SimulatedPool(Scale(1, 12)).run(requests, HOUR_S)
    assert 4 <= max(sizes_between(pool, 600, 610)) <= 12
    assert max(pool.waits) < 2
    assert quantile(pool.waits, 0.99) < 0.25
    assert_changes_are_bounded(pool)


def test_a_step_down_is_followed_one_by_one():
    """No two workers go within a quiet period, and in the end there is the least number."""
    requests = poisson(lambda second: 8 if second < 600 else 0.05, HOUR_S, seed=1)
    pool = SimulatedPool(Scale(1, 8)).run(requests, HOUR_S)
    assert_changes_are_bounded(pool)
    assert len(pool.states) == 1


def test_a_step_with_slow_workers_starts_no_more_than_may_be():
    """While workers load for a quarter of a minute no further ones are started; then the backlog goes."""
    requests = poisson(lambda second: 8 if 600 < second < 1200 else 0.05, HOUR_S, seed=1)
    pool = SimulatedPool(Scale(1, 12), start_s=15).run(requests, HOUR_S)
    assert len(pool.starts) <= 13
    assert max(pool.waits) < 30
    assert len(pool.states) == 1


def test_a_ramp_is_followed_up_and_down():
    """For an hour up and an hour down: about as many starts as workers are needed at the top."""
    requests = poisson(lambda second: 12 * min(second, 2 * HOUR_S - second) / HOUR_S, 2 * HOUR_S, seed=1)
    pool = SimulatedPool(Scale(1, 16)).run(requests, 3 * HOUR_S)
    assert max(size for _, size in pool.sizes) >= 5
    assert len(pool.starts) <= 20
    assert quantile(pool.waits, 0.99) < 0.25
    assert len(pool.states) == 1


def test_steady_load_settles():
    """The same load all the time: after the first minutes hardly a worker comes or goes."""
    pool = SimulatedPool(Scale(1, 16)).run(poisson(lambda _: 5, 2 * HOUR_S, seed=1), 2 * HOUR_S)
    assert len([at for at in pool.starts if at > 600]) <= 6
    assert quantile(pool.waits, 0.99) < 0.25


def test_more_load_than_the_most_workers_can_do_keeps_the_most_workers():
    """Nobody is started beyond max and nobody goes while requests wait; afterwards the least number is left."""
    pool = SimulatedPool(Scale(1, 3)).run(poisson(lambda second: 9 if second < 600 else 0, 600, seed=1), HOUR_S)
    assert sizes_between(pool, 60, 600) == {3}
    assert len(pool.starts) == 3
    assert len(pool.states) == 1


def test_long_batches_are_followed_as_well_as_short_ones():
    """What counts is how long requests wait and how busy the workers are, not how many requests there are."""
    long = SimulatedPool(Scale(1, 12)).run(poisson(lambda _: 0.5, HOUR_S, seed=1, takes_s=8), HOUR_S)
    short = SimulatedPool(Scale(1, 12)).run(poisson(lambda _: 150, 300, seed=1, takes_s=0.01), 300)
    for pool in (long, short):
        assert_changes_are_bounded(pool)
        assert quantile(pool.waits, 0.95) < 0.25
    assert len(short.starts) <= 4


# -- recycling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [Scale(1, 1), Scale(2, 2), Scale(1, 6), Scale(0, 3)], ids=str)
@pytest.mark.parametrize("start_s", [0.1, 5.0])
def test_recycling_takes_nothing_away_and_adds_one_at_most(scale: Scale, start_s: float):
    """However often workers are worn, there is never one more than max and one, and never a time with none."""
    requests = poisson(lambda second: 2 if second < 900 else 0, 900, seed=1, takes_s=0.2)
    pool = SimulatedPool(scale, start_s, max_requests=50).run(requests, HOUR_S)
    assert len(pool.waits) == len(requests)
    assert max(size for _, size in pool.sizes) <= scale.max_workers + 1
    assert min(sizes_between(pool, 1, 900)) >= 1
    assert len(pool.states) == scale.min_workers
    assert len(requests) / 100 <= len(pool.starts) <= len(requests) / 50 + 10


def test_recycling_costs_the_requests_nothing():
    """With worn workers replaced all the time, waits are like those without: the worn one serves until it has an heir."""
    requests = poisson(lambda _: 3, HOUR_S, seed=1, takes_s=0.2)
    plain = SimulatedPool(Scale(2, 2)).run(requests, HOUR_S)
    worn = SimulatedPool(Scale(2, 2), max_requests=40).run(requests, HOUR_S)
    assert len(worn.starts) > len(requests) / 50
    assert quantile(worn.waits, 0.99) < 1.1 * quantile(plain.waits, 0.99) + 0.02
    assert worn.worker_s < 1.05 * plain.worker_s
