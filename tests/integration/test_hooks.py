"""Hooks of handlers: what each worker begins with after the model was loaded, once, and whatever the model is."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.handlers import PATIENCE_S, TOOLS, Deployer, Gate, lines_of, until
from torchmgmt import Model, ModelManager
from torchmgmt.errors import WorkerStartFailed
from torchmgmt.worker.service import ModelLoader

WAYS = ["auto", "never", "always"]
CLASS = (
    TOOLS
    + """
class Handler:
    def initialize(self, context):
        note({path!r}, f"initialize {{os.getpid()}}")
    def begin({parameters}):
        note({path!r}, f"begin {{os.getpid()}}")
        {body}
    def handle(self, data, context):
        return [eval(row["body"], {{**globals(), "self": self}}) for row in data]
"""
)
FUNCTION = (
    TOOLS
    + """
def begin({parameters}):
    note({path!r}, f"begin {{os.getpid()}}")
    {body}
def handle(data, context):
    if data is None:
        return note({path!r}, f"initialize {{os.getpid()}}")
    return [eval(row["body"]) for row in data]
"""
)


@pytest.fixture(params=["process", "thread"])
def backend_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pids(model: Model) -> list[int]:
    return [worker.pid or 0 for worker in model.describe().workers]


def noted(path: Path, what: str) -> list[int]:
    """The processes that noted it, in order."""
    return [int(line.split()[1]) for line in lines_of(path) if line.startswith(what)]


# -- begin -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_weights", WAYS)
@pytest.mark.parametrize("source", [CLASS, FUNCTION], ids=["class", "function"])
def test_each_worker_begins_once_after_the_model_was_loaded(
    deploy: Deployer, tmp_path: Path, source: str, share_weights: str
) -> None:
    """However workers come to their model, each calls begin once, in its own process, and no process that is none does."""
    path = tmp_path / "notes"
    text = source.format(path=str(path), parameters="self" if source is CLASS else "", body="pass")
    model = deploy(text, initial_workers=2, share_weights=share_weights)
    model.scale(3)
    assert sorted(noted(path, "begin")) == sorted(pids(model))
    lines = lines_of(path)
    assert lines[0].startswith("initialize")
    assert len(noted(path, "initialize")) == (3 if share_weights == "never" else 1)


def test_a_template_that_becomes_a_worker_begins_as_one(deploy: Deployer, tmp_path: Path) -> None:
    """Where loading left something behind, the process that loaded is the first worker, and calls begin once like the others."""
    path = tmp_path / "notes"
    source = CLASS.format(path=str(path), parameters="self", body="pass")
    source = source.replace(
        "def initialize(self, context):", "def initialize(self, context):\n        self.pipe = os.pipe()"
    )
    model = deploy(source, initial_workers=3)
    assert model.describe().sharing.is_shared is False
    assert sorted(noted(path, "begin")) == sorted(noted(path, "initialize")) == sorted(pids(model))


def test_a_replaced_worker_begins_anew(deploy: Deployer, tmp_path: Path) -> None:
    """The worker that takes the place of a dead one begins, too, without the model being loaded again."""
    path = tmp_path / "notes"
    model = deploy(CLASS.format(path=str(path), parameters="self", body="pass"))
    (first,) = pids(model)
    os.kill(first, signal.SIGKILL)
    assert model.predict("os.getpid()", timeout=PATIENCE_S) != first
    assert noted(path, "begin") == [first, *pids(model)]
    assert len(noted(path, "initialize")) == 1


PARAMETERS = {
    "self": "()",
    "self, context": "(context.model_name,)",
    "self, ctx=None": "(ctx.model_name,)",
    "self, *, eager=True": "(eager,)",
    "self, timeout=5": "(timeout,)",
    "self, *args, **kwargs": "(args, kwargs)",
}


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_begin_may_take_the_context(deploy: Deployer, tmp_path: Path, parameters: str) -> None:
    """A begin with one argument is given the context; options of its own keep their defaults."""
    body = f"self.seen = {PARAMETERS[parameters]}"
    model = deploy(CLASS.format(path=str(tmp_path / "notes"), parameters=parameters, body=body))
    expected: dict[str, Any] = {"()": (), "(eager,)": (True,), "(timeout,)": (5,), "(args, kwargs)": ((), {})}
    assert model.predict("self.seen") == expected.get(PARAMETERS[parameters], ("m",))


def test_a_begin_that_needs_more_is_not_called(
    deploy: Deployer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A method of that name that takes two arguments is the handler's own affair; that it was not called is logged."""
    source = CLASS.format(path=str(tmp_path / "notes"), parameters="self, text, start", body="pass")
    model = deploy(source)
    assert noted(tmp_path / "notes", "begin") == []
    assert model.predict("1") == 1
    until(lambda: "begin() of the handler is not called" in caplog.text, "it is logged")


def test_a_function_of_another_module_is_no_hook(deploy: Deployer, tmp_path: Path) -> None:
    """What a handler's module has imported under the name of a hook is not called."""
    source = "from helpers import begin\ndef handle(data, context):\n    return data and [1 for _ in data]\n"
    helpers = "def begin():\n    raise RuntimeError('not a hook')\n"
    assert deploy(source, files={"helpers": helpers}).predict(0) == 1


def test_a_begin_that_raises_is_a_failed_start(deploy: Deployer, tmp_path: Path, backend_name: str) -> None:
    """What begin raises is told as what initialize raises is: with its text and its traceback."""
    source = CLASS.format(path=str(tmp_path / "notes"), parameters="self", body="raise OSError('no engine')")
    with pytest.raises(WorkerStartFailed, match="no engine") as caught:
        deploy(source, config="maxRetryTimeoutInSec: 0\n", backend=backend_name)
    assert "raise OSError" in caught.value.traceback
    assert "begin" in caught.value.traceback


@pytest.mark.parametrize("body", ["async def begin(self): pass", "def begin(self): yield"])
def test_a_begin_that_nobody_would_run_is_refused(deploy: Deployer, body: str) -> None:
    """A coroutine or generator in the place of begin is a failed start that says so: nothing of it would ever run."""
    source = f"class H:\n    {body}\n    def handle(self, data, context): return data\n"
    with pytest.raises(WorkerStartFailed, match="plain function"):
        deploy(source, config="maxRetryTimeoutInSec: 0\n")


def test_begin_comes_before_the_warm_up(deploy: Deployer) -> None:
    """What begin makes is there when the warm-up inputs run."""
    source = """
class H:
    def begin(self):
        self.rows = []
    def handle(self, data, context):
        self.rows += [row["body"] for row in data]
        return [list(self.rows) for _ in data]
"""
    model = deploy(source, config="warmup: [{body: 1}]\n")
    assert model.predict(2) == [1, 2]


def test_begin_may_take_its_time(deploy: Deployer, tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked worker whose begin takes long is not taken for one that hangs; startup_timeout is its limit."""
    monkeypatch.setattr("torchmgmt.backends.process_worker.FORK_LIMIT_S", 0.3)
    source = CLASS.format(path=str(tmp_path / "notes"), parameters="self", body=f"wait_for({gate.path!r})")
    model = deploy(source, synchronous=False)
    until(lambda: noted(tmp_path / "notes", "begin"), "the worker begins")
    threading.Event().wait(0.6)
    gate.open()
    model.wait_ready(PATIENCE_S)
    assert model.describe().sharing.is_shared is True
    assert len(noted(tmp_path / "notes", "begin")) == 1
    with pytest.raises(WorkerStartFailed, match="startup_timeout"):
        source = CLASS.format(path=str(tmp_path / "more"), parameters="self", body="threading.Event().wait()")
        deploy(source, model_name="slow", startup_timeout=0.5, config="maxRetryTimeoutInSec: 0\n")


def test_begin_has_the_workers_threads_and_environment(deploy: Deployer, tmp_path: Path) -> None:
    """In begin torch has the worker's number of threads, the context says it, and the environment is the program's."""
    body = "import torch; self.seen = (torch.get_num_threads(), context.system_properties['threads'], os.getpid())"
    source = CLASS.format(path=str(tmp_path / "notes"), parameters="self, context", body=body)
    for share_weights in WAYS:
        model = deploy(source, threads_per_worker=2, share_weights=share_weights, model_name=share_weights)
        assert model.predict("self.seen") == (2, 2, pids(model)[0])


def test_what_begin_makes_is_no_obstacle_to_sharing(deploy: Deployer, tmp_path: Path) -> None:
    """Threads, sockets, files and folders made in begin are each worker's own, and the weights are still shared."""
    body = (
        "import socket, tempfile; self.thing = socket.socket(), open(os.devnull, 'w'), tempfile.mkdtemp();"
        " threading.Thread(target=threading.Event().wait, daemon=True).start()"
    )
    source = CLASS.format(path=str(tmp_path / "notes"), parameters="self", body=body)
    model = deploy(source, initial_workers=3)
    assert model.describe().sharing.is_shared is True
    folders = {str(model.predict("self.thing[2]")) for _ in range(30)}
    for folder in folders:
        Path(folder).rmdir()


def test_a_service_loaded_by_hand_has_begun(tmp_path: Path) -> None:
    """What ts.model_loader loads for a unit test is as a worker has it: begun."""
    (tmp_path / "handler.py").write_text(
        "class H:\n    def begin(self): self.x = 7\n    def handle(self, data, context): return [self.x for _ in data]\n"
    )
    service = ModelLoader().load("m", str(tmp_path), handler="handler.py")
    assert service.entry_point([{}], service.context) == [7]


# -- begin of live objects ---------------------------------------------------------------------------------------------


class Counting:
    """Counts how often it was begun; a handler."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def initialize(self, context: Any) -> None:
        self.calls.append("initialize")

    def begin(self, context: Any) -> None:
        self.calls.append("begin")

    def handle(self, data: Any, context: Any) -> Any:
        return [list(self.calls) for _ in data]


class Layered(torch.nn.Module):
    """A module with a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1

    def begin(self) -> None:
        self.factor += 1

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch * self.factor


class Named(torch.nn.Module):
    """A module whose layers have the names of hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.begin, self.finalize, self.close = (torch.nn.Linear(2, 2) for _ in range(3))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch


class Callable:
    """An object that is called, with a hook."""

    def __init__(self) -> None:
        self.begun = 0

    def begin(self) -> None:
        self.begun += 1

    def __call__(self, rows: list[Any]) -> list[Any]:
        return [self.begun for _ in rows]


def test_live_objects_begin(manager: ModelManager, backend_name: str) -> None:
    """Handlers, classes of them, modules and callables begin in each worker; an object that threads share begins once."""
    options: dict[str, Any] = {"initial_workers": 3, "backend": backend_name}
    handler = manager.register(Counting(), model_name="handler", **options)
    kind = manager.register(Counting, model_name="class", **options)
    module = manager.register(Layered().eval(), model_name="module", **options)
    function = manager.register(Callable(), model_name="callable", **options)
    for _ in range(10):
        assert handler.predict(0) == ["initialize", "begin"]
        assert kind.predict(0) == ["initialize", "begin"]
        assert module.predict(torch.tensor(3.0)).item() == 6
        assert function.predict(0) == 1
    function.scale(4)
    assert [function.predict(0) for _ in range(10)] == [1] * 10


def test_a_layer_is_no_hook(manager: ModelManager) -> None:
    """A submodule that has the name of a hook is never called as one."""
    assert manager.register(Named(), model_name="m").predict(torch.tensor(5.0)).item() == 5
