"""The log relay: whatever a program's log handlers do, who has something to say goes on at once."""

from __future__ import annotations

import gc
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.handlers import until
from tests.interruptions import Nuisance, interruptions
from torchmgmt import log_relay
from torchmgmt.log_relay import LogRelay, log_guarded

WAIT_S = 20


class Handler(logging.Handler):
    """A program's log handler, which does as a test wants it to."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.act: Callable[[str], object] = lambda _line: None

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        self.act(line)
        self.lines.append(line)


@pytest.fixture
def handler() -> Iterator[Handler]:
    """The only handler of the logger "tests.relay", and of the relay's own."""
    handler = Handler()
    loggers = [logging.getLogger("tests.relay"), logging.getLogger("torchmgmt.log_relay")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        logger.propagate = True


@pytest.fixture
def relay() -> Iterator[LogRelay]:
    relay = LogRelay("tests-relay")
    yield relay
    relay.close()


logger = logging.getLogger("tests.relay")


def say(relay: LogRelay, message: str, *args: object) -> None:
    relay.log(logger, logging.INFO, message, *args)


def test_records_are_logged_in_their_order_on_another_thread(relay: LogRelay, handler: Handler) -> None:
    """With what belongs to them; what nobody wants to hear is not even kept."""
    threads = set()
    handler.act = lambda _line: threads.add(threading.current_thread().name)
    for number in range(100):
        say(relay, "line %d", number)
    relay.log(logger, logging.DEBUG, "not wanted")
    until(lambda: len(handler.lines) == 100)
    assert handler.lines == [f"line {number}" for number in range(100)]
    assert threads == {"tests-relay"}


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_what_a_handler_raises_costs_nothing_but_its_record(
    relay: LogRelay, handler: Handler, error: BaseException
) -> None:
    """The next record is logged; so it is with log_guarded, on the caller's own thread."""

    def act(line: str) -> None:
        if line.startswith("bad"):
            raise error

    handler.act = act
    for line in ("good 1", "bad 1", "bad 2", "good 2"):
        say(relay, line)
    until(lambda: handler.lines == ["good 1", "good 2"])
    for line in ("bad 3", "good 3"):
        log_guarded(logger, logging.INFO, line)
    assert handler.lines == ["good 1", "good 2", "good 3"]


def test_a_record_that_cannot_be_written_costs_nothing_but_itself(relay: LogRelay, handler: Handler) -> None:
    """Arguments that do not fit, and such as cannot be shown."""

    class Odd:
        def __str__(self) -> str:
            raise SystemExit(4)

    say(relay, "%d", "no number")
    say(relay, "%s", Odd())
    say(relay, "good")
    until(lambda: handler.lines == ["good"])


def test_who_logs_never_waits_for_a_handler_that_hangs(
    relay: LogRelay, handler: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many records are kept; further ones are counted, and how many they were is told once the handler goes on."""
    monkeypatch.setattr(log_relay, "MOST_WAITING", 50)
    hangs, may_go_on = threading.Event(), threading.Event()
    handler.act = lambda _line: (hangs.set(), may_go_on.wait(WAIT_S))
    say(relay, "first")
    assert hangs.wait(WAIT_S)
    for number in range(80):
        say(relay, "line %d", number)
    assert handler.lines == []
    may_go_on.set()
    until(lambda: len(handler.lines) == 52)
    assert handler.lines[0] == "first"
    assert [line for line in handler.lines if line.startswith("line")] == [f"line {number}" for number in range(50)]
    assert handler.lines[1] == "30 log records were dropped: log handlers took too long"


def test_closing_logs_what_waits_and_leaves_a_handler_that_hangs_behind(
    handler: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes no longer than it may, and what comes afterwards is logged by who has it to say."""
    monkeypatch.setattr(log_relay, "_END_TIMEOUT_S", 0.1)
    relay = LogRelay("tests-relay")
    for number in range(20):
        say(relay, "line %d", number)
    relay.close()
    relay.close()
    assert len(handler.lines) == 20
    threads = set()
    handler.act = lambda _line: threads.add(threading.current_thread())
    say(relay, "after")
    assert handler.lines[-1] == "after"
    assert threads == {threading.current_thread()}

    other, hangs, may_go_on = LogRelay("tests-relay"), threading.Event(), threading.Event()
    handler.act = lambda _line: (hangs.set(), may_go_on.wait(WAIT_S))
    say(other, "hangs")
    assert hangs.wait(WAIT_S)
    began = time.monotonic()
    other.close()
    assert time.monotonic() - began < 5
    may_go_on.set()
    until(lambda: not any(thread.name == "tests-relay" for thread in threading.enumerate()))


def test_there_is_a_thread_only_while_there_is_something_to_log(
    handler: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None before the first record and none when it was quiet for a while; the next record has another one started."""
    monkeypatch.setattr(log_relay, "_LINGER_S", 0.02)
    relay = LogRelay("tests-relay")
    for number in range(5):
        before = threading.active_count()
        say(relay, "line %d", number)
        until(lambda number=number: len(handler.lines) == number + 1)
        until(lambda before=before: threading.active_count() <= before, "the thread is gone")
    assert relay._thread is None


def test_records_that_come_as_the_thread_goes_are_not_lost(handler: Handler, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whatever moment: each is logged, in the order of its thread."""
    monkeypatch.setattr(log_relay, "_LINGER_S", 0.0005)
    relay = LogRelay("tests-relay")

    def talk(who: int) -> None:
        for number in range(200):
            say(relay, "%d %d", who, number)
            if number % 10 == 0:
                time.sleep(0.0005)

    threads = [threading.Thread(target=talk, args=(who,)) for who in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: len(handler.lines) == 600)
    for who in range(3):
        mine = [line for line in handler.lines if line.startswith(f"{who} ")]
        assert mine == [f"{who} {number}" for number in range(200)]
    until(lambda: relay._thread is None)


def test_signal_handlers_may_log(relay: LogRelay, handler: Handler) -> None:
    """Whatever the main thread is in the midst of, such as logging itself."""
    handled = 0
    with Nuisance(signal.SIGUSR1, seed=3, most_s=0.002) as nuisance:

        def handle(*_: object) -> None:
            nonlocal handled
            handled += 1
            say(relay, "from the handler")
            if handled < 100:
                nuisance.again()

        before = signal.signal(signal.SIGUSR1, handle)
        try:
            nuisance.again()
            said, end = 0, time.monotonic() + WAIT_S
            while handled < 100 and time.monotonic() < end:
                say(relay, "from the main thread")
                said += 1
                time.sleep(0.0001)
        finally:
            signal.signal(signal.SIGUSR1, before)
    assert handled == 100
    until(lambda: len(handler.lines) == handled + said)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # where it meets a finalizer
def test_an_interruption_loses_no_later_record(handler: Handler) -> None:
    """At each point of log(), of the one that starts the thread as well: what is said next is logged."""
    gc.collect()
    for interruption in interruptions():
        relay = LogRelay("tests-relay")
        interruption.of(lambda: say(relay, "interrupted"))  # noqa: B023
        say(relay, "next")
        until(lambda: "next" in handler.lines, f"the next record, after an interruption {interruption.where}")
        relay.close()
        handler.lines.clear()
    until(lambda: not any(thread.name == "tests-relay" for thread in threading.enumerate()))


def test_where_there_are_no_threads_a_record_waits_for_one(handler: Handler, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is logged with what comes when the system has threads again."""
    relay = LogRelay("tests-relay")

    def none_left(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        say(relay, "first")
        until(lambda: not relay._is_starting)
    assert handler.lines == []
    say(relay, "second")
    until(lambda: handler.lines == ["first", "second"])
    relay.close()
