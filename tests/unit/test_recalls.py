"""Recalls of batches from a worker: the protocol between both processes, in whatever order its steps come."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterator
from datetime import datetime, timezone

import attrs
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torchmgmt.lifecycle import WorkerEvent
from torchmgmt.page import PAGE_BYTES, Page
from torchmgmt.pool.jobs import OwnJob
from torchmgmt.pool.workers import PoolWorker
from torchmgmt.records import ModelKey


@attrs.define(slots=False)
class Recalling:
    """One worker, and what ProcessWorker and Recalls do about it, each step of it at the moment that a test says.

    Those of one side come in their order, but for what pools do without their lock: two threads may send batches, or recall
    some, in another order than that in which these were decided.
    """

    worker: PoolWorker
    page: Page
    jobs: dict[int, OwnJob] = attrs.field(factory=dict)
    inbox: list[int] = attrs.field(factory=list)
    decided: list[tuple[int, list[int]]] = attrs.field(factory=list)
    recalled: list[list[int]] = attrs.field(factory=list)
    socket: deque[tuple[str, int]] = attrs.field(factory=deque)
    ran: list[int] = attrs.field(factory=list)
    elsewhere: list[int] = attrs.field(factory=list)
    behind: set[int] = attrs.field(factory=set)
    """All that lay behind another when a recall was decided."""

    def __attrs_post_init__(self) -> None:
        self.working = self.work()

    def assign(self, place: int) -> None:
        number = len(self.jobs) + 1
        self.jobs[number] = OwnJob(ModelKey("m", "1.0"), [])
        self.worker.assign(number, self.jobs[number], 100.0, 10.0)
        self.inbox.insert(len(self.inbox) - place % 2 if self.inbox else 0, number)

    def work(self) -> Iterator[None]:
        """Do what the worker does, for ever; a step does nothing while it has no batch."""
        while True:
            if self.inbox:
                self.page.start(number := self.inbox.pop(0))
                yield
                is_recalled = self.page.is_recalled(number)
                yield
                if not is_recalled:
                    self.ran.append(number)
                    yield
                self.socket.append(("skipped" if is_recalled else "done", number))
            yield

    def look(self, _place: int) -> None:
        first, *behind = [*self.worker.jobs, None]
        behind = [number for number in behind if number is not None]
        if first is not None and behind and self.worker.recalled < max(behind):
            self.worker.recalled = max(behind)
            self.behind |= {*behind}
            self.decided.append((first, behind))

    def recall(self, place: int) -> None:
        if self.decided:
            first, behind = self.decided.pop(place % len(self.decided))
            self.page.recall(max(behind), but=first)
            self.recalled.append(behind)

    def tell_skipped(self, _place: int) -> None:
        if self.recalled:
            started = self.page.started
            self.tell(len(self.socket))
            for number in self.recalled.pop(0):
                if number != started and self.page.is_recalled(number):
                    self.skipped(number)

    def tell(self, count: int) -> None:
        for _ in range(min(count, len(self.socket))):
            what, number = self.socket.popleft()
            if what == "done":
                done = self.worker.finish(number, 101.0, 10.0)
                assert done is self.jobs[number], "run here, and given to another worker"
            else:
                self.skipped(number)

    def skipped(self, number: int) -> None:
        if self.worker.skip(number, 101.0, 10.0) is not None:
            self.elsewhere.append(number)


ONE_RUN = [("work", 0)] * 4 + [("tell", 1)]
LATE_RECALL = [
    *[("assign", 0), ("assign", 0), ("look", 0)],  # that 2 is to be recalled is decided, and its thread held up
    *[*ONE_RUN, ("work", 0), ("work", 0), ("work", 0)],  # meanwhile 1 is done, and 2 is run
    *[("assign", 0), ("look", 0), ("recall", 1)],  # and what lies behind 2 is recalled
]
ON_ITS_WAY = [
    *[("assign", 0), ("assign", 0), ("look", 0), *ONE_RUN],  # as before, but 2 has yet to come to the worker
    *[("assign", 0), ("look", 0)],
]
STEPS = ["assign", "assign", "work", "work", "work", "tell", "look", "recall", "tell_skipped"]


@settings(max_examples=300)
@given(steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 3)), max_size=60))
@example(steps=[*LATE_RECALL, ("tell_skipped", 0), ("recall", 0)])
@example(steps=[*LATE_RECALL, ("recall", 0), ("tell_skipped", 0), ("tell_skipped", 0)])
@example(steps=[*ON_ITS_WAY, ("recall", 0), ("tell_skipped", 0), ("recall", 0)])
@example(steps=[*ON_ITS_WAY, ("recall", 1), ("recall", 0), ("tell_skipped", 0), ("tell_skipped", 0)])
def test_a_recalled_batch_is_run_here_or_elsewhere_and_never_twice(steps: list[tuple[str, int]]) -> None:
    """The protocol of ProcessWorker.recall, whatever the worker does before, between and after what the other side does."""
    worker = PoolWorker("9000", datetime.now(timezone.utc))
    worker.advance(WorkerEvent.SPAWN)
    worker.advance(WorkerEvent.READY)
    with tempfile.TemporaryFile() as file:
        file.truncate(PAGE_BYTES)
        made = Recalling(worker, Page(file.fileno()))
    rest = (
        [("recall", 0), ("tell_skipped", 0)] * len(steps) + [("work", 0)] * 5 * len(steps) + [("tell", 2 * len(steps))]
    )
    for step, place in [*steps, *rest]:
        if step == "work":
            next(made.working)
        else:
            getattr(made, step)(place)
    assert sorted(made.ran + made.elsewhere) == sorted(made.jobs)
    assert {*made.elsewhere} <= made.behind, "what was before others is not recalled"
    assert worker.jobs == {}
    made.page.close()
