"""Many callers at once: every request is answered exactly once, every load happens once."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.handlers import ECHO, SIZES, TOOLS, Deployer, Gate, lines_of, until, write_folder
from torchmgmt import ModelManager, WorkerPool
from torchmgmt.errors import AlreadyRegistered, ManagerClosed, ModelNotFound, ModelVersionNotFound, TorchmgmtError

GATED_SIZES = """
import os, time
def handle(data, context):
    if data is None:
        return None
    while not os.path.exists(data[0].get("gate", "/")):
        time.sleep(0.002)
    return [(row["body"], len(data), place) for place, row in enumerate(data)]
"""


def at_once(*calls: Any) -> list[Any]:
    """Call all of them from threads that start together; return what each returned or raised."""
    barrier = threading.Barrier(len(calls))

    def run(call: Any) -> Any:
        barrier.wait()
        try:
            return call()
        except TorchmgmtError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(run, calls))


def test_of_many_registrations_of_one_version_one_succeeds_and_loads(manager: ModelManager, tmp_path: Path) -> None:
    """Of callers that register one version at once one succeeds, the others are refused, and it is loaded once."""
    loads = tmp_path / "loads"
    source = f"{TOOLS}\nclass Handler:\n    def initialize(self, context):\n        note({str(loads)!r})\n"
    source += "    def handle(self, data, context):\n        return data\n"
    folder = write_folder(tmp_path / "model", source)

    def register() -> object:
        return manager.register(folder, model_name="m", handler="handler")

    outcomes = at_once(*[register] * 8)

    refused = [outcome for outcome in outcomes if isinstance(outcome, AlreadyRegistered)]
    assert len(refused) == 7, outcomes
    assert {(error.name, error.version) for error in refused} == {("m", "1.0")}
    assert len(lines_of(loads)) == 1
    assert [len(info.workers) for info in manager.models()] == [1]


def test_versions_that_are_registered_at_once_do_not_disturb_each_other(manager: ModelManager, tmp_path: Path) -> None:
    """Callers that register different versions at once all succeed, and exactly one of these is the default."""
    folder = write_folder(tmp_path / "model", ECHO)
    names = [str(number) for number in range(6)]

    outcomes = at_once(
        *[lambda name=name: manager.register(folder, model_name="m", version=name, handler="handler") for name in names]
    )

    assert sorted(model.version for model in outcomes) == names
    assert sum(info.is_default for info in manager.versions("m")) == 1
    assert [model.predict(model.version) for model in outcomes] == [model.version for model in outcomes]


def test_each_request_is_answered_rightly_while_everything_changes(manager: ModelManager, deploy: Deployer) -> None:
    """While a version is scaled up and down and others come and go, each request gets its own answer, once."""
    model = deploy(ECHO, initial_workers=2, batch_size=4, max_batch_delay=1)
    over = threading.Event()

    def predict(caller: int) -> int:
        for number in itertools.count():
            if over.is_set():
                return number
            assert model.predict((caller, number), timeout=30) == (caller, number)
        raise AssertionError

    def scale() -> None:
        for wanted in (1, 3, 2, 1, 3, 1):
            model.scale(wanted)

    def come_and_go(version: str) -> None:
        for number in range(4):
            with deploy(ECHO, version=f"{version}.{number}") as other:
                assert other.predict(version) == version

    with ThreadPoolExecutor(16) as threads:
        callers = [threads.submit(predict, caller) for caller in range(6)]
        changes = [threads.submit(scale), threads.submit(come_and_go, "2"), threads.submit(come_and_go, "3")]
        try:
            for change in changes:
                change.result()
        finally:
            over.set()
        answered = [caller.result() for caller in callers]

    assert all(answered), answered
    assert manager.describe("m").queue_length == 0
    assert [info.version for info in manager.versions("m")] == ["1.0"]


def test_who_predicts_while_the_version_goes_is_answered_or_told_that_it_is_gone(deploy: Deployer) -> None:
    """A request that meets an unregistration is answered or refused as not found: the manager is open all the time."""
    strange: list[BaseException] = []
    for _ in range(12):
        model = deploy(ECHO)
        over = threading.Event()

        def predict(caller: int, model: Any = model, over: threading.Event = over) -> None:
            for number in itertools.count():
                if over.is_set():
                    return
                try:
                    assert model.predict((caller, number), timeout=30) == (caller, number)
                except (ModelNotFound, ModelVersionNotFound):
                    return
                except TorchmgmtError as error:
                    strange.append(error)
                    return

        with ThreadPoolExecutor(16) as threads:
            callers = [threads.submit(predict, caller) for caller in range(4)]
            assert model.predict("warm") == "warm"
            model.unregister()
            over.set()
            for caller in callers:
                caller.result()

    assert strange == []


def test_who_predicts_while_the_manager_closes_is_answered_or_told_so(deploy: Deployer, manager: ModelManager) -> None:
    """A request that meets the closing of the manager is answered, or refused with ManagerClosed and nothing else."""
    model = deploy(ECHO, initial_workers=2)

    def predict(caller: int) -> TorchmgmtError:
        for number in itertools.count():
            try:
                assert model.predict((caller, number), timeout=30) == (caller, number)
            except TorchmgmtError as error:
                return error
        raise AssertionError

    with ThreadPoolExecutor(16) as threads:
        callers = [threads.submit(predict, caller) for caller in range(6)]
        assert model.predict("warm") == "warm"
        report = manager.close()
        ends = [caller.result() for caller in callers]

    assert {type(end) for end in ends} == {ManagerClosed}, ends
    assert report.clean, report


def test_a_registration_that_was_undone_takes_no_later_one_with_it(
    manager: ModelManager, deploy: Deployer, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registration whose version is unregistered while it waits fails; one that took the name since stays."""
    original = WorkerPool.wait_ready
    waits, resume = threading.Event(), threading.Event()

    def hear_of_it_late(pool: WorkerPool, timeout: float | None = None) -> None:
        waits.set()
        try:
            original(pool, timeout)
        except TorchmgmtError:
            resume.wait(20)
            raise

    monkeypatch.setattr(WorkerPool, "wait_ready", hear_of_it_late)
    with ThreadPoolExecutor(1) as threads:
        undone = threads.submit(deploy, f"{TOOLS}\nwait_for({gate.path!r})\n{ECHO}")
        assert waits.wait(20)
        manager.unregister("m")
        later = deploy(ECHO)
        resume.set()
        assert isinstance(undone.exception(20), TorchmgmtError)
    assert list(manager) == ["m"]
    assert later.predict("still here") == "still here"


def test_a_batch_is_full_when_enough_wait_and_never_larger(deploy: Deployer, gate: Gate) -> None:
    """What waits while the worker is busy is run in batches of batch_size, in the order in which it came."""
    model = deploy(GATED_SIZES, batch_size=4)
    first = model.submit(fields={"body": "first", "gate": gate.path})
    until(first.running, "the first request runs")
    futures = [model.submit(number) for number in range(10)]
    until(lambda: model.describe().queue_length == 10, "ten requests wait")

    gate.open()

    answers = [future.result(20) for future in futures]
    assert [body for body, _, _ in answers] == list(range(10))
    assert [size for _, size, _ in answers] == [4] * 8 + [2] * 2
    assert [place for _, _, place in answers] == [0, 1, 2, 3] * 2 + [0, 1]


def test_a_batch_that_is_not_full_is_run_after_the_delay(deploy: Deployer) -> None:
    """A lone request does not wait for others for ever: it is run alone when max_batch_delay is over."""
    model = deploy(SIZES, batch_size=64, max_batch_delay=20)
    assert model.predict("alone", timeout=20) == ("alone", 1, 0)


def test_requests_of_one_caller_are_run_in_their_order(deploy: Deployer, tmp_path: Path) -> None:
    """With one worker, requests are run in the order in which they were submitted."""
    order = tmp_path / "order"
    source = f"{TOOLS}\ndef handle(data, context):\n"
    source += f"    return data and [note({str(order)!r}, row['body']) for row in data]\n"
    model = deploy(source, batch_size=3, max_batch_delay=1)

    for future in [model.submit(number) for number in range(50)]:
        future.result(20)

    assert lines_of(order) == [str(number) for number in range(50)]


def test_two_workers_run_at_the_same_time(deploy: Deployer) -> None:
    """Each of two requests can wait for what the other one does: they run in different processes, side by side."""
    model = deploy(initial_workers=2)
    folder = model.describe().spec.model_dir
    one = model.submit(f"[note('{folder}/a'), wait_for('{folder}/b'), os.getpid()][-1]")
    two = model.submit(f"[note('{folder}/b'), wait_for('{folder}/a'), os.getpid()][-1]")
    assert one.result(20) != two.result(20)


def test_what_was_submitted_is_what_the_handler_gets(deploy: Deployer, gate: Gate) -> None:
    """A request is what its data was when it was submitted, whatever the caller does with an array afterwards."""
    model = deploy(GATED_SIZES.replace('(row["body"], len(data), place)', 'row["body"]'))
    first = model.submit(fields={"body": "first", "gate": gate.path})
    until(first.running, "the first request runs")
    frame = np.zeros(100_000, dtype=np.uint8)
    futures = []
    for number in range(3):
        frame[:] = number
        futures.append(model.submit(frame))

    gate.open()

    assert [int(future.result(20)[0]) for future in futures] == [0, 1, 2]
