"""A caller that is alone hands its request to an idle worker itself."""

from __future__ import annotations

import gc

import pytest

from tests.handlers import ECHO, PATIENCE_S, Deployer, until
from torchmgmt.channel import Channel
from torchmgmt.seat import Seat


def test_a_lone_caller_takes_it(deploy: Deployer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its request does not go by way of the dispatcher."""
    model = deploy(ECHO)
    taken: list[object] = []
    take = Seat.take

    def noted(seat: Seat, entry: object, item: object) -> None:
        take(seat, entry, item)
        taken.append(seat)

    monkeypatch.setattr(Seat, "take", noted)
    for number in range(10):
        assert model.predict(number) == number
    assert len(taken) >= 8


@pytest.mark.parametrize("sent", [5, 0])
def test_a_worker_that_gets_half_a_request_is_ended(
    sent: int, deploy: Deployer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows what it would read next; the request is another one's."""
    model = deploy(ECHO)
    pid = model.describe().workers[0].pid
    monkeypatch.setattr(
        Channel, "send_raw", property(lambda channel: lambda data, flags: channel._sock.send(data[:sent], flags))
    )
    for _ in range(3):  # the first of them has the seat be offered
        assert model.predict("x", timeout=PATIENCE_S) == "x"
    monkeypatch.undo()
    until(lambda: model.describe().workers and model.describe().workers[0].pid not in {pid, None}, "another worker")
    assert model.predict("y") == "y"


def test_large_answers_are_released_in_time(deploy: Deployer) -> None:
    """What is to be said of shared memory goes with a request of the usual way: the seat is not offered then."""
    model = deploy("def handle(data, context): return data and [bytes(4 << 20) for _ in data]")
    for _ in range(40):
        assert len(model.predict(b"x")) == 4 << 20
    gc.collect()
    assert model.predict(b"x")[:2] == b"\0\0"
