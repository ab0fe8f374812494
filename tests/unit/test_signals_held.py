"""Handlers of signals run after the block, not in the midst of it, and are as they were before."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.interruptions import Nuisance
from torchmgmt.signals_held import SignalsHeld

NUMBERS = (signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture
def came() -> Iterator[list[int]]:
    """The signals whose handlers have run."""
    found: list[int] = []
    before = [signal.signal(number, lambda number, _frame: found.append(number)) for number in NUMBERS]
    yield found
    for number, handler in zip(NUMBERS, before, strict=True):
        signal.signal(number, handler)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in NUMBERS]


def test_they_run_when_the_block_is_over(came: list[int]) -> None:
    """In the order in which the signals came; each as often."""
    before = handlers()
    with SignalsHeld():
        for number in (signal.SIGUSR2, signal.SIGUSR1, signal.SIGUSR2):
            signal.raise_signal(number)
        assert came == []
    assert came == [signal.SIGUSR2, signal.SIGUSR1, signal.SIGUSR2]
    assert handlers() == before


def test_blocks_lie_in_one_another(came: list[int]) -> None:
    """The outermost one counts."""
    held = SignalsHeld()
    with held:
        with held:
            signal.raise_signal(signal.SIGUSR1)
        assert came == []
    assert came == [signal.SIGUSR1]


def test_what_a_handler_raises_comes_out_of_the_block(came: list[int]) -> None:
    """The others run all the same."""

    def fail(*_: object) -> None:
        raise TimeoutError("over")

    before = signal.signal(signal.SIGUSR1, fail)
    with pytest.raises(TimeoutError, match="over"), SignalsHeld():  # noqa: PT012
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR2)
    assert came == [signal.SIGUSR2]
    assert signal.signal(signal.SIGUSR1, before) is fail


def test_a_handler_that_was_set_in_the_block_stays(came: list[int]) -> None:
    """Whoever sets one in there, such as a callback, wants that one."""
    calls: list[int] = []
    own: Callable[..., object] = lambda *_: calls.append(1)  # noqa: E731
    with SignalsHeld():
        signal.signal(signal.SIGUSR1, own)
    assert signal.getsignal(signal.SIGUSR1) is own
    signal.raise_signal(signal.SIGUSR1)
    assert (calls, came) == ([1], [])


def test_it_does_nothing_on_other_threads(came: list[int]) -> None:
    """There no handler runs anyway."""
    before = handlers()
    seen: list[object] = []

    def run() -> None:
        with SignalsHeld():
            seen.extend(handlers())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == before


def test_a_signal_at_any_moment_leaves_the_handlers_as_they_were(came: list[int]) -> None:
    """Also one whose handler raises as others are being held, or let go."""
    raised = 0

    def fail(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGUSR1, fail)
    expected = handlers()
    held = SignalsHeld()
    with Nuisance(signal.SIGUSR1, seed=3, most_s=0.001) as nuisance:
        for _ in range(300):
            nuisance.again()
            in_block = False
            try:
                while True:
                    with held:
                        in_block = True
                        in_block = sum(range(50)) < 0
            except TimeoutError:
                raised += 1
            assert not in_block
            assert handlers() == expected
    signal.signal(signal.SIGUSR1, before)
    assert (raised, came) == (300, [])
