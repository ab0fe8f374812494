"""Modules, functions, handlers and model files that are registered as they are, in real processes."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from tests.handlers import run_program, until
from torchmgmt import Model, ModelManager, ProcessBackend
from torchmgmt.errors import HandlerFailed, InvalidArchive, InvalidArgument, WorkerStartFailed
from torchmgmt.state_file import StateFile

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="counts what has no name in memory")


def pids(model: Model) -> list[int]:
    return [worker.pid or 0 for worker in model.describe().workers]


def memories() -> int:
    """How many live objects this process holds the memory of."""
    links = list(Path("/proc/self/fd").iterdir())
    return sum("torchmgmt-live" in str(link.readlink()) for link in links if link.is_symlink())


def counting_net() -> nn.Module:
    """A module that writes into its own state: it answers how often it was called, and in which process."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, item: torch.Tensor) -> torch.Tensor:
            self.calls += len(item)
            pid = torch.tensor([float(os.getpid())])
            return torch.cat([self.calls, pid]).expand(len(item), 2)

    return Counting()


@pytest.mark.parametrize("share_weights", ["auto", "never"])
@pytest.mark.parametrize("script", [False, True], ids=["module", "script"])
def test_a_module_answers_as_in_the_program(manager: ModelManager, share_weights: str, script: bool) -> None:
    """Whichever way its workers get it; in evaluation mode, though the program's own is not."""
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    registered = torch.jit.script(net) if script else net
    model = manager.register(registered, model_name="m", initial_workers=2, batch_size=4, share_weights=share_weights)
    items = torch.randn(8, 4)
    assert net.training
    expected = net.eval()(items)
    for answer, wanted in zip(model.map(items), expected, strict=True):
        assert torch.allclose(answer, wanted, atol=1e-6)
    assert model.describe().sharing.is_shared is (share_weights == "auto")


def test_an_exported_program_answers_as_in_the_program(manager: ModelManager) -> None:
    """For batches of any size that it was exported for."""
    net = nn.Linear(4, 2)
    program = torch.export.export(net, (torch.zeros(2, 4),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    model = manager.register(program, model_name="m", batch_size=4)
    items = torch.randn(6, 4)
    for answer, item in zip(model.map(items), items, strict=True):
        assert torch.allclose(answer, net(item), atol=1e-6)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
def test_sixty_callers_get_their_own_states(manager: ModelManager, layer: type[nn.RNNBase]) -> None:
    """Output and states of a recurrent layer are each caller's own, whoever else is in the batch and whichever worker runs it."""
    net = layer(4, 8, num_layers=2, batch_first=True).eval()
    model = manager.register(net, model_name="m", initial_workers=2, batch_size=8, max_batch_delay=5)
    items = torch.randn(60, 6, 4)

    def check(item: torch.Tensor) -> bool:
        with torch.inference_mode():
            wanted = net(item)
        answer = model.predict(item, timeout=30)
        flat = [answer[0], *(answer[1] if layer is nn.LSTM else answer[1:])]
        expected = [wanted[0], *(wanted[1] if layer is nn.LSTM else wanted[1:])]
        return all(torch.allclose(got, each, atol=1e-5) for got, each in zip(flat, expected, strict=True))

    with ThreadPoolExecutor(60) as callers:
        for _ in range(3):
            assert all(callers.map(check, items))


def test_a_module_that_mixes_its_callers_answers_none_of_them(manager: ModelManager) -> None:
    """With the reason, and what to do; the worker lives."""
    model = manager.register(nn.LSTM(4, 8), model_name="m", batch_size=8, max_batch_delay=20)
    errors = [future.exception(30) for future in [model.submit(torch.randn(6, 4)) for _ in range(5)]]
    assert all(isinstance(error, HandlerFailed) and "batch_first=True" in str(error) for error in errors)
    with pytest.raises(HandlerFailed, match="NotABatch"):
        model.predict(torch.randn(6, 4))


def test_a_program_of_a_fixed_batch_is_run_or_says_what_it_needs(manager: ModelManager) -> None:
    """One that takes batches of one is run for each request; one that takes others cannot be asked one by one."""
    net = nn.Linear(4, 2)
    items = torch.randn(6, 4)
    for batch in (1, 3):
        program = torch.export.export(net, (torch.zeros(batch, 4),))
        manager.register(program, model_name=f"of {batch}", batch_size=3, max_batch_delay=20)
    for answer, item in zip(manager["of 1"].map(items), items, strict=True):
        assert torch.allclose(answer, net(item), atol=1e-6)
    with pytest.raises(HandlerFailed, match=r"batches of exactly 3.*dynamic_shapes"):
        list(manager["of 3"].map(items))


def test_what_is_registered_stays_what_it_was(manager: ModelManager) -> None:
    """Workers that start later, and those in place of one that died, have the module as it was at the call."""
    net = nn.Linear(2, 2, bias=False)
    item = torch.ones(2)
    expected = net(item).detach()
    model = manager.register(net, model_name="m", share_weights="never")
    with torch.no_grad():
        net.weight.zero_()
    kept = weakref.ref(net)
    del net
    gc.collect()
    assert kept() is None, "the program cannot get its memory back"
    (first,) = pids(model)
    os.kill(first, signal.SIGKILL)
    until(lambda: pids(model) not in ([first], [], [0]), "another worker has come")
    assert torch.equal(model.predict(item, timeout=20), expected)
    model.scale(3)
    assert all(torch.equal(answer, expected) for answer in model.map([item] * 9))


@pytest.mark.parametrize("share_weights", ["auto", "never"])
def test_what_one_worker_writes_no_other_sees(manager: ModelManager, share_weights: str) -> None:
    """State that a module changes in place is each worker's own, and not the program's."""
    net = counting_net()
    model = manager.register(net, model_name="m", initial_workers=2, share_weights=share_weights)
    calls: dict[float, list[float]] = {}
    until(lambda: [note(calls, model) for _ in range(4)] and len(calls) == 2, "both workers have answered")
    for counts in calls.values():
        assert sorted(counts) == [float(n) for n in range(1, len(counts) + 1)]
    assert net.calls.item() == 0


def note(calls: dict[float, list[float]], model: Model) -> None:
    for count, pid in [future.result(20) for future in [model.submit(torch.zeros(1)) for _ in range(8)]]:
        calls.setdefault(float(pid), []).append(float(count))


@pytest.mark.parametrize("share_weights", ["auto", "never"])
def test_workers_share_one_copy_of_the_weights(manager: ModelManager, share_weights: str) -> None:
    """Four workers that have read all weights have no memory of their own for them, whether forked from a template or not."""

    class Heavy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.ones(1 << 25))

        def forward(self, item: torch.Tensor) -> torch.Tensor:
            return item + self.weights.sum()

    size = 4 << 25
    model = manager.register(Heavy(), model_name="m", initial_workers=4, share_weights=share_weights)
    seen: set[int] = set()

    def each_has_read_them() -> bool:
        for answer in [model.submit(torch.zeros(1)) for _ in range(8)]:
            assert answer.result(20) == 1 << 25
        seen.update(pid for pid in pids(model) if shared_of(pid) > size // 2)
        return len(seen) == 4

    until(each_has_read_them, "each worker has the weights in its memory")
    memory = [psutil.Process(pid).memory_full_info() for pid in pids(model)]
    assert all(each.uss < size // 2 for each in memory)
    # One copy, and what torch takes in four processes; four copies would be more by themselves.
    assert sum(each.pss for each in memory) < 4 * size


def shared_of(pid: int) -> int:
    memory = psutil.Process(pid).memory_full_info()
    return int(memory.rss - memory.uss)


def test_the_memory_goes_with_the_version(manager: ModelManager) -> None:
    """One piece for each version, until it is unregistered; none is left by a registration that fails."""
    model = manager.register(nn.Linear(2, 2), model_name="m", initial_workers=2)
    assert memories() == 1
    manager.register(nn.Linear(2, 2), model_name="m", version="2.0", initial_workers=0)
    assert memories() == 2
    manager.unregister("m", "2.0")
    model.unregister()
    assert memories() == 0

    class Broken:
        def initialize(self, context: Any) -> None:
            raise RuntimeError("no luck")

        def handle(self, data: Any, context: Any) -> Any:
            return data

    with pytest.raises(WorkerStartFailed, match="no luck"):
        manager.register(Broken(), model_name="m")
    with pytest.raises(InvalidArgument):
        manager.register(nn.Linear(2, 2), model_name="m", batching="both")
    assert memories() == 0
    assert manager.register(nn.Linear(2, 1), model_name="m").predict(torch.zeros(2)).shape == (1,)


def test_handlers_are_run_as_those_of_archives_are(manager: ModelManager) -> None:
    """An instance brings its state, a class is made in the worker; both are initialised there, and describe themselves."""

    class Scaling:
        def __init__(self, factor: torch.Tensor | None = None) -> None:
            self.factor = torch.ones(2) if factor is None else factor
            self.name = None

        def initialize(self, context: Any) -> None:
            self.name = context.model_name

        def handle(self, data: Any, context: Any) -> Any:
            return [(self.name, row["body"] * self.factor) for row in data]

        def describe_handle(self) -> Any:
            return {"factor": self.factor.tolist()}

    instance = Scaling(torch.full((2,), 3.0))
    first = manager.register(instance, model_name="instance")
    name, answer = first.predict(torch.ones(2))
    assert (name, answer.tolist()) == ("instance", [3, 3])
    assert instance.name is None
    assert first.describe(customized=True).customized_metadata == {"factor": [3, 3]}
    assert manager.register(Scaling, model_name="class").predict(torch.ones(2))[1].tolist() == [1, 1]


def test_describe_shows_what_it_was_made_from(manager: ModelManager) -> None:
    """In words that are the same in each run of the program."""
    shown = {
        "net": nn.Linear(1, 1),
        "script": torch.jit.script(nn.Linear(1, 1)),
        "function": run_program,
    }
    for name, source in shown.items():
        manager.register(source, model_name=name, initial_workers=0)
    urls = {info.name: info.to_dict()["modelUrl"] for info in manager.models()}
    assert urls == {
        "net": "<class 'torch.nn.modules.linear.Linear'>",
        "script": "<ScriptModule Linear>",
        "function": "<function tests.handlers.run_program>",
    }
    assert manager.describe("net").to_dict()["runtime"] == "python"


@pytest.mark.parametrize("batching, wanted", [("stack", (2,)), ("list", (2,))])
def test_errors_of_a_module_are_its_callers(manager: ModelManager, batching: str, wanted: tuple[int, ...]) -> None:
    """What does not go in fails the request with the module's own words; the worker goes on."""

    def call(items: Any) -> Any:
        return torch.stack(list(items)) @ torch.ones(3, 2)

    model = manager.register(call, model_name="m", batching=batching)
    with pytest.raises(HandlerFailed, match="shapes cannot be multiplied"):
        model.predict(torch.ones(4))
    assert model.predict(torch.ones(3)).shape == wanted


def test_threads_use_the_object_itself(manager: ModelManager) -> None:
    """What the program does to the module is seen at once; a handler is initialised once; training mode is refused."""
    net = nn.Linear(2, 1, bias=False)
    with pytest.raises(InvalidArgument, match="evaluation mode"):
        manager.register(net, model_name="m", backend="thread")
    model = manager.register(net.eval(), model_name="m", backend="thread", initial_workers=2)
    with torch.no_grad():
        net.weight.fill_(4)
    assert model.predict(torch.ones(2)) == 8
    assert memories() == 0

    class Once:
        times = 0

        def initialize(self, context: Any) -> None:
            self.times += 1

        def handle(self, data: Any, context: Any) -> Any:
            return [self.times for _ in data]

    assert manager.register(Once(), model_name="once", backend="thread", initial_workers=3).predict(0) == 1


# -- model files -------------------------------------------------------------------------------------------------------


def weights(file: Path, net: nn.Module) -> None:
    torch.save(net.state_dict(), file)


def script(file: Path, net: nn.Module) -> None:
    torch.jit.script(net).save(str(file))


def safetensors(file: Path, net: nn.Module) -> None:
    pytest.importorskip("safetensors.torch").save_file(net.state_dict(), file)


@pytest.mark.parametrize(
    "name, write, model_class",
    [
        ("m.pt", weights, lambda: nn.Linear(3, 2)),
        ("m.PTH", weights, lambda: nn.Linear(3, 2)),
        ("m.safetensors", safetensors, lambda: nn.Linear(3, 2)),
        ("m.pt", script, None),
    ],
)
def test_a_model_file_needs_no_archive(
    manager: ModelManager, tmp_path: Path, name: str, write: Callable[[Path, nn.Module], None], model_class: Any
) -> None:
    """TorchScript by its path alone, weights with what makes the module that they belong to."""
    net = nn.Linear(3, 2)
    write(tmp_path / name, net)
    model = manager.register(tmp_path / name, model_name="m", model_class=model_class, initial_workers=2)
    item = torch.randn(3)
    assert torch.allclose(model.predict(item), net(item), atol=1e-6)
    assert model.describe().to_dict()["modelUrl"] == str(tmp_path / name)


def test_a_model_file_that_cannot_be_used_says_what_is_missing(manager: ModelManager, tmp_path: Path) -> None:
    """Weights without a class, a class without weights, and arguments that only archives have."""
    file = tmp_path / "m.pt"
    weights(file, nn.Linear(3, 2))
    with pytest.raises(WorkerStartFailed, match="register it with model_class="):
        manager.register(file, model_name="m")
    with pytest.raises(WorkerStartFailed, match="made an object of type int, not"):
        manager.register(file, model_name="m", model_class=lambda: 5)
    with pytest.raises(InvalidArgument, match="model_class is 5"):
        manager.register(file, model_name="m", model_class=5)
    with pytest.raises(InvalidArgument, match="model_class is None"):
        manager.register(file.rename(tmp_path / "m.safetensors"), model_name="m")
    with pytest.raises(InvalidArgument, match="model_class"):
        manager.register(nn.Linear(1, 1), model_name="m", model_class=nn.Linear)
    with pytest.raises(InvalidArgument, match="model_name"):
        manager.register(nn.Linear(1, 1))
    with pytest.raises(InvalidArgument, match="handler"):
        manager.register(nn.Linear(1, 1), model_name="m", handler="base_handler")
    with pytest.raises(InvalidArgument, match="batching"):
        manager.register(tmp_path, model_name="m", handler="h.py", batching="stack")


def test_callers_over_http_register_archives_only(backend: ProcessBackend, tmp_path: Path) -> None:
    """Who is not trusted gets no model file run, wherever it lies: it is no archive."""
    script(tmp_path / "m.pt", nn.Linear(3, 2))
    with ModelManager(tmp_path, backend=backend) as manager:
        with pytest.raises(InvalidArchive):
            manager.register("m.pt", model_name="m", trusted=False)
        with pytest.raises(InvalidArgument):
            manager.register(nn.Linear(3, 2), model_name="m", trusted=False)


def test_a_state_file_keeps_what_can_be_brought_back(backend: ProcessBackend, tmp_path: Path) -> None:
    """A model file is there again after a restart; a live object is not: the program that made it makes it again."""
    script(tmp_path / "m.pt", nn.Linear(3, 2))
    state = tmp_path / "state.json"
    with ModelManager(backend=backend, state_file=state) as manager:
        manager.register(tmp_path / "m.pt", model_name="file", batch_size=3, batching="list")
        manager.register(tmp_path / "m.pt", model_name="both", initial_workers=0)
        manager.register(nn.Linear(3, 2), model_name="both", version="2.0", initial_workers=0)
        manager.set_default("both", "2.0")
        manager.register(nn.Linear(3, 2), model_name="live", initial_workers=0)
    with contextlib.closing(StateFile(state)) as file:
        assert {stored.key.name for stored in file.read().versions()} == {"file", "both"}
    with ModelManager(backend=backend, state_file=state) as manager:
        assert sorted(manager) == ["both", "file"]
        assert manager.describe("both").version == "1.0"
        assert manager.describe("file").spec.batch_size == 3
        with pytest.raises(HandlerFailed):  # it gets the list that it asked for, and a script takes a tensor
            manager.predict("file", torch.ones(3))


# -- programs ----------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, threading, torch
from torchmgmt import ModelManager

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, item):
        return helper(self.second(self.first(item)))

def helper(value):
    return value * FACTOR

FACTOR = 2
net, item = Net().eval(), torch.ones(3)
with ModelManager() as manager:
    model = manager.register(net, model_name="net", initial_workers=4)
    assert torch.allclose(model.predict(item), net(item), atol=1e-6)
    assert len(model.describe().workers) == 4
    print(model.describe().to_dict()["modelUrl"])
    print(manager.register(lambda values: [value + FACTOR for value in values], model_name="f").predict(40))
"""


def test_what_a_program_defines_itself_needs_no_module() -> None:
    """Classes, functions and variables of ``__main__`` are there in workers, in a program that is no file."""
    done = run_program(PROGRAM)
    assert (done.returncode, done.stdout, done.stderr) == (0, "<class '__main__.Net'>\n42\n", "")


def test_a_program_that_hands_over_no_tensor_has_no_torch(tmp_path: Path) -> None:
    """A function of plain data costs it neither the import nor its memory; modules on its own path are found."""
    (tmp_path / "beside.py").write_text("def shout(values):\n    return [value.upper() for value in values]\n")
    done = run_program(
        f"""
import sys
from torchmgmt import ModelManager
with ModelManager() as manager:
    manager.warm()
    sys.path.append({str(tmp_path)!r})
    import beside
    print(manager.register(beside.shout, model_name="f").predict("text"), "torch" in sys.modules)
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "TEXT False\n", "")


def test_the_example_does_what_it_shows(repository: Path) -> None:
    """It runs as a file, too, from wherever it is started."""
    done = subprocess.run(
        [sys.executable, repository / "examples" / "live" / "demo.py"],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    assert "a module: 100 answers by 2" in done.stdout
    assert "a file of weights: 32 of 32 digits are right" in done.stdout


def test_a_module_that_workers_cannot_import_is_named(manager: ModelManager, tmp_path: Path) -> None:
    """With what to do about it."""
    (tmp_path / "hidden.py").write_text("def same(values):\n    return values\n")
    spec = importlib.util.spec_from_file_location("hidden_live_module", tmp_path / "hidden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hidden_live_module"] = module
    spec.loader.exec_module(module)
    try:
        with pytest.raises(WorkerStartFailed, match="register_pickle_by_value"):
            manager.register(module.same, model_name="m")
    finally:
        del sys.modules["hidden_live_module"]


def test_a_large_tensor_travels_both_ways(manager: ModelManager) -> None:
    """And may be changed by whoever gets it, on both sides."""
    model = manager.register(lambda values: [value.add_(1) for value in values], model_name="m")
    item = torch.zeros(1 << 20)
    for _ in range(3):
        answer = model.predict(item)
        assert answer.add_(1).eq(2).all()
    assert not item.any()
