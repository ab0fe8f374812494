"""Errors per item: what becomes of the requests of a batch when a handler fails for some of them, or as a whole."""

from __future__ import annotations

import math
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import pytest
import torch

from tests.unit.clocks import FakeClock
from torchmgmt.channel import decode, encode
from torchmgmt.exchange import Encoded
from torchmgmt.handlers.context import Context
from torchmgmt.handlers.inputs import InputRefused, read_each
from torchmgmt.records import EXPIRED, WorkerFault
from torchmgmt.worker.batch import run_batch
from torchmgmt.worker.loader import Handler

BAD = "bad"


class Named(Exception):
    """Names requests of the batch that it was raised for, or has something else by that name."""

    def __init__(self, indexes: object, errors: object = None) -> None:
        super().__init__(f"named {indexes}")
        self.indexes = indexes
        self.errors = errors


@attrs.define
class Worker:
    """Runs batches on ``entry_point`` and writes down what that is given, and when."""

    entry_point: Callable[[list[Any]], Any]
    isolates_errors: bool = False
    limit_s: float = math.inf
    runs: list[list[Any]] = attrs.field(factory=list)
    ids: list[list[str | None]] = attrs.field(factory=list)

    def handle(self, rows: list[Any], context: Context) -> Any:
        self.runs.append(list(rows))
        self.ids.append([context.get_request_id(index) for index in range(len(rows))])
        return self.entry_point(rows)

    def run(
        self,
        *rows: Any,
        deadlines: Mapping[int, float] | None = None,
        headers: Mapping[int, Mapping[str, str]] | None = None,
    ) -> list[Any]:
        """Return for each row its answer, or the fault."""
        context = Context("m", "", {}, batch_size=8, gpu=None, mms_version="0")
        handler = Handler(self.handle, context, isolates_errors=self.isolates_errors, limit_s=self.limit_s)
        encoded = [encode(row) for row in rows]
        heads = [
            (str(index), (headers or {}).get(index), len(each.segments), (deadlines or {}).get(index), None, False)
            for index, each in enumerate(encoded)
        ]
        segments = [_arrived(segment) for each in encoded for segment in each.segments]
        return [decode(each) if isinstance(each, Encoded) else each for each in run_batch(handler, heads, segments)]


def _arrived(segment: Any) -> memoryview:
    return memoryview(bytearray(segment))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock(now=100.0)
    monkeypatch.setattr("torchmgmt.worker.batch.time", types.SimpleNamespace(monotonic=clock))
    return clock


def fail_if_bad(rows: Sequence[Any]) -> list[Any]:
    """Raise for a batch that has BAD in it, without saying for which request."""
    if BAD in rows:
        raise ValueError("not this")
    return [row * 2 for row in rows]


def name_bad(rows: Sequence[Any]) -> list[Any]:
    """Raise for a batch that has BAD in it, and say where."""
    if found := [index for index, row in enumerate(rows) if row == BAD]:
        raise Named(found)
    return [row * 2 for row in rows]


def faults(outcomes: Sequence[Any]) -> list[int]:
    return [index for index, outcome in enumerate(outcomes) if isinstance(outcome, WorkerFault)]


def test_a_returned_exception_fails_its_own_request():
    """An exception in place of an answer is that request's fault: its class, text and code; the others are answered."""
    refused = InputRefused("too large", error_code=413)
    worker = Worker(lambda rows: [1, refused, 3])
    first, fault, last = worker.run("a", "b", "c")
    assert (first, last, len(worker.runs)) == (1, 3, 1)
    assert fault.error_type == "torchmgmt.handlers.inputs.InputRefused"
    assert fault.reason.endswith("InputRefused: too large")
    assert (fault.error_code, fault.out_of_memory, fault.traceback) == (413, False, "")


def test_a_returned_exception_that_was_raised_before_has_its_traceback():
    """What the handler caught and returns is told with the place where it was raised."""

    def each(row):
        try:
            return 1 / row
        except ZeroDivisionError as error:
            return error

    answer, fault = Worker(lambda rows: [each(row) for row in rows]).run(1, 0)
    assert answer == 1
    assert "return 1 / row" in fault.traceback
    assert fault.traceback.rstrip().endswith("ZeroDivisionError: division by zero")


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), MemoryError(), torch.OutOfMemoryError("x")])
def test_any_exception_may_be_returned(error):
    """What is returned ends nothing, whatever its class; running out of memory is told apart."""
    fault, answer = Worker(lambda rows: [error, 2]).run(1, 2)
    assert answer == 2
    assert fault.error_type.endswith(type(error).__name__)
    assert fault.out_of_memory is isinstance(error, (MemoryError, torch.OutOfMemoryError))


def test_who_is_named_fails_and_the_others_are_run_again():
    """The batch is run again without the requests that an error names; each answer comes to its own request."""
    worker = Worker(name_bad)
    outcomes = worker.run("a", BAD, "c", BAD, "e")
    assert [outcomes[index] for index in (0, 2, 4)] == ["aa", "cc", "ee"]
    assert faults(outcomes) == [1, 3]
    assert outcomes[1].reason.endswith("Named: named [1, 3]")
    assert "name_bad" in outcomes[1].traceback
    assert worker.runs == [["a", BAD, "c", BAD, "e"], ["a", "c", "e"]]
    assert worker.ids[1] == ["0", "2", "4"]


def test_a_batch_is_run_once_for_each_raise_that_names_some():
    """A handler that finds one at a time gets the rest each time; the positions count in what it was given."""

    def name_first_bad(rows):
        if BAD in rows:
            raise Named([rows.index(BAD)])
        return rows

    worker = Worker(name_first_bad)
    assert faults(worker.run(BAD, "b", BAD, "d", BAD)) == [0, 2, 4]
    assert [len(rows) for rows in worker.runs] == [5, 4, 3, 2]


def test_a_handler_that_always_names_one_is_run_no_more_than_there_are_requests():
    """The runs are bounded by the batch size: each names at least one that is not run again."""

    def name_last(rows):
        raise Named([len(rows) - 1])

    worker = Worker(name_last, isolates_errors=True)
    assert faults(worker.run(*"abcd")) == [0, 1, 2, 3]
    assert [len(rows) for rows in worker.runs] == [4, 3, 2, 1]


@pytest.mark.parametrize("kind", [list, tuple, set, np.array, torch.tensor, lambda found: dict.fromkeys(found, "why")])
def test_indexes_may_be_any_collection_of_whole_numbers(kind):
    """A tuple, a set, an array, a tensor, or the keys of a dictionary; twice the same counts once."""

    def name_some(rows):
        if len(rows) == 3:
            raise Named(kind([0, 2, 2]))
        return rows

    assert faults(Worker(name_some).run(1, 2, 3)) == [0, 2]


class Evil(Exception):
    """Has properties that fail."""

    @property
    def indexes(self) -> Any:
        raise RuntimeError("no")

    errors = error_code = indexes


@pytest.mark.parametrize(
    "error",
    [
        *map(Named, ([], [3], [-1], [0, 3], [True, False, False], ["0"], "0", b"\x07", 1, None, [1.0], iter([0]), {})),
        Evil(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_names_no_request_of_the_batch_fails_the_batch(error):
    """Positions that are not there, or no positions at all, name nobody: the batch failed as a whole, and ran once."""

    def fail(rows):
        raise error

    worker = Worker(fail)
    assert faults(worker.run(1, 2, 3)) == [0, 1, 2]
    assert len(worker.runs) == 1


def test_each_one_that_is_refused_is_told_its_own_reason():
    """Where an error has an error for each position, each request gets its own text and code."""

    def read(row):
        if row != "ok":
            raise InputRefused(f"no {row}", error_code=row)
        return row

    outcomes = Worker(lambda rows: read_each(rows, read)).run(413, "ok", 415)
    assert outcomes[1] == "ok"
    assert [(outcomes[at].error_code, outcomes[at].reason[-6:]) for at in (0, 2)] == [(413, "no 413"), (415, "no 415")]


@pytest.mark.parametrize("errors", [{}, {5: ValueError()}, {0: "text"}, [ValueError()], list])
def test_errors_that_are_none_leave_the_error_itself(errors):
    """An attribute ``errors`` that has no error for a position counts for nothing."""

    def name_first(rows):
        if len(rows) == 2:
            raise Named([0], errors)
        return rows

    fault, answer = Worker(name_first).run(1, 2)
    assert answer == 2
    assert fault.error_type.endswith("Named")


def test_a_batch_that_failed_as_a_whole_stays_failed():
    """Without isolate_errors nothing is run again unless the error names somebody."""
    worker = Worker(fail_if_bad)
    assert faults(worker.run("a", BAD)) == [0, 1]
    assert len(worker.runs) == 1


def out_of_memory(rows: Sequence[Any]) -> list[Any]:
    if len(rows) > 1:
        raise MemoryError
    return fail_if_bad(rows)


def out_of_device_memory(rows: Sequence[Any]) -> list[Any]:
    if len(rows) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return fail_if_bad(rows)


def one_answer(rows: Sequence[Any]) -> list[Any]:
    return [fail_if_bad([row])[0] for row in rows[:1]]


def no_list(rows: Sequence[Any]) -> Any:
    return None if len(rows) > 1 else fail_if_bad(rows)


@pytest.mark.parametrize("entry_point", [fail_if_bad, out_of_memory, out_of_device_memory, one_answer, no_list])
def test_an_isolated_batch_is_run_again_one_by_one(entry_point):
    """A batch that failed as a whole, in whatever way, is run again once, request by request: only the bad one fails."""
    worker = Worker(entry_point, isolates_errors=True)
    outcomes = worker.run("a", BAD, "c")
    assert (outcomes[0], outcomes[2]) == ("aa", "cc")
    assert outcomes[1].reason == "ValueError: not this"
    assert worker.runs == [["a", BAD, "c"], ["a"], [BAD], ["c"]]
    assert worker.ids[1:] == [["0"], ["1"], ["2"]]


def test_a_batch_of_one_is_not_run_again():
    """What failed alone would fail alone again; so would what is left when all others are settled."""
    worker = Worker(fail_if_bad, isolates_errors=True)
    assert faults(worker.run(BAD)) == [0]
    assert faults(worker.run(BAD, "late", deadlines={1: 0.0})) == [0, 1]
    assert worker.runs == [[BAD], [BAD]]


def test_what_is_left_of_a_batch_is_isolated():
    """A run without those that were named may fail as a whole; it is then run one by one, as any batch is."""

    def name_then_fail(rows):
        if "named" in rows:
            raise Named([rows.index("named")])
        return fail_if_bad(rows)

    worker = Worker(name_then_fail, isolates_errors=True)
    outcomes = worker.run("named", "b", BAD)
    assert outcomes[1] == "bb"
    assert [outcomes[at].error_type.rpartition(".")[2] for at in (0, 2)] == ["Named", "ValueError"]
    assert worker.runs == [["named", "b", BAD], ["b", BAD], ["b"], [BAD]]


@pytest.mark.parametrize("answers", [[], [1], [1, 2, 3]])
def test_a_wrong_number_of_answers_names_both_numbers(answers):
    """Nobody knows whose is whose, so all fail, and are told how many answers there were and how many were to be."""
    for fault in Worker(lambda rows: answers).run("a", "b"):
        assert f"returned {len(answers)} answers for a batch of 2 requests" in fault.reason


@pytest.mark.parametrize("entry_point", [fail_if_bad, name_bad])
def test_what_is_past_its_deadline_is_not_run_again(clock, entry_point):
    """Nobody waits for it any more: it is said to be expired, and the others are run."""

    def slow(rows):
        clock.now += 10
        return entry_point(rows)

    worker = Worker(slow, isolates_errors=True)
    outcomes = worker.run(BAD, "late", "c", deadlines={1: 105.0, 2: 1000.0})
    assert (outcomes[1], outcomes[2]) == (EXPIRED, "cc")
    assert ["late"] not in worker.runs
    assert all("late" not in rows for rows in worker.runs[1:])


def test_what_would_take_too_long_is_not_run_again(clock):
    """A worker that takes longer than response_timeout for a batch is killed: who is not tried again is told so."""

    def slow(rows):
        clock.now += 4
        return fail_if_bad(rows)

    worker = Worker(slow, isolates_errors=True, limit_s=13)
    outcomes = worker.run("a", BAD, "c", "d")
    assert outcomes[0] == "aa"
    assert outcomes[1].reason == "ValueError: not this"
    for fault in outcomes[2:]:
        assert fault.reason.startswith("ValueError: not this; no time was left in response_timeout (13 s)")
    assert worker.runs[1:] == [["a"], [BAD]]


def test_who_was_not_named_and_has_no_time_left_is_not_blamed(clock):
    """The code that the named ones deserve is not that of the others."""

    def refuse(rows):
        clock.now += 7
        raise InputRefused("no", 400, [0])

    refused, untried = Worker(refuse, limit_s=10).run("a", "b")
    assert (refused.error_code, untried.error_code) == (400, None)
    assert "response_timeout" in untried.reason


def test_a_row_is_run_again_as_it_was_sent():
    """What a handler did to rows and arrays in the run that failed is not there when they are run one by one."""

    def take_apart(rows):
        sums = []
        for row in rows:
            array = row.pop("body")
            sums.append(float(array.sum()))
            array[:] = -1
        if len(rows) > 1:
            raise ValueError
        return sums

    worker = Worker(take_apart, isolates_errors=True)
    assert worker.run({"body": np.ones(3)}, {"body": np.ones(5)}) == [3.0, 5.0]


@pytest.mark.parametrize("isolates", [False, True])
def test_what_a_failed_run_made_is_let_go_before_the_next(isolates):
    """A batch that ran out of memory must not hold that memory while it is run again."""
    made: list[weakref.ref[Any]] = []
    held: list[object] = []

    def use_much(rows):
        held.extend(ref() for ref in made)
        activations = np.ones(4)
        made.append(weakref.ref(activations))
        if len(rows) > 1:
            raise MemoryError if isolates else Named([0])
        return rows

    assert Worker(use_much, isolates_errors=isolates).run(1, 2)[1] == 2
    assert len(made) >= 2
    assert set(held) == {None}


def test_a_request_that_cannot_be_read_is_not_counted_by_an_error():
    """Positions that an error names are those of the rows that the handler was given."""

    def name_last(rows):
        if len(rows) == 2:
            raise Named([1])
        return rows

    worker = Worker(name_last)
    outcomes = worker.run("late", "b", "c", deadlines={0: 0.0})
    assert outcomes[0] == EXPIRED
    assert outcomes[1] == "b"
    assert faults(outcomes) == [0, 2]


@pytest.mark.parametrize("name", ["explain", "Explain", "describe"])
def test_a_request_for_an_explanation_is_run_alone(name):
    """A handler looks at the first request's header and answers all alike: the others of the batch are not explained."""
    worker = Worker(lambda rows: [f"{rows[0]} and {len(rows) - 1} more"] * len(rows))
    headers = {0: {name: "True"}, 1: {"x-other": "1"}, 2: {name: "True"}}
    assert worker.run("a", "b", "c", "d", headers=headers) == [
        "a and 0 more", "b and 1 more", "c and 0 more", "b and 1 more",
    ]  # fmt: skip
    assert worker.ids == [["0"], ["2"], ["1", "3"]]


def test_errors_of_a_batch_with_an_explanation_stay_with_their_requests():
    """The positions that an error names are those of the run in which it was raised."""
    worker = Worker(name_bad)
    outcomes = worker.run("a", BAD, BAD, "d", headers={0: {"explain": "True"}, 2: {"explain": "True"}})
    assert (faults(outcomes), outcomes[0], outcomes[3]) == ([1, 2], "aa", "dd")


@pytest.mark.parametrize("limit_s, failed", [(9.0, [1, 2]), (99.0, [1])])
def test_what_explanations_take_is_not_there_for_running_others_again(clock, limit_s, failed):
    """All runs of a batch share its time."""

    def slow(rows):
        clock.now += 4.0
        return fail_if_bad(rows)

    worker = Worker(slow, isolates_errors=True, limit_s=limit_s)
    assert faults(worker.run("a", BAD, "c", headers={0: {"explain": "True"}})) == failed
