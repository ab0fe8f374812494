"""Values of odd types, at every door: the call works, or it alone fails; other models go on, whatever that is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import pytest

from tests.handlers import ECHO, EVAL, PATIENCE_S, Deployer, Gate, run_program, until, write_folder
from torchmgmt import Model, ModelManager
from torchmgmt.errors import InvalidArgument, TorchmgmtError, WorkerDied
from torchmgmt.lifecycle import VersionState


class Name(str, Enum):
    """Of models, versions and handlers, as a program keeps them."""

    A = "a"
    VERSION = "2.0"
    HANDLER = "handler.py"
    PROCESS = "process"
    HEADER = "X-Header"


class Number(IntEnum):
    """A program's constants."""

    ONE = 1
    TWO = 2


class Text(str):
    """What a library makes of text; it remembers who has made it."""

    maker = "somebody"

    __slots__ = ()


class Seconds(float):
    """A number with a unit."""

    __slots__ = ()


class Whole(int):
    """A number that somebody has made a class of."""


class Gone(str):
    """Text whose class no other process can find."""

    __slots__ = ()
    __module__ = "there_is_no_such_module"


class Unpicklable(str):
    """Text that does not travel."""

    __slots__ = ()

    def __reduce_ex__(self, _protocol: Any) -> Any:
        raise AttributeError("no")


@pytest.fixture
def healthy(deploy: Deployer) -> Iterator[Model]:
    """Another model, whose worker is to be the same, and to answer, whatever a test does."""
    model = deploy(EVAL, model_name="healthy")
    pid = model.predict("os.getpid()")
    yield model
    assert model.submit("os.getpid()").result(PATIENCE_S) == pid


ODD: list[dict[str, Any]] = [
    {"model_name": Name.A},
    {"model_name": Text("a")},
    {"model_name": Gone("a")},
    {"model_name": Unpicklable("a")},
    {"version": Name.VERSION},
    {"version": Gone("2.0")},
    {"handler": Name.HANDLER},
    {"handler": Unpicklable("handler.py")},
    {"batch_size": Number.TWO},
    {"batch_size": Whole(2)},
    {"max_batch_delay": Number.ONE},
    {"initial_workers": Number.ONE},
    {"initial_workers": Whole(1), "max_workers": Number.TWO},
    {"response_timeout": Seconds(20)},
    {"response_timeout": Whole(20), "startup_timeout": Seconds(20)},
    {"threads_per_worker": Number.ONE},
    {"batches_in_flight": Number.TWO},
    {"max_requests": Whole(1000)},
    {"max_memory": Whole(1 << 40)},
    {"scale_down_delay": Seconds(1)},
    {"template_idle_timeout": Seconds(1)},
    {"backend": Name.PROCESS},
    {"backend": Gone("thread")},
    {"share_weights": Gone("never")},
    {"cancel_running": Gone("now")},
    {"runtime": Gone("python")},
]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: " ".join(f"{name} {type(odd[name]).__name__}" for name in odd))
def test_registering_with_odd_types_works(
    manager: ModelManager, healthy: Model, tmp_path: Path, odd: dict[str, Any]
) -> None:
    """They count as what they are; nothing that the library gives, nor what workers get, is of the program's class."""
    folder = write_folder(tmp_path / "model", EVAL)
    options = {"model_name": "a", "handler": "handler.py", "max_batch_delay": 0, **odd}
    model = manager.register(folder, **options)
    assert model.submit("2 + 3").result(PATIENCE_S) == 5
    assert type(model.name) is type(model.version) is str
    assert "a" in manager
    info = model.describe()
    assert type(info.name) is type(info.version) is str
    assert type(info.spec.batch_size) is int
    model.scale(2 if len(info.workers) == 1 else 1)
    assert model.submit("type(context.system_properties.get('batch_size')).__name__").result(PATIENCE_S) == "int"
    assert model.submit("[type(each).__name__ for each in context.model_name]").result(PATIENCE_S) == ["str"]
    model.unregister()


def test_calls_with_odd_types_work(manager: ModelManager, deploy: Deployer, healthy: Model) -> None:
    """Names and numbers of all other calls, of predictions above all."""
    deploy(EVAL, model_name="a", version="2.0")
    for name, version in ((Name.A, Name.VERSION), (Gone("a"), Gone("2.0")), (Unpicklable("a"), Unpicklable("2.0"))):
        assert manager.predict(name, "1", version=version, timeout=Seconds(20)) == 1
        assert manager.submit(name, "1", version=version, priority=Number.TWO, wait_timeout=Whole(20)).result(20) == 1
        assert manager.describe(name, version).name == "a"
        manager.scale(name, Number.TWO, Whole(2), version=version, timeout=Seconds(20))
        manager.scale(name, Whole(1), Number.ONE, version=version, timeout=Number.TWO)
        manager.set_default(name, version)
        assert [info.version for info in manager.versions(name)] == ["2.0"]
        assert name in manager
    manager.unregister(Name.A, Name.VERSION, timeout=Seconds(20))
    assert "a" not in manager


@pytest.mark.parametrize("kind", [Text, Gone, Unpicklable])
def test_headers_and_ids_of_odd_types_reach_the_handler(deploy: Deployer, healthy: Model, kind: type[str]) -> None:
    """As text, with those of the others in the same batch; an enumeration counts as its value."""
    source = (
        "def handle(data, context):\n    return data and [[context.get_request_header(place, 'X-Header'),"
        " type(context.get_request_header(place, 'X-Header')).__name__, context.get_request_id(place)]"
        " for place in range(len(data))]\n"
    )
    model = deploy(source, batch_size=3, max_batch_delay=200)
    futures = [
        model.submit(1, headers={"X-Header": "plain"}, request_id="plain"),
        model.submit(2, headers={kind("X-Header"): kind("odd")}, request_id=kind("odd")),
        model.submit(3, headers={Name.HEADER: Name.A}, request_id=Name.A),
    ]
    answers = [future.result(PATIENCE_S) for future in futures]
    assert answers == [["plain", "str", "plain"], ["odd", "str", "odd"], ["a", "str", "a"]]


BAD: dict[str, Callable[[Model], object]] = {
    "a header that is no text": lambda model: model.submit("1", headers={"x": lambda: None}),  # type: ignore[dict-item]
    "headers that are none": lambda model: model.submit("1", headers=5),  # type: ignore[arg-type]
    "an id that is no text": lambda model: model.submit("1", request_id=5),  # type: ignore[arg-type]
    "data that does not travel": lambda model: model.submit(Unpicklable("1")),
    "a field that does not travel": lambda model: model.submit(fields={"body": "1", "x": Unpicklable("1")}),
    "a field whose name does not": lambda model: model.submit(fields={Unpicklable("body"): "1"}),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_travel_is_refused_where_it_was_given(
    deploy: Deployer, healthy: Model, name: str, gate: Gate
) -> None:
    """It is an InvalidArgument of that call: nothing of it waits, and no worker is busy with it, or ends by it."""
    model = deploy(EVAL)
    pid = model.predict("os.getpid()")
    running = model.submit(gate.expression)
    for _ in range(3):
        with pytest.raises(InvalidArgument):
            BAD[name](model)
    gate.open()
    assert running.result(PATIENCE_S) is None
    assert model.submit("os.getpid()").result(PATIENCE_S) == pid
    assert model.describe().queue_length == 0


def test_data_that_only_its_worker_cannot_read_fails_alone(deploy: Deployer, healthy: Model) -> None:
    """A row of a class that no other process knows is that request's error, with the others of its batch answered."""
    model = deploy(EVAL, batch_size=3, max_batch_delay=100)
    pids = {*model.map(["os.getpid()"] * 3)}
    futures = [model.submit("1"), model.submit(fields={"body": "1", "x": Gone("x")}), model.submit("3")]
    outcomes = []
    for future in futures:
        try:
            outcomes.append(future.result(PATIENCE_S))
        except TorchmgmtError as error:
            outcomes.append(type(error).__name__)
    assert outcomes[0::2] == [1, 3]
    assert outcomes[1] in {1, "HandlerFailed"}
    assert {*model.map(["os.getpid()"] * 3)} == pids


@pytest.mark.usefixtures("light_torch")
def test_odd_entries_of_the_module_path_are_no_obstacle(tmp_path: Path) -> None:
    """A Path, bytes and None in sys.path, which Python heeds or not, keep no worker from being started."""
    program = run_program(
        "import pathlib, sys\n"
        "sys.path += [pathlib.Path(sys.argv[2]), b'/nowhere', None]\n"
        "from torchmgmt import ModelManager\n"
        "with ModelManager() as manager:\n"
        "    model = manager.register(sys.argv[1], model_name='m', handler='handler.py')\n"
        "    print(model.predict('1'))\n"
        "    sys.path.insert(0, pathlib.Path(sys.argv[2]))\n"
        "    model.scale(2)\n"
        "    other = manager.register(sys.argv[1], model_name='n', handler='handler.py', share_weights='never')\n"
        "    print(other.predict('2'))\n",
        write_folder(tmp_path / "model", EVAL),
        tmp_path,
    )
    assert (program.stdout, program.stderr, program.returncode) == ("1\n2\n", "", 0)


def test_a_start_that_fails_unforeseen_is_a_start_that_failed(
    deploy: Deployer, manager: ModelManager, healthy: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it raises: the registration fails with it, nothing piles up, and close returns at once."""
    from torchmgmt.backends.process_worker import ProcessWorker

    opened = 0

    def broken(_self: ProcessWorker) -> None:
        nonlocal opened
        opened += 1
        raise LookupError("nobody has thought of that")

    model = deploy(EVAL, model_name="m", initial_workers=0, max_workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(ProcessWorker, "_open", broken)
        with pytest.raises(TorchmgmtError, match="nobody has thought of that"):
            deploy(EVAL, model_name="a")
        assert "a" not in manager
        with pytest.raises(TorchmgmtError, match="nobody has thought of that"):
            model.scale(1)
        assert opened
        assert healthy.predict("1") == 1
    until(lambda: model.state is VersionState.READY, "it is tried again, and works")
    assert model.predict("1") == 1


def test_a_request_that_no_worker_can_receive_ends(deploy: Deployer, healthy: Model, tmp_path: Path) -> None:
    """After three workers it fails with WorkerDied; what waits behind it is answered, and the model serves on."""
    limits = "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
    marker = tmp_path / "killed"
    # Reading the first request of that size ends the process before it is begun, as the system's own killer would.
    source = limits + EVAL.replace(
        "def handle(data, context):",
        "import torchmgmt.channel as channel\n"
        "_parse = channel.FrameReader._parse\n"
        "def parse(self, data, start, header):\n"
        f"    if header[4] > 300000:\n        note({str(marker)!r}); os.kill(os.getpid(), 9)\n"
        "    return _parse(self, data, start, header)\n"
        "channel.FrameReader._parse = parse\n"
        "def handle(data, context):",
        1,
    )
    model = deploy(source, share_weights="never")
    assert model.predict("1") == 1
    bad = model.submit("1 #" + "x" * 400_000)
    others = [model.submit(str(number)) for number in range(3)]
    error = bad.exception(40)
    assert isinstance(error, WorkerDied)
    assert "before it had begun this request" in error.reason
    assert [future.result(PATIENCE_S) for future in others] == [0, 1, 2]
    assert len(marker.read_text().split()) == 3
    assert model.state is VersionState.READY


def test_this_module_is_not_what_workers_import() -> None:
    """The classes above are strangers to workers: that is what the tests stand on."""
    assert "there_is_no_such_module" not in sys.modules
    assert ECHO
