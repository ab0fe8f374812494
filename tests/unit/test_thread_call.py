"""Calls that another thread makes: made once, and told to who waits, whatever interrupts that one."""

from __future__ import annotations

import _thread
import contextlib
import errno
import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from tests.handlers import until
from tests.interruptions import interruptions
from torchmgmt import thread_call
from torchmgmt.thread_call import ThreadCall, on_new_thread


def test_it_runs_on_another_thread_and_tells_what_came_of_it() -> None:
    """What it returns is returned."""
    assert on_new_thread(lambda: (threading.get_ident() != threading.get_ident(), 3)) == (False, 3)
    assert on_new_thread(threading.get_ident) != threading.get_ident()


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_what_it_raises_is_raised(error: BaseException) -> None:
    """Whatever it is; the thread ends without a word."""

    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        on_new_thread(fail)
    assert caught.value is error


def test_it_is_called_once() -> None:
    """Whoever is asked to run it, and however often."""
    ran: list[int] = []
    call = ThreadCall(lambda: ran.append(1) or "done")
    threads = [threading.Thread(target=call.run) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert call.result() == "done"
    for thread in threads:
        thread.join()
    assert ran == [1]


def test_nothing_refers_to_what_it_raised() -> None:
    """An error that was raised goes with who has caught it."""

    class Odd(Exception):
        pass

    def fail() -> None:
        raise Odd

    gone: list[weakref.ref[Odd]] = []

    def ask() -> None:
        try:
            on_new_thread(fail)
        except Odd as error:
            gone.append(weakref.ref(error))

    gc.collect()
    gc.disable()
    try:
        ask()
        until(lambda: gone[0]() is None)
    finally:
        gc.enable()


def test_without_threads_it_is_an_error_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """OSError, as of any other resource that there is no more of; and it was not called."""

    def none_left(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("_thread.start_new_thread", none_left)
    ran: list[int] = []
    with pytest.raises(OSError, match="can't start new thread") as caught:
        on_new_thread(lambda: ran.append(1))
    assert caught.value.errno == errno.EAGAIN
    assert ran == []


def test_who_is_interrupted_leaves_it_to_be_done() -> None:
    """At each point: it is done once or never, and nobody waits for ever."""
    outcomes = set()
    for interruption in interruptions():
        ran: list[int] = []

        def act(ran: list[int] = ran) -> None:
            time.sleep(0.001)
            ran.append(1)

        was_interrupted = interruption.of(lambda: on_new_thread(act))
        if not was_interrupted:
            assert ran == [1]
        elif " result " in interruption.where:
            until(lambda: ran == [1], interruption.where)  # noqa: B023
        outcomes.add(was_interrupted)
    assert outcomes == {False, True}


def test_one_that_was_made_can_still_be_asked_for() -> None:
    """result() after run() does not wait."""
    for act in (lambda: 1, lambda: 1 / 0):
        call: ThreadCall[float] = ThreadCall(act)
        call.run()
        asked: Callable[[], object] = call.result
        with contextlib.suppress(ZeroDivisionError):
            assert asked() == 1


def test_a_thread_that_dies_before_its_first_line_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does where the exception hits it that another thread has set in the caller."""
    monkeypatch.setattr(thread_call, "_BEGUN_S", 0.05)
    start, started = _thread.start_new_thread, []

    def stillborn(function: Any, args: tuple[Any, ...]) -> int:
        started.append(function)
        return start(bool, ()) if len(started) < 3 else start(function, args)

    monkeypatch.setattr(_thread, "start_new_thread", stillborn)
    assert on_new_thread(lambda: 5) == 5
    assert len(started) == 3


def test_a_call_that_takes_long_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes after it has begun."""
    monkeypatch.setattr(thread_call, "_BEGUN_S", 0.01)
    calls: list[int] = []
    on_new_thread(lambda: (calls.append(1), time.sleep(0.2)))
    assert calls == [1]
