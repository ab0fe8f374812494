"""Which configuration file counts, what one of TorchServe's does to a server, and which models it begins with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.http.archives import BROKEN, ECHO, write_model
from tests.http.fakes import FakeManager
from tests.http.test_program import Program, run
from torchmgmt.errors import TorchmgmtError
from torchmgmt.http import loader as loader_module
from torchmgmt.http.command_line import Action, parse_command_line
from torchmgmt.http.loader import Loader, ModelToLoad, models_to_load
from torchmgmt.settings import Settings

CONFIG = r"""# as TorchServe's documentation has it
inference_address=http://127.0.0.1:0
management_address=http\://127.0.0.1\:0
model_store=$$STORE_OF_THIS_TEST$$
load_models=noop.mar, second=plain
enable_envvars_config=true
enable_model_api=true
job_queue_size=7
default_workers_per_model=1
vmargs=-Xmx1g
job_queu_size=8
number_of_gpu=1
models={\
  "noop.mar": {\
    "1.0": {\
        "defaultVersion": true,\
        "marName": "noop.mar",\
        "minWorkers": 1,\
        "maxWorkers": 2,\
        "batchSize": 4,\
        "maxBatchDelay": 50,\
        "responseTimeout": 60\
    }\
  }\
}
metrics_address=http://127.0.0.1:0
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Program]]:
    """Start programs; what still runs at the end is killed."""
    programs: list[Program] = []

    def start(*arguments: str, **variables: str) -> Program:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        programs.append(Program(arguments, tmp_path))
        programs[-1].wait_for("Model server started")
        return programs[-1]

    yield start
    for program in programs:
        program.process.kill()
        program.process.wait()
        assert program.process.stdout is not None
        program.process.stdout.close()


def test_a_file_of_torchserves_serves(start: Callable[..., Program], tmp_path: Path) -> None:
    """config.properties in the working directory is found, and all that stands in it counts or is warned about."""
    write_model(tmp_path / "store", "noop.mar")
    write_model(tmp_path / "store", "plain")
    (tmp_path / "config.properties").write_text(CONFIG)
    program = start("--job-queue-size", "6", STORE_OF_THIS_TEST=str(tmp_path / "store"), TS_JOB_QUEUE_SIZE="5")
    assert f"Configuration file: {tmp_path / 'config.properties'}" in program.lines
    assert f"Model store: {tmp_path / 'store'}" in program.lines
    assert "Registering and unregistering over HTTP: on" in program.lines
    (item,) = program.client().get("/models/noop.mar").json()
    keys = ("minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout", "loadedAtStartup")
    assert [item[key] for key in keys] == [1, 2, 4, 50, 60, True]
    assert item["jobQueueStatus"]["remainingCapacity"] == 5
    (item,) = program.client().get("/models/second").json()
    assert [item[key] for key in keys] == [1, 1, 1, 100, 120, True]
    log = program.log.read_text()
    assert "config.properties, line 10: vmargs has no effect" in log
    assert "config.properties, line 11: unknown setting 'job_queu_size': did you mean 'job_queue_size'?" in log
    assert "number_of_gpu has no effect in this release" in log
    assert program.end() == 0


def test_what_failed_at_the_start_can_be_registered_or_removed(start: Callable[..., Program], tmp_path: Path) -> None:
    """A later POST /models of that name works, DELETE removes it, and until then a prediction would say why."""
    for name in ("mended", "given_up"):
        write_model(tmp_path / "model_store", name, BROKEN)
    program = start("--models", "all", "--enable-model-api", "--default-workers-per-model", "1")
    client = program.client()
    answer = client.put("/models/mended", params={"min_worker": "1"})
    assert answer.status_code == 503
    assert "could not be loaded at the start" in answer.json()["message"]
    (tmp_path / "model_store" / "mended" / "handler.py").write_text(ECHO)
    parameters = {"url": "mended", "initial_workers": "1", "synchronous": "true"}
    assert client.post("/models", params=parameters).status_code == 200
    assert client.get("/models/mended/all").json()[0]["state"] == "READY"
    assert len(client.get("/models/mended/all").json()) == 1
    answer = client.delete("/models/given_up")
    assert (answer.status_code, answer.json()["status"]) == (200, 'Model "given_up" unregistered')
    assert client.get("/models/given_up").status_code == 404
    assert [model["modelName"] for model in client.get("/models").json()["models"]] == ["mended"]
    assert client.delete("/models/given_up").status_code == 404
    assert program.client("Inference").get("/ping").json() == {"status": "Healthy"}
    assert program.end() == 0


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a=1\njob_queue_size=many", "config.properties, line 2: job_queue_size is 'many', but must be a whole number"),
        ("keystore=keystore.p12", "config.properties, line 1: keystore is 'keystore.p12', but must be left out"),
        ("model_store=$$NOT_SET_ANYWHERE$$", "config.properties, line 1: model_store is '$$NOT_SET_ANYWHERE$$'"),
        ("models={", "config.properties, line 1: models is '{', but must be a JSON object"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    """Code 2, with file, line and key, in the foreground and for --start; nothing is begun."""
    (tmp_path / "config.properties").write_text(text)
    for flags in ([], ["--start"]):
        ended = run(*flags, cwd=tmp_path)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr.startswith(f"torchmgmt: error: {expected}")
        assert ended.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.properties"]


FILES = ("config.properties", "flag.properties", "variable.properties")


@pytest.mark.parametrize(
    "there, flag, variable, expected",
    [
        (FILES[:0], None, None, None),
        (FILES[:1], None, None, "config.properties"),
        (FILES[:2], "flag.properties", None, "flag.properties"),
        (FILES, "flag.properties", "variable.properties", "variable.properties"),
        (FILES, None, "variable.properties", "variable.properties"),
        (FILES, "flag.properties", "", "flag.properties"),
        (FILES[1:2], None, None, None),
    ],
)
def test_the_variable_beats_the_flag_and_that_the_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    there: tuple[str, ...],
    flag: str | None,
    variable: str | None,
    expected: str | None,
) -> None:
    """TS_CONFIG_FILE, --ts-config, ./config.properties: one file counts, never two."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(FILES):
        if name in there:
            (tmp_path / name).write_text(f"job_queue_size={number + 1}")
    variables = {} if variable is None else {"TS_CONFIG_FILE": variable}
    command = parse_command_line(["--ts-config", flag] if flag else [], variables)
    assert command.file == (Path(expected) if expected else None)
    assert command.settings.job_queue_size == (FILES.index(expected) + 1 if expected else 100)


@pytest.mark.parametrize(
    "arguments, action",
    [
        ([], Action.SERVE),
        (["--foreground"], Action.SERVE),
        (["--start"], Action.START),
        (["--start", "--foreground"], Action.SERVE_STOPPABLE),
        (["--stop"], Action.STOP),
    ],
)
def test_what_the_flags_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], action: Action):
    """As with TorchServe, but that it stays in the foreground without --start."""
    monkeypatch.chdir(tmp_path)
    assert parse_command_line(arguments, {}).action is action


def test_stopping_needs_no_configuration(tmp_path: Path) -> None:
    """A file that has become wrong meanwhile does not keep a server from being stopped."""
    (tmp_path / "config.properties").write_text("job_queue_size=many")
    assert run("--stop", cwd=tmp_path).returncode == 0


def test_a_command_line_as_scripts_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags of TorchServe in its order, with several models, switches without value, and one that turns off."""
    monkeypatch.chdir(tmp_path)
    line = "--start --ncs --model-store s --models a.mar b=b.mar,c.mar --enable-model-api --disable-token-auth"
    settings = parse_command_line(line.split(), {}).settings
    assert settings.no_config_snapshots
    assert settings.load_models == ("a.mar", "b=b.mar", "c.mar")
    assert (settings.enable_model_api, settings.disable_token_authorization) == (True, True)
    assert parse_command_line(["--enable-token-auth"], {}).settings.disable_token_authorization is False


@pytest.mark.parametrize("items", [(), ("standalone",), ("STANDALONE",)])
def test_no_models(tmp_path: Path, items: tuple[str, ...]) -> None:
    """TorchServe's documentation calls the start without models standalone."""
    write_model(tmp_path, "noop")
    assert models_to_load(Settings(model_store=tmp_path, load_models=items)) == []


def test_all_is_every_archive_of_the_store(tmp_path: Path) -> None:
    """Folders that are models and archives by their suffix; nothing hidden and nothing else."""
    write_model(tmp_path, "folder")
    (tmp_path / "no_model").mkdir()
    for name in ("b.mar", "a.tar.gz", "c.tgz", ".d.mar", "e.txt"):
        (tmp_path / name).touch()
    models = models_to_load(Settings(model_store=tmp_path, load_models=("all",)))
    assert models == [ModelToLoad(name) for name in ("a.tar.gz", "b.mar", "c.tgz", "folder")]
    assert models_to_load(Settings(load_models=("all",))) == []


class Meeting(FakeManager):
    """A manager in which as many loads as there are cores must meet before any of them ends."""

    def __init__(self, cores: int, errors: dict[str, Exception]) -> None:
        super().__init__()
        self.meeting = threading.Barrier(cores, timeout=20)
        self.errors = errors
        self.lock = threading.Lock()
        self.inside = self.most = 0
        self.loaded: list[str] = []

    def restore(self, model_snapshot: object) -> tuple[()]:
        return ()

    def items_to_load(self, items: list[str], *, over_state: bool) -> list[str]:
        return items

    def register(self, url: str, **kwargs: Any) -> Any:
        assert kwargs["loaded_at_startup"] is True
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        self.meeting.wait()
        with self.lock:
            self.inside -= 1
        if url in self.errors:
            raise self.errors[url]
        self.loaded.append(url)
        return ModelStub()


class ModelStub:
    name, version = "x", "1.0"


def test_as_many_load_at_once_as_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more and no fewer; failures of any kind stop no other, and only after the last one it says that it is done."""
    monkeypatch.setattr(loader_module, "_cores", lambda: 3)
    urls = [f"m{number}.mar" for number in range(9)]
    errors: dict[str, Exception] = {"m0.mar": TorchmgmtError("no"), "m4.mar": ZeroDivisionError("a bug")}
    manager = Meeting(3, errors)
    tried_when_done = []
    loader = Loader(manager, Settings(load_models=urls), lambda: tried_when_done.append(len(manager.loaded)))  # type: ignore[arg-type]
    assert loader.is_loading
    loader.start()
    loader.join(30)
    assert manager.most == 3
    assert sorted(manager.loaded) == sorted(set(urls) - set(errors))
    assert (tried_when_done, loader.is_loading) == ([7], False)


def test_a_loader_that_is_stopped_begins_no_further_model() -> None:
    """Nor does it say that all is loaded."""
    manager = Meeting(1, {})
    said: list[str] = []
    loader = Loader(manager, Settings(load_models=("a.mar",)), lambda: said.append("loaded"))  # type: ignore[arg-type]
    loader.stop()
    loader.start()
    loader.join(30)
    assert (manager.loaded, said, loader.is_loading) == ([], [], True)
