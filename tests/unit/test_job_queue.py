"""What a pool has to run: the order in which it is run, and that each piece of it ends exactly once."""

from __future__ import annotations

import attrs
import pytest

from torchmgmt.channel import encode
from torchmgmt.errors import HandlerFailed, ManagerClosed, WorkerDied, WorkerStartFailed
from torchmgmt.exchange import Encoded, WorkerRequest
from torchmgmt.pool.jobs import Job, JobQueue, OwnJob, size_of
from torchmgmt.pool.results import answers_of, error_of_death
from torchmgmt.records import ModelKey, WorkerExit, WorkerFault

KEY = ModelKey("m", "1.0")


def own(*bodies: object) -> OwnJob:
    return OwnJob(KEY, [WorkerRequest(encode(body), str(body)) for body in bodies])


@attrs.define
class Source:
    """A source that has these batches; only those of two requests are full."""

    jobs: list[Job]

    def take(self, *, full: bool = False) -> Job | None:
        if not self.jobs or (full and len(self.jobs[0].items) < 2):
            return None
        return self.jobs.pop(0)

    def fail_waiting(self, error: BaseException) -> int:
        for job in self.jobs:
            job.fail(error)
        return len(self.jobs)

    def waited_s(self) -> float:
        return 1.5

    def __len__(self) -> int:
        return sum(len(job.items) for job in self.jobs)


def test_what_was_given_back_goes_first_then_its_own_then_the_source() -> None:
    """A batch that had its turn before goes before all others, and the pool's own go before the source's."""
    queue, returned, mine, theirs = JobQueue(), own(1), own(2), own(3)
    queue.source = Source([theirs])
    queue.add(mine)
    queue.give_back([returned])
    assert [queue.take() for _ in range(4)] == [returned, mine, theirs, None]


def test_batches_that_are_given_back_keep_their_order() -> None:
    """Those of one worker stay in their order, and stand before what another one gave back earlier."""
    queue, jobs = JobQueue(), [own(number) for number in range(4)]
    queue.give_back(jobs[2:])
    queue.give_back(iter(jobs[:2]))
    assert [queue.take() for _ in range(4)] == jobs


def test_only_a_full_batch_of_the_source_is_taken_ahead() -> None:
    """With ``full`` a batch that could still grow stays; what was taken before, or is the pool's own, does not grow."""
    queue, returned, mine = JobQueue(), own(1), own(2)
    queue.source = Source([own(3), own(4, 5)])
    queue.add(mine)
    queue.give_back([returned])
    assert [queue.take(full=True) for _ in range(3)] == [returned, mine, None]
    assert queue.take() is not None
    assert size_of(filter(None, [queue.take(full=True)])) == 2


def test_a_cancelled_batch_is_never_taken() -> None:
    """Cancelling a batch that waits is heeded; one that is taken cannot be cancelled any more."""
    queue, cancelled, other = JobQueue(), own(1), own(2)
    queue.add(cancelled)
    queue.add(other)
    assert cancelled.future.cancel()
    assert queue.take() is other
    assert not other.future.cancel()
    cancelled.fail(ManagerClosed("x"))  # nothing happens


def test_all_that_waits_counts() -> None:
    """The length is in requests, whoever has them; the wish for a description counts as one."""
    queue = JobQueue()
    assert (len(queue), queue.waited_s(), queue.take()) == (0, 0.0, None)
    queue.source = Source([own(1, 2)])
    queue.add(OwnJob(KEY, None))
    queue.give_back([own(3, 4, 5)])
    assert (len(queue), queue.waited_s()) == (6, 1.5)


def test_clearing_leaves_the_source_alone() -> None:
    """All that the pool holds is handed out, in order, once."""
    queue, returned, mine = JobQueue(), own(1), own(2)
    queue.source = Source([own(3)])
    queue.add(mine)
    queue.give_back([returned])
    assert queue.clear() == [returned, mine]
    assert queue.clear() == []
    assert len(queue) == 1


def test_a_batch_of_its_own_is_answered_whole() -> None:
    """All answers come as one list, in order; one that failed fails all of them; a description is a single answer."""
    answered, failed, description = own(1, 2), own(1, 2), OwnJob(KEY, None)
    answered.finish([encode("a"), encode("b")])
    assert answered.future.result(0) == ["a", "b"]
    failed.finish([encode("a"), ManagerClosed("x")])
    assert isinstance(failed.future.exception(0), ManagerClosed)
    description.finish([encode({"size": 3})])
    assert description.future.result(0) == {"size": 3}
    assert description.is_description


def test_a_fault_becomes_an_error_of_ours() -> None:
    """What the worker says went wrong keeps its type, code and traceback; the other answers of the batch stay."""
    fault = WorkerFault("ValueError", "ValueError: no", "Traceback ...", error_code=507, out_of_memory=True)
    fine = Encoded([b"x"])
    answer, error = answers_of(KEY, [], [fine, fault], ["last"])
    assert answer is fine
    assert isinstance(error, HandlerFailed)
    assert (error.error_type, error.error_code, error.traceback) == ("ValueError", 507, "Traceback ...")
    assert (error.out_of_memory, error.last_lines) == (True, ("last",))


EXIT = WorkerExit(77, -9, "it was ended by SIGKILL", ["last"])
FAULT = WorkerFault("OSError", "OSError: gone", "Traceback ...", out_of_memory=True)


@pytest.mark.parametrize(
    "exit, end_reason, reason",
    [
        (EXIT, "", "it was ended by SIGKILL"),
        (EXIT, "it was too slow", "it was too slow"),
        (attrs.evolve(EXIT, is_final=True), "it was too slow", "it was too slow; it was ended by SIGKILL"),
    ],
)
def test_a_death_says_why(exit: WorkerExit, end_reason: str, reason: str) -> None:
    """Our own reason goes before what the system says, and what ends all others, too, is told beside it."""
    died = error_of_death(KEY, exit, end_reason=end_reason, was_loading=False)
    assert isinstance(died, WorkerDied)
    assert (died.pid, died.exitcode, died.reason, died.last_lines) == (77, -9, reason, ("last",))
    failed = error_of_death(KEY, exit, end_reason=end_reason, was_loading=True)
    assert isinstance(failed, WorkerStartFailed)
    assert (failed.reason, failed.last_lines) == (reason, ("last",))


def test_a_start_that_failed_says_what_was_raised() -> None:
    """What loading raised is the reason, unless we ended the worker ourselves."""
    exit = attrs.evolve(EXIT, fault=FAULT)
    raised = error_of_death(KEY, exit, end_reason="", was_loading=True)
    assert isinstance(raised, WorkerStartFailed)
    assert (raised.reason, raised.traceback) == ("OSError: gone", "Traceback ...")
    ended = error_of_death(KEY, exit, end_reason="it was too slow", was_loading=True)
    assert ended.reason == "it was too slow"
