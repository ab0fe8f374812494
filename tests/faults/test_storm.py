"""A storm of kills is survived; and what watches over it would see if it were not."""

from __future__ import annotations

import os
from random import Random

import pytest

from tests.faults.storm import MARGIN_S, Remains, Report, complaints, storm
from tests.faults.storm_actors import LONG_S, Request
from torchmgmt.errors import DeadlineExceeded, HandlerFailed, NoWorker, WorkerDied

SECONDS = 15.0


@pytest.mark.timeout(300)
def test_a_storm_is_survived(capsys: pytest.CaptureFixture[str]) -> None:
    """While workers, templates and torch-only processes are killed, stopped and replaced, every request ends once and in
    time, the pools come to what is wanted, and nothing is left."""
    # In CI every run makes the same choices, so that a red build is about the change that it tests; locally they vary.
    report = storm(SECONDS, 1 if os.environ.get("CI") else Random().randrange(1 << 32))
    with capsys.disabled():
        print(f"\n{report}")
    assert not report.complaints, str(report)
    assert sum(report.kills.values()) > SECONDS
    assert report.requests > 10 * SECONDS
    assert report.outcomes["WorkerDied"] > 0


def answered(**changes: object) -> Request:
    """A request that was answered as it should be, but for what is said."""
    request = Request(7, "forked", 1.0, 10, asked_at=100.0, ended_at=100.5, ends=1, is_right=True)
    for name, value in changes.items():
        setattr(request, name, value)
    return request


DIED = WorkerDied("forked", "1.0", 4711, -9, "it was ended by SIGKILL")
LATE = DeadlineExceeded("The request", 1.0)


@pytest.mark.parametrize(
    "request_, begun",
    [
        (answered(), [100.1]),
        (answered(outcome=DIED), [100.1]),
        (answered(outcome=DIED), []),  # killed between taking it and noting it
        (answered(outcome=LATE, ended_at=101.0), []),
        (answered(outcome=LATE, ended_at=101.0), [100.9]),
        (answered(outcome=NoWorker("guest0", "1.0", "none"), model="guest0"), []),
    ],
)
def test_what_may_happen_is_no_complaint(request_: Request, begun: list[float]) -> None:
    """An answer, a death and a deadline are ends as they should be; for a guest so is that nobody is there."""
    assert list(complaints([request_], {7: begun})) == []


@pytest.mark.parametrize(
    "request_, begun, words",
    [
        (answered(ends=0), [], "ended 0 times"),
        (answered(ends=2), [100.1], "ended 2 times"),
        (answered(ended_at=101.1 + MARGIN_S), [100.1], "ended after"),
        (answered(), [100.1, 100.2], "begun 2 times"),
        (answered(outcome=DIED), [100.1, 100.2], "begun 2 times"),
        (answered(outcome=LATE, ended_at=101.0), [102.0 + MARGIN_S], "nobody waited"),
        (answered(is_right=False), [100.1], "wrong answer"),
        (answered(), [], "without having been begun"),
        (answered(outcome=LATE), [], "too early"),
        (answered(outcome=LATE, limit_s=LONG_S, ended_at=100.0 + LONG_S), [], "lost"),
        (answered(outcome=WorkerDied("forked", "1.0", 0, None, "")), [], "does not say"),
        (answered(outcome=NoWorker("forked", "1.0", "none")), [], "NoWorker"),
        (answered(outcome=HandlerFailed("forked", "1.0", "a bug")), [100.1], "HandlerFailed"),
        (answered(outcome=RuntimeError("ours")), [], "RuntimeError"),
        (answered(outcome=HandlerFailed("guest0", "1.0", "a bug"), model="guest0"), [100.1], "HandlerFailed"),
    ],
)
def test_what_must_not_happen_is_told(request_: Request, begun: list[float], words: str) -> None:
    """Each way in which a request may end wrongly is found."""
    assert words in " ".join(complaints([request_], {7: begun}))


def test_what_is_left_is_seen() -> None:
    """A descriptor, a memory file and a process too many are more than there was before."""
    before = Remains(processes=0, descriptors=5, memory_files=0, temporary=0)
    assert not Remains(0, 5, 0, 0).exceeds(before)
    assert not Remains(0, 4, 0, 0).exceeds(before)
    for after in (Remains(1, 5, 0, 0), Remains(0, 6, 0, 0), Remains(0, 5, 1, 0), Remains(0, 5, 0, 1)):
        assert after.exceeds(before)
    fd = os.memfd_create("torchmgmt-test")
    try:
        assert Remains.now("nobody").memory_files == 1
    finally:
        os.close(fd)


def test_a_report_says_what_is_wrong() -> None:
    """The report of a storm holds its seed, its counts, and every complaint up to a number that can be read."""
    remains = Remains(0, 5, 0, 0)
    many = [f"complaint {number}" for number in range(30)]
    report = Report(15.0, 42, 10, 9, {"answer": 10}, {"worker SIGKILL": 3}, {}, remains, remains, many)
    assert "seed 42" in str(report)
    assert "worker SIGKILL 3" in str(report)
    assert str(report).count("WRONG") == 20
    assert "10 more" in str(report)
