"""The two state machines: closed tables, no dead ends but the final states, no step that is not in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from itertools import product
from typing import Any

import pytest
from attrs import frozen
from hypothesis import given
from hypothesis import strategies as st

from torchmgmt.lifecycle import (
    VERSION_TRANSITIONS,
    WORKER_TRANSITIONS,
    IllegalTransition,
    VersionEvent,
    VersionState,
    WorkerEvent,
    WorkerState,
    advance_version,
    advance_worker,
)


@frozen
class Machine:
    """One of the two, as the laws see it."""

    table: Mapping[Any, Mapping[Any, Any]]
    states: type[Enum]
    events: type[Enum]
    advance: Callable[[Any, Any], Any]
    initial: Enum
    final: Enum


VERSION = Machine(
    VERSION_TRANSITIONS, VersionState, VersionEvent, advance_version, VersionState.REGISTERED, VersionState.GONE
)
WORKER = Machine(WORKER_TRANSITIONS, WorkerState, WorkerEvent, advance_worker, WorkerState.WANTED, WorkerState.EXITED)
MACHINES = {"version": VERSION, "worker": WORKER}

each_machine = pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
each_step = pytest.mark.parametrize(
    "machine, state, event",
    [
        pytest.param(machine, state, event, id=f"{name}-{state.name}-{event.name}")
        for name, machine in MACHINES.items()
        for state, event in product(machine.states, machine.events)
    ],
)


def reachable(machine: Machine, start: Enum) -> set[Enum]:
    found: set[Enum] = set()
    todo = [start]
    while todo:
        state = todo.pop()
        if state not in found:
            found.add(state)
            todo += machine.table[state].values()
    return found


@each_machine
def test_the_table_is_closed(machine: Machine):
    """Every state has a row, and every step leads to a state that has one."""
    assert set(machine.table) == set(machine.states)
    for row in machine.table.values():
        assert set(row) <= set(machine.events)
        assert set(row.values()) <= set(machine.states)


@each_machine
def test_every_state_can_be_reached(machine: Machine):
    """No state is in the table for nothing."""
    assert reachable(machine, machine.initial) == set(machine.states)


@each_machine
def test_the_end_can_be_reached_from_everywhere(machine: Machine):
    """Nothing can get stuck: whatever happened, there is a way to the final state."""
    for state in machine.states:
        assert machine.final in reachable(machine, state)


@each_machine
def test_only_the_final_state_has_no_way_out(machine: Machine):
    """What is gone stays gone, and nothing else is a dead end."""
    assert [state for state, row in machine.table.items() if not row] == [machine.final]


@each_machine
def test_every_event_means_something_somewhere(machine: Machine):
    """No event is in the enum for nothing."""
    assert {event for row in machine.table.values() for event in row} == set(machine.events)


@each_step
def test_a_step_does_what_the_table_says_or_names_what_is_legal(machine: Machine, state: Enum, event: Enum):
    """Every pair of a state and an event either leads to the table's state or raises with the legal events."""
    row = machine.table[state]
    if event in row:
        assert machine.advance(state, event) is row[event]
        return
    with pytest.raises(IllegalTransition) as caught:
        machine.advance(state, event)
    text = str(caught.value)
    assert str(state) in text
    assert str(event) in text
    assert all(legal.name in text.partition("legal are")[2] for legal in row)
    assert row or "final" in text


@each_machine
@given(data=st.data())
def test_no_sequence_of_events_leaves_the_table(machine: Machine, data: st.DataObject):
    """After any events whatever, refused ones included, the state is a known one and the same as the table's."""
    state = machine.initial
    for event in data.draw(st.lists(st.sampled_from(list(machine.events)), max_size=40)):
        expected = machine.table[state].get(event)
        try:
            state = machine.advance(state, event)
        except IllegalTransition:
            assert expected is None
        else:
            assert state is expected
        assert state in machine.table


@pytest.mark.parametrize(
    "state", [s for s in VersionState if s not in {VersionState.RETIRING, VersionState.GONE}], ids=lambda s: s.name
)
def test_any_living_version_can_be_retired(state: VersionState):
    """Unregistering works in every state, whatever its workers do."""
    assert advance_version(state, VersionEvent.RETIRE) is VersionState.RETIRING


@pytest.mark.parametrize("event", [e for e in VersionEvent if e is not VersionEvent.VANISH], ids=lambda e: e.name)
def test_nothing_brings_a_retiring_version_back(event: VersionEvent):
    """Once it is being unregistered, a version only vanishes."""
    with pytest.raises(IllegalTransition):
        advance_version(VersionState.RETIRING, event)


@pytest.mark.parametrize("state", [s for s in WorkerState if s is not WorkerState.EXITED], ids=lambda s: s.name)
def test_a_worker_may_die_at_any_moment(state: WorkerState):
    """There is no state in which the end of a process is a surprise to the table."""
    assert advance_worker(state, WorkerEvent.EXIT) is WorkerState.EXITED


SERVING = (WorkerState.READY, WorkerState.BUSY)


@pytest.mark.parametrize("state", [s for s in WorkerState if s not in SERVING], ids=lambda s: s.name)
def test_only_a_worker_that_serves_is_assigned_a_batch(state: WorkerState):
    """A worker that is loading or leaving never gets a batch."""
    with pytest.raises(IllegalTransition):
        advance_worker(state, WorkerEvent.ASSIGN)


@pytest.mark.parametrize("state", SERVING, ids=lambda s: s.name)
def test_a_worker_with_a_batch_is_busy(state: WorkerState):
    """Further batches may lie with a worker that computes."""
    assert advance_worker(state, WorkerEvent.ASSIGN) is WorkerState.BUSY


def test_a_failed_version_tries_again_when_it_is_scaled():
    """Giving up is not for ever."""
    assert advance_version(VersionState.FAILED, VersionEvent.WANT) is VersionState.LOADING
