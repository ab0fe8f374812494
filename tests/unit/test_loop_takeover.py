"""Who runs the rounds of a dispatcher: the table, held against the state machine that lives by it, and against real loops."""

from __future__ import annotations

import asyncio
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import uvloop
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.handlers import until
from torchmgmt.dispatcher import Dispatcher
from torchmgmt.loop_takeover import TRANSITIONS, LoopTakeover, RoundsEvent, RoundsOwner, RoundsState

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
uvloop.new_event_loop().close()  # the first one of a process makes a pipe for all of them, which stays


def test_the_table_is_closed() -> None:
    """Every state can be reached from the thread's own rounds, and leads back to them."""
    assert set(TRANSITIONS) == set(RoundsState)
    assert {event for events in TRANSITIONS.values() for event in events} == set(RoundsEvent)
    for start in RoundsState:
        seen, pending = {start}, [start]
        while pending:
            for after in TRANSITIONS[pending.pop()].values():
                if after not in seen:
                    seen.add(after)
                    pending.append(after)
        assert seen == set(RoundsState)


class OwnerRules(RuleBasedStateMachine):
    """Loops ask, give back and are lost; the thread parks and resumes; in any order, each of them from a thread of its own."""

    @initialize()
    def begin(self) -> None:
        self.owner = RoundsOwner()
        self.takeovers: list[Any] = [object() for _ in range(3)]
        self.state = RoundsState.OWN
        self.asker: object = None
        self.has_resumed = True
        self.owner.begin()

    def _follow(self, event: RoundsEvent) -> None:
        self.state = TRANSITIONS[self.state][event]

    @rule(which=st.integers(0, 2))
    def ask(self, which: int) -> None:
        is_possible = RoundsEvent.ASK in TRANSITIONS[self.state]
        assert self.owner.ask(self.takeovers[which]) is is_possible
        if is_possible:
            self._follow(RoundsEvent.ASK)
            self.asker = self.takeovers[which]

    @rule()
    def park(self) -> None:
        parked = self.owner.park()
        if self.state is RoundsState.ASKED:
            assert parked is self.asker
            self._follow(RoundsEvent.PARK)
            self.has_resumed = False
        else:
            assert parked is None

    @rule(which=st.integers(0, 2))
    def give_back(self, which: int) -> None:
        is_its_own = self.asker is self.takeovers[which]
        assert self.owner.give_back(self.takeovers[which]) is is_its_own
        if is_its_own:
            self._follow(RoundsEvent.GIVE_BACK)
            self.asker = None

    @precondition(lambda self: self.state is RoundsState.LOOP)
    @rule()
    def lose(self) -> None:
        takeover: Any = self.asker
        assert self.owner.give_back(takeover, RoundsEvent.LOSE)
        self._follow(RoundsEvent.LOSE)
        self.asker = None

    @rule()
    def resume(self) -> None:
        is_possible = self.state is RoundsState.RETURNING
        assert self.owner.resume() is is_possible
        if is_possible:
            self._follow(RoundsEvent.RESUME)
        if self.state is not RoundsState.LOOP:
            self.has_resumed = True

    @invariant()
    def has_one_owner(self) -> None:
        owner = self.owner
        assert owner.state is self.state
        assert owner.host is (self.asker if self.state is RoundsState.LOOP else None)
        # This is the thread's own. Where a loop asks before it has resumed, it does that all the same.
        if self.state is not RoundsState.RETURNING and self.has_resumed:
            assert owner.is_here() is (self.state is not RoundsState.LOOP)
        here: list[bool] = []
        thread = threading.Thread(target=lambda: here.append(owner.is_here()))
        thread.start()
        thread.join()
        assert here == [False]


TestOwnerRules = OwnerRules.TestCase


@pytest.mark.parametrize("kind", LOOPS)
def test_loops_that_come_and_go_lose_nothing(kind: str) -> None:
    """Two loops take the rounds and give them back at random: each callback runs once, in order, on one thread at a time."""
    dispatcher = Dispatcher()
    ran: list[int] = []
    busy = threading.Lock()
    twice: list[int] = []

    def note(number: int) -> None:
        if not busy.acquire(blocking=False):
            twice.append(number)
            return
        ran.append(number)
        busy.release()

    def host(seed: int) -> None:
        rng = random.Random(seed)
        loop = LOOPS[kind]()

        async def turns() -> None:
            for _ in range(60):
                undo = dispatcher.run_on(loop)
                await asyncio.sleep(rng.choice([0, 0, 0.001, 0.003]))
                undo()
                if rng.random() < 0.5:
                    await asyncio.sleep(0)

        loop.run_until_complete(turns())
        loop.close()

    dispatcher.call_soon(int)
    hosts = [threading.Thread(target=host, args=(seed,)) for seed in (1, 2)]
    for thread in hosts:
        thread.start()
    count = 0
    while any(thread.is_alive() for thread in hosts):
        dispatcher.call_soon(lambda number=count: note(number))  # type: ignore[misc]
        count += 1
        time.sleep(0.0005)
    for thread in hosts:
        thread.join()
    until(lambda: len(ran) == count, "all callbacks have run")
    assert (ran, twice) == (list(range(count)), [])
    assert dispatcher.owner.state is RoundsState.OWN
    dispatcher.close()


async def taken_over(dispatcher: Dispatcher) -> None:
    """Return once the loop that runs has the rounds."""
    while not dispatcher.on_thread():  # noqa: ASYNC110 - nobody tells of it
        await asyncio.sleep(0.001)


def test_a_thread_that_gets_the_number_of_another_is_not_taken_for_it() -> None:
    """A later thread may be given the id of one that was a loop's; it is known by more than that."""
    dispatcher = Dispatcher()

    def host() -> None:
        loop = asyncio.new_event_loop()

        async def once() -> None:
            undo = dispatcher.run_on(loop)
            await taken_over(dispatcher)
            undo()
            assert not dispatcher.on_thread()

        loop.run_until_complete(once())
        loop.close()

    for _ in range(10):
        thread = threading.Thread(target=host)
        thread.start()
        thread.join()
        here: list[bool] = []
        thread = threading.Thread(target=lambda: here.append(dispatcher.on_thread()))  # noqa: B023
        thread.start()
        thread.join()
        assert here == [False]
        assert not dispatcher.on_thread()
    dispatcher.close()


def test_a_loop_that_stopped_without_giving_back_is_noticed() -> None:
    """Its thread goes on within a second or so, and what waits is done."""
    dispatcher = Dispatcher()
    loop = asyncio.new_event_loop()

    async def forget() -> None:
        dispatcher.run_on(loop)
        await taken_over(dispatcher)

    loop.run_until_complete(forget())
    assert dispatcher.on_thread()  # as far as anybody knows by now
    done = threading.Event()
    threading.Thread(target=lambda: dispatcher.call_soon(done.set)).start()
    assert done.wait(10)
    assert not dispatcher.on_thread()
    assert dispatcher.owner.state is RoundsState.OWN
    loop.close()
    dispatcher.close()


def test_a_takeover_that_was_undone_before_it_began_never_begins() -> None:
    """Undoing it at once leaves the rounds where they are."""
    dispatcher = Dispatcher()
    loop = asyncio.new_event_loop()

    async def in_haste() -> None:
        for _ in range(100):
            dispatcher.run_on(loop)()
        done = asyncio.Event()
        dispatcher.call_soon(lambda: loop.call_soon_threadsafe(done.set))
        await asyncio.wait_for(done.wait(), 10)

    loop.run_until_complete(in_haste())
    until(lambda: dispatcher.owner.state is RoundsState.OWN)
    loop.close()
    dispatcher.close()


class Rounds:
    """A dispatcher that does nothing but to note its visits."""

    def __init__(self) -> None:
        self.owner = RoundsOwner()
        self.visits: list[str] = []

    def clock(self) -> float:
        return 0.0

    def visit(self) -> float | None:
        self.visits.append("begins")
        signal.raise_signal(signal.SIGUSR1)
        self.visits.append("goes on")
        return None

    def note_returned(self) -> None:
        pass


def test_a_signal_handler_runs_between_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that raises on the main thread interrupts no round: it raises when that is done."""
    rounds = Rounds()
    loop = asyncio.new_event_loop()
    takeover = LoopTakeover(rounds, loop, -1)
    before = signal.signal(signal.SIGUSR1, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        with pytest.raises(KeyboardInterrupt):
            takeover._run()
    finally:
        signal.signal(signal.SIGUSR1, before)
        loop.close()
    assert rounds.visits == ["begins", "goes on"]
