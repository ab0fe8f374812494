"""Time stamps: values that say a moment of some span, as whoever asked a clock within it may have written it down."""

from __future__ import annotations

import calendar
import contextlib
import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any

__all__ = ["Span"]

# Of a longer span, only the first and the last so many seconds are compared with texts.
_MOST_SECONDS = 3600
_UNITS = (1, 1_000, 1_000_000, 1_000_000_000)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_TIME_OF_DAY = re.compile(r"(?<!\d)(\d\d)[:._h-]?(\d\d)[:._m-]?(\d\d)(?!\d)")
_FORMS = ("%Y%m%d%H%M%S", "%y%m%d%H%M%S", "%d%m%Y%H%M%S", "%m%d%Y%H%M%S")
_CLOCKS: tuple[Callable[[], float], ...] = (time.monotonic, time.perf_counter)


class Span:
    """The time from when it was made until :meth:`end`."""

    def __init__(self) -> None:
        self._began, self._began_on = time.time(), [clock() for clock in _CLOCKS]
        self._ended, self._ended_on = self._began, self._began_on
        self._texts: frozenset[str] = frozenset()

    def end(self) -> None:
        """Let it be over; only then it can be asked what is within."""
        self._ended, self._ended_on = time.time(), [clock() for clock in _CLOCKS]
        self._texts = frozenset(self._written())

    def has(self, value: Any) -> bool:
        """Whether ``value`` is a moment of it, as a number (of a second or a part of one), a date with time, or a text with one."""
        with contextlib.suppress(OverflowError, ValueError, OSError):  # the year 1, say
            if isinstance(value, datetime):
                return self._has_date(value)
            if isinstance(value, time.struct_time):
                return any(self._has_number(int(seconds(value))) for seconds in (calendar.timegm, time.mktime))
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return self._has_number(value)
        return isinstance(value, str) and self._has_text(value)

    def _has_date(self, value: datetime) -> bool:
        readings = (value, value.replace(tzinfo=timezone.utc)) if value.tzinfo is None else (value,)
        return any(self._has_number(each.timestamp()) for each in readings)

    def _has_number(self, value: float) -> bool:
        """Whether it is the time of the day, as far as it has decimals, or a reading of a clock that began somewhere.

        Of the latter only what has a part of a millisecond: it may be any small number.
        """
        step = 1.0 if isinstance(value, int) else 10.0 ** -len(repr(value).partition(".")[2])
        if any(self._began * unit - step <= value <= self._ended * unit + step for unit in _UNITS):
            return True
        is_reading = (value * 1000) % 1 != 0
        spans = list(zip(self._began_on, self._ended_on, strict=True))
        if is_reading and any(began <= value <= ended for began, ended in spans):
            return True
        return any(began * 1e9 <= value <= ended * 1e9 for began, ended in spans)

    def _has_text(self, text: str) -> bool:
        numbers = (number for number in _NUMBER.findall(text) if 9 < len(number) < 25)
        if any(self._has_number(float(number) if "." in number else int(number)) for number in numbers):
            return True
        if any("".join(parts) in self._texts for parts in _TIME_OF_DAY.findall(text)):
            return True
        digits = re.sub(r"\D", "", text)
        return any(
            digits[start : start + size] in self._texts for size in (12, 14) for start in range(len(digits) - size + 1)
        )

    def _written(self) -> Iterator[str]:
        """Give its seconds as they are written, here and in UTC."""
        first, last = int(self._began), int(self._ended)
        seconds = range(first, last + 1)
        if len(seconds) > 2 * _MOST_SECONDS:
            seconds = [*seconds[:_MOST_SECONDS], *seconds[-_MOST_SECONDS:]]  # type: ignore[assignment]
        for second in seconds:
            for read in (time.localtime, time.gmtime):
                moment = read(second)
                yield time.strftime("%H%M%S", moment)
                yield from (time.strftime(form, moment) for form in _FORMS)
