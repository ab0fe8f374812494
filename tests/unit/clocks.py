"""A clock that stands still until told to go on, and timers that go off exactly when it does."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any

from torchmgmt.dispatcher import Timer


class FakeClock:
    """Shows the same time until it is set; time in s."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class FakeTimers:
    """A dispatcher on a FakeClock, whose thread is the caller's: timers go off in :meth:`advance`, each at its own time."""

    has_ended = False

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.armed_in_all = 0
        self._pending: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """How many timers are pending."""
        return len(self.times())

    def times(self) -> list[float]:
        """When each pending timer goes off."""
        return [when for when, _, timer in self._pending if timer.callback is not None]

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        self.armed_in_all += 1
        timer = Timer(when, callback)
        heapq.heappush(self._pending, (when, next(self._numbers), timer))
        return timer

    def call_soon(self, callback: Callable[[], object]) -> None:
        callback()

    def call(self, act: Callable[[], Any]) -> Any:
        return act()

    act_here = call

    def run_all(self) -> None:
        """Have every timer that is pending now go off, whatever its time."""
        pending, self._pending = sorted(self._pending, key=lambda entry: entry[:2]), []
        for when, _, timer in pending:
            if timer.callback is not None:
                self.clock.now = max(self.clock.now, when)
                timer.run()

    def add_dependent(self, dependent: object) -> None:
        pass

    def on_thread(self) -> bool:
        return True

    def log(self, logger: Any, level: int, message: str, *args: object, exc_info: Any = None) -> None:
        logger.log(level, message, *args, exc_info=exc_info)

    def advance(self, seconds: float = 0.0) -> None:
        """Let time pass; on the way every timer goes off when the clock shows its time."""
        target = self.clock.now + seconds
        while self._pending and self._pending[0][0] <= target:
            when, _, timer = heapq.heappop(self._pending)
            if timer.callback is not None:
                self.clock.now = max(self.clock.now, when)
                timer.run()
        self.clock.now = target
