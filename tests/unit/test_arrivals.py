"""When a batch waits for more, and when it does not: the policy by itself, then under simulated callers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.clocks import FakeClock, FakeTimers
from torchmgmt.arrivals import Arrivals
from torchmgmt.batch import Batch
from torchmgmt.batcher import Batcher


def test_a_first_request_does_not_wait():
    """Nobody was seen, so nobody is likely to come."""
    arrivals = Arrivals(0.1)
    arrivals.came(10.0, 1)
    assert arrivals.wait_until(10.0, 1) <= 10.0


def test_those_who_were_there_lately_are_waited_for():
    """Of four callers one has come back: the others may, and their usual gap says until when."""
    arrivals = Arrivals(0.1)
    for number in range(1, 5):
        arrivals.came(10 + number * 0.001, number)
    arrivals.came(10.010, 1)
    assert 10.010 < arrivals.wait_until(10.010, 1) < 10.030


def test_nobody_is_waited_for_who_comes_too_seldom():
    """Where the next one is not expected within the delay, waiting is vain."""
    arrivals = Arrivals(0.1)
    arrivals.came(10.0, 3)
    for number in range(1, 60):
        arrivals.came(10.0 + number, 1)
    assert arrivals.wait_until(69.0, 1) <= 69.0


@given(
    events=st.lists(st.tuples(st.floats(0, 10), st.integers(1, 50), st.booleans()), min_size=1, max_size=60),
    delay_s=st.floats(0.001, 1),
)
def test_no_history_makes_a_batch_wait_longer_than_it_may(events: list[tuple[float, int, bool]], delay_s: float):
    """max_batch_delay is an upper bound, whatever was seen."""
    arrivals, now = Arrivals(delay_s), 0.0
    for pause_s, in_house, is_cut in events:
        now += pause_s
        (arrivals.cut if is_cut else arrivals.came)(now, in_house)
        assert arrivals.wait_until(now, in_house) <= now + delay_s


@define(slots=False)
class Simulation:
    """A Batcher with one worker that takes ``run_s`` for a batch, on a clock of its own."""

    batch_size: int
    delay_ms: int
    run_s: float
    cuts_early: bool = True
    sizes: list[int] = field(factory=list)
    waits: list[float] = field(factory=list)
    """From a request to its answer, in s."""

    def __attrs_post_init__(self) -> None:
        self.clock = FakeClock(0.0)
        self.timers = FakeTimers(self.clock)
        self.is_busy = False
        self.batcher: Batcher[float, float] = Batcher(
            batch_size=self.batch_size,
            max_batch_delay=self.delay_ms,
            cuts_early=self.cuts_early,
            capacity=1000,
            clock=self.clock,
            dispatcher=self.timers,
            on_ready=self._pump,
        )

    def ask(self, then: Callable[[], None] = lambda: None) -> None:
        def answered(future: Any) -> None:
            self.waits.append(self.clock.now - future.result())
            then()

        self.batcher.submit(self.clock.now).add_done_callback(answered)

    def run_for(self, seconds: float) -> None:
        self.timers.advance(seconds)

    def _pump(self) -> None:
        if self.is_busy or (batch := self.batcher.take()) is None:
            return
        self.is_busy = True
        self.sizes.append(len(batch))
        self.timers.call_at(self.clock.now + self.run_s, lambda: self._done(batch))

    def _done(self, batch: Batch[float, float]) -> None:
        self.is_busy = False
        batch.finish(batch.items)
        self._pump()

    def mean_size(self) -> float:
        return sum(self.sizes) / len(self.sizes)

    def median_wait(self) -> float:
        return sorted(self.waits)[len(self.waits) // 2]


def closed_loop(simulation: Simulation, callers: int, think_s: float, seed: int = 1) -> None:
    """Callers that ask again a moment after each answer."""
    chance = random.Random(seed)

    def ask_again() -> None:
        pause_s = think_s * chance.uniform(0.5, 1.5)
        simulation.timers.call_at(simulation.clock.now + pause_s, lambda: simulation.ask(ask_again))

    for _ in range(callers):
        ask_again()


def test_a_lone_caller_sees_the_models_own_latency():
    """batch_size=8, max_batch_delay=100 ms, a model of 5 ms: 5 ms and not 105."""
    simulation = Simulation(8, 100, 0.005)
    closed_loop(simulation, callers=1, think_s=0.001)
    simulation.run_for(10)
    assert len(simulation.waits) > 1000
    assert max(simulation.waits) < 0.0051


@pytest.mark.parametrize("callers", [8, 16, 32])
def test_under_load_batches_fill(callers):
    """Callers that ask again at once are waited for: nearly as full as with the whole delay, and no slower."""
    simulation = Simulation(8, 100, 0.005)
    closed_loop(simulation, callers, think_s=0.0005)
    simulation.run_for(10)
    patient = Simulation(8, 100, 0.005, cuts_early=False)
    closed_loop(patient, callers, think_s=0.0005)
    patient.run_for(10)
    assert simulation.mean_size() > 7
    assert len(simulation.waits) > 0.9 * len(patient.waits)


@pytest.mark.parametrize("callers", [2, 3, 5])
def test_fewer_callers_than_a_batch_holds_do_not_wait_for_more(callers):
    """The batch goes when all who are there have joined it, long before its delay is over."""
    simulation = Simulation(8, 100, 0.005)
    closed_loop(simulation, callers, think_s=0.0005)
    simulation.run_for(10)
    assert simulation.mean_size() > 0.6 * callers
    assert simulation.median_wait() < 0.015


def test_a_crowd_that_has_gone_is_forgotten():
    """After 32 callers one is left: it waits for the others a few times, and then no more."""
    simulation = Simulation(8, 100, 0.005)
    left = [32]

    def ask_again() -> None:
        if simulation.clock.now > 2 and left[0] > 1:
            left[0] -= 1
            return
        simulation.timers.call_at(simulation.clock.now + 0.0005, lambda: simulation.ask(ask_again))

    for _ in range(32):
        ask_again()
    simulation.run_for(3)
    simulation.waits.clear()
    simulation.run_for(2)
    assert max(simulation.waits) < 0.0051


def test_requests_at_random_times_fill_batches_when_they_come_densely():
    """2,000 a second, which nobody's answers set off, at a model that takes 10 ms for a batch."""
    simulation, chance = Simulation(32, 100, 0.01), random.Random(2)
    when = 0.0
    while when < 5:
        when += chance.expovariate(2000)
        simulation.timers.call_at(when, simulation.ask)
    simulation.run_for(6)
    assert simulation.mean_size() > 15
    assert simulation.median_wait() < 0.1


def test_requests_that_come_seldom_do_not_wait():
    """2 a second: the next one is not to be expected within the delay."""
    simulation, chance = Simulation(8, 100, 0.005), random.Random(3)
    when = 0.0
    for _ in range(500):
        when += chance.expovariate(2)
        simulation.timers.call_at(when, simulation.ask)
    simulation.run_for(when + 1)
    assert simulation.median_wait() < 0.0051


def replay(connections: int, *, cuts_early: bool = True) -> Simulation:
    """Return what became of requests that came when those of so many connections of wrk did."""
    simulation = Simulation(8, 100, 0.005, cuts_early)
    recorded = json.loads(Path(__file__).with_name("recorded_arrivals.json").read_text())[str(connections)]
    for came_us in recorded:
        simulation.timers.call_at(came_us / 1e6, simulation.ask)
    simulation.run_for(recorded[-1] / 1e6 + 1)
    assert len(simulation.waits) == len(recorded)
    return simulation


def test_recorded_requests_of_one_connection_do_not_wait():
    """They have the model's own latency, where a batch that waited to be full would keep them for several times that."""
    assert max(replay(1).waits) < 0.0051
    assert replay(1, cuts_early=False).median_wait() > 0.02


def test_recorded_requests_of_16_connections_fill_batches():
    """Nearly as full as with the whole delay, and answered no later."""
    quick, patient = replay(16), replay(16, cuts_early=False)
    assert quick.mean_size() > 7
    assert quick.median_wait() < 1.1 * patient.median_wait()
