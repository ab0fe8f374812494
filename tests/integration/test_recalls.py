"""Batches that lie behind one which takes long: they go to whoever is free, and who waits for them can give them up."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from tests.handlers import EVAL, Deployer, Gate, lines_of, until
from torchmgmt import Model
from torchmgmt.errors import DeadlineExceeded, ManagerClosed

BACKENDS = ["process", "thread"]


@pytest.fixture(params=BACKENDS)
def quick(request: pytest.FixtureRequest, deploy: Deployer) -> Model:
    """A model whose batches were short so far, so that further ones lie with its one worker."""
    return used(deploy(EVAL, batch_size=1, backend=request.param))


def used(model: Model) -> Model:
    for future in [model.submit("1") for _ in range(50)]:
        future.result(20)
    return model


def lying(model: Model, gate: Gate, *expressions: str, **options: float) -> list:
    """Have a worker compute until the gate opens, and these lie behind that."""
    held = model.submit(gate.expression)
    until(gate.reached, "the worker computes")
    return [held, *(model.submit(each, **options) for each in expressions)]


def test_who_is_free_runs_what_lies_behind_a_long_batch(deploy: Deployer, gate: Gate) -> None:
    """With two workers nothing waits for the one that takes long."""
    model = used(deploy(EVAL, batch_size=1, initial_workers=2))
    held, *others = lying(model, gate, "time.sleep(0.05)", *map(str, range(8)))
    assert [future.result(20) for future in others[1:]] == list(range(8))
    assert not held.done()
    gate.open()
    held.result(20)


def test_what_lies_there_can_be_taken_back(quick: Model, gate: Gate, tmp_path: Path) -> None:
    """After a moment cancelling it works, and it is never run; what is not cancelled is run, in its order."""
    noted = tmp_path / "noted"
    held, *others = lying(quick, gate, *(f"note({str(noted)!r}, {number})" for number in range(6)))
    until(others[1].cancel, "it can be taken back")
    until(others[4].cancel, "it can be taken back")
    gate.open()
    wait([held, *others], 20)
    assert lines_of(noted) == ["0", "2", "3", "5"]


def test_what_lies_there_waits_no_longer_than_it_may(quick: Model, gate: Gate, tmp_path: Path) -> None:
    """``wait_timeout`` holds, and what is past it is never run."""
    noted = tmp_path / "noted"
    held, *others = lying(quick, gate, *[f"note({str(noted)!r})"] * 4, wait_timeout=0.4)
    for future in others:
        with pytest.raises(DeadlineExceeded):
            future.result(20)
    assert not held.done()
    gate.open()
    held.result(20)
    assert quick.predict("1", timeout=20) == 1
    assert not noted.exists()


def test_what_lies_there_and_is_abandoned_is_not_run(quick: Model, gate: Gate, tmp_path: Path) -> None:
    """So is what a client asked for that has left meanwhile."""
    noted = tmp_path / "noted"
    held, *others = lying(quick, gate, *[f"note({str(noted)!r})"] * 3)
    for future in others:
        future.abandon()
    until(lambda: quick.describe().queue_length == 0, "nobody waits")
    time.sleep(0.3)  # they are recalled meanwhile
    gate.open()
    held.result(20)
    assert quick.predict("1", timeout=20) == 1
    assert not noted.exists()


@pytest.mark.parametrize("kind", BACKENDS)
def test_descriptions_lie_there_too(deploy: Deployer, gate: Gate, kind: str) -> None:
    """What asks how the model describes itself is taken back as any other, and run by who is free."""
    model = used(deploy(EVAL, batch_size=1, backend=kind, initial_workers=2))
    with ThreadPoolExecutor() as pool:
        held, *others = lying(model, gate, "time.sleep(0.05)")
        descriptions = [pool.submit(model.describe, customized=True) for _ in range(4)]
        assert all(each.result(20).customized_metadata is not None for each in descriptions)
        assert not held.done()
        gate.open()
        wait([held, *others], 20)


def test_a_large_request_that_is_long_on_its_way_is_run(deploy: Deployer) -> None:
    """It is the batch before others, begun or not: what is recalled is what lies behind it."""
    model = used(deploy(EVAL, batch_size=1))
    large = model.submit(fields={"body": "len(data[0]['payload'])", "payload": bytes(300_000_000)})
    small = [model.submit(str(number)) for number in range(3)]
    assert large.result(20) == 300_000_000
    assert [each.result(20) for each in small] == [0, 1, 2]


def test_nothing_is_lost_when_it_closes_meanwhile(quick: Model, gate: Gate) -> None:
    """What was accepted is run or refused, whether it was recalled or not."""
    _, *others = lying(quick, gate, *map(str, range(6)))
    time.sleep(0.12)
    gate.open()
    quick.unregister()
    done = wait(others, 20)
    assert not done.not_done
    assert all(isinstance(future.exception(), ManagerClosed | None) for future in others)
