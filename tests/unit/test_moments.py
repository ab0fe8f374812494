"""Time stamps: a moment is known for what it is in every form in which people write it down, and other numbers are not."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmgmt.worker.moments import Span

BEGAN, LASTED_S = 1_793_900_000.25, 40.0
FORMS: dict[str, Callable[[float], Any]] = {
    "seconds": lambda moment: moment,
    "whole seconds": int,
    "rounded": round,
    "milliseconds": lambda moment: int(moment * 1000),
    "nanoseconds": lambda moment: int(moment * 1e9),
    "of two decimals": lambda moment: round(moment, 2),
    "text": str,
    "text of one decimal": lambda moment: f"run {moment:.1f}",
    "text without decimals": lambda moment: f"run_{moment:.0f}.log",
    "text of milliseconds": lambda moment: f"{moment * 1000:.0f}",
    "local date": datetime.fromtimestamp,
    "date": lambda moment: datetime.fromtimestamp(moment, timezone.utc),
    "date elsewhere": lambda moment: datetime.fromtimestamp(moment, timezone(timedelta(hours=5, minutes=30))),
    "parts": time.localtime,
    "parts in UTC": time.gmtime,
    "ISO": lambda moment: datetime.fromtimestamp(moment, timezone.utc).isoformat(),
    "ISO without marks": lambda moment: datetime.fromtimestamp(moment, timezone.utc).strftime("%Y%m%dT%H%M%SZ"),
    "with microseconds": lambda moment: datetime.fromtimestamp(moment).strftime("%Y%m%d%H%M%S%f"),  # noqa: DTZ006 - as people do
    "short": lambda moment: time.strftime("%y%m%d-%H%M%S", time.localtime(moment)),
    "European": lambda moment: time.strftime("%d.%m.%Y %H:%M:%S", time.localtime(moment)),
    "American": lambda moment: time.strftime("%m/%d/%Y %H:%M:%S", time.localtime(moment)),
    "ctime": time.ctime,
    "time of day": lambda moment: time.strftime("model_%H-%M-%S.log", time.localtime(moment)),
    "time of day in a row": lambda moment: time.strftime("run_%H%M%S", time.gmtime(moment)),
}


@pytest.fixture
def span(monkeypatch: pytest.MonkeyPatch) -> Span:
    return span_of(BEGAN, BEGAN + LASTED_S)


def span_of(began: float, ended: float) -> Span:
    span = Span()
    span.end()
    span._began, span._ended = began, ended
    span._texts = frozenset(span._written())
    return span


WHOLE = span_of(BEGAN, BEGAN + LASTED_S)


@given(form=st.sampled_from(sorted(FORMS)), after_s=st.floats(0, LASTED_S))
def test_a_moment_within_is_known_in_every_form(form: str, after_s: float) -> None:
    """Whatever form a time stamp has, a moment of the span is found."""
    assert WHOLE.has(FORMS[form](BEGAN + after_s))


@given(form=st.sampled_from(sorted(FORMS)), after_s=st.floats(100, 80_000), sign=st.sampled_from([1, -1]))
def test_a_moment_without_is_none_of_it(form: str, after_s: float, sign: int) -> None:
    """A time stamp of an hour ago, or of another day, is not taken for one of the span."""
    if form.startswith("time of day") and round(after_s) % 900 < 100:  # the same time of day, elsewhere
        return
    assert not WHOLE.has(FORMS[form](BEGAN + sign * after_s))


@pytest.mark.parametrize(
    "value",
    [
        *(0, 1, -1, 7, 0.5, 3.25, 1e9, 1e300, float("inf"), float("nan"), True, 10**5000, 2**63),
        *("", "1", "model-2.0.13", "10.12.45", "0" * 64, "conv2d_23", "v20240101", "2026-11-05", b"1793900010", None),
        *(date(2026, 11, 5), datetime.min, datetime.max, (), [BEGAN]),  # noqa: DTZ901 - as people have them
    ],
    ids=lambda value: repr(value)[:20] if not isinstance(value, int) or value < 2**64 else "huge",
)
def test_other_values_are_no_moments(value: Any) -> None:
    """Sizes, versions, dates without a time, and what is no number at all, are not taken for time stamps."""
    assert not WHOLE.has(value)


@pytest.mark.parametrize("clock", [time.monotonic, time.perf_counter, time.monotonic_ns, time.perf_counter_ns])
def test_readings_of_other_clocks_are_moments(clock: Callable[[], float]) -> None:
    """What a clock said that began with the machine is known, too; but a small number that has no such decimals is not."""
    span = Span()
    reading = clock()
    span.end()
    assert span.has(reading)
    assert not span.has(int(time.monotonic()))


def test_a_long_span_has_its_beginning_and_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load of a day is not written down second by second."""
    span = span_of(BEGAN, BEGAN + 86_400 * 3)
    assert span.has(time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(BEGAN + 5)))
    assert span.has(time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(BEGAN + 86_400 * 3 - 5)))
    assert span.has(BEGAN + 86_400)
    assert len(span._texts) < 100_000
