"""Requests and answers that cannot travel, that kill who packs or unpacks them, or that are very large."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.faults.processes import only_pid, pids_of, states_of, until
from tests.handlers import Deployer, Gate, lines_of
from torchmgmt.errors import HandlerFailed, WorkerDied


@attrs.frozen
class Ends:
    """Ends the process that unpickles it: a request whose reading is fatal."""

    call: Any
    arguments: tuple[Any, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


UNPICKLABLE_ANSWER = "type('Ends', (), {{'__reduce__': lambda self: {end}}})()"
"""An answer whose pickling does something else; to be formatted."""


@pytest.mark.parametrize(
    "end, exitcode, words",
    [
        ("os._exit(5)", 5, "status 5"),
        ("sys.exit(6)", 6, "status 6"),
        ("__import__('ctypes').string_at(0)", -11, "SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, "SIGKILL"),
    ],
)
def test_a_crash_while_pickling_the_answer_fails_that_batch_alone(
    deploy_both: Deployer, end: str, exitcode: int, words: str
) -> None:
    """An answer whose pickling ends its worker fails its request with how; those that wait are answered by the next."""
    model = deploy_both()
    old = only_pid(model)
    fatal = model.submit("print('packing') or " + UNPICKLABLE_ANSWER.format(end=end))
    others = [model.submit(str(number)) for number in range(5)]
    error = fatal.exception(20)
    assert isinstance(error, WorkerDied)
    assert (error.pid, error.exitcode) == (old, exitcode)
    assert words in error.reason
    assert "packing" in error.last_lines
    assert [future.result(20) for future in others] == list(range(5))


@pytest.mark.parametrize(
    "fatal, exitcode", [(Ends(os._exit, (6,)), 6), (Ends(os.kill, (0, signal.SIGSEGV)), None)], ids=["exit", "group"]
)
def test_a_crash_while_unpickling_the_request_kills_once(
    deploy_both: Deployer, fatal: Ends, exitcode: int | None, tmp_path: Path
) -> None:
    """A request whose reading ends its worker fails and is never handed on; the others of other batches are answered."""
    model = deploy_both()
    old = only_pid(model)
    futures = [model.submit(fatal), *(model.submit("os.getpid()") for _ in range(10))]
    error = futures[0].exception(20)
    assert isinstance(error, WorkerDied)
    assert error.pid == old
    if exitcode is not None:
        assert error.exitcode == exitcode
    (successor,) = {future.result(20) for future in futures[1:]}
    assert successor != old
    assert only_pid(model) == successor


def test_a_fatal_request_takes_only_its_own_batch_with_it(deploy_both: Deployer, gate: Gate) -> None:
    """Of batches of several requests the one with the fatal request fails, whatever lies before and behind it."""
    model = deploy_both(batch_size=3, max_batch_delay=50)
    blocker = [model.submit(gate.expression) for _ in range(3)]
    until(gate.reached, "the first batch runs")
    requests = ["1", "2", "3", "4", Ends(os._exit, (6,)), "6", "7", "8", "9"]
    futures = [model.submit(each) for each in requests]
    gate.open()
    assert [future.result(20) for future in blocker] == [None] * 3
    outcomes = [future.exception(20) or future.result() for future in futures]
    lost = [index for index, outcome in enumerate(outcomes) if isinstance(outcome, WorkerDied)]
    assert 4 in lost
    assert lost == list(range(lost[0], lost[-1] + 1))
    assert len(lost) <= 3  # a batch, which is cut early where nobody else is likely to join it
    assert [outcome for index, outcome in enumerate(outcomes) if index not in lost] == [
        each for index, each in enumerate([1, 2, 3, 4, None, 6, 7, 8, 9]) if index not in lost
    ]


def test_no_request_is_run_twice(deploy_both: Deployer, tmp_path: Path) -> None:
    """However often workers die with further batches lying there, each request is begun exactly once."""
    model = deploy_both(initial_workers=2, batches_in_flight=4)
    begun = tmp_path / "begun"
    note = f"note({str(begun)!r}, {{number}}) or "
    bodies = [note.format(number=number) + ("os._exit(1)" if number % 10 == 3 else "'x'") for number in range(60)]
    futures = [model.submit(body) for body in bodies]
    died = [number for number, future in enumerate(futures) if isinstance(future.exception(40), WorkerDied)]
    assert died == list(range(3, 60, 10))
    assert sorted(map(int, lines_of(begun))) == list(range(60))


@pytest.mark.parametrize(
    "answer, words",
    [
        ("threading.Lock()", "cannot pickle"),
        ("(lambda: 1)", "pickle"),
        (UNPICKLABLE_ANSWER.format(end="fail(ValueError('not this one'))"), "not this one"),
    ],
)
def test_an_answer_that_cannot_be_pickled_harms_no_worker(deploy_both: Deployer, answer: str, words: str) -> None:
    """An answer that cannot be pickled is a HandlerFailed with the reason, and its worker serves on."""
    model = deploy_both()
    pid = only_pid(model)
    with pytest.raises(HandlerFailed) as caught:
        model.predict(answer)
    assert words in caught.value.reason.lower()
    assert model.predict("os.getpid()") == pid


@pytest.mark.parametrize("count", [0, 2, 100])
def test_a_wrong_number_of_answers_harms_no_worker(deploy_both: Deployer, count: int) -> None:
    """A batch that is answered with too few or too many fails with both numbers, and its worker serves on."""
    source = "import os\ndef handle(data, context):\n    return data and [os.getpid()] * data[0]['body']\n"
    model = deploy_both(source)
    pid = model.predict(1)
    with pytest.raises(HandlerFailed, match=f"returned {count} answers for a batch of 1"):
        model.predict(count)
    assert model.predict(1) == pid


def test_a_large_request_and_answer_arrive_intact(deploy: Deployer) -> None:
    """50 MB go to a worker and back as they were, as bytes and as a numpy array."""
    import numpy as np

    source = "def handle(data, context):\n    return data and [row['body'] for row in data]\n"
    model = deploy(source)
    data = np.random.default_rng(1).integers(0, 256, 50_000_000, dtype=np.uint8)
    assert model.predict(data.tobytes(), timeout=60) == data.tobytes()
    answer = model.predict(data, timeout=60)
    assert np.array_equal(answer, data)


def test_a_large_request_to_a_worker_that_dies_is_handed_on(deploy: Deployer) -> None:
    """A request of 50 MB to a worker that is killed before it has read it is run by the next one, and blocks nobody."""
    model = deploy()
    old = only_pid(model)
    os.kill(old, signal.SIGSTOP)
    ballast = os.urandom(50_000_000)
    future = model.submit(fields={"body": "data[0]['ballast'], os.getpid()", "ballast": ballast})
    os.kill(old, signal.SIGKILL)
    answer, new = future.result(30)
    assert bytes(answer) == ballast
    assert new not in {0, old}


def test_two_hundred_megabytes_travel_both_ways(deploy_both: Deployer) -> None:
    """Requests and answers of 200 MB arrive intact, through the socket the first time and in shared memory then."""
    model = deploy_both()
    size = 200_000_000
    for fill in (b"a", b"b"):
        ballast = fill * size
        body = "(len(data[0]['ballast']), bytes(data[0]['ballast'][-3:]))"
        assert model.predict(fields={"body": body, "ballast": ballast}, timeout=40) == (size, fill * 3)
        answer = model.predict(f"{fill!r} * {size}", timeout=40)
        assert len(answer) == size
        assert answer == ballast


def test_a_worker_that_dies_with_a_large_answer_on_its_way_harms_no_other(deploy_both: Deployer) -> None:
    """A worker that is killed while it sends 200 MB fails that request or has sent all of it, and is replaced."""
    model = deploy_both()
    pid = only_pid(model)
    future = model.submit("print('sending') or b'x' * 200_000_000")
    os.kill(pid, signal.SIGKILL)
    outcome = future.exception(40) or future.result()
    assert isinstance(outcome, WorkerDied) or len(outcome) == 200_000_000
    assert model.predict("'served'", timeout=20) == "served"
    assert pids_of(model) != [pid]
    assert states_of(model) == ["READY"]
