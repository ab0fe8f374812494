"""Answers in parts inside a worker: where parts go, what is run again, and what is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchmgmt.channel import decode, encode
from torchmgmt.exchange import Encoded, RequestHead
from torchmgmt.handlers.context import Context
from torchmgmt.records import EXPIRED, WorkerFault
from torchmgmt.worker.batch import run_batch
from torchmgmt.worker.loader import Handler
from torchmgmt.worker.parts import PartSender


@attrs.define
class Sink(PartSender):
    """Keeps what is sent, and says after how many parts nobody waits any more."""

    limit: int = 10**9
    sent: list[tuple[int, Any]] = attrs.field(factory=list)

    def send(self, index: int, part: Encoded) -> None:
        self.sent.append((index, decode(part)))

    def is_abandoned(self) -> bool:
        return len(self.sent) >= self.limit

    def of(self, index: int) -> list[Any]:
        return [part for at, part in self.sent if at == index]


def run(
    entry_point: Callable[[list[Any], Context], Any],
    *bodies: Any,
    sink: Sink | None = None,
    whole: frozenset[int] = frozenset(),
    isolates: bool = False,
    deadline: float | None = None,
) -> list[Any]:
    """Run one batch whose requests take parts but those in ``whole``; return what each was answered at last."""
    context = Context("m", "", {}, batch_size=8, gpu=None, mms_version="0")
    handler = Handler(entry_point, context, isolates_errors=isolates)
    encoded = [encode(body) for body in bodies]
    heads: list[RequestHead] = [
        (str(index), None, len(each.segments), deadline, None, index not in whole) for index, each in enumerate(encoded)
    ]
    segments = [segment for each in encoded for segment in each.segments]
    outcomes = run_batch(handler, heads, segments, sink or Sink())
    return [_read(outcome) for outcome in outcomes]


def _read(outcome: Encoded | WorkerFault) -> Any:
    if isinstance(outcome, WorkerFault):
        return outcome
    return decode(outcome) if outcome.segments else "nothing more"


def numbers(count: int, end: object = None) -> Iterator[int]:
    yield from range(count)
    return end


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.sampled_from([None, "end"])), min_size=1, max_size=5))
def test_every_part_goes_to_its_request_in_order(wanted: list[tuple[int, bool, str | None]]) -> None:
    """Whoever takes parts gets each once, in order; whoever takes the answer whole gets the list of all."""
    sink = Sink()
    whole = frozenset(index for index, (_, is_whole, _) in enumerate(wanted) if is_whole)
    last = run(lambda rows, _: [numbers(row[0], row[2]) for row in rows], *wanted, sink=sink, whole=whole)
    for index, (count, is_whole, end) in enumerate(wanted):
        parts = list(range(count))
        assert sink.of(index) == ([] if is_whole else parts)
        if is_whole and (count or end is None):
            assert last[index] == [*parts, *([] if end is None else [end])]
        elif end is None and count:
            assert last[index] == "nothing more"
        else:
            assert last[index] == ([] if end is None else end)


def test_generators_take_turns() -> None:
    """No request waits for all the parts of another."""
    sink = Sink()
    run(lambda rows, _: [numbers(2) for _ in rows], "a", "b", sink=sink)
    assert sink.sent == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_a_generator_that_raises_fails_its_own_request() -> None:
    """The others of the batch go on."""

    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("mine")

    first, second = run(lambda rows, _: [failing(), numbers(3, "end")], "a", "b")
    assert (first.error_type, second) == ("ValueError", "end")


def test_nothing_is_run_again_of_which_a_part_was_sent() -> None:
    """A batch that raised after a part went out is not repeated: its caller would get that part twice."""
    runs = []

    def handle(rows: list[Any], context: Context) -> list[Any]:
        runs.append(rows)
        context.send_intermediate(rows)
        raise ValueError("late")

    faults = run(handle, "a", "b", isolates=True)
    assert [fault.error_type for fault in faults] == ["ValueError", "ValueError"]
    assert runs == [["a", "b"]]


def test_a_batch_that_raised_before_any_part_is_run_again_and_its_parts_find_their_requests() -> None:
    """Request by request, each with the parts of its own."""
    sink = Sink()

    def handle(rows: list[Any], _context: Context) -> list[Any]:
        if len(rows) > 1 or rows == ["bad"]:
            raise ValueError(rows)
        return [numbers(2) for _ in rows]

    good, bad = run(handle, "good", "bad", sink=sink, isolates=True)
    assert (good, bad.error_type) == ("nothing more", "ValueError")
    assert sink.sent == [(0, 0), (0, 1)]


@pytest.mark.parametrize("parts", [[1], [1, 2, 3]])
def test_a_wrong_number_of_parts_is_an_error_that_names_both(parts: list[int]) -> None:
    """Parts are for each request of the batch."""
    fault = run(lambda _rows, context: context.send_intermediate(parts), "a", "b")[0]
    assert f"{len(parts)} parts were sent for a batch of 2 requests" in fault.reason


def test_a_handler_is_stopped_when_nobody_waits_and_its_generators_are_closed() -> None:
    """It cannot catch that as an Exception, but can put away what it has open."""
    closed = []

    def endless() -> Iterator[int]:
        try:
            while True:
                try:
                    yield 1
                except Exception:
                    closed.append("caught")
        finally:
            closed.append("closed")

    assert run(lambda rows, _: [endless() for _ in rows], "a", "b", sink=Sink(limit=5)) == [EXPIRED, EXPIRED]
    assert closed == ["closed", "closed"]


def test_a_batch_past_all_its_deadlines_is_not_begun_nor_gone_on_with() -> None:
    """Whoever takes answers whole is not waited for either, once its deadline is over."""
    assert run(lambda rows, _: [numbers(1) for _ in rows], "a", whole=frozenset({0}), deadline=0.0) == [EXPIRED]


def test_a_handler_that_yields_gives_a_part_to_each_request() -> None:
    """Its own returned value is the last answer; what is no list of the right length fails the batch."""

    def handle(rows: list[Any], _context: Context) -> Iterator[list[Any]]:
        yield [f"{row}1" for row in rows]
        return [f"{row}2" for row in rows]

    sink = Sink()
    assert run(handle, "a", "b", sink=sink) == ["a2", "b2"]
    assert sink.sent == [(0, "a1"), (1, "b1")]

    def wrong(_rows: list[Any], _context: Context) -> Iterator[Any]:
        yield [1]

    assert "1 answers for a batch of 2" in run(wrong, "a", "b")[0].reason
