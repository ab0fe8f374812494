"""Admission: never more than may wait, in the order in which they came, and nothing lost by an interruption."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from attrs import define
from hypothesis import given
from hypothesis import strategies as st

from tests.interruptions import interruptions
from tests.unit.clocks import FakeClock, FakeTimers
from torchmgmt.admission import Admission, Admitted
from torchmgmt.batcher import Batcher
from torchmgmt.errors import QueueFull


@define(eq=False)
class Guest:
    """Somebody who wants to be admitted."""

    name: object = None
    next: Any = None
    is_counted: bool = False


def names(admission: Admission) -> list[object]:
    return [guest.name for guest in admission.take_new()]


def test_as_many_as_may_wait_are_admitted_and_no_more() -> None:
    """Whoever leaves makes room; who was refused is not in the chain."""
    admission = Admission(2)
    guests = [Guest(number) for number in range(4)]
    assert [admission.enter(guest) for guest in guests[:3]] == [Admitted.YES, Admitted.YES, Admitted.FULL]
    assert admission.waiting == 2
    admission.leave(guests[0])
    assert admission.enter(guests[3]) is Admitted.YES
    assert names(admission) == [0, 1, 3]
    assert admission.waiting == 2, "to be looked at is not to leave"


def test_leaving_twice_counts_once() -> None:
    """So does leaving without having come."""
    admission = Admission(3)
    guests = [Guest() for _ in range(3)]
    for guest in guests[:2]:
        admission.enter(guest)
    for guest in (guests[0], guests[0], guests[2]):
        admission.leave(guest)
    assert admission.waiting == 1


def test_who_had_begun_may_come_back_whatever_the_limit_is() -> None:
    """It waited here before; coming back twice counts once."""
    admission = Admission(1)
    first, second = Guest(1), Guest(2)
    admission.enter(first)
    assert names(admission) == [1]
    admission.leave(first)
    admission.enter(second)
    for _ in range(2):
        admission.reenter(first)
    assert admission.waiting == 2
    assert admission.enter(Guest()) is Admitted.FULL
    assert names(admission) == [2], "its owner has the other one already"


def test_closed_is_closed() -> None:
    """Nobody is admitted any more, also where there is room; what waits stays, and may leave."""
    admission = Admission(2)
    guest = Guest(1)
    admission.enter(guest)
    admission.close()
    assert admission.enter(Guest(2)) is Admitted.CLOSED
    assert names(admission) == [1]
    admission.leave(guest)
    assert admission.waiting == 0


def test_what_was_taken_does_not_keep_what_came_later() -> None:
    """The chain is taken apart as it is given."""
    admission = Admission(3)
    guests = [Guest(number) for number in range(3)]
    for guest in guests:
        admission.enter(guest)
    assert admission.has_new()
    assert names(admission) == [0, 1, 2]
    assert not admission.has_new()
    assert [guest.next for guest in guests] == [None] * 3
    assert admission.enter(Guest(3)) is Admitted.FULL
    admission.leave(guests[0])
    admission.enter(Guest(4))
    assert names(admission) == [4]


@given(
    st.lists(st.tuples(st.sampled_from(["enter", "leave", "reenter", "take", "close"]), st.integers(0, 5)), max_size=60)
)
def test_it_counts_as_a_list_would(steps: list[tuple[str, int]]) -> None:
    """Whatever comes and goes in whatever order, once each: the count and the order are those of a plain list."""
    admission = Admission(3)
    guests = [Guest(number) for number in range(6)]
    counted: set[int] = set()
    new: list[object] = []
    entered: set[int] = set()
    is_closed = False
    for step, number in steps:
        guest = guests[number]
        if step == "enter" and number not in entered:
            expected = Admitted.CLOSED if is_closed else Admitted.YES if len(counted) < 3 else Admitted.FULL
            assert admission.enter(guest) is expected
            if expected is Admitted.YES:
                entered.add(number)
                counted.add(number)
                new.append(number)
        elif step == "leave":
            admission.leave(guest)
            counted.discard(number)
        elif step == "reenter" and number in entered:
            admission.reenter(guest)
            counted.add(number)
        elif step == "take":
            assert names(admission) == new
            new = []
        elif step == "close":
            admission.close()
            is_closed = True
        assert admission.waiting == len(counted)
        assert admission.has_new() == bool(new)


def test_many_threads_lose_nobody() -> None:
    """Each one that was admitted is given once, those of one thread in their order, and never more than may wait."""
    admission = Admission(50)
    taken: list[tuple[int, int]] = []
    most = 0
    over = threading.Event()

    def own() -> None:
        nonlocal most
        while not (over.is_set() and not admission.has_new()):
            most = max(most, admission.waiting)
            for guest in admission.take_new():
                taken.append(guest.name)
                admission.leave(guest)

    def come(caller: int) -> None:
        for number in range(500):
            guest = Guest((caller, number))
            while admission.enter(guest) is not Admitted.YES:
                pass

    owner = threading.Thread(target=own)
    callers = [threading.Thread(target=come, args=(caller,)) for caller in range(4)]
    for thread in (owner, *callers):
        thread.start()
    for thread in callers:
        thread.join()
    over.set()
    owner.join()
    assert most <= 50
    assert admission.waiting == 0
    for caller in range(4):
        assert [number for who, number in taken if who == caller] == list(range(500))


CALLS: dict[str, Callable[[Admission, Guest], object]] = {
    "enter": lambda admission, guest: admission.enter(guest),
    "leave": lambda admission, guest: admission.leave(guest),
    "reenter": lambda admission, guest: admission.reenter(guest),
    "close": lambda admission, _guest: admission.close(),
    "take": lambda admission, _guest: names(admission),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_interruption_does_all_or_nothing(name: str) -> None:
    """At each point of each call: no lock stays held, and who is counted is in the chain."""
    for interruption in interruptions():
        admission = Admission(10)
        guest, other = Guest("guest"), Guest("other")
        if name == "leave":
            admission.enter(guest)
        interruption.of(lambda: CALLS[name](admission, guest))  # noqa: B023
        done = threading.Thread(target=admission.enter, args=(other,), daemon=True)
        done.start()
        done.join(20)
        assert not done.is_alive(), interruption.where
        admission.leave(other)
        assert admission.waiting == guest.is_counted, interruption.where
        if name == "enter" and guest.is_counted:
            assert names(admission)[0] == "guest", interruption.where


def steps_of(call: Callable[[], object]) -> int:
    """Return how many bytecodes a call takes."""
    steps = 0

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal steps
        frame.f_trace_opcodes = True
        steps += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return steps


def test_to_be_refused_costs_the_same_however_many_wait() -> None:
    """A full queue of 10,000 is not walked for each one that comes too late."""
    steps = []
    for capacity in (10, 10_000):
        timers = FakeTimers(FakeClock())
        batcher: Batcher[int, int] = Batcher(
            batch_size=20_000,
            capacity=capacity,
            dispatcher=timers,
            on_ready=lambda: None,
            clock=timers.clock,  # type: ignore[arg-type]
        )
        for number in range(capacity):
            batcher.submit(number, priority=number % 3)

        def refused(batcher: Batcher[int, int] = batcher) -> None:
            with pytest.raises(QueueFull):
                batcher.submit(1)

        refused()
        steps.append(steps_of(refused))
    assert abs(steps[0] - steps[1]) < 20, steps
