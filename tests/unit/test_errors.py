"""The tree of errors: what callers may decide by (types, bases, fields) and what people read."""

from __future__ import annotations

import copy
import pickle

import attrs
import pytest

from torchmgmt import errors
from torchmgmt.errors import (
    AlreadyRegistered,
    DeadlineExceeded,
    DefaultVersionInUse,
    DownloadFailed,
    HandlerFailed,
    InvalidArchive,
    InvalidArgument,
    InvalidSetting,
    InvalidStateFile,
    ManagerClosed,
    ModelNotFound,
    ModelVersionNotFound,
    NoWorker,
    QueueFull,
    ReaderTooSlow,
    SourceNotAllowed,
    SourceNotFound,
    StateFileInUse,
    TorchmgmtError,
    WorkerDied,
    WorkerStartFailed,
    WouldWaitForever,
    WrongNumberOfAnswers,
)

TRACEBACK = 'Traceback (most recent call last):\n  File "handler.py", line 1\nValueError: no\n'

# The text is the one that CONTRACT.md quotes, where it quotes one.
EXAMPLES = [
    (TorchmgmtError("something"), "something"),
    (
        InvalidArgument("batch_size", 0, "a whole number, at least 1"),
        "batch_size is 0, but must be a whole number, at least 1",
    ),
    (
        InvalidSetting("job_queue_size", "many", "a whole number", source="config.properties, line 3"),
        "config.properties, line 3: job_queue_size is 'many', but must be a whole number",
    ),
    (ModelNotFound("nope"), "Model not found: nope"),
    (ModelVersionNotFound("noop", "9.9"), "Model version: 9.9 does not exist for model: noop"),
    (AlreadyRegistered("noop", "1.0"), "Model version 1.0 is already registered for model noop"),
    (DefaultVersionInUse("noop", "1.0"), "Cannot remove default version for model noop"),
    (SourceNotFound("nope.mar"), "Model not found at: nope.mar"),
    (SourceNotFound("nope.mar", "no such file"), "Model not found at: nope.mar (no such file)"),
    (
        SourceNotAllowed("../a.mar", "Relative path is not allowed in url: ../a.mar"),
        "Relative path is not allowed in url: ../a.mar",
    ),
    (
        DownloadFailed("http://h/a.mar", "connection refused"),
        "Failed to download archive from: http://h/a.mar: connection refused",
    ),
    (InvalidArchive("a.mar", "it is empty"), "a.mar is not a usable model archive: it is empty"),
    (
        WorkerStartFailed("bad", "1.0", "ValueError: no", TRACEBACK, ["loading", "still loading"]),
        "Failed to start workers for model bad version: 1.0: ValueError: no\n"
        + TRACEBACK
        + "Its last lines:\nloading\nstill loading",
    ),
    (
        WorkerDied("m", "1.0", 4711, -9, "killed by SIGKILL", ("out of memory?",)),
        "Worker 4711 of model m version 1.0 died: killed by SIGKILL\nIts last lines:\nout of memory?",
    ),
    (WorkerDied("m", "1.0", 4711, None, "gone"), "Worker 4711 of model m version 1.0 died: gone"),
    (
        HandlerFailed("m", "1.0", "ValueError: no", "builtins.ValueError", 507, True, TRACEBACK, ["last"]),
        "Model m version 1.0 failed: ValueError: no",
    ),
    (
        InvalidStateFile("/s/state.json", "its format is 2"),
        (
            "/s/state.json cannot be restored: its format is 2; it is left untouched: put it right, move it away to begin"
            " without it, or name another state file"
        ),
    ),
    (
        StateFileInUse("/s/state.json", 77),
        "The state file /s/state.json is in use by process 77; close that one, or name another state file",
    ),
    (
        StateFileInUse("/s/state.json"),
        "The state file /s/state.json is in use by another process; close that one, or name another state file",
    ),
    (
        WouldWaitForever("predict"),
        (
            "predict waits for a worker, but was called on the thread that hears from the workers (in a future's callback, or"
            " in a listener); use submit and synchronous=False there, or another thread"
        ),
    ),
    (
        ReaderTooSlow(2000, 1000),
        (
            "2000 bytes of parts of an answer wait to be read, more than 1000; the request was given up: read faster, or have the"
            " handler send less"
        ),
    ),
    (WrongNumberOfAnswers(3, 2), "a batch of 3 was answered with 2 answers; there must be one for each, in order"),
    (
        NoWorker("m", "1.0", "it is scaled to zero"),
        "No worker is available to serve model m version 1.0: it is scaled to zero",
    ),
    (
        QueueFull("m:1.0", 100, 1.5),
        "The queue of m:1.0 is full: 100 requests wait already; try again in 1.5 s, or raise job_queue_size",
    ),
    (DeadlineExceeded("The request to m", 0.25), "The request to m did not end within 0.25 s"),
    (ManagerClosed(), "This ModelManager is closed"),
    (
        ManagerClosed("The pool", "belongs to another process"),
        "The pool belongs to another process",
    ),
]
INSTANCES = [pytest.param(error, id=f"{type(error).__name__}-{n}") for n, (error, _) in enumerate(EXAMPLES)]


def fields_of(error: BaseException) -> dict[str, object]:
    return attrs.asdict(error, recurse=False) if attrs.has(type(error)) else {}


def test_every_public_error_has_an_example_here():
    """No error class escapes the laws below."""
    assert {type(error).__name__ for error, _ in EXAMPLES} == set(errors.__all__)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("error", INSTANCES)
def test_pickling_keeps_type_fields_and_text(error: BaseException, protocol: int):
    """An error that crossed a process says and carries what it did before."""
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is type(error)
    assert fields_of(again) == fields_of(error)
    assert again.args == error.args
    assert str(again) == str(error)


@pytest.mark.parametrize("error", INSTANCES)
def test_a_copy_is_as_good_as_the_original(error: BaseException):
    """An error can be copied, as libraries do that raise it in several places."""
    again = copy.copy(error)
    assert (type(again), fields_of(again), str(again)) == (type(error), fields_of(error), str(error))


@pytest.mark.parametrize("name", errors.__all__)
def test_all_errors_are_one_tree(name: str):
    """Whoever catches TorchmgmtError catches everything that torchmgmt raises on purpose."""
    assert issubclass(getattr(errors, name), TorchmgmtError)
    assert getattr(errors, name).__doc__


@pytest.mark.parametrize(
    "error_class, base",
    [
        (InvalidArgument, ValueError),
        (ModelNotFound, LookupError),
        (ModelVersionNotFound, LookupError),
        (SourceNotFound, ModelNotFound),
        (DeadlineExceeded, TimeoutError),
    ],
)
def test_errors_have_the_bases_that_python_callers_expect(error_class: type, base: type):
    """Code that knows only the standard library's exceptions catches the right ones."""
    assert issubclass(error_class, base)


def test_no_error_has_a_base_that_it_should_not_have():
    """An `except OSError` or `except ValueError` catches nothing of ours by accident."""
    builtin_bases = {
        name: {base for base in getattr(errors, name).__mro__ if base.__module__ == "builtins"} - set(Exception.__mro__)
        for name in errors.__all__
    }
    assert {name: bases for name, bases in builtin_bases.items() if bases} == {
        "InvalidArgument": {ValueError},
        "InvalidSetting": {ValueError},
        "ModelNotFound": {LookupError},
        "ModelVersionNotFound": {LookupError},
        "SourceNotFound": {LookupError},
        "DeadlineExceeded": {TimeoutError, OSError},
    }


@pytest.mark.parametrize(
    "error, text", [pytest.param(*example, id=f"{type(example[0]).__name__}-{n}") for n, example in enumerate(EXAMPLES)]
)
def test_texts_are_those_of_the_contract(error: BaseException, text: str):
    """Clients and people find the words that the contract promises."""
    assert str(error) == text


def test_a_start_without_evidence_is_one_line():
    """Nothing is announced that is not there."""
    text = str(WorkerStartFailed("bad", "1.0", "exit status 3"))
    assert text == "Failed to start workers for model bad version: 1.0: exit status 3"


def test_a_long_value_is_shortened_in_the_text_and_kept_in_the_field():
    """An error about a huge argument stays readable, and loses nothing."""
    given = "x" * 100_000
    error = InvalidArgument("model_name", given, "short")
    assert len(str(error)) < 300
    assert error.given == given


def test_two_errors_are_equal_only_if_they_are_the_same():
    """Errors keep the identity that exception handling relies on: hashable, never equal to a twin."""
    assert ModelNotFound("a") != ModelNotFound("a")
    assert len({ModelNotFound("a"), ModelNotFound("a")}) == 2
