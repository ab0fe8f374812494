"""The policy of a pool, rule by rule, and what follows from all of them together."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
from attrs import define, evolve, field
from hypothesis import given
from hypothesis import strategies as st

from torchmgmt.lifecycle import WorkerState
from torchmgmt.records import Scale
from torchmgmt.scaling import (
    FIRST_BACK_OFF_S,
    LONGEST_BACK_OFF_S,
    Failures,
    Plan,
    Situation,
    WorkerFacts,
    back_off_s,
    decide,
)

WANTED, LOADING, READY, BUSY = WorkerState.WANTED, WorkerState.LOADING, WorkerState.READY, WorkerState.BUSY
DRAINING, STOPPING, EXITED = WorkerState.DRAINING, WorkerState.STOPPING, WorkerState.EXITED
KEPT = {WANTED, LOADING, READY, BUSY}

NOW = 1000.0
FAILED_ONCE = Failures(1, NOW, NOW)
FAILING_FOR_300_S = Failures(9, NOW - 300, NOW)


def situation(low: int, high: int, *states: WorkerState, **changes: Any) -> Situation:
    """A situation at NOW with workers w0, w1, ... (the oldest first)."""
    workers = [WorkerFacts(f"w{number}", state) for number, state in enumerate(states)]
    return Situation(**{"scale": Scale(low, high), "workers": workers, "now": NOW, **changes})


def as_tuple(plan: Plan) -> tuple[object, ...]:
    return plan.add, tuple(plan.spawn), tuple(plan.remove), plan.wake_at, plan.give_up


def is_empty(plan: Plan) -> bool:
    return as_tuple(plan) == as_tuple(Plan())


RULES = {
    "below min adds what is missing": (situation(3, 5, READY), Plan(add=2)),
    "from nothing to min": (situation(2, 2), Plan(add=2)),
    "enough is enough": (situation(1, 1, READY), Plan()),
    "between min and max is left alone": (situation(1, 4, READY, BUSY, READY), Plan()),
    "a busy worker counts": (situation(1, 1, BUSY), Plan()),
    "a loading worker counts": (situation(1, 1, LOADING), Plan()),
    "one that leaves does not count": (situation(1, 1, DRAINING), Plan(add=1)),
    "one that was told to end does not count": (situation(1, 1, STOPPING), Plan(add=1)),
    "one that is gone does not count": (situation(1, 1, EXITED), Plan(add=1)),
    "the wanted are spawned": (situation(2, 2, WANTED, WANTED), Plan(spawn=["w0", "w1"])),
    "the wanted are spawned while others are added": (situation(2, 2, WANTED), Plan(add=1, spawn=["w0"])),
    "after a failure it waits": (
        situation(1, 1, WANTED, failures=FAILED_ONCE),
        Plan(wake_at=NOW + FIRST_BACK_OFF_S),
    ),
    "while it waits, workers are wanted all the same": (
        situation(2, 2, failures=FAILED_ONCE),
        Plan(add=2, wake_at=NOW + FIRST_BACK_OFF_S),
    ),
    "when the wait is over it starts": (
        situation(1, 1, WANTED, failures=FAILED_ONCE, now=NOW + FIRST_BACK_OFF_S),
        Plan(spawn=["w0"]),
    ),
    "more failures make it wait longer": (
        situation(1, 1, WANTED, failures=Failures(3, NOW - 1, NOW)),
        Plan(wake_at=NOW + 4 * FIRST_BACK_OFF_S),
    ),
    "jitter moves the end of the wait": (
        situation(1, 1, WANTED, failures=FAILED_ONCE, jitter=1.5),
        Plan(wake_at=NOW + 1.5 * FIRST_BACK_OFF_S),
    ),
    "a failure is no reason to wake if nobody is wanted": (situation(1, 1, READY, failures=FAILED_ONCE), Plan()),
    "failing for too long gives up": (
        situation(1, 1, WANTED, failures=FAILING_FOR_300_S),
        Plan(give_up=True, remove=["w0"]),
    ),
    "it gives up with nobody wanted yet": (situation(1, 1, failures=FAILING_FOR_300_S), Plan(give_up=True)),
    "giving up spares those who serve": (
        situation(3, 3, READY, BUSY, WANTED, failures=FAILING_FOR_300_S),
        Plan(give_up=True, remove=["w2"]),
    ),
    "it does not give up while one is loading that might make it": (
        situation(2, 2, LOADING, WANTED, failures=FAILING_FOR_300_S, now=NOW + 60),
        Plan(spawn=["w1"]),
    ),
    "it does not give up a moment too early": (
        situation(1, 1, WANTED, failures=Failures(9, NOW - 299.9, NOW - 60)),
        Plan(spawn=["w0"]),
    ),
    "with a retry time of zero the first failure is the last": (
        situation(1, 1, WANTED, failures=FAILED_ONCE, max_retry_timeout_s=0),
        Plan(give_up=True, remove=["w0"]),
    ),
    "without a failure there is nothing to give up": (
        situation(1, 1, WANTED, max_retry_timeout_s=0),
        Plan(spawn=["w0"]),
    ),
    "having given up it adds nothing": (situation(2, 2, gave_up=True, failures=FAILING_FOR_300_S), Plan()),
    "having given up it adds nothing for waiting requests": (situation(0, 2, gave_up=True, waiting=5), Plan()),
    "having given up it spawns nothing": (situation(1, 1, WANTED, gave_up=True), Plan(remove=["w0"])),
    "having given up it keeps those who serve": (situation(3, 3, READY, LOADING, BUSY, gave_up=True), Plan()),
    "having given up it still scales down": (situation(1, 1, READY, BUSY, gave_up=True), Plan(remove=["w0"])),
    "of too many the cheapest go first": (
        situation(0, 1, BUSY, READY, LOADING, WANTED),
        Plan(remove=["w3", "w2", "w1"]),
    ),
    "of equals the youngest goes first": (situation(0, 1, READY, READY, READY), Plan(remove=["w2", "w1"])),
    "no more go than are too many": (situation(1, 2, READY, READY, BUSY, DRAINING), Plan(remove=["w1"])),
    "scaled to zero all go": (situation(0, 0, BUSY, WANTED), Plan(remove=["w1", "w0"])),
    "none is spawned while there are too many": (situation(1, 1, READY, WANTED), Plan(remove=["w1"])),
    "waiting requests are worth one worker": (situation(0, 3, waiting=7), Plan(add=1)),
    "waiting requests are worth no second one": (situation(0, 3, READY, waiting=7), Plan()),
    "waiting requests with min above zero change nothing": (situation(1, 3, BUSY, waiting=7), Plan()),
    "nobody waits, nobody comes": (situation(0, 3), Plan()),
    "max zero never adds": (situation(0, 0, waiting=7), Plan()),
}


@pytest.mark.parametrize("now, plan", RULES.values(), ids=RULES)
def test_rule(now: Situation, plan: Plan):
    """Each row is one rule of the policy."""
    assert as_tuple(decide(now)) == as_tuple(plan)


# -- what follows ------------------------------------------------------------------------------------------------------

TIMES = st.floats(0, 2000)
SCALES = st.tuples(st.integers(0, 6), st.integers(0, 6)).map(sorted).map(lambda pair: Scale(*pair))
FAILURES = st.builds(
    lambda count, first, more: Failures(count, first, first + more) if count else Failures(),
    st.integers(0, 200),
    TIMES,
    TIMES,
)
SITUATIONS = st.builds(
    lambda states, late, **facts: Situation(
        workers=[WorkerFacts(f"w{n}", state) for n, state in enumerate(states)],
        now=facts["failures"].last_at + late,
        **facts,
    ),
    st.lists(st.sampled_from(WorkerState), max_size=10),
    TIMES,
    scale=SCALES,
    waiting=st.integers(0, 100),
    failures=FAILURES,
    jitter=st.floats(0.5, 1.5),
    max_retry_timeout_s=st.floats(0, 500),
    gave_up=st.booleans(),
)


@given(now=SITUATIONS)
def test_every_plan_stays_within_the_scale(now: Situation):
    """No plan adds beyond max, spawns what is not wanted, removes what is leaving, or adds and removes at once."""
    plan = decide(now)
    by_id = {worker.id: worker.state for worker in now.workers}
    kept = sum(state in KEPT for state in by_id.values())
    assert plan.add >= 0
    assert not plan.add or kept + plan.add <= now.scale.max_workers
    assert all(by_id[each] is WANTED for each in plan.spawn)
    assert all(by_id[each] in KEPT for each in plan.remove)
    assert len(set(plan.remove)) == len(plan.remove)
    assert len(set(plan.spawn)) == len(plan.spawn)
    assert not (plan.remove and (plan.add or plan.spawn))


@given(now=SITUATIONS)
def test_the_same_situation_gives_the_same_plan(now: Situation):
    """decide is pure."""
    assert as_tuple(decide(now)) == as_tuple(decide(now))


@given(now=SITUATIONS)
def test_a_plan_wakes_only_in_the_future_and_starts_nothing_till_then(now: Situation):
    """A back-off ends after now, and no process is started before its end."""
    plan = decide(now)
    if plan.wake_at is not None:
        assert plan.wake_at > now.now
        assert not plan.spawn
        assert plan.wake_at - now.failures.last_at <= 1.5 * LONGEST_BACK_OFF_S


@given(now=SITUATIONS)
def test_who_serves_is_removed_only_to_get_down_to_max(now: Situation):
    """Failures and giving up never cost a worker that is loading, ready or busy."""
    by_id = {worker.id: worker.state for worker in now.workers}
    removed = [by_id[each] for each in decide(now).remove]
    too_many = sum(state in KEPT for state in by_id.values()) - now.scale.max_workers
    if any(state is not WANTED for state in removed):
        assert len(removed) == too_many


@given(now=SITUATIONS)
def test_gave_up_is_quiet(now: Situation):
    """After giving up nothing is added, spawned, given up again or waited for."""
    plan = decide(evolve(now, gave_up=True))
    assert (plan.add, tuple(plan.spawn), plan.wake_at, plan.give_up) == (0, (), None, False)


@define
class Pool:
    """The smallest pool that carries plans out: workers that load or fail as the test says, and a clock."""

    scale: Scale
    fates: Iterator[bool]
    states: dict[str, WorkerState] = field(factory=dict)
    waiting: int = 0
    now: float = NOW
    failures: Failures = field(factory=Failures)
    gave_up: bool = False
    _numbers: Iterator[int] = field(factory=count)

    def kept(self) -> int:
        return sum(state in KEPT for state in self.states.values())

    def plan(self) -> Plan:
        workers = [WorkerFacts(*each) for each in self.states.items()]
        return decide(
            Situation(
                scale=self.scale,
                workers=workers,
                now=self.now,
                waiting=self.waiting,
                failures=self.failures,
                gave_up=self.gave_up,
            )
        )

    def carry_out(self, plan: Plan) -> None:
        for _ in range(plan.add):
            self.states[f"n{next(self._numbers)}"] = WANTED
        for each in plan.spawn:
            self.states[each] = LOADING
        for each in plan.remove:
            self.states[each] = DRAINING if self.states[each] is BUSY else STOPPING
        self.gave_up |= plan.give_up
        if plan.wake_at is not None:
            self.now = plan.wake_at

    def pass_time(self) -> None:
        """Whoever loads gets ready or dies; whoever leaves is gone."""
        for each, state in list(self.states.items()):
            if state in {DRAINING, STOPPING, EXITED}:
                del self.states[each]
            elif state is LOADING and next(self.fates):
                self.states[each], self.failures = READY, Failures()
            elif state is LOADING:
                del self.states[each]
                self.failures = self.failures.another(self.now)

    def settle(self, limit: int) -> None:
        for _ in range(limit):
            plan = self.plan()
            busy = any(state not in {READY, BUSY} for state in self.states.values())
            if is_empty(plan) and not busy:
                return
            self.carry_out(plan)
            assert not plan.add or self.kept() <= self.scale.max_workers
            self.pass_time()
        raise AssertionError(f"it does not come to rest: {self}")


def fates(*, fail: list[bool], then: bool) -> Iterator[bool]:
    yield from (not failed for failed in fail)
    while True:
        yield then


@given(
    scale=SCALES,
    states=st.lists(st.sampled_from(WorkerState), max_size=10),
    fail=st.lists(st.booleans(), max_size=20),
    waiting=st.integers(0, 5),
)
def test_following_the_plans_leads_to_what_is_wanted(
    scale: Scale, states: list[WorkerState], fail: list[bool], waiting: int
):
    """From any start, with workers that fail now and then, the pool comes to rest between min and max."""
    pool = Pool(scale, fates(fail=fail, then=True), {f"w{n}": state for n, state in enumerate(states)}, waiting=waiting)
    pool.settle(limit=200)
    assert not pool.gave_up
    assert scale.min_workers <= pool.kept() <= scale.max_workers
    assert not waiting or pool.kept() >= min(1, scale.max_workers)
    assert is_empty(pool.plan())


@given(scale=SCALES, states=st.lists(st.sampled_from([READY, BUSY]), max_size=6))
def test_if_no_worker_ever_starts_it_gives_up_and_is_quiet(scale: Scale, states: list[WorkerState]):
    """Trying ends: those that serve go on, no other is started, and the plan is empty."""
    pool = Pool(scale, fates(fail=[], then=False), {f"w{n}": state for n, state in enumerate(states)})
    pool.settle(limit=2000)
    assert pool.gave_up is (len(states) < scale.min_workers)
    assert pool.kept() == min(len(states), scale.max_workers)


def test_trying_takes_as_long_as_it_may_and_not_much_longer():
    """It gives up between the retry time and one longest back-off after it."""
    pool = Pool(Scale(1, 1), fates(fail=[], then=False))
    pool.settle(limit=2000)
    assert 300 <= pool.now - NOW <= 300 + LONGEST_BACK_OFF_S
    assert pool.failures.count > 300 / LONGEST_BACK_OFF_S


# -- back-off ----------------------------------------------------------------------------------------------------------


def test_nothing_failed_nothing_waits():
    """Without a failure there is no back-off."""
    assert back_off_s(0) == 0
    assert back_off_s(1) == FIRST_BACK_OFF_S


@given(failures=st.integers(1, 10**9), jitter=st.floats(0.5, 1.5))
def test_back_off_grows_and_is_bounded(failures: int, jitter: float):
    """Each failure makes the wait longer up to a limit, however many there are."""
    wait_s = back_off_s(failures, jitter)
    assert FIRST_BACK_OFF_S / 2 <= wait_s <= back_off_s(failures + 1, jitter) <= LONGEST_BACK_OFF_S * 1.5
    assert wait_s == pytest.approx(jitter * back_off_s(failures))


def test_back_off_doubles_until_the_limit():
    """The waits are 0.1, 0.2, 0.4 s and so on, 10 s in the end."""
    assert [back_off_s(n) for n in range(1, 9)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0])


@given(times=st.lists(TIMES, min_size=1).map(sorted))
def test_failures_remember_the_first_and_the_last(times: list[float]):
    """The retry time counts from the first failure, the back-off from the last."""
    failures = Failures()
    for now in times:
        failures = failures.another(now)
    assert failures == Failures(len(times), times[0], times[-1])
