"""What breaks under the dispatcher, and what it owes to others when it ends in spite of all."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.handlers import until
from torchmgmt.dispatcher import Alarm, Dispatcher
from torchmgmt.errors import ManagerClosed
from torchmgmt.owned_future import OwnedFuture

WAIT_S = 20


@pytest.fixture
def dispatcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dispatcher]:
    # Else pytest would keep the records of what was raised, and with the frames descriptors that were given up.
    monkeypatch.setattr(logging.getLogger("torchmgmt.dispatcher"), "disabled", True)
    dispatcher = Dispatcher()
    dispatcher.call(lambda: None)
    dispatcher.call_soon(lambda: None)
    until(lambda: dispatcher._thread is not None)
    yield dispatcher
    dispatcher.close()


def heard(dispatcher: Dispatcher, ask: Callable[[Callable[[], object]], object]) -> None:
    """Wait until a callback that was asked for has run."""
    came = threading.Event()
    ask(came.set)
    assert came.wait(WAIT_S)


# -- timers ------------------------------------------------------------------------------------------------------------


def test_cancelled_timers_do_not_pile_up(dispatcher: Dispatcher) -> None:
    """100,000 that are set for the far future and cancelled leave hardly any behind; those that count stay."""
    kept = [dispatcher.call_at(dispatcher.clock() + 1000 + number, lambda: None) for number in range(10)]
    most = 0
    for _ in range(100):
        timers = [dispatcher.call_at(dispatcher.clock() + 500, lambda: None) for _ in range(1000)]
        for timer in timers:
            timer.cancel()
        heard(dispatcher, dispatcher.call_soon)
        most = max(most, len(dispatcher._timers))
    assert most <= 2200
    dispatcher.call(
        lambda: [dispatcher.call_at(dispatcher.clock() + 500, lambda: None).cancel() for _ in range(10_000)]
    )
    assert len(dispatcher._timers) <= 200
    assert dispatcher.call(lambda: sum(entry[2].callback is not None for entry in dispatcher._timers._heap)) == 10
    for timer in kept:
        timer.cancel()


def test_an_alarm_that_is_moved_needs_one_timer(dispatcher: Dispatcher) -> None:
    """Later and later costs nothing; earlier and earlier leaves nothing for long."""
    went_off = threading.Event()

    def move() -> int:
        alarm = Alarm(dispatcher, went_off.set)
        now = dispatcher.clock()
        for number in range(10_000):
            alarm.set(now + 1000 + number)
        assert len(dispatcher._timers) == 1
        for number in range(10_000):
            alarm.set(now + 900 - number / 100)
        alarm.set(now + 0.01)
        return len(dispatcher._timers)

    assert dispatcher.call(move) <= 200
    assert went_off.wait(WAIT_S)


# -- what it waits with ------------------------------------------------------------------------------------------------


def test_a_selector_that_breaks_is_replaced(dispatcher: Dispatcher) -> None:
    """As where a program closes all descriptors that it does not know: what is watched still is, and timers go off."""
    left, right = socket.socketpair()
    with left, right:
        read = threading.Semaphore(0)
        dispatcher.watch(left, lambda: (left.recv(10), read.release()))
        right.send(b"x")
        assert read.acquire(timeout=WAIT_S)

        def close_all() -> None:
            assert dispatcher._selector is not None
            assert dispatcher._wake_up is not None
            os.close(dispatcher._selector.fileno())  # type: ignore[attr-defined]
            os.close(dispatcher._wake_up.fileno())

        before = dispatcher._wake_up
        dispatcher.call_soon(close_all)
        until(lambda: dispatcher._wake_up is not before)
        heard(dispatcher, dispatcher.call_soon)
        heard(dispatcher, lambda callback: dispatcher.call_at(dispatcher.clock() + 0.01, callback))
        right.send(b"y")
        assert read.acquire(timeout=WAIT_S)
        gone = threading.Event()
        dispatcher.unwatch(left, gone.set)
        assert gone.wait(WAIT_S)
        assert dispatcher._thread is not None
        assert dispatcher._thread.is_alive()


def test_what_was_closed_by_others_is_not_closed_again(dispatcher: Dispatcher, tmp_path: Path) -> None:
    """Their numbers are soon those of other files, which nobody closes but who has opened them."""
    closed: list[int] = []

    def close_all() -> None:
        assert dispatcher._selector is not None
        assert dispatcher._wake_up is not None
        closed.extend([dispatcher._selector.fileno(), dispatcher._wake_up.fileno()])  # type: ignore[attr-defined]
        for fd in closed:
            os.close(fd)
        others.extend(os.open(tmp_path / str(number), os.O_CREAT | os.O_RDWR) for number in range(2))

    others: list[int] = []
    before = dispatcher._wake_up
    dispatcher.call_soon(close_all)
    until(lambda: dispatcher._wake_up is not before)
    for _ in range(3):
        heard(dispatcher, dispatcher.call_soon)
    dispatcher.close()
    gc.collect()
    assert set(others) == set(closed)
    for fd in others:
        assert os.fstat(fd).st_size == 0
        os.close(fd)


def test_a_source_that_broke_with_it_is_told(dispatcher: Dispatcher) -> None:
    """What cannot be waited for any more hears that there is something to read, and sees for itself what."""
    left, right = socket.socketpair()
    with left, right:
        told = threading.Event()
        dispatcher.watch(left, told.set)
        heard(dispatcher, dispatcher.call_soon)

        def break_both() -> None:
            os.close(left.detach())
            assert dispatcher._selector is not None
            dispatcher._selector.select = fail  # type: ignore[method-assign]

        def fail(_timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            raise MemoryError

        dispatcher.call_soon(break_both)
        assert told.wait(WAIT_S)
        heard(dispatcher, dispatcher.call_soon)


# -- its end -----------------------------------------------------------------------------------------------------------


class Dependent:
    """Somebody who needs the dispatcher, and what happens to it when that ends."""

    def __init__(self, act: Callable[[], object] = lambda: None) -> None:
        self.was_told = threading.Event()
        self._act = act

    def dispatcher_ended(self) -> None:
        self.was_told.set()
        self._act()


@contextlib.contextmanager
def broken(dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have every round of it fail from the end of the block on."""

    def fail(_self: Dispatcher, _timeout: float | None) -> None:
        raise MemoryError

    yield
    thread = dispatcher._thread
    assert thread is not None
    monkeypatch.setattr(Dispatcher, "run_round", fail)
    with contextlib.suppress(ManagerClosed):
        dispatcher.call_soon(lambda: None)
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_one_bad_round_is_not_its_end(dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are three; what was asked for is done."""
    run_round, left = Dispatcher.run_round, [3]

    def fail_at_times(self: Dispatcher, timeout: float | None) -> None:
        if left[0]:
            left[0] -= 1
            raise MemoryError
        run_round(self, timeout)

    monkeypatch.setattr(Dispatcher, "run_round", fail_at_times)
    heard(dispatcher, dispatcher.call_soon)
    heard(dispatcher, dispatcher.call_soon)
    assert left == [0]


def test_when_it_ends_all_is_told_and_nobody_waits(dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who depend on it fail at once what they owe; what was asked for is done; what comes later is refused."""

    def exits() -> None:
        raise SystemExit(3)

    future: OwnedFuture[int] = OwnedFuture()
    future.owner = dispatcher
    dependents = [Dependent(exits), Dependent(lambda: future.set_exception(ManagerClosed("It"))), Dependent()]
    done = threading.Event()
    with broken(dispatcher, monkeypatch):
        for dependent in dependents:
            dispatcher.add_dependent(dependent)
    for dependent in dependents:
        assert dependent.was_told.is_set()
    with pytest.raises(ManagerClosed):
        future.result(WAIT_S)
    for call in (
        lambda: dispatcher.call_soon(done.set),
        lambda: dispatcher.call_at(0, done.set),
        lambda: dispatcher.call(done.set),
    ):
        with pytest.raises(ManagerClosed):
            call()
    assert not done.is_set()
    dispatcher.close()
    dispatcher.close()


def test_what_was_asked_for_before_its_end_is_done(dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that waits is answered, and what dependents ask for as it ends is done, too."""
    held, may_go_on = threading.Event(), threading.Event()
    dispatcher.call_soon(lambda: (held.set(), may_go_on.wait(WAIT_S)))
    assert held.wait(WAIT_S)
    ran: list[str] = []
    dependent = Dependent(lambda: dispatcher.call_soon(lambda: ran.append("as it ended")))
    dispatcher.add_dependent(dependent)
    came: list[str] = []
    with broken(dispatcher, monkeypatch):
        callers = [threading.Thread(target=lambda: came.append(dispatcher.call(lambda: "done"))) for _ in range(5)]
        for caller in callers:
            caller.start()
        until(lambda: len(dispatcher._inbox) == 5)
        may_go_on.set()
    for caller in callers:
        caller.join(WAIT_S)
    assert came == ["done"] * 5
    assert ran == ["as it ended"]


def test_who_comes_as_it_ends_is_answered_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """At whatever moment: no call waits for a thread that is gone."""
    for _ in range(20):
        dispatcher = Dispatcher()
        dispatcher.call_soon(lambda: None)
        until(lambda dispatcher=dispatcher: dispatcher._is_running)
        came: list[object] = []

        def ask(dispatcher: Dispatcher = dispatcher, came: list[object] = came) -> None:
            try:
                while True:
                    came.append(dispatcher.call(lambda: 1))
            except ManagerClosed as error:
                came.append(error)

        callers = [threading.Thread(target=ask) for _ in range(3)]
        for caller in callers:
            caller.start()
        until(lambda came=came: came)
        with monkeypatch.context() as patch, broken(dispatcher, patch):
            pass
        for caller in callers:
            caller.join(WAIT_S)
            assert not caller.is_alive()
        assert sum(isinstance(each, ManagerClosed) for each in came) == 3
        dispatcher.close()
