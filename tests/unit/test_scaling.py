"""The policy of a pool, rule by rule, and what follows from all of them together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import pytest
from attrs import define, evolve, field
from hypothesis import given
from hypothesis import strategies as st

from torchmgmt.lifecycle import WorkerState
from torchmgmt.pool.autoscaling import (
    FIRST_BACK_OFF_S,
    LONGEST_BACK_OFF_S,
    LOOK_AT_WAITING_S,
    LOOK_S,
    Failures,
    Load,
    Observation,
    Plan,
    Situation,
    Targets,
    WorkerFacts,
    back_off_s,
    decide,
    default_threads,
)
from torchmgmt.records import Scale

WANTED, LOADING, READY, BUSY = WorkerState.WANTED, WorkerState.LOADING, WorkerState.READY, WorkerState.BUSY
DRAINING, STOPPING, EXITED = WorkerState.DRAINING, WorkerState.STOPPING, WorkerState.EXITED
KEPT = {WANTED, LOADING, READY, BUSY}

NOW = 1000.0
FAILED_ONCE = Failures(1, NOW, NOW)
FAILING_FOR_300_S = Failures(9, NOW - 300, NOW)


def situation(low: int, high: int, *states: WorkerState, worn: Sequence[int] = (), **changes: Any) -> Situation:
    """A situation at NOW with workers w0, w1, ... (the oldest first), some of them worn."""
    workers = [WorkerFacts(f"w{number}", state, number in worn) for number, state in enumerate(states)]
    return Situation(**{"scale": Scale(low, high), "workers": workers, "now": NOW, **changes})


def as_tuple(plan: Plan) -> tuple[object, ...]:
    return plan.add, tuple(plan.spawn), tuple(plan.remove), plan.wake_at, plan.give_up, plan.rest


def is_empty(plan: Plan) -> bool:
    return as_tuple(plan) == as_tuple(Plan())


def load(
    *parts: tuple[float, float], serving: int, waiting: int = 0, waited_s: float = 0.0, until: float = NOW
) -> Load:
    """A load that ends at NOW, as a pool sees it ten times a second: for so many seconds so many workers are busy.

    What waits, waits in the last part only.
    """
    now, busy_s = until - sum(seconds for seconds, _ in parts), 0.0
    seen = Load()
    for number, (seconds, busy) in enumerate(parts):
        is_last = number == len(parts) - 1
        for step in range(round(seconds * 10) + 1):
            observation = Observation(
                now=now + step / 10,
                busy_s=busy_s + step / 10 * busy,
                serving=serving,
                busy=round(busy),
                waiting=waiting if is_last else 0,
                waited_s=waited_s if is_last else 0.0,
            )
            seen = seen.observed(observation)
        now, busy_s = now + seconds, busy_s + seconds * busy
    return seen


def quiet(serving: int, *, seconds: float = 61) -> Load:
    """A load of nothing at all."""
    return load((seconds, 0), serving=serving)


def crowded(serving: int, *, seconds: float, waiting: int = 1, waited_s: float = 0.2) -> Load:
    """All workers are busy and requests wait, for so many seconds after a time with nothing to do."""
    return load((2, 0), (seconds, serving), serving=serving, waiting=waiting, waited_s=waited_s)


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


def pressed(low: int, high: int, *states: WorkerState, **changes: Any) -> Situation:
    """Requests wait while all workers are busy, as :func:`crowded` says."""
    names = {"seconds", "waited_s", "waiting"}
    seen = crowded(
        sum(state in {READY, BUSY} for state in states),
        **{"seconds": 1.0, **{name: changes.pop(name) for name in names & set(changes)}},
    )
    assert seen.last is not None
    return situation(low, high, *states, load=seen, waiting=seen.last.waiting, **changes)


NEXT_LOOK = Plan(wake_at=NOW + LOOK_S)
SOON = Plan(wake_at=NOW + LOOK_AT_WAITING_S)

FOLLOWING = {
    # growing
    "waiting too long for busy workers adds one": (pressed(1, 4, BUSY), Plan(add=1)),
    "not before it lasts": (pressed(1, 4, BUSY, seconds=0.3), SOON),
    "not if they wait no longer than they may": (pressed(1, 4, BUSY, waited_s=0.05), SOON),
    "not while another is about to serve": (pressed(1, 4, BUSY, LOADING), NEXT_LOOK),
    "not while one waits to be started": (pressed(1, 4, BUSY, WANTED), Plan(spawn=["w1"])),
    "not beyond max": (pressed(1, 2, BUSY, BUSY), NEXT_LOOK),
    "not with min equal to max, nor a look at the load": (pressed(2, 2, BUSY, BUSY), Plan()),
    "not after giving up": (pressed(1, 4, BUSY, gave_up=True), NEXT_LOOK),
    "in a back-off it is wanted, and waits": (
        pressed(1, 4, BUSY, failures=FAILED_ONCE),
        Plan(add=1, wake_at=NOW + FIRST_BACK_OFF_S),
    ),
    "a long wait of many adds several": (pressed(1, 9, BUSY, BUSY, waiting=9, waited_s=1), Plan(add=2)),
    "at most as many as serve": (pressed(1, 9, BUSY, waiting=9, waited_s=1), Plan(add=1)),
    "at most as many as wait": (pressed(1, 9, BUSY, BUSY, BUSY, waiting=2, waited_s=1), Plan(add=2)),
    "at most as many as there may be": (pressed(1, 4, BUSY, BUSY, BUSY, waiting=9, waited_s=1), Plan(add=1)),
    "being always busy while requests wait a little adds one": (
        pressed(1, 4, BUSY, seconds=6, waited_s=0.02),
        Plan(add=1),
    ),
    "what waits beside an idle worker waits for its batch": (
        situation(2, 4, BUSY, READY, waiting=3, load=load((9, 1), serving=2, waiting=3, waited_s=3)),
        SOON,
    ),
    "being always busy with nothing waiting adds none": (
        situation(1, 4, BUSY, load=load((9, 1), serving=1)),
        NEXT_LOOK,
    ),
    # shrinking
    "after a quiet period one goes, the youngest": (
        situation(1, 4, READY, READY, READY, load=quiet(3)),
        Plan(remove=["w2"]),
    ),
    "not before the period is over, and then it looks again": (
        situation(1, 4, READY, READY, load=quiet(2, seconds=20)),
        Plan(wake_at=NOW + 40),
    ),
    "the period is a setting": (
        situation(1, 4, READY, READY, load=quiet(2, seconds=20), scale_down_delay_s=10.0),
        Plan(remove=["w1"]),
    ),
    "not below min, and then nothing ticks": (situation(2, 4, READY, READY, load=quiet(2)), Plan()),
    "with min 0 the last one goes, too": (situation(0, 4, READY, load=quiet(1)), Plan(remove=["w0"])),
    "with min 0 the last one stays if anything ran": (
        situation(0, 4, READY, load=load((30, 0), (0.1, 1), (31, 0), serving=1)),
        Plan(wake_at=pytest.approx(NOW + 29, abs=1.1)),
    ),
    "what the others can do comfortably counts as quiet": (
        situation(1, 4, BUSY, READY, READY, load=load((61, 1.1), serving=3)),
        Plan(remove=["w2"]),
    ),
    "what the others can barely do does not": (
        situation(1, 4, BUSY, READY, READY, load=load((61, 1.9), serving=3)),
        NEXT_LOOK,
    ),
    "one busy second is enough to keep it": (
        situation(1, 4, READY, READY, load=load((30, 0), (2, 2), (30, 0), serving=2)),
        Plan(wake_at=pytest.approx(NOW + 30, abs=1.5)),
    ),
    "a wait is enough to keep it": (
        situation(
            1,
            4,
            READY,
            READY,
            load=load((30, 0), (0.2, 2), serving=2, waiting=1, waited_s=0.2, until=NOW - 30).observed(
                Observation(now=NOW, busy_s=0.4, serving=2, busy=0, waiting=0, waited_s=0)
            ),
        ),
        Plan(wake_at=pytest.approx(NOW + 30, abs=1.5)),
    ),
    "none goes while anything waits": (situation(1, 4, READY, READY, load=quiet(2), waiting=1), SOON),
    "none goes while all are busy": (situation(1, 4, BUSY, BUSY, load=quiet(2)), NEXT_LOOK),
    "an idle one goes before a busy one": (
        situation(1, 4, READY, BUSY, load=quiet(2)),
        Plan(remove=["w0"]),
    ),
    "one that does not even start goes first": (
        situation(1, 4, READY, WANTED, load=quiet(1), failures=FAILED_ONCE),
        Plan(remove=["w1"]),
    ),
    "the period begins anew after each": (
        situation(1, 4, READY, READY, load=quiet(3)),
        Plan(wake_at=NOW + 60),
    ),
    "having given up it still follows a falling load": (
        situation(1, 4, READY, READY, load=quiet(2), gave_up=True),
        Plan(remove=["w1"]),
    ),
    # looking
    "at min with nothing to do it does not look": (situation(1, 4, READY, load=quiet(1)), Plan()),
    "while one computes it looks every second": (situation(1, 4, BUSY, load=load((1, 1), serving=1)), NEXT_LOOK),
    "with min equal to max it does not look": (situation(1, 1, BUSY, load=load((1, 1), serving=1)), Plan()),
}


@pytest.mark.parametrize("now, plan", FOLLOWING.values(), ids=FOLLOWING)
def test_following_the_load(now: Situation, plan: Plan):
    """Each row is one rule of what happens between min and max."""
    assert as_tuple(decide(now)) == as_tuple(plan)


RECYCLING = {
    "a worn worker gets a successor first": (situation(1, 1, READY, worn=[0]), Plan(add=1)),
    "which is started beyond max": (situation(1, 1, BUSY, WANTED, worn=[0]), Plan(spawn=["w1"])),
    "until it serves the worn one does": (situation(1, 1, BUSY, LOADING, worn=[0]), Plan()),
    "then the worn one goes": (situation(1, 1, READY, READY, worn=[0]), Plan(remove=["w0"])),
    "even if it is busy": (situation(1, 1, BUSY, READY, worn=[0]), Plan(remove=["w0"])),
    "one at a time": (situation(3, 3, READY, READY, READY, worn=[0, 1, 2]), Plan(add=1)),
    "no second one meanwhile": (situation(3, 3, READY, READY, READY, LOADING, worn=[0, 1, 2]), Plan()),
    "nor after the first": (situation(3, 3, READY, READY, READY, READY, worn=[0, 1, 2]), Plan(remove=["w2"])),
    "what is missing comes first": (situation(3, 3, READY, worn=[0]), Plan(add=2)),
    "a successor waits out a back-off": (
        situation(1, 1, READY, WANTED, worn=[0], failures=FAILED_ONCE),
        Plan(wake_at=NOW + FIRST_BACK_OFF_S),
    ),
    "if no successor ever starts the worn one goes on": (situation(1, 1, READY, worn=[0], gave_up=True), Plan()),
    "giving up takes the successor": (
        situation(1, 1, READY, WANTED, worn=[0], failures=FAILING_FOR_300_S),
        Plan(give_up=True, remove=["w1"]),
    ),
    "of too many the worn go first": (situation(1, 1, READY, READY, READY, worn=[0]), Plan(remove=["w0", "w2"])),
    "but not before those that do not serve yet": (
        situation(1, 1, READY, LOADING, LOADING, worn=[0]),
        Plan(remove=["w2"]),
    ),
    "scaled to zero worn ones and successors go": (
        situation(0, 0, READY, LOADING, worn=[0]),
        Plan(remove=["w1", "w0"]),
    ),
    "between min and max there are as many afterwards as before": (
        situation(1, 4, READY, BUSY, worn=[0], load=load((5, 1.9), serving=2)),
        Plan(add=1),
    ),
    "and the worn one goes when one more serves": (
        situation(
            1,
            4,
            READY,
            BUSY,
            READY,
            worn=[0],
            load=load((5, 1.9), serving=2, until=NOW - 0.1).observed(
                Observation(now=NOW, busy_s=9.7, serving=3, busy=1, waiting=0, waited_s=0)
            ),
        ),
        Plan(remove=["w0"]),
    ),
    "at max there may be one more": (
        situation(1, 2, BUSY, BUSY, worn=[0], load=load((5, 2), serving=2)),
        Plan(add=1),
    ),
    "a worn one that is not needed just goes": (
        situation(1, 4, READY, READY, worn=[0], load=quiet(2)),
        Plan(remove=["w0"]),
    ),
    "a worn one that has no heir yet does not count twice": (
        situation(1, 4, READY, LOADING, worn=[0], load=quiet(1)),
        Plan(),
    ),
}


@pytest.mark.parametrize("now, plan", RECYCLING.values(), ids=RECYCLING)
def test_recycling(now: Situation, plan: Plan):
    """Each row is one rule of how worn workers are replaced."""
    assert as_tuple(decide(now)) == as_tuple(plan)


def empty(low: int, high: int, *states: WorkerState, for_s: float = 0.0, **changes: Any) -> Situation:
    """There has been no worker for so long, and something is kept loaded for the next one."""
    return situation(low, high, *states, **{"is_loaded": True, "empty_since": NOW - for_s, **changes})


RESTING = {
    "an idle version stays loaded for a while": (empty(0, 2), Plan(wake_at=NOW + 600)),
    "and then no longer": (empty(0, 2, for_s=600), Plan(rest=True)),
    "the while is a setting": (empty(0, 2, for_s=5, template_idle_timeout_s=5.0), Plan(rest=True)),
    "once": (empty(0, 2, for_s=600, is_loaded=False), Plan()),
    "scaled to zero it rests at once": (empty(0, 0), Plan(rest=True)),
    "having given up it rests at once": (empty(2, 2, gave_up=True), Plan(rest=True)),
    "what waits needs it": (empty(0, 2, for_s=600, waiting=1), Plan(add=1)),
    "what is wanted needs it": (empty(1, 2, for_s=600), Plan(add=1)),
    "who serves needs it": (situation(0, 2, READY, is_loaded=True), Plan()),
    "who waits out a back-off needs it": (
        empty(1, 1, WANTED, for_s=600, failures=FAILED_ONCE),
        Plan(wake_at=NOW + FIRST_BACK_OFF_S),
    ),
    "who still leaves may need it": (situation(0, 0, DRAINING, is_loaded=True), Plan()),
}


@pytest.mark.parametrize("now, plan", RESTING.values(), ids=RESTING)
def test_resting(now: Situation, plan: Plan):
    """Each row is one rule of when nothing is kept loaded any more."""
    assert as_tuple(decide(now)) == as_tuple(plan)


def test_a_plan_with_nothing_in_it_is_empty_whenever_it_wakes():
    """Each kind of action makes it one that has something to do."""
    assert Plan(wake_at=NOW).is_empty
    actions = [Plan(add=1), Plan(spawn=["w"]), Plan(remove=["w"]), Plan(give_up=True), Plan(rest=True)]
    assert not any(plan.is_empty for plan in actions)


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


STEPS = st.lists(
    st.tuples(
        st.sampled_from([0.05, 0.1, 1.0, 30.0, 90.0]),
        st.floats(0, 1),
        st.integers(0, 6),
        st.integers(0, 30),
        st.sampled_from([0.0, 0.05, 0.2, 1.0]),
    ),
    max_size=12,
)


@st.composite
def followed(draw: st.DrawFn) -> Situation:
    """Any situation with a past, what was observed last being what is."""
    plain = draw(SITUATIONS)
    workers = [
        evolve(worker, is_worn=worker.state in {READY, BUSY} and draw(st.booleans())) for worker in plain.workers
    ]
    serving = sum(worker.is_serving for worker in workers)
    busy = sum(worker.state is BUSY for worker in workers)
    now, busy_s, seen = plain.now, 0.0, Load()
    for takes_s, share, past, waiting, waited_s in draw(STEPS):
        seen = seen.observed(
            Observation(now=now, busy_s=busy_s, serving=past, busy=past, waiting=waiting, waited_s=waited_s)
        )
        now, busy_s = now + takes_s, busy_s + takes_s * share * past
    waited_s = draw(st.sampled_from([0.0, 0.05, 0.2, 1.0])) if plain.waiting else 0.0
    seen = seen.observed(
        Observation(now=now, busy_s=busy_s, serving=serving, busy=busy, waiting=plain.waiting, waited_s=waited_s)
    )
    is_empty = all(worker.state is EXITED for worker in workers)
    return evolve(
        plain,
        workers=workers,
        now=now,
        load=seen,
        scale_down_delay_s=draw(st.sampled_from([0.0, 1.0, 60.0])),
        is_loaded=draw(st.booleans()),
        empty_since=now - draw(TIMES) if is_empty else None,
    )


@given(now=followed())
def test_following_stays_within_the_scale_but_for_one_replacement(now: Situation):
    """Nothing is added beyond max and one more, that only for a worn one; nothing that serves is removed below min."""
    plan = decide(now)
    by_id = {worker.id: worker for worker in now.workers}
    kept = sum(worker.state in KEPT for worker in now.workers)
    has_worn = any(worker.is_worn for worker in now.workers)
    assert not plan.add or kept + plan.add <= now.scale.max_workers + has_worn
    assert all(by_id[each].state in KEPT for each in plan.remove)
    assert not (plan.remove and (plan.add or plan.spawn))
    if any(by_id[each].is_serving for each in plan.remove):
        assert kept - len(plan.remove) >= now.scale.min_workers


@given(now=followed())
def test_following_is_pure(now: Situation):
    """The same situation gives the same plan, and its past is not changed by looking at it."""
    before = evolve(now, workers=list(now.workers))
    assert as_tuple(decide(now)) == as_tuple(decide(now))
    assert now == before


@given(now=followed(), more=st.integers(1, 50))
def test_more_waiting_never_means_fewer_workers(now: Situation, more: int):
    """With more requests waiting none that serves or loads is removed that would else be kept; no fewer are added."""
    assert now.load.last is not None
    waiting = now.waiting + more
    last = evolve(now.load.last, waiting=waiting)
    plan, other = decide(now), decide(evolve(now, waiting=waiting, load=evolve(now.load, last=last)))
    unstarted = {worker.id for worker in now.workers if worker.state is WANTED}
    assert set(other.remove) - unstarted <= set(plan.remove)
    assert other.add >= plan.add
    assert not other.rest or plan.rest


@given(now=followed())
def test_at_one_moment_carrying_plans_out_comes_to_rest(now: Situation):
    """However it begins, a few plans later there is nothing more to do till something happens or time passes."""
    for _ in range(8 + len(now.workers)):  # with no quiet period all of them go, one by one
        plan = decide(now)
        if plan.is_empty:
            break
        now = carried_out(now, plan)
    else:
        raise AssertionError(f"it does not come to rest: {now}")
    assert plan.wake_at is None or plan.wake_at > now.now


def carried_out(now: Situation, plan: Plan) -> Situation:
    """The situation in which a plan has been carried out, at the same moment."""
    assert now.load.last is not None
    workers = []
    for worker in now.workers:
        state = LOADING if worker.id in plan.spawn else worker.state
        if worker.id in plan.remove:
            state = DRAINING if worker.state is BUSY else STOPPING
        workers.append(evolve(worker, state=state))
    workers += [WorkerFacts(f"{len(workers)}+{number}", WANTED) for number in range(plan.add)]
    last = evolve(
        now.load.last,
        serving=sum(worker.is_serving for worker in workers),
        busy=sum(worker.state is BUSY for worker in workers),
    )
    return evolve(
        now,
        workers=workers,
        load=now.load.observed(last),
        gave_up=now.gave_up or plan.give_up,
        is_loaded=now.is_loaded and not plan.rest,
    )


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
                self.failures = self.failures.another(self.now, self.now)

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
        failures = failures.another(now, started_at=now)
    assert failures == Failures(len(times), times[0], times[-1])


@given(times=st.lists(TIMES, min_size=1, max_size=8).map(sorted))
def test_workers_that_wait_for_one_load_fail_once(times: list[float]):
    """However many were started before the first failure, they are one; the back-off counts from the last of them."""
    failures = Failures()
    for now in times:
        failures = failures.another(now, started_at=times[0] - 1)
    assert (failures.count, failures.first_at, failures.last_at) == (1, times[0], times[-1])


def test_workers_that_fail_in_turns_fail_more_and_more():
    """Of two that are restarted one after the other each was started before the other failed; yet each is one more try."""
    failures = Failures().another(1, started_at=0).another(2, started_at=0)
    for now in range(3, 11):
        failures = failures.another(now, started_at=now - 1.9)
    assert failures.count >= 5
    assert failures.last_at == 10


# -- the load ----------------------------------------------------------------------------------------------------------


def test_what_is_remembered_grows_with_the_logarithm_of_time():
    """A day seen every second takes little more than an hour does, its busiest second is not forgotten."""
    seen, busy_s = Load(), 0.0
    for second in range(40_000):
        busy_s += 5 if second == 100 else 0.5
        seen = seen.observed(Observation(now=second, busy_s=busy_s, serving=6, busy=1, waiting=0, waited_s=0))
        if second == 4_000:
            after_an_hour = len(seen.stretches)
    assert len(seen.stretches) < after_an_hour + 100 < 300
    assert max(stretch.peak for stretch in seen.stretches) == pytest.approx(5)
    assert [stretch.until for stretch in seen.stretches[:-1]] == [stretch.since for stretch in seen.stretches[1:]]
    assert all(stretch.until - stretch.since <= max(1, (40_000 - stretch.until) / 16) for stretch in seen.stretches)


def test_observing_changes_nothing_that_was_observed():
    """A load is a value."""
    before = quiet(2, seconds=5)
    after = before.observed(Observation(now=NOW + 1, busy_s=1, serving=2, busy=2, waiting=3, waited_s=1))
    assert before == quiet(2, seconds=5)
    assert after != before


def test_targets_are_far_apart():
    """One worker less would be far less busy than what makes one more: else the two would chase each other."""
    targets = Targets()
    assert 0 < targets.comfortable_share <= 0.75 * targets.busy_share < 1


# -- threads -----------------------------------------------------------------------------------------------------------


@given(cores=st.integers(1, 512), max_workers=st.integers(0, 512))
def test_threads_share_the_cores(cores: int, max_workers: int):
    """All workers together use no more threads than there are cores, but each at least one."""
    threads = default_threads(cores, max_workers)
    assert threads >= 1
    assert threads == 1 or threads * max_workers <= cores
    assert (threads + 1) * max(1, max_workers) > cores
