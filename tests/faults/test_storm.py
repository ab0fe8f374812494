"""A storm of kills is survived; and what watches over it would see if it were not."""

from __future__ import annotations

import logging
import os
from random import Random

import pytest

from benchmarks.soak import Limits, Sample, Verdict, soak, trends_of
from tests.faults.storm import DefectsLogged, Remains, Report
from tests.faults.storm_actors import LONG_S, Request
from tests.faults.storm_audit import MARGIN_S, complaints
from tests.faults.storm_http import AnswerOfAnother, BrokenOff, Left, Refused
from torchmgmt.errors import DeadlineExceeded, HandlerFailed, NoWorker, WorkerDied

SECONDS = 30.0


@pytest.mark.timeout(300)
def test_a_short_soak_is_survived(capsys: pytest.CaptureFixture[str]) -> None:
    """While workers, templates and torch-only processes are killed, stopped and replaced, every request ends once and in
    time, the pools come to what is wanted, nothing is left, and memory, descriptors and threads stay what they were."""
    # In CI every run makes the same choices, so that a red build is about the change that it tests; locally they vary.
    verdict = soak(SECONDS, 1 if os.environ.get("CI") else Random().randrange(1 << 32))
    report = verdict.report
    with capsys.disabled():
        print(f"\n{verdict}")
    assert not report.complaints, str(report)
    # Not its latency: beside other tests that is theirs, too.
    assert [trend for trend in verdict.trends if not (trend.is_well or trend.is_ratio)] == []
    assert sum(report.kills.values()) > SECONDS
    assert report.requests > 10 * SECONDS
    assert report.outcomes["WorkerDied"] > 0
    assert report.calls["PUT 202"] > 0
    assert report.predictions["200"] > SECONDS
    assert {end for end in report.predictions if end.startswith("left")} == {
        "left in its body",
        "left in its wait",
        "left in its answer",
    }


def samples(seconds: int = 100, **slopes: float) -> list[Sample]:
    """Samples of a soak in which all stays as it is, but for what grows by so much in each second."""
    start = {
        "parent_mb": 50.0,
        "torch_only_mb": 100.0,
        "descriptors": 60,
        "threads": 10,
        "processes": 12,
        "latency_ms": 2.0,
        "http_latency_ms": 2.0,
    }
    return [
        Sample(at_s=at, **{name: value + slopes.get(name, 0) * at for name, value in start.items()})  # type: ignore[arg-type]
        for at in range(seconds)
    ]


def report_with(*wrong: str) -> Report:
    remains = Remains(0, 5, 0, 0)
    return Report(
        15.0, 42, 10, 9, {"answer": 7}, {"200": 3}, {"worker SIGKILL": 3}, {}, {}, remains, remains, list(wrong)
    )


def test_a_soak_in_which_nothing_grows_is_well() -> None:
    """What is at last as it was at first is no complaint, and the verdict says so."""
    verdict = Verdict(report_with(), trends_of(samples(), Limits()), samples())
    assert len(verdict.trends) == 7
    assert verdict.complaints == []
    assert "all is well" in str(verdict)


@pytest.mark.parametrize(
    "figure, slope, what",
    [
        ("parent_mb", 0.5, "memory of the program"),
        ("torch_only_mb", 0.5, "memory of the torch-only process"),
        ("descriptors", 1, "descriptors"),
        ("threads", 0.2, "threads"),
        ("processes", 0.3, "processes"),
        ("latency_ms", 0.05, "latency, median"),
        ("http_latency_ms", 0.1, "latency over HTTP, median"),
    ],
)
def test_what_grows_is_told(figure: str, slope: float, what: str) -> None:
    """Each figure that grows all the time makes the verdict bad, and no other is blamed."""
    trends = trends_of(samples(**{figure: slope}), Limits())
    assert [trend.what for trend in trends if not trend.is_well] == [what]
    verdict = Verdict(report_with(), trends, [])
    assert len(verdict.complaints) == 1
    assert verdict.complaints[0].startswith(what)
    assert "NOT WELL" in str(verdict)


def test_what_settles_after_the_first_fifth_is_well() -> None:
    """Warming up is not judged: what grows at the beginning and then stays is no leak."""
    warming = [*samples(20, parent_mb=5.0), *[sample for sample in samples(100) if sample.at_s >= 20]]
    assert all(trend.is_well for trend in trends_of(warming, Limits()))


def test_a_soak_that_saw_nothing_is_not_well() -> None:
    """Without samples there is no verdict on them; a lost request is enough for a bad one."""
    assert Verdict(report_with(), trends_of([], Limits()), []).complaints == ["too little was seen to judge it"]
    lost = Verdict(report_with("request 7 was lost"), trends_of(samples(), Limits()), [])
    assert lost.complaints == ["request 7 was lost"]


def answered(**changes: object) -> Request:
    """A request that was answered as it should be, but for what is said."""
    request = Request(7, "forked", 1.0, 10, asked_at=100.0, ended_at=100.5, ends=1, is_right=True)
    for name, value in changes.items():
        setattr(request, name, value)
    return request


def over_http(**changes: object) -> Request:
    """The same over HTTP."""
    return answered(is_over_http=True, **changes)


DIED = WorkerDied("forked", "1.0", 4711, -9, "it was ended by SIGKILL")
LATE = DeadlineExceeded("The request", 1.0)
UNAVAILABLE = "ServiceUnavailableException"
HTTP_DIED = Refused(500, "InternalServerException", str(DIED))
HTTP_LATE = Refused(504, "RequestTimeoutException", str(LATE))
HTTP_FULL = Refused(503, UNAVAILABLE, "full", retry_after="1")
HTTP_NOBODY = Refused(503, UNAVAILABLE, "no worker")
HTTP_UNKNOWN = Refused(404, "ModelNotFoundException", "Model not found: guest0")


@pytest.mark.parametrize(
    "request_, begun",
    [
        (answered(), [100.1]),
        (answered(outcome=DIED), [100.1]),
        (answered(outcome=DIED), []),  # killed between taking it and noting it
        (answered(outcome=LATE, ended_at=101.0), []),
        (answered(outcome=LATE, ended_at=101.0), [100.9]),
        (answered(outcome=NoWorker("guest0", "1.0", "none"), model="guest0"), []),
        (over_http(), [100.1]),
        (over_http(outcome=HTTP_DIED), [100.1]),
        (over_http(outcome=HTTP_LATE, ended_at=101.0), []),
        (over_http(outcome=HTTP_FULL), []),
        (over_http(outcome=HTTP_NOBODY, model="guest0"), []),
        (over_http(outcome=HTTP_UNKNOWN, model="guest0"), []),
        (over_http(outcome=Left("body")), []),
        (over_http(outcome=Left("wait")), []),
        (over_http(outcome=Left("answer")), [100.1]),
        (over_http(outcome=BrokenOff("after 7 bytes"), parts=2), [100.1]),
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
        (over_http(is_right=False), [100.1], "wrong answer"),
        (over_http(outcome=TimeoutError("timed out"), ended_at=135.0), [], "TimeoutError"),
        (over_http(outcome=ConnectionResetError("reset")), [], "ConnectionResetError"),
        (over_http(outcome=AnswerOfAnother("storm-8")), [100.1], "AnswerOfAnother"),
        (over_http(outcome=HTTP_LATE), [], "too early"),
        (over_http(outcome=HTTP_LATE, limit_s=LONG_S, ended_at=100.0 + LONG_S), [], "lost"),
        (over_http(outcome=HTTP_NOBODY), [], "503"),
        (over_http(outcome=HTTP_UNKNOWN), [], "404"),
        (over_http(outcome=Refused(500, "InternalServerException", "a defect")), [], "500"),
        (over_http(outcome=Refused(503, "InternalServerException", "a bug"), model="guest0"), [], "503"),
        (over_http(outcome=Refused(400, "BadRequestException", "not HTTP")), [], "400"),
        (over_http(outcome=Left("wait")), [100.6 + MARGIN_S], "nobody waited"),
        (over_http(outcome=Left("body")), [100.1], "although not all"),
        (over_http(outcome=BrokenOff("after 7 bytes")), [100.1], "half an answer"),
    ],
)
def test_what_must_not_happen_is_told(request_: Request, begun: list[float], words: str) -> None:
    """Each way in which a request may end wrongly is found."""
    assert words in " ".join(complaints([request_], {7: begun}))


def test_a_defect_that_is_logged_is_told() -> None:
    """What serves HTTP, or an event loop, logs as an error is a complaint, even where the log is off; a warning is none."""
    wrong: list[str] = []
    ours, before = logging.getLogger("torchmgmt"), logging.getLogger("torchmgmt").level
    ours.setLevel(logging.CRITICAL)
    try:
        with DefectsLogged(wrong).watched():
            logging.getLogger("torchmgmt.http.predictions").error("POST failed")
            logging.getLogger("torchmgmt.http.predictions").warning("POST was refused")
        logging.getLogger("torchmgmt.http.predictions").error("nobody looks any more")
    finally:
        ours.setLevel(before)
    assert wrong == ["torchmgmt.http.predictions logged: POST failed"]


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
    report = report_with(*(f"complaint {number}" for number in range(30)))
    assert "seed 42" in str(report)
    assert "worker SIGKILL 3" in str(report)
    assert str(report).count("WRONG") == 20
    assert "10 more" in str(report)
