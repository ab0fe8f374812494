"""Batches that lie with a worker: nobody waits for a worker that is gone, and nothing is run twice, late or out of turn."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path

import attrs
import pytest

from tests.handlers import TOOLS, Deployer, Gate, lines_of, until
from torchmgmt import Model
from torchmgmt.answer_future import AnswerFuture
from torchmgmt.errors import DeadlineExceeded, HandlerFailed, WorkerDied

# A request is a name; those that begin with "gate" wait, "poison" ends the process. What is begun is noted first.
HANDLER = (
    TOOLS
    + """
def handle(data, context):
    if data is None:
        return None
    return [run(row["body"]) for row in data]

def run(name):
    if name == "pid":
        return os.getpid()
    note({begun!r}, name)
    if name.startswith("gate"):
        wait_for({gate!r})
    if name.startswith("poison"):
        os.kill(os.getpid(), signal.SIGKILL)
    return name
"""
)


@attrs.frozen
class Scene:
    """A model whose batches lie with its workers, and what they have begun."""

    model: Model
    begun_file: Path
    gate: Gate

    @property
    def begun(self) -> list[str]:
        return lines_of(self.begun_file)

    def block(self, name: str = "gate") -> AnswerFuture:
        """Have a worker run a batch that waits at the gate, and wait until it has begun."""
        future = self.model.submit(name)
        until(lambda: name in self.begun, f"{name} has begun")
        return future

    def lying(self) -> int:
        """How many batches are with workers, those included that they run."""
        pool = self.model.manager._catalogue.get("m").pool
        return sum(len(worker.jobs) for worker in pool._workers)

    def kill(self) -> None:
        """Kill the oldest worker."""
        pid = self.model.describe().workers[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def scene(deploy: Deployer, tmp_path: Path, gate: Gate) -> Scene:
    begun = tmp_path / "begun"
    model = deploy(HANDLER.format(begun=str(begun), gate=gate.path), batches_in_flight=4)
    workers = model.manager._catalogue.get("m").pool._workers
    # Until it is known that batches are short, on a busy machine, too: no more than 50 ms of work lies with a worker.
    until(lambda: model.predict("pid") and workers._run_s < 0.01, "batches take no time")
    return Scene(model, begun, gate)


def test_what_lay_with_a_killed_worker_is_answered_by_another(scene: Scene) -> None:
    """Only the batch that ran fails; those that lay behind it, and those that wait, are run, in their order, each once."""
    running = scene.block()
    names = [str(number) for number in range(8)]
    futures = [scene.model.submit(name) for name in names]
    until(lambda: scene.lying() == 4)
    scene.kill()
    assert isinstance(running.exception(20), WorkerDied)
    assert [future.result(20) for future in futures] == names
    assert scene.begun == ["gate", *names]


def test_answers_come_in_the_order_of_the_requests(scene: Scene) -> None:
    """With one worker requests are begun in the order in which they were submitted, whether they lie or wait."""
    running = scene.block()
    names = [str(number) for number in range(50)]
    futures = [scene.model.submit(name) for name in names]
    scene.gate.open()
    assert running.result(20) == "gate"
    assert [future.result(20) for future in futures] == names
    assert scene.begun == ["gate", *names]


def test_what_is_too_late_is_never_begun(scene: Scene) -> None:
    """A request whose time is over while it lies with a worker fails by that, and is not run when its turn comes."""
    running = scene.block()
    late = scene.model.submit("late", timeout=0.1)
    fine = scene.model.submit("fine", timeout=60)
    until(lambda: scene.lying() == 3)
    assert isinstance(late.exception(20), DeadlineExceeded)
    scene.gate.open()
    assert (running.result(20), fine.result(20)) == ("gate", "fine")
    assert "late" not in scene.begun


def test_what_is_too_late_is_not_run_by_the_next_worker(scene: Scene) -> None:
    """The same for one that lay with a worker that died."""
    scene.block()
    late = scene.model.submit("late", timeout=0.05)
    fine = scene.model.submit("fine")
    assert isinstance(late.exception(20), DeadlineExceeded)
    scene.kill()
    assert fine.result(20) == "fine"
    assert "late" not in scene.begun


def test_a_poisonous_request_ends_one_worker_only(scene: Scene) -> None:
    """A request that ends its worker fails with that, is not handed to the next worker, and harms none that lay behind."""
    running = scene.block()
    poison = [scene.model.submit("poison"), scene.model.submit("poison too")]
    others = [scene.model.submit(name) for name in ("a", "b", "c")]
    scene.gate.open()
    assert running.result(20) == "gate"
    for each in poison:
        assert isinstance(each.exception(30), WorkerDied)
    assert [future.result(30) for future in others] == ["a", "b", "c"]
    assert sorted(scene.begun) == sorted(["gate", "poison", "poison too", "a", "b", "c"])


def test_a_worker_past_its_time_keeps_none_of_those_behind(deploy: Deployer, tmp_path: Path, gate: Gate) -> None:
    """A batch that runs past response_timeout fails alone; what lay behind it is answered by the next worker."""
    begun = tmp_path / "begun"
    source = HANDLER.format(begun=str(begun), gate=gate.path)
    model = deploy(source, response_timeout=0.5, batches_in_flight=4)
    scene = Scene(model, begun, gate)
    for _ in range(3):
        model.predict("pid")
    stuck = scene.block()
    futures = [model.submit(name) for name in ("a", "b")]
    error = stuck.exception(20)
    assert isinstance(error, WorkerDied)
    assert "response_timeout" in error.reason
    assert [future.result(20) for future in futures] == ["a", "b"]


def test_a_worker_that_goes_finishes_what_lies_with_it(scene: Scene) -> None:
    """Scaling down lets a worker run all that it was handed, though another one is free before it."""
    scene.model.scale(2)
    running = [scene.block("gate 1"), scene.block("gate 2")]
    futures = [scene.model.submit(name) for name in "abcdef"]
    until(lambda: scene.lying() == 8)
    scene.model.scale(1, synchronous=False)
    until(lambda: scene.lying() == 8)
    scene.gate.open()
    assert [future.result(20) for future in [*running, *futures]] == ["gate 1", "gate 2", *"abcdef"]
    until(lambda: len(scene.model.describe().workers) == 1, "one of them is gone")


def test_a_worker_that_goes_at_once_leaves_what_it_has_not_begun(scene: Scene) -> None:
    """Scaling down without time fails what runs; what only lay there is answered by another worker."""
    scene.model.scale(2)
    running = [scene.block("gate 1"), scene.block("gate 2")]
    lying = [scene.model.submit(name) for name in "abcdef"]
    scene.model.scale(1, synchronous=False, timeout=0)
    until(lambda: any(future.done() for future in running), "one was cut off")
    scene.gate.open()
    errors = [future.exception(20) for future in running]
    assert sorted(type(error).__name__ for error in errors) == ["NoneType", "WorkerDied"]
    assert [future.result(20) for future in lying] == [*"abcdef"]
    assert len(scene.begun) == len(set(scene.begun))


def test_closing_counts_what_it_could_not_finish(scene: Scene) -> None:
    """Unregistering without time fails what runs, what lies and what waits, each once, and says how many they were."""
    running = scene.block()
    futures = [scene.model.submit(str(number)) for number in range(8)]
    report = scene.model.unregister(timeout=0)
    assert all(future.exception(20) is not None for future in [running, *futures])
    assert report.failed_requests == 9
    assert len(report.killed_pids) == 1
    assert not report.clean
    assert scene.begun == ["gate"]


def test_closing_finishes_what_lies(scene: Scene) -> None:
    """Unregistering with time answers what runs, what lies and what waits."""
    running = scene.block()
    futures = [scene.model.submit(str(number)) for number in range(8)]
    scene.gate.open()
    report = scene.model.unregister(timeout=20)
    assert report.clean
    assert running.result(0) == "gate"
    assert [future.result(0) for future in futures] == [str(number) for number in range(8)]


@pytest.mark.parametrize("drain", [True, False])
def test_closing_while_batches_fly_always_ends(deploy: Deployer, tmp_path: Path, gate: Gate, drain: bool) -> None:
    """However a flood of short batches and the end of their version meet, that ends, and every request with it."""
    source = HANDLER.format(begun=str(tmp_path / "begun"), gate=gate.path)
    for number in range(15):
        model = deploy(source, model_name=f"m{number}", config="jobQueueSize: 1000\n")
        futures = [model.submit("pid") for _ in range(60)]
        futures[number * 3].exception(20)
        began = time.monotonic()
        model.unregister(timeout=20 if drain else 0)
        assert all(future.done() for future in futures)
        assert time.monotonic() - began < 20, "it was ended by nothing but its own limits"
        if drain:
            assert not any(future.exception(0) for future in futures)


def test_one_at_a_time_where_that_is_asked_for(deploy: Deployer, tmp_path: Path, gate: Gate) -> None:
    """With batches_in_flight=1 nothing lies with a busy worker."""
    begun = tmp_path / "begun"
    model = deploy(HANDLER.format(begun=str(begun), gate=gate.path), batches_in_flight=1)
    scene = Scene(model, begun, gate)
    for _ in range(3):
        model.predict("pid")
    scene.block()
    waiting = [model.submit(name) for name in "abc"]
    until(lambda: scene.lying() == 1)
    scene.gate.open()
    assert [future.result(20) for future in waiting] == ["a", "b", "c"]


class SlowHandler(logging.Handler):
    """A program's log handler that takes as long as a test wants it to."""

    def __init__(self) -> None:
        super().__init__()
        self.is_called = threading.Event()
        self.may_return = threading.Event()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.is_called.set()
        self.may_return.wait(20)
        self.lines.append(record.getMessage())


def test_a_slow_log_handler_keeps_no_answer_waiting(deploy: Deployer) -> None:
    """However long the program's logging takes over what a worker prints, answers, failures included, come meanwhile."""
    model, other = deploy(model_name="talks"), deploy(model_name="other")
    slow = SlowHandler()
    logger = logging.getLogger("torchmgmt.workers")
    logger.addHandler(slow)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        model.submit("print('first')").result(20)
        assert slow.is_called.wait(20)
        error = model.submit("[print('a line', number) for number in range(50)] and fail(ValueError())").exception(10)
        assert isinstance(error, HandlerFailed)
        assert error.last_lines[-1] == "a line 49"
        assert other.predict("1", timeout=10) == 1
        assert not slow.lines
    finally:
        slow.may_return.set()
        until(lambda: len(slow.lines) == 51, "all is logged")
        logger.removeHandler(slow)
        logger.setLevel(before)
    assert [line.rpartition(": ")[2] for line in slow.lines] == ["first", *(f"a line {number}" for number in range(50))]
