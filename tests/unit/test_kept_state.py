"""A look at what a module answers leaves no trace: state and random numbers are what they would have been without."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.unit.live import Running, one_thread
from torchmgmt.handlers.kept_state import KeptState, stand_in

__all__ = ["one_thread"]


class Remembering(nn.Module):
    """Keeps what it was asked with in every way that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("bound", torch.zeros(()))
        self.register_buffer("unset", None)
        self.plain = torch.zeros(())
        self.number = 0
        self.history: list[int] = []
        self.by_size: dict[int, int] = {}
        self.sizes: set[int] = set()

    def forward(self, batch: Tensor) -> Tensor:
        self.count += 1
        self.bound = self.bound + 1
        self.unset = torch.ones(()) if self.unset is None else self.unset + 1
        self.plain.add_(1)
        self.number += 1
        self.history.append(len(batch))
        self.by_size[len(batch)] = self.number
        self.sizes.add(len(batch))
        self.last = batch.sum()
        return batch * 2

    def everything(self) -> Any:
        tensors = [float(each) for each in (self.count, self.bound, self.plain)]
        others = [self.number, list(self.history), dict(self.by_size), set(self.sizes)]
        return tensors, others, None if self.unset is None else float(self.unset), hasattr(self, "last")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: net,
        lambda net: nn.Sequential(nn.Identity(), net),
        lambda net: net.forward,
        lambda net: lambda batch: net(batch) * 2,
        lambda net: functools.partial(lambda module, batch: module(batch), net),
    ],
    ids=["module", "inside", "method", "closure", "partial"],
)
def test_a_module_is_asked_as_often_as_it_was_asked(wrap: Callable[[Any], Any]) -> None:
    """What it keeps in buffers, attributes and containers says nothing of more."""
    net, other = Remembering().eval(), Remembering().eval()
    running = Running(wrap(net), "stack", batch_size=1)
    for items in (torch.ones(1, 2), torch.ones(3, 2)):
        running(*items)
        other(items)
    assert net.everything() == other.everything()


def test_what_was_not_changed_is_not_written_to() -> None:
    """Buffers may lie in memory that all workers share."""
    net = nn.BatchNorm1d(3).eval()
    versions = [buffer._version for buffer in net.buffers()]
    kept = KeptState(net, with_generators=True)
    net(torch.ones(2, 3))
    kept.put_back_all()
    assert [buffer._version for buffer in net.buffers()] == versions


def test_statistics_of_a_layer_in_training_are_put_back() -> None:
    """As those of every buffer."""
    net = nn.BatchNorm1d(3).train()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    kept = KeptState(lambda batch: net(batch) * 2, with_generators=False)
    net(torch.randn(4, 3))
    assert not torch.equal(net.running_mean, before["running_mean"])
    kept.put_back()
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())


def test_a_lazy_module_stays_what_it_became() -> None:
    """Its parameters are made at the first call, and its class is another one then."""
    net = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d()).eval()
    kept = KeptState(net, with_generators=False)
    net(torch.ones(2, 5))
    kept.put_back()
    assert net(torch.ones(3, 5)).shape == (3, 2)
    assert type(net[0]) is nn.Linear


def numbers() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(np.random.rand())


def seed() -> None:
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)


@pytest.fixture
def kept_generators() -> Iterator[None]:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    yield
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


@pytest.mark.usefixtures("kept_generators")
def test_random_numbers_are_drawn_as_often_as_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has seeded a worker's generators gets the numbers that follow; those of the program itself go on."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    seed()
    expected = [numbers(), numbers()]

    def draw(batch: Tensor) -> Tensor:
        return torch.tensor([numbers() for _ in batch])

    for is_written in (True, False):
        running = Running(draw, "stack", is_written=is_written)
        seed()
        drawn = [tuple(running(torch.ones(1))[0].tolist()) for _ in range(2)]
        assert (drawn == [pytest.approx(each) for each in expected]) is is_written


class Script(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.sum = torch.zeros(())
        self.register_buffer("count", torch.zeros(()))

    def forward(self, batch: Tensor) -> Tensor:
        self.calls += 1
        self.sum = self.sum + batch.sum()
        self.count += 1
        return batch * self.calls


def test_what_torchscript_keeps_is_as_if_it_was_asked_once() -> None:
    """In buffers, in attributes that are tensors, and in those that are numbers."""
    script = torch.jit.script(Script())
    answers = [Running(script, "stack", batch_size=1)(torch.ones(2))]
    assert [answer.tolist() for answer in answers[0]] == [[1, 1]]
    assert (script.calls, float(script.sum), float(script.count)) == (1, 2, 1)


def test_a_script_that_is_too_large_to_be_copied_keeps_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands in for itself then."""
    monkeypatch.setattr("torchmgmt.handlers.kept_state._MOST_COPIED_BYTES", -1)
    script = torch.jit.script(Script())
    assert stand_in(script) is script
    Running(script, "stack", batch_size=1)(torch.ones(2))
    assert float(script.count) == 1
