"""Whether it is worth while to let a batch wait: policy, without a clock, a lock or a thread of its own.

A batch may wait for ``max_batch_delay`` ms to fill. That is only of use while somebody may still join it, and two things
that can be seen say whether that is so:

- *Who is there already.* Callers that ask again when they have their answer (most do) cannot come while their request waits or
  runs. When as many requests are in the house as were there at the same time lately, nobody is left to come: a lone caller
  never waits, and of 16 of them the batch waits for those that have just been answered.
- *How close together they come.* When nobody has come for a few times the usual gap, since the last arrival and the last
  answers, nobody will in time.
"""

from __future__ import annotations

import math

from attrs import define

__all__ = ["Arrivals"]

_NEW_SHARE = 0.1  # of each new gap in their moving average, and of a cut in the fading of the crowd
_VAIN_SHARE = 0.5  # the same for a cut that waited and was not joined: that nobody is left has been seen
_PATIENCE = 3.0
"""For so many usual gaps after the last arrival a batch waits for the next: of arrivals at random, 95 of 100 come by then."""
_LEAST_PATIENCE_S = 0.0005
"""A timer that is due sooner costs more than it brings."""


@define
class Arrivals:
    """What was seen of the requests to one model version. Not thread-safe; times are monotonic seconds.

    Args:
        delay_s: for how long an item may wait at most, at least 0.
    """

    delay_s: float
    _gap_s: float = 0.0
    _crowd: float = 0.0
    """So many requests are in the house at the same time, when they are many; fades with every batch."""
    _last_at: float = -math.inf
    _answered_at: float = -math.inf

    def came(self, now: float, in_house: int) -> None:
        """Note that a request came; ``in_house`` are those that wait or run, this one included."""
        if self._last_at > -math.inf:
            gap_s = min(now - self._last_at, self.delay_s)
            self._gap_s += _NEW_SHARE * (gap_s - self._gap_s) if self._gap_s else gap_s
        self._last_at = now
        self._crowd = max(self._crowd, in_house)

    def answered(self, now: float) -> None:
        """Note that requests were answered: who made them may ask again from now on."""
        self._answered_at = now

    def cut(self, now: float, in_house: int) -> None:
        """Note that a batch was cut, when ``in_house`` requests waited or ran."""
        if in_house < self._crowd:
            was_vain = now >= self._patience_ends_at()
            self._crowd -= (_VAIN_SHARE if was_vain else _NEW_SHARE) * (self._crowd - in_house)

    def wait_until(self, since: float, in_house: int) -> float:
        """Return until when a batch whose oldest item came at ``since`` is to wait for more; a time that may be over."""
        latest = since + self.delay_s
        if in_house >= round(self._crowd) or self._last_at + self._gap_s >= latest:
            return since
        return min(latest, self._patience_ends_at())

    def _patience_ends_at(self) -> float:
        return max(self._last_at, self._answered_at) + max(_LEAST_PATIENCE_S, _PATIENCE * self._gap_s)
