"""A Batcher around a plain function: what callers, their callbacks and a fork do to it harms nobody else."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from tests.forks import in_child
from tests.handlers import until
from tests.interruptions import interruptions
from torchmgmt import Batcher
from torchmgmt.errors import DeadlineExceeded, ManagerClosed, QueueFull

WAIT_S = 20


class Held:
    """A function for a Batcher that waits until it is let go, and then answers with what it was given."""

    def __init__(self) -> None:
        self.runs = threading.Event()
        self.may_end = threading.Event()

    def __call__(self, items: list[Any]) -> list[Any]:
        self.runs.set()
        assert self.may_end.wait(WAIT_S)
        return items


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held()
    yield held
    held.may_end.set()


def exits(_future: Future[Any]) -> None:
    raise SystemExit(3)


@pytest.mark.parametrize("end", ["answered", "cancelled", "late"])
def test_a_callback_that_exits_keeps_no_other_waiting(held: Held, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other callbacks of its item are called, and the other items of its batch answered."""
    # Else pytest would keep the record of what it raised, and with its frames the descriptor of who called it.
    monkeypatch.setattr(logging.getLogger("torchmgmt.owned_future"), "disabled", True)
    called: list[str] = []
    with Batcher(held, batch_size=2, max_batch_delay=0) as batcher:
        blocker = batcher.submit("first")
        assert held.runs.wait(WAIT_S)
        first = batcher.submit(1, timeout=0.05 if end == "late" else None)
        second = batcher.submit(2)
        for callback in (exits, lambda _: called.append("one"), exits, lambda _: called.append("two")):
            first.add_done_callback(callback)
        if end == "cancelled":
            assert first.cancel()
        if end != "answered":
            until(lambda: called == ["one", "two"])
            assert not blocker.done()
        held.may_end.set()
        assert (blocker.result(WAIT_S), second.result(WAIT_S)) == ("first", 2)
        until(lambda: called == ["one", "two"])
        assert batcher.submit(3).result(WAIT_S) == 3


def error_of(future: Future[Any]) -> BaseException | None:
    try:
        return future.exception(WAIT_S)
    except CancelledError as error:
        return error


def test_who_is_interrupted_as_it_takes_an_item_back_keeps_no_other_waiting(held: Held) -> None:
    """Another thread that waits for the same answer hears of it, whatever point of cancel() that was."""
    with Batcher(held, max_batch_delay=0, capacity=1000) as batcher:
        blocker = batcher.submit(0)
        assert held.runs.wait(WAIT_S)
        for interruption in interruptions():
            future = batcher.submit(1)
            came: list[BaseException | None] = []
            waiting = threading.Thread(target=lambda: came.append(error_of(future)))  # noqa: B023
            waiting.start()
            until(lambda: future._sleepers is not None)  # type: ignore[attr-defined]  # noqa: B023
            interruption.of(future.cancel)
            if not future.cancelled():
                assert future.cancel()
            waiting.join(WAIT_S)
            assert [type(error) for error in came] == [CancelledError], interruption.where
        assert len(batcher) == 0
        held.may_end.set()
        assert blocker.result(WAIT_S) == 0


def test_each_item_of_a_failed_batch_has_an_error_of_its_own() -> None:
    """However often they ask, and are told, no traceback grows, nor shows the frames of the others."""

    def fail(_items: list[int]) -> list[int]:
        raise KeyError("no")

    with Batcher(fail, batch_size=8, max_batch_delay=1000) as batcher:
        futures = [batcher.submit(number) for number in range(8)]
        errors = [future.exception(WAIT_S) for future in futures]
        assert len({id(error) for error in errors}) == 8
        lengths = set()
        for future in futures * 20:
            with pytest.raises(KeyError) as caught:
                future.result(WAIT_S)
            lengths.add(len(traceback.extract_tb(caught.value.__traceback__)))
        assert len(lengths) == 1
        assert lengths.pop() < 8


def test_what_is_late_while_the_function_runs_hears_of_it_in_time(held: Held) -> None:
    """Both what runs and what waits, which then makes room for others although the function goes on."""
    with Batcher(held, max_batch_delay=0, capacity=1) as batcher:
        began = time.monotonic()
        running = batcher.submit(1, timeout=0.2)
        assert held.runs.wait(WAIT_S)
        waiting = batcher.submit(2, wait_timeout=0.1)
        with pytest.raises(QueueFull):
            batcher.submit(3)
        for future, limit_s in ((waiting, 0.1), (running, 0.2)):
            error = future.exception(WAIT_S)
            assert isinstance(error, DeadlineExceeded)
            assert error.limit_s == limit_s
        assert time.monotonic() - began < 5
        assert not held.may_end.is_set()
        last = batcher.submit(3)
        held.may_end.set()
        assert last.result(WAIT_S) == 3


ANSWERS: dict[str, Callable[[list[int]], Any]] = {
    "set": lambda items: {*items},
    "dict": dict.fromkeys,
    "str": lambda items: "x" * len(items),
    "bytes": bytes,
    "generator": lambda items: (item for item in items),
    "number": len,
    "None": lambda _items: None,
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_has_no_places_is_no_list_of_answers(name: str) -> None:
    """Nobody can tell whose part of a set is whose: the batch fails, and the next one runs."""
    with Batcher(ANSWERS[name], batch_size=2, max_batch_delay=1000) as batcher:
        futures = [batcher.submit(number) for number in (1, 2)]
        for future in futures:
            with pytest.raises(TypeError, match="list with one answer for each item"):
                future.result(WAIT_S)


# -- a forked copy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", [False, True])
def test_a_forked_copy_refuses_and_harms_nothing(held: Held, used: bool) -> None:
    """In a child it says that it belongs to another process, and waits for no thread that is not there."""
    with Batcher(held) as batcher:
        future = batcher.submit(1, timeout=60) if used else None
        if used:
            assert held.runs.wait(WAIT_S)
        said = in_child(lambda: batcher.submit(2))
        assert said.startswith("ManagerClosed:")
        assert "fork" in said
        assert in_child(lambda: batcher.close(1)) == "0"
        held.may_end.set()
        assert batcher.submit(3).result(WAIT_S) == 3
        if future is not None:
            assert future.result(WAIT_S) == 1


def test_after_the_fork_the_parent_can_still_close() -> None:
    """A child that closed its copy has not closed the parent's."""
    with Batcher(lambda items: items) as batcher:
        assert batcher.submit(1).result(WAIT_S) == 1
        assert in_child(batcher.close) == "0"
        assert batcher.submit(2).result(WAIT_S) == 2
    with pytest.raises(ManagerClosed):
        batcher.submit(3)
