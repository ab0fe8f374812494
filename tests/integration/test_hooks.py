"""Hooks of handlers: what each worker begins with after the model was loaded, once, and whatever the model is."""

from __future__ import annotations

import functools
import io
import os
import signal
import sys
import threading
import zlib
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
    source = CLASS.format(path=str(tmp_path / "more"), parameters="self", body="threading.Event().wait()")
    with pytest.raises(WorkerStartFailed, match="startup_timeout"):
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


def test_a_service_loaded_by_hand_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ts.model_loader loads for a unit test is as a worker has it: begun."""
    monkeypatch.setitem(sys.modules, "handler", sys)  # and is gone afterwards
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


# -- the end in good order ---------------------------------------------------------------------------------------------

ENDING = (
    TOOLS
    + """
import atexit
class Handler:
    def initialize(self, context):
        atexit.register(note, {path!r}, "atexit of initialize")
    def begin(self):
        self.lines = open({path!r} + f"-{{os.getpid()}}", "w")
        atexit.register(note, {path!r}, "atexit of begin")
    def handle(self, data, context):
        for row in data:
            self.lines.write(f"{{row['body']}}\\n")
        return [os.getpid() for _ in data]
    {hooks}
"""
)
FINALIZE = "def finalize(self): note({path!r}, 'finalize')"
CLOSE = "def close(self, context): note({path!r}, f'close {{context.model_name}}')"


def ending(path: Path, *hooks: str) -> str:
    hooks = hooks or (FINALIZE, CLOSE)
    text = "\n    ".join(hook.format(path=str(path)) for hook in hooks)
    return ENDING.format(path=str(path), hooks=text)


def written(path: Path) -> list[str]:
    """What workers wrote to the files that they left open, all together."""
    return sorted(line for file in path.parent.glob(f"{path.name}-*") for line in lines_of(file))


@pytest.mark.parametrize("share_weights", WAYS)
@pytest.mark.parametrize("end", ["unregister", "scale", "close"])
def test_a_worker_ends_in_good_order(
    deploy: Deployer, manager: ModelManager, tmp_path: Path, end: str, share_weights: str
) -> None:
    """Told to end, each worker calls finalize, close and what was registered with atexit, and writes what its files hold."""
    path = tmp_path / "notes"
    model = deploy(ending(path), initial_workers=2, share_weights=share_weights)
    for number in range(20):
        model.predict(number)
    assert written(path) == []
    {"unregister": model.unregister, "scale": lambda: model.scale(0, 0), "close": manager.close}[end]()
    of_each = ["atexit of begin", "atexit of initialize", "close m", "finalize"]
    assert sorted(lines_of(path)) == sorted(2 * of_each)
    assert next(line for line in lines_of(path) if line != "close m") == "finalize"
    assert written(path) == sorted(map(str, range(20)))


def test_the_worker_that_was_a_template_ends_in_good_order(deploy: Deployer, tmp_path: Path) -> None:
    """A file that was opened in initialize is written out as well, by the process that has become a worker, and by the others."""
    path = tmp_path / "notes"
    source = ending(path).replace("def begin(self):", "def begin(self): pass\n    def open(self):")
    source = source.replace("def initialize(self, context):", "def initialize(self, context):\n        self.open()")
    model = deploy(source, initial_workers=2)
    for number in range(10):
        model.predict(number)
    assert model.describe().sharing.is_shared is False
    model.unregister()
    assert lines_of(path).count("finalize") == 2
    assert written(path) == sorted(map(str, range(10)))


def test_a_template_that_is_given_up_runs_no_hooks(deploy: Deployer, tmp_path: Path) -> None:
    """Hooks are the workers': a template that is not needed any more calls none."""
    path = tmp_path / "notes"
    model = deploy(ending(path))
    model.scale(0, 0)
    before = lines_of(path)
    model.unregister()
    assert lines_of(path) == before
    assert before.count("finalize") == 1


def test_a_worker_that_is_recycled_ends_in_good_order(deploy: Deployer, tmp_path: Path) -> None:
    """A worker that has served its number of requests calls its hooks before it goes, and its files are complete."""
    path = tmp_path / "notes"
    model = deploy(ending(path), max_requests=5)
    for number in range(15):
        model.predict(number, timeout=PATIENCE_S)
    until(lambda: "finalize" in lines_of(path), "the first worker was replaced")
    model.unregister()
    assert written(path) == sorted(map(str, range(15)))


def test_a_worker_that_dies_runs_no_hooks(deploy: Deployer, tmp_path: Path) -> None:
    """An end that is in no good order is none: what was killed calls nothing."""
    path = tmp_path / "notes"
    model = deploy(ending(path))
    os.kill(pids(model)[0], signal.SIGKILL)
    assert model.predict("x", timeout=PATIENCE_S)
    assert lines_of(path) == []


RAISING = {
    "an error": "raise ValueError('no good end')",
    "a panic": "raise type('Panic', (BaseException,), {{}})('no good end')",
    "an exit": "sys.exit('no good end')",
    "an interrupt": "raise KeyboardInterrupt('no good end')",
}


@pytest.mark.parametrize("what", RAISING)
def test_what_a_hook_raises_stops_nothing(
    deploy: Deployer, tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """The hooks after it, atexit and files have their turn, and the log has what it raised and printed."""
    path = tmp_path / "notes"
    model = deploy(ending(path, f"def finalize(self): print('a last print'); {RAISING[what]}", CLOSE))
    model.predict("line")
    report = model.unregister()
    assert report.killed_pids == ()
    assert sorted(lines_of(path)) == ["atexit of begin", "atexit of initialize", "close m"]
    assert written(path) == ["line"]
    assert "finalize() failed" in caplog.text
    assert "no good end" in caplog.text


HANGING = {
    "sleeps": "threading.Event().wait()",
    "computes": "[None for _ in iter(int, 1)]",
    "swallows": "exec('while True:\\n try: time.sleep(9)\\n except BaseException: pass')",
    "hangs in native code": "c = __import__('ctypes'); m = c.create_string_buffer(64); [c.CDLL(None).pthread_mutex_lock(m) for _ in 'ab']",
    "waits for a thread": "t = threading.Thread(target=time.sleep, args=(60,), daemon=True); t.start(); t.join()",
}


@pytest.mark.parametrize("how", HANGING)
def test_a_hook_that_hangs_loses_no_file(
    deploy: Deployer, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """A hook that does not come back is given up in time for all that can be written: nothing has to be killed for it."""
    path = tmp_path / "notes"
    model = deploy(ending(path, f"def finalize(self): {HANGING[how]}", CLOSE))
    model.predict("line")
    report = model.unregister()
    assert report.killed_pids == ()
    assert written(path) == ["line"]
    if how in {"sleeps", "computes", "waits for a thread"}:
        assert sorted(lines_of(path)) == ["atexit of begin", "atexit of initialize", "close m"]
        assert "finalize() was interrupted" in caplog.text


@pytest.mark.parametrize("how", ["sleeps", "swallows", "hangs in native code"])
def test_in_a_hurry_files_are_written_all_the_same(
    deploy: Deployer, manager: ModelManager, tmp_path: Path, how: str
) -> None:
    """Where the manager has no time for a hook that hangs, and hurries, files are still written."""
    path = tmp_path / "notes"
    model = deploy(ending(path, f"def finalize(self): {HANGING[how]}", CLOSE))
    model.predict("line")
    manager.close(0)
    assert written(path) == ["line"]


def test_an_exit_function_that_hangs_holds_up_none_of_the_others(deploy: Deployer, tmp_path: Path) -> None:
    """What was registered with atexit is called function by function; one that hangs is given up alone."""
    path = tmp_path / "notes"
    source = ending(path).replace("def begin(self):", "def begin(self):\n        atexit.register(time.sleep, 60)")
    model = deploy(source)
    model.predict("line")
    assert model.unregister().killed_pids == ()
    assert "atexit of initialize" in lines_of(path)
    assert written(path) == ["line"]


def test_a_file_that_cannot_be_written_holds_up_none_of_the_others(deploy: Deployer, tmp_path: Path) -> None:
    """A full disk, or a pipe that nobody reads, costs its own file alone."""
    path = tmp_path / "notes"
    opened = (
        "def begin(self):\n        self.full = open('/dev/full', 'w'); self.full.write('lost')"
        "\n        self.pipe = os.pipe(); os.set_blocking(self.pipe[1], True); self.writer = open(self.pipe[1], 'wb', 1 << 20)"
        "\n        self.writer.write(bytes(1 << 19))"
    )
    model = deploy(ending(path).replace("def begin(self):", opened))
    model.predict("line")
    assert model.unregister().killed_pids == ()
    assert written(path) == ["line"]


def test_the_kinds_of_files_that_are_written_out(deploy: Deployer, tmp_path: Path) -> None:
    """Text, bytes, compressed files, and what a logging handler keeps, are complete when the worker has ended."""
    source = f"""
import gzip, logging.handlers
folder = {str(tmp_path)!r}
class H:
    def begin(self):
        self.text = open(folder + "/text", "a+")
        self.bytes = open(folder + "/bytes", "wb", 1 << 16)
        self.both = open(folder + "/both", "w+b")
        self.zip = gzip.open(folder + "/zip", "wt")
        target = logging.FileHandler(folder + "/log")
        self.log = logging.getLogger("kept")
        self.log.addHandler(logging.handlers.MemoryHandler(1000, target=target))
    def handle(self, data, context):
        for file in (self.text, self.zip):
            file.write("x" * 10)
        for file in (self.bytes, self.both):
            file.write(b"x" * 10)
        self.log.info("x" * 10)
        return data
"""
    model = deploy(source)
    model.predict(1)
    model.unregister()
    assert [(tmp_path / name).read_text().strip() for name in ("text", "bytes", "both", "log")] == ["x" * 10] * 4
    assert b"x" * 10 in zlib.decompressobj(31).decompress((tmp_path / "zip").read_bytes())


def test_a_folder_made_before_the_fork_outlives_its_workers(deploy: Deployer, tmp_path: Path) -> None:
    """With share_weights=always, a TemporaryDirectory that was made once is not removed by the first worker that ends."""
    source = """
import os, tempfile
class H:
    def initialize(self, context):
        self.folder = tempfile.TemporaryDirectory()
    def begin(self):
        self.own = tempfile.TemporaryDirectory()
    def handle(self, data, context):
        return [(self.folder.name, self.own.name, os.path.isdir(self.folder.name)) for _ in data]
"""
    model = deploy(source, share_weights="always", initial_workers=2)
    shared, own, _ = model.predict(0)
    model.scale(1)
    assert model.predict(0)[2] is True
    model.unregister()
    assert Path(shared).is_dir()
    Path(shared).rmdir()
    assert not Path(own).exists()


def test_a_function_ends_by_the_hooks_of_its_module(deploy: Deployer, tmp_path: Path) -> None:
    """Handlers that are functions have their hooks beside them."""
    path = tmp_path / "notes"
    source = f"""{TOOLS}
def finalize(): note({str(path)!r}, "finalize")
def close(context): note({str(path)!r}, "close " + context.model_name)
def handle(data, context): return data and [1 for _ in data]
"""
    deploy(source).unregister()
    assert lines_of(path) == ["finalize", "close m"]


def test_workers_that_are_threads_end_in_good_order(deploy: Deployer, tmp_path: Path) -> None:
    """Each thread calls its own handler's hooks before it counts as ended; what the program registered with atexit is left alone."""
    path = tmp_path / "notes"
    hooks = f"""
    def finalize(self):
        note({str(path)!r}, "finalize"); raise SystemExit("nobody hears that")
    def close(self):
        note({str(path)!r}, "close")
"""
    source = f"{TOOLS}\nclass H:\n    def handle(self, data, context): return data\n{hooks}"
    model = deploy(source, backend="thread", initial_workers=3)
    model.scale(2)
    assert sorted(lines_of(path)) == ["close", "finalize"]
    model.unregister()
    assert sorted(lines_of(path)) == 3 * ["close"] + 3 * ["finalize"]


class Closing:
    """A handler that notes in a file when it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def handle(self, data: Any, context: Any) -> Any:
        return data

    def close(self) -> None:
        with self.path.open("a") as file:
            file.write("closed\n")


class Sheet(io.StringIO):
    """An open file of a kind, that can be called: whose ``close`` is the file's."""

    def __call__(self, rows: list[Any]) -> list[Any]:
        return [self.closed for _ in rows]


def test_a_live_handler_is_closed_with_each_worker(manager: ModelManager, tmp_path: Path) -> None:
    """In processes each worker has a copy of a live handler, and closes it; the program's own stays open."""
    model = manager.register(Closing(tmp_path / "notes"), model_name="m", initial_workers=3)
    model.scale(2)
    assert lines_of(tmp_path / "notes") == ["closed"]
    model.unregister()
    assert lines_of(tmp_path / "notes") == ["closed"] * 3


def test_what_threads_share_is_the_programs_to_close(manager: ModelManager, tmp_path: Path) -> None:
    """A live object that threads share is closed by nobody but the program; one that each makes of a class is its own."""
    model = manager.register(Closing(tmp_path / "notes"), model_name="m", initial_workers=3, backend="thread")
    model.scale(1)
    model.unregister()
    assert lines_of(tmp_path / "notes") == []
    made = functools.partial(Closing, tmp_path / "notes")
    kind = type("Made", (Closing,), {"__init__": lambda self: Closing.__init__(self, made().path)})
    manager.register(kind, model_name="kind", initial_workers=2, backend="thread").unregister()
    assert lines_of(tmp_path / "notes") == ["closed"] * 2


def test_a_live_object_that_is_an_open_file_stays_open(manager: ModelManager) -> None:
    """The close of a file is no hook, although the object has it: threads that end do not close what the program uses."""
    sheet = Sheet("text")
    model = manager.register(sheet, model_name="m", initial_workers=2, backend="thread")
    model.scale(1)
    assert model.predict(0) is False
    model.unregister()
    assert not sheet.closed
