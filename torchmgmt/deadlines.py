"""Deadlines: when the requests in a Batcher are over, and which of them are so by now."""

from __future__ import annotations

import heapq
import itertools
import weakref
from typing import Any, Generic, TypeVar

from attrs import field, frozen

from torchmgmt.batch import Promise

__all__ = ["Deadlines"]

R = TypeVar("R")

_MANY_DEADLINES = 256
"""Above this number, deadlines of requests that have ended are swept out before more are noted."""


@frozen(order=True)
class _Deadline:
    """When a request is over. It must not keep a settled request and its answer alive, hence the weak reference."""

    when: float
    number: int
    future: weakref.ref[Promise[Any]] = field(order=False)
    timeout_s: float = field(order=False)
    ends_waiting_only: bool = field(order=False)

    def is_moot(self) -> bool:
        future = self.future()
        return future is None or future.done() or (self.ends_waiting_only and future.running())


class Deadlines(Generic[R]):
    """A heap of them, the next one first, in seconds of its owner's clock. Not thread-safe.

    It grows with the requests that have not ended; what is left of those that have is swept out now and then.
    """

    def __init__(self) -> None:
        self._heap: list[_Deadline] = []
        self._numbers = itertools.count()
        self._compact_at = _MANY_DEADLINES

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def next_at(self) -> float | None:
        """When the next one is, if its request has not ended before; None if there is none."""
        return self._heap[0].when if self._heap else None

    def add(
        self, future: Promise[R], now: float, timeout_s: float | None, wait_timeout_s: float | None
    ) -> float | None:
        """Note when ``future`` is over, and when it is so unless it runs by then.

        Returns the earlier of the two, by which it is to be running; None if it has all the time there is.
        """
        limits = [(s, is_wait) for s, is_wait in ((timeout_s, False), (wait_timeout_s, True)) if s is not None]
        if len(self._heap) >= self._compact_at:
            self._compact()
        for limit_s, is_wait in limits:
            heapq.heappush(
                self._heap, _Deadline(now + limit_s, next(self._numbers), weakref.ref(future), limit_s, is_wait)
            )
        return now + min(limit_s for limit_s, _ in limits) if limits else None

    def take_expired(self, now: float) -> list[tuple[Promise[R], float]]:
        """Return the requests whose time is over, with what their limits were. The caller is to fail them."""
        expired = []
        while self._heap and (self._heap[0].when <= now or self._heap[0].is_moot()):
            deadline = heapq.heappop(self._heap)
            future = deadline.future()
            if future is not None and not deadline.is_moot():
                expired.append((future, deadline.timeout_s))
        return expired

    def _compact(self) -> None:
        self._heap = [deadline for deadline in self._heap if not deadline.is_moot()]
        heapq.heapify(self._heap)
        self._compact_at = max(_MANY_DEADLINES, 2 * len(self._heap))
