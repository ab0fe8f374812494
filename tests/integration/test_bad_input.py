"""Bad input: an error of our own that says which, what and why; nothing registered, nothing left over."""

from __future__ import annotations

import contextlib
import itertools
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.handlers import ECHO, TOOLS, Deployer, until, write_folder, write_manifest
from torchmgmt import Model, ModelManager, Settings
from torchmgmt.backends import Backend
from torchmgmt.errors import (
    InvalidArchive,
    InvalidArgument,
    ModelNotFound,
    ModelVersionNotFound,
    NoWorker,
    SourceNotFound,
    TorchmgmtError,
    WorkerStartFailed,
)
from torchmgmt.lifecycle import VersionState

HUGE = 10**400
NAN = float("nan")

REGISTER = [
    ("batch_size", (0, -2, 1.5, "8", True, [], HUGE)),
    ("max_batch_delay", (-1, 0.5, "100", False, HUGE)),
    ("initial_workers", (-1, 1.0, "2", True, HUGE)),
    ("max_workers", (-1, 1.0, "2", True)),
    ("response_timeout", (0, -1, "120", NAN, float("inf"), True, [], HUGE)),
    ("startup_timeout", (0, -1, "120", NAN, float("inf"), True, HUGE)),
    ("model_name", ("a/b", "", "  ", "a\0b", 5, b"m", [])),
    ("version", ("1/2", "", "  ", 2, 1.0, b"1")),
    ("handler", (5, b"handler", [], "", "  ")),
    ("runtime", ("cobol", 3, "")),
    ("synchronous", ("yes", 1, None)),
    ("default_workers", (-1, "1", 1.5)),
    ("trusted", ("no", None)),
    ("loaded_at_startup", ("no", None)),
    ("url", (5, None, "", b"model", "a\0b", [])),
]
SCALE = [
    ("min_worker", (-1, 1.5, "2", None, True, [], HUGE)),
    ("max_worker", (-1, 1.5, "2", True, 0, [])),
    ("timeout", (-2, "1", NAN, None, True, float("inf"), HUGE)),
    ("version", (5, [], b"1.0")),
    ("name", (5, None, [], b"m")),
    ("synchronous", ("yes", None)),
]
SUBMIT = [
    ("timeout", (-1, "1", NAN, True, [], float("inf"), HUGE)),
    ("fields", (5, "text", [1], b"x")),
    ("headers", (5, "text", [1, 2], {1: "x"}, {"x": 1}, {None: None})),
    ("data", (lambda: None,)),
    ("version", (5, [])),
    ("name", (5, None, [], {})),
]
NAMED = [("name", (5, [], None, b"m")), ("version", (5, [], b"1.0"))]


def identify(value: object) -> str:
    return repr(value)[:20].replace("\0", "0")


def check(error: TorchmgmtError, argument: str, given: object) -> None:
    assert isinstance(error, (InvalidArgument, ValueError)), repr(error)
    assert isinstance(error, InvalidArgument)
    assert error.argument == argument
    assert error.given is given or error.given == given
    assert argument in str(error)
    assert repr(given)[:50] in str(error)
    assert error.allowed in str(error)


@pytest.fixture
def model(deploy: Deployer) -> Model:
    """A model that could be called, without workers: nothing below gets as far as to need one."""
    return deploy(ECHO, initial_workers=0, max_workers=1)


@pytest.mark.parametrize("argument, values", REGISTER, ids=identify)
def test_register_refuses(tmp_path: Path, manager: ModelManager, argument: str, values: Sequence[Any]) -> None:
    """A wrong argument of register is named, with what was given and what is allowed; nothing is registered."""
    folder = write_folder(tmp_path / "m", ECHO)
    arguments = {"url": folder, "model_name": "m", "handler": "handler", "initial_workers": 0}
    if argument == "max_workers":
        del arguments["initial_workers"]
    for value in values:
        with pytest.raises(TorchmgmtError) as caught:
            manager.register(**{**arguments, argument: value})
        assert len(manager) == 0
        check(caught.value, argument, value)


@pytest.mark.parametrize("argument, values", SCALE, ids=identify)
def test_scale_refuses(manager: ModelManager, model: Model, argument: str, values: Sequence[Any]) -> None:
    """A wrong argument of scale is named, with what was given and what is allowed; what was wanted stays."""
    arguments = {"name": "m", "min_worker": 1, "synchronous": False}
    before = model.describe().scale
    for value in values:
        with pytest.raises(TorchmgmtError) as caught:
            manager.scale(**{**arguments, argument: value})
        assert model.describe().scale == before
        if argument in {"name", "version"}:
            assert isinstance(caught.value, (InvalidArgument, ModelNotFound, ModelVersionNotFound))
        else:
            check(caught.value, argument, value)


@pytest.mark.parametrize("argument, values", SUBMIT, ids=identify)
def test_submit_and_predict_refuse(manager: ModelManager, model: Model, argument: str, values: Sequence[Any]) -> None:
    """A wrong argument of a request is named, with what was given and what is allowed; nothing waits in the queue."""
    calls: list[Callable[..., object]] = [manager.submit, manager.predict]
    for call, value in itertools.product(calls, values):
        with pytest.raises(TorchmgmtError) as caught:
            call(**{"name": "m", "data": 1, argument: value})
        info = model.describe()
        assert (info.queue_length, len(info.workers)) == (0, 0)
        assert isinstance(caught.value, (InvalidArgument, ModelNotFound, ModelVersionNotFound))
        if argument not in {"name", "version"}:
            assert isinstance(caught.value, InvalidArgument)
            assert caught.value.argument == argument
            assert argument in str(caught.value)


@pytest.mark.parametrize("call", ["unregister", "describe", "set_default"])
@pytest.mark.parametrize("argument, values", NAMED, ids=identify)
def test_names_of_a_wrong_type_are_not_found_or_refused(
    manager: ModelManager, model: Model, call: str, argument: str, values: Sequence[Any]
) -> None:
    """A name or version that is no text is an error of our own in every call, and changes nothing."""
    for value in values:
        with pytest.raises((InvalidArgument, ModelNotFound, ModelVersionNotFound)):
            getattr(manager, call)(**{"name": "m", "version": "1.0", argument: value})
    assert manager.describe("m").is_default
    assert model.state is VersionState.REGISTERED


@pytest.mark.parametrize("call", ["manager.close", "manager.unregister", "model.unregister", "model.wait_ready"])
def test_times_that_are_none_are_refused(manager: ModelManager, model: Model, call: str) -> None:
    """A timeout that is no number of seconds is refused by name, and nothing is closed or unregistered."""
    what, method = call.split(".")
    target: Any = {"manager": manager, "model": model}[what]
    arguments = ("m",) if call == "manager.unregister" else ()
    for value in (-1, "1", NAN, float("inf"), True, [], HUGE):
        with pytest.raises(InvalidArgument) as caught:
            getattr(target, method)(*arguments, timeout=value)
        check(caught.value, "timeout", value)
        assert "m" in manager


@pytest.mark.parametrize("value", [1e7, 1e10, 1e300], ids=identify)
@pytest.mark.parametrize("argument", ["response_timeout", "startup_timeout", "predict", "scale"])
def test_a_very_long_time_is_as_good_as_none(deploy: Deployer, argument: str, value: float) -> None:
    """A limit of months or more is either refused by name or kept; it never stops what has other limits."""
    other = deploy(ECHO, model_name="other", initial_workers=0)
    with contextlib.suppress(InvalidArgument):
        if argument == "predict":
            assert deploy(ECHO).predict(1, timeout=value) == 1
        elif argument == "scale":
            deploy(ECHO).scale(2, timeout=value)
        else:
            model = deploy(ECHO, **{argument: value})
            assert model.submit(1).result(15) == 1
    other.scale(1, synchronous=False)
    other.wait_ready(15)
    assert other.submit(2).result(15) == 2


@pytest.mark.parametrize("value", [1e7, 1e10, 1e300], ids=identify)
def test_waiting_very_long_is_waiting(deploy: Deployer, manager: ModelManager, value: float) -> None:
    """wait_ready, unregister and close take a limit of years, or refuse it by name."""
    model = deploy(ECHO)
    for call in (model.wait_ready, model.unregister, manager.close):
        with contextlib.suppress(InvalidArgument):
            call(timeout=value)


@pytest.mark.parametrize(
    "arguments",
    [{"settings": 5}, {"settings": {}}, {"model_store": 5}, {"model_store": ""}, {"listeners": 5}, {"listeners": [5]}],
    ids=identify,
)
def test_a_manager_refuses(backend: Backend, arguments: dict[str, Any]) -> None:
    """A wrong argument of ModelManager is named when it is made, not when it is first needed."""
    with pytest.raises(InvalidArgument) as caught:
        ModelManager(backend=backend, **arguments)
    assert caught.value.argument == next(iter(arguments))


def test_less_at_most_than_at_least_is_refused(manager: ModelManager, model: Model, deploy: Deployer) -> None:
    """max_worker below min_worker is refused and names both, in register and in scale."""
    with pytest.raises(InvalidArgument, match=r"max_worker.* 1, .*min_worker.* 2") as caught:
        model.scale(2, 1)
    assert caught.value.argument == "max_worker"
    with pytest.raises(InvalidArgument, match="max_workers"):
        deploy(ECHO, model_name="other", initial_workers=2, max_workers=1)
    assert list(manager) == ["m"]


def test_what_is_not_there_is_not_found(manager: ModelManager, model: Model) -> None:
    """Every call that names an unknown model or version says which, as a LookupError of our tree."""
    calls: list[Callable[..., object]] = [
        manager.describe,
        manager.scale,
        manager.unregister,
        manager.predict,
        manager.submit,
        lambda name, version="1.0": manager.set_default(name, version),
    ]
    for call in calls:
        with pytest.raises(ModelNotFound, match="nope"):
            call("nope")
        with pytest.raises(ModelVersionNotFound, match=r"9\.9.*m"):
            call("m", version="9.9")
    with pytest.raises(ModelNotFound, match="nope"):
        manager["nope"]
    assert "nope" not in manager
    assert model.version == "1.0"


# -- archives and handlers -------------------------------------------------------------------------------------------


def zipped(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return target


def good_archive(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "source", ECHO)
    write_manifest(folder, modelName="m", modelVersion="1.0", handler="handler.py")
    return zipped(folder, tmp_path / "m.mar")


def truncated(tmp_path: Path) -> Path:
    archive = good_archive(tmp_path)
    archive.write_bytes(archive.read_bytes()[:-40])
    return archive


def damaged(tmp_path: Path) -> Path:
    archive = good_archive(tmp_path)
    data = bytearray(archive.read_bytes())
    at = data.index(b"return data")
    data[at] ^= 0xFF
    archive.write_bytes(data)
    return archive


def no_archive(tmp_path: Path) -> Path:
    path = tmp_path / "m.mar"
    path.write_bytes(b"this is no archive" * 100)
    return path


def empty(tmp_path: Path) -> Path:
    path = tmp_path / "m.mar"
    path.touch()
    return path


def no_manifest(tmp_path: Path) -> Path:
    return zipped(write_folder(tmp_path / "source", ECHO), tmp_path / "m.mar")


def bad_manifest(tmp_path: Path) -> Path:
    folder = write_manifest(write_folder(tmp_path / "source", ECHO), modelName="m")
    (folder / "MAR-INF" / "MANIFEST.json").write_text('{"model": ')
    return zipped(folder, tmp_path / "m.mar")


def no_handler_named(tmp_path: Path) -> Path:
    return zipped(write_manifest(write_folder(tmp_path / "source", ECHO), modelName="m"), tmp_path / "m.mar")


def leaves_its_folder(tmp_path: Path) -> Path:
    archive = good_archive(tmp_path)
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("../escaped.py", "")
    return archive


def truncated_tgz(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "source", ECHO)
    write_manifest(folder, modelName="m", handler="handler.py")
    path = tmp_path / "m.tgz"
    with tarfile.open(path, "w:gz") as file:
        file.add(folder, "m")
    path.write_bytes(path.read_bytes()[:-30])
    return path


def temporary_files() -> set[str]:
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("torchmgmt")}  # noqa: PTH208


@pytest.mark.parametrize(
    "make",
    [
        truncated,
        damaged,
        no_archive,
        empty,
        no_manifest,
        bad_manifest,
        no_handler_named,
        leaves_its_folder,
        truncated_tgz,
    ],
)
def test_a_bad_archive_is_refused(tmp_path: Path, manager: ModelManager, make: Callable[[Path], Path]) -> None:
    """An archive that cannot be used is an InvalidArchive that names it; nothing of it is registered or left."""
    archive = make(tmp_path)
    before = temporary_files()
    with pytest.raises(InvalidArchive) as caught:
        manager.register(archive)
    assert str(archive) in str(caught.value)
    assert caught.value.reason
    assert len(manager) == 0
    assert temporary_files() == before
    assert not (tmp_path.parent / "escaped.py").exists()
    assert not (tmp_path / "escaped.py").exists()


def test_a_source_that_is_not_there_is_not_found(tmp_path: Path, manager: ModelManager) -> None:
    """A missing archive, by name or by path, is not found, and the error says where it was looked for."""
    for url in ("nope.mar", tmp_path / "nope.mar", tmp_path / "nope", f"file://{tmp_path}/nope.mar"):
        with pytest.raises(SourceNotFound, match=r"Model not found at: .*nope"):
            manager.register(url, model_name="m", handler="handler")
    assert len(manager) == 0


CLASS = "class Handler:\n    def initialize(self, context):\n        {body}\n    def handle(self, data, context):\n        return data\n"
FAILURES = {
    "nothing to import": (None, "handler.py"),
    "a syntax error": ("def handle(:\n", "SyntaxError"),
    "an import error": ("import there_is_no_such_module\n" + ECHO, "there_is_no_such_module"),
    "an error while importing": ("raise OSError('no weights here')\n", "no weights here"),
    "no handler in it": ("x = 1\n", "exactly one class"),
    "two handlers": (
        CLASS.format(body="pass") + CLASS.format(body="pass").replace("Handler", "Second"),
        "Handler, Second",
    ),
    "raise in initialize": (CLASS.format(body="raise ValueError('bad weights')"), "ValueError: bad weights"),
    "raise in handle(None)": ("def handle(data, context):\n    return len(data)\n", "TypeError"),
    "raise of no Exception": (CLASS.format(body="raise KeyboardInterrupt"), "KeyboardInterrupt"),
    "sys.exit in initialize": (CLASS.format(body="import sys; sys.exit(3)"), "SystemExit: 3"),
    "sys.exit with a message": (CLASS.format(body="import sys; sys.exit('no licence')"), "no licence"),
    "os._exit while importing": ("import os\nos._exit(5)\n", "status 5"),
    "exit with 0": ("import os\nos._exit(0)\n", "status 0"),
    "killed in initialize": (CLASS.format(body="import os; os.kill(os.getpid(), 9)"), "SIGKILL"),
    "crash while importing": ("import ctypes\nctypes.string_at(0)\n", "SIGSEGV"),
    "an error that cannot be shown": (
        "class E(Exception):\n    def __str__(self):\n        raise RuntimeError\n" + CLASS.format(body="raise E"),
        "E",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_handler_that_cannot_be_loaded_fails_the_registration(
    tmp_path: Path, manager: ModelManager, name: str
) -> None:
    """A registration whose handler cannot be loaded raises the cause and the last lines, and leaves nothing at all."""
    source, words = FAILURES[name]
    talk = "print('about to load')\n"
    folder = write_folder(tmp_path / "source", talk + (source or ""))
    if source is None:
        (folder / "handler.py").unlink()
    write_manifest(folder, modelName="m", handler="handler.py")
    archive = zipped(folder, tmp_path / "m.mar")
    before = temporary_files()

    with pytest.raises(WorkerStartFailed) as caught:
        manager.register(archive)

    error = caught.value
    assert (error.name, error.version) == ("m", "1.0")
    assert words in str(error)
    assert "Failed to start workers for model m version: 1.0" in str(error)
    if source is not None and "syntax" not in name:
        assert "about to load" in error.last_lines
    assert len(manager) == 0
    assert manager.models() == ()
    assert temporary_files() == before
    with pytest.raises(ModelNotFound):
        manager.predict("m", 1)


@pytest.mark.parametrize("source", ["raise ValueError('x')\n", "import os\nos._exit(5)\n"])
def test_a_failed_registration_leaves_no_process(tmp_path: Path, deploy: Deployer, source: str) -> None:
    """After a failed registration of several workers no process of it runs, and the name can be used at once."""
    pids = tmp_path / "pids"
    with pytest.raises(WorkerStartFailed):
        deploy(f"{TOOLS}\nnote({str(pids)!r}, os.getpid())\n{source}", initial_workers=3)
    alive = [int(pid) for pid in pids.read_text().split() if psutil.pid_exists(int(pid))]
    until(lambda: not any(psutil.pid_exists(pid) for pid in alive), "no process is left", timeout_s=5)
    assert deploy(ECHO).predict("again") == "again"


def test_a_failed_version_leaves_the_others_alone(deploy: Deployer, manager: ModelManager) -> None:
    """When a further version fails to register, those that exist, and the default, stay as they are."""
    model = deploy(ECHO)
    with pytest.raises(WorkerStartFailed):
        deploy("raise ValueError('x')\n", version="2.0")
    assert [info.version for info in manager.versions("m")] == ["1.0"]
    assert manager.predict("m", 1) == model.predict(1) == 1


def test_an_asynchronous_registration_that_fails_is_described(backend: Backend, tmp_path: Path) -> None:
    """A version registered asynchronously whose workers fail stays registered; describe shows FAILED and why."""
    settings = Settings(max_retry_timeout=0.2)
    with ModelManager(backend=backend, settings=settings) as manager:
        model = Deployer(tmp_path, manager)("print('hm')\nraise ValueError('bad weights')\n", synchronous=False)
        assert model.state in {VersionState.LOADING, VersionState.FAILED}
        until(lambda: model.state is VersionState.FAILED, "the version failed")
        item = model.describe().to_dict()
        assert (item["state"], item["workers"], item["minWorkers"]) == ("FAILED", [], 1)
        assert "ValueError: bad weights" in item["lastError"]
        assert "raise ValueError" in item["lastError"]
        assert "hm" in item["lastError"]
        with pytest.raises(NoWorker, match="bad weights"):
            model.predict(1)
        with pytest.raises(WorkerStartFailed, match="bad weights"):
            model.wait_ready(20)
        model.unregister()
        assert len(manager) == 0


def test_requests_wait_while_starts_are_tried_again(deploy: Deployer, tmp_path: Path) -> None:
    """While failing starts are tried again the version is LOADING, and its requests wait for the start that works."""
    flag = tmp_path / "flag"
    source = f"{TOOLS}\nif not os.path.exists({str(flag)!r}):\n    raise OSError('not yet')\n{ECHO}"
    model = deploy(source, synchronous=False)
    until(lambda: "not yet" in model.describe().last_error, "a start failed")
    assert model.state is VersionState.LOADING
    future = model.submit("patience")
    flag.touch()
    assert future.result(30) == "patience"
    assert model.state is VersionState.READY


@pytest.mark.parametrize(
    "config, key",
    [
        ("batchSize: 0\n", "batchSize"),
        ("batchSize: many\n", "batchSize"),
        ("maxBatchDelay: -1\n", "maxBatchDelay"),
        ("responseTimeout: 0\n", "responseTimeout"),
        ("startupTimeout: soon\n", "startupTimeout"),
        ("minWorkers: -1\n", "minWorkers"),
        ("minWorkers: 2\nmaxWorkers: 1\n", "maxWorkers"),
        ("maxWorkers: x\n", "maxWorkers"),
        ("jobQueueSize: 0\n", "jobQueueSize"),
        ("maxRetryTimeoutInSec: -1\n", "maxRetryTimeoutInSec"),
        ("- a list\n", "mapping"),
        ("minWorkers: [\n", "YAML"),
    ],
)
def test_a_bad_configuration_is_refused(tmp_path: Path, manager: ModelManager, config: str, key: str) -> None:
    """A wrong value in model-config.yaml makes the archive invalid; the error names the key as it is written there."""
    with pytest.raises(InvalidArchive) as caught:
        manager.register(write_folder(tmp_path / "m", ECHO, config=config), model_name="m", handler="handler")
    assert key in str(caught.value)
    assert len(manager) == 0
