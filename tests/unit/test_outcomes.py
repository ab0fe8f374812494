"""Outcomes: what workers say, in the errors that callers get."""

from __future__ import annotations

import pytest

from torchmgmt.errors import DeadlineExceeded, HandlerFailed, WorkerDied, WorkerStartFailed
from torchmgmt.exchange import Encoded, WorkerRequest
from torchmgmt.pool.results import answers_of, error_of_death
from torchmgmt.records import EXPIRED, ModelKey, WorkerExit, WorkerFault

KEY = ModelKey("m", "1.0")


def request(limit_s: float) -> WorkerRequest:
    return WorkerRequest(Encoded([b""]), "id", None, 100.0 + limit_s, limit_s)


def test_a_request_that_expired_at_its_worker_exceeded_its_deadline() -> None:
    """Whoever notices first that a request's time is over, its caller gets DeadlineExceeded, with its own limit."""
    fine = Encoded([b"x"])
    answers = answers_of(KEY, [request(1.0), request(0.5), request(2.0)], [fine, EXPIRED, EXPIRED], [])
    assert answers[0] is fine
    for answer, limit_s in zip(answers[1:], (0.5, 2.0), strict=True):
        assert isinstance(answer, DeadlineExceeded)
        assert answer.limit_s == limit_s
        assert str(answer) == f"The request to model m version 1.0 did not end within {limit_s:g} s"


def test_what_a_handler_raises_under_that_name_is_its_own() -> None:
    """An exception of the handler's that is called DeadlineExceeded, too, is a HandlerFailed like any other."""
    fault = WorkerFault("DeadlineExceeded", "DeadlineExceeded: mine", "Traceback")
    (answer,) = answers_of(KEY, [request(1.0)], [fault], ["last"])
    assert isinstance(answer, HandlerFailed)
    assert (answer.traceback, answer.last_lines) == ("Traceback", ("last",))


def test_a_description_that_fails_is_the_handlers_failure() -> None:
    """The wish for a description has no request and so no deadline."""
    (answer,) = answers_of(KEY, [], [WorkerFault("E", "E: x", "")], [])
    assert isinstance(answer, HandlerFailed)


@pytest.mark.parametrize("fault", [None, WorkerFault("OSError", "OSError: no weights", "Traceback", None, True)])
def test_a_death_while_loading_names_process_and_status(fault: WorkerFault | None) -> None:
    """What ended before it was ready is a WorkerStartFailed with pid and status; a fault says more than a status."""
    error = error_of_death(KEY, WorkerExit(12, 3, "status 3", ["last"], fault), end_reason="", was_loading=True)
    assert isinstance(error, WorkerStartFailed)
    assert (error.pid, error.exitcode, error.last_lines) == (12, 3, ("last",))
    assert error.reason == (fault.reason if fault else "status 3")
    assert error.out_of_memory is (fault is not None)


def test_why_we_ended_it_counts_more_than_how_it_ended() -> None:
    """A process that was made to end is told of by the reason for that."""
    exit = WorkerExit(12, -9, "SIGKILL")
    error = error_of_death(KEY, exit, end_reason="it hung", was_loading=False)
    assert isinstance(error, WorkerDied)
    assert (error.pid, error.exitcode, error.reason) == (12, -9, "it hung")
