"""A clock that stands still until told to go on, and timers that go off exactly when it does."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class FakeClock:
    """Shows the same time until it is set; time in s."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class FakeTimers:
    """``call_at`` of a FakeClock: callbacks run in :meth:`advance`, each at its own time."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.armed_in_all = 0
        self._pending: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """How many timers are pending."""
        return len(self._pending)

    def call_at(self, when: float, callback: Callable[[], object]) -> None:
        self.armed_in_all += 1
        heapq.heappush(self._pending, (when, next(self._numbers), callback))

    def advance(self, seconds: float = 0.0) -> None:
        """Let time pass; on the way every timer goes off when the clock shows its time."""
        target = self.clock.now + seconds
        while self._pending and self._pending[0][0] <= target:
            when, _, callback = heapq.heappop(self._pending)
            self.clock.now = max(self.clock.now, when)
            callback()
        self.clock.now = target
