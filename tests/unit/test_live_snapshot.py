"""What is written down of a live object, and what is made of it again."""

from __future__ import annotations

import inspect
import linecache
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from torchmgmt.errors import InvalidArgument
from torchmgmt.handlers.live_loading import read_snapshot
from torchmgmt.live import live_object
from torchmgmt.live.snapshot import write_snapshot


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Any]]:
    """Returns what a worker makes of an object; each call is a worker of its own."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def copy(target: Any) -> Any:
        fd = write_snapshot(target, "it")
        try:
            return read_snapshot(fd)
        finally:
            os.close(fd)

    return copy


def test_tied_weights_and_views_share_memory_as_before(copied: Callable[[Any], Any]) -> None:
    """A parameter that is two is one, and what shows a part of a tensor shows it still."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    net.register_buffer("whole", torch.arange(6.0))
    net.register_buffer("part", net.whole[2:4])
    again = copied(net)
    assert again[1].weight is again[0].weight
    assert torch.equal(again[0].weight, net[0].weight)
    again.whole[2] = 50
    assert again.part.tolist() == [50, 3]
    assert net.part.tolist() == [2, 3]


@pytest.mark.parametrize("has_memfd", [True, False])
def test_what_one_writes_no_other_sees(monkeypatch: pytest.MonkeyPatch, has_memfd: bool) -> None:
    """Two workers over one piece of memory, or one file where there is none, are as apart as two that have a copy each."""
    if not has_memfd:
        monkeypatch.delattr(os, "memfd_create")
    net = nn.Linear(4, 4)
    before = net.weight.detach().clone()
    fd = write_snapshot(net, "it")
    path = list(sys.path)
    try:
        first, second = read_snapshot(fd), read_snapshot(fd)
    finally:
        os.close(fd)
        sys.path[:] = path
    with torch.no_grad():
        first.weight.zero_()
    assert torch.equal(second.weight, before)
    assert torch.equal(net.weight, before)


def test_the_memory_cannot_be_written_to() -> None:
    """Not even by whoever is handed the descriptor."""
    fd = write_snapshot(nn.Linear(2, 2), "it")
    try:
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
    finally:
        os.close(fd)


def test_kinds_of_state_come_out_as_they_were(copied: Callable[[Any], Any]) -> None:
    """Sparse and empty tensors, arrays, scripts inside of modules, and closures."""
    net = nn.Module()
    net.register_buffer("sparse", torch.eye(3).to_sparse())
    net.register_buffer("nothing", torch.zeros(0, 2))
    net.array = np.arange(5)
    net.script = torch.jit.script(nn.Linear(2, 1))
    net.hook = lambda: net.array.sum() + 0
    again = copied(net)
    assert torch.equal(again.sparse.to_dense(), torch.eye(3))
    assert again.nothing.shape == (0, 2)
    assert again.array.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(again.script(torch.ones(2)), net.script(torch.ones(2)))
    again.array[0] = 10
    assert again.hook() == 20
    assert net.hook() == 10


def test_parametrized_modules_come_out_as_they_were(copied: Callable[[Any], Any]) -> None:
    """Weight norm and its like, of which torch itself pickles the state alone."""
    net = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2))
    torch.nn.utils.parametrizations.orthogonal(net[1])
    again = copied(net).eval()
    item = torch.randn(1, 3)
    assert torch.allclose(again(item), net.eval()(item))
    assert again.state_dict().keys() == net.state_dict().keys()
    assert torch.nn.utils.parametrize.is_parametrized(again[0], "weight")
    assert type(again[0]).__name__ == "ParametrizedLinear"
    torch.nn.utils.parametrize.remove_parametrizations(again[0], "weight")
    assert torch.allclose(again(item), net(item))


def test_large_state_stays_out_of_the_pickle() -> None:
    """What is written is as large as the numbers in it, once, though two names lead there."""
    net = nn.Linear(1000, 1000)
    net.copy_of = net.weight
    net.array = np.zeros(1_000_000)
    fd = write_snapshot(net, "it")
    try:
        size = os.fstat(fd).st_size
    finally:
        os.close(fd)
    assert 12_000_000 < size < 12_100_000


def _with_lock() -> nn.Module:
    net = nn.Sequential(nn.Linear(1, 1), nn.Module())
    net[1].guards = {"write": threading.Lock()}
    return net


def _closure() -> Any:
    lock = threading.Lock()
    return lambda batch: (lock, batch)


@pytest.mark.parametrize(
    "make, words",
    [
        (_with_lock, "its 1.guards['write'] (an object of type _thread.lock)"),
        (_closure, "its variable lock (an object of"),
    ],
)
def test_what_cannot_be_pickled_is_named(make: Callable[[], Any], words: str) -> None:
    """The error leads to the part that is at fault, and says what to do."""
    live = live_object(make(), None)
    with pytest.raises(InvalidArgument) as refused:
        live.prepare("process", isolates_errors=False)
    assert words in str(refused.value)
    assert 'backend="thread"' in str(refused.value)
    assert live.descriptors() == ()


def test_a_release_gives_the_descriptor_back() -> None:
    """Once, however often it is asked for; then there is none to be had."""
    live = live_object(nn.Linear(1, 1), None)
    live.prepare("process", isolates_errors=False)
    (copy,) = live.descriptors()
    os.close(copy)
    live.release()
    live.release()
    with pytest.raises(OSError, match="Bad file descriptor"):
        live.descriptors()


def test_the_source_of_a_notebook_goes_along(copied: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that is in no file is shown in a worker's tracebacks, and found by what compiles source."""
    name = "<ipython-input-7-snapshot>"
    text = "def told(x):\n    return 1 / x  # told\n"
    monkeypatch.setitem(linecache.cache, name, (len(text), None, text.splitlines(keepends=True), name))
    module: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(text, name, "exec"), module)
    fd = write_snapshot(module["told"], "it")
    try:
        monkeypatch.delitem(linecache.cache, name)
        again = read_snapshot(fd)
    finally:
        os.close(fd)
    assert inspect.getsource(again) == text
    with pytest.raises(ZeroDivisionError) as raised:
        again(0)
    assert "return 1 / x  # told" in "".join(traceback.format_exception(raised.value))
