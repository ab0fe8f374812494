"""Management calls: made to their end, or taken back, whatever interrupts who waits for them."""

from __future__ import annotations

import contextlib
import contextvars
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import pytest

from tests.handlers import until
from tests.interruptions import Nuisance, interruptions
from torchmgmt import management_call
from torchmgmt.management_call import (
    CallAbandoned,
    ManagementThreads,
    check_wanted,
    still_wanted,
    when_abandoned,
)

WAIT_S = 20
NAME = "torchmgmt-management"


def helpers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


@pytest.fixture
def threads() -> Iterator[ManagementThreads]:
    yield ManagementThreads()
    until(lambda: not helpers(), "the threads are gone")


def test_it_is_made_on_a_thread_of_the_library(threads: ManagementThreads) -> None:
    """In the caller's context; a call within a call is made at once, on that thread."""
    variable = contextvars.ContextVar("variable", default="none")
    variable.set("the caller's")

    def act() -> tuple[str, str, bool, str]:
        within = threads.call(lambda: threading.current_thread().name)
        return threading.current_thread().name, variable.get(), threads.is_here(), within

    assert threads.call(act) == (NAME, "the caller's", True, NAME)
    assert not threads.is_here()


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_what_it_raises_is_raised_and_the_thread_lives_on(threads: ManagementThreads, error: BaseException) -> None:
    """The next call is made by the same thread, if it comes soon."""

    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        threads.call(fail)
    assert caught.value is error
    assert threads.call(lambda: "next") == "next"
    assert len(helpers()) <= 2


def test_many_calls_at_once_wait_for_none_of_the_others(threads: ManagementThreads) -> None:
    """Each that would wait has a thread; when all are idle they go."""
    barrier = threading.Barrier(6)
    came: list[int] = []
    callers = [
        threading.Thread(target=lambda: came.append(threads.call(lambda: barrier.wait(WAIT_S)))) for _ in range(6)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(WAIT_S)
    assert sorted(came) == [*range(6)]


def test_calls_that_come_as_a_thread_goes_are_made(threads: ManagementThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whatever moment: a thread that has waited long enough takes none with it."""
    monkeypatch.setattr(management_call, "_LINGER_S", 0.0005)
    for number in range(300):
        assert threads.call(lambda number=number: number) == number
        time.sleep(0.0005)


def test_what_is_posted_is_done_and_raises_for_nobody(threads: ManagementThreads) -> None:
    """Nobody waits for it."""
    done = threading.Event()
    threads.post(lambda: 1 / 0)
    threads.post(done.set)
    assert done.wait(WAIT_S)


def test_without_threads_the_calling_one_makes_it(threads: ManagementThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that has no more threads is no reason not to unregister a model."""

    def none_left(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("_thread.start_new_thread", none_left)
    assert threads.call(threading.current_thread) is threading.current_thread()
    posted: list[threading.Thread] = []
    threads.post(lambda: posted.append(threading.current_thread()))
    assert posted == [threading.current_thread()]


class Steps:
    """A call of several steps, each of which can be taken back: what is there when nobody wants it any more?"""

    def __init__(self) -> None:
        self.done: list[int] = []
        self.taken_back = 0

    def act(self) -> Steps:
        try:
            for number in range(3):
                check_wanted()
                self.done.append(number)
                time.sleep(0.0005)
        except BaseException:
            self.done.clear()
            raise
        return self

    def take_back(self, _result: Steps) -> None:
        self.taken_back += 1
        self.done.clear()


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
def test_who_is_interrupted_has_it_taken_back(threads: ManagementThreads, error: type[BaseException]) -> None:
    """At each point: nothing of it is left when the interruption comes out, and nothing is taken back twice.

    A TimeoutError, which signal handlers like to raise, is not taken for an error of a system without threads.
    """
    for interruption in interruptions(error=error):
        steps = Steps()
        was_interrupted = interruption.of(lambda: threads.call(steps.act, steps.take_back))  # noqa: B023
        assert was_interrupted == bool(interruption.where), interruption.where
        if was_interrupted:
            until(lambda: not steps.done, interruption.where)  # noqa: B023
            time.sleep(0.002)
            assert steps.done == [], interruption.where
            assert steps.taken_back <= 1
        else:
            assert steps.done == [0, 1, 2]
            assert steps.taken_back == 0
        assert threads.call(lambda: "next") == "next", interruption.where


def test_what_is_not_to_be_taken_back_goes_on(threads: ManagementThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted caller leaves it to be done, once; mostly that is so when the interruption comes out."""
    monkeypatch.setattr(management_call, "_FINISHED_S", 0.02)
    for interruption in interruptions():
        ran: list[int] = []

        def act(ran: list[int] = ran) -> None:
            time.sleep(0.001)
            ran.append(1)

        was_interrupted = interruption.of(lambda: threads.call(act))
        if not was_interrupted or " result " in interruption.where:
            until(lambda: ran == [1], interruption.where)  # noqa: B023
        time.sleep(0.002)
        assert len(ran) <= 1, interruption.where


def test_who_waits_for_long_is_woken_when_nobody_wants_it(threads: ManagementThreads) -> None:
    """A registration that waits for its workers ends at once, and is taken back; what it asks says so, too."""
    began, woken, wanted = threading.Event(), threading.Event(), []

    def act() -> None:
        is_wanted = still_wanted()
        wanted.append(is_wanted())
        with when_abandoned(woken.set):
            began.set()
            assert woken.wait(WAIT_S)
        wanted.append(is_wanted())
        check_wanted()

    ended: list[BaseException] = []
    with Nuisance(signal.SIGUSR1, seed=1) as nuisance:

        def interrupt(*_: object) -> None:
            raise TimeoutError("too late")

        before = signal.signal(signal.SIGUSR1, interrupt)
        try:
            started = time.monotonic()
            with pytest.raises(TimeoutError, match="too late"):  # noqa: PT012
                nuisance.again()
                threads.call(act, ended.append)
        finally:
            signal.signal(signal.SIGUSR1, before)
    assert time.monotonic() - started < 3
    assert ended == [], "it has come to no end that could be taken back"
    if began.is_set():
        assert woken.is_set()
        assert wanted == [True, False]


def test_on_no_call_everything_is_wanted() -> None:
    """Code that runs for nobody in particular asks in vain."""
    check_wanted()
    assert still_wanted()()
    with when_abandoned(lambda: None):
        pass


def test_nobody_catches_an_abandoned_call_by_mistake() -> None:
    """``except Exception`` in the midst of a registration does not go on with it."""
    assert not issubclass(CallAbandoned, Exception)


def test_a_forked_child_has_threads_of_its_own(threads: ManagementThreads) -> None:
    """It does not wait for those of its parent, which are not there."""
    assert threads.call(lambda: 1) == 1
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:  # pragma: no cover
        signal.alarm(5)
        with contextlib.suppress(BaseException):
            os.write(writer, str(threads.call(lambda: 2)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        assert file.read() == "2"
    assert os.waitpid(child, 0)[1] == 0


def test_signal_handlers_may_call(threads: ManagementThreads) -> None:
    """Whatever call the main thread is in the midst of."""
    came: list[int] = []
    calls: list[Callable[[], object]] = [lambda: threads.call(lambda: 1), lambda: threads.post(lambda: None)]
    with Nuisance(signal.SIGUSR1, seed=5, most_s=0.002) as nuisance:

        def handle(*_: object) -> None:
            came.append(threads.call(lambda: len(came)))
            if len(came) < 60:
                nuisance.again()

        before = signal.signal(signal.SIGUSR1, handle)
        try:
            nuisance.again()
            end = time.monotonic() + WAIT_S
            while len(came) < 60 and time.monotonic() < end:
                for call in calls:
                    call()
        finally:
            signal.signal(signal.SIGUSR1, before)
    assert came == [*range(60)]
