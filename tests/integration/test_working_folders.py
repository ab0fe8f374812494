"""Versions that keep something in files of their working directory: right answers to many callers, whatever they share."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.handlers import is_gone, until, write_folder, write_manifest
from torchmgmt import Model, ModelManager, ProcessBackend
from torchmgmt.archive import copying, pristine

CALLERS = 60

STATE = """
import os
def handle(data, context):
    if data is None:
        return
    answers = []
    for row in data:
        fd = os.open("state.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, (row["body"] + "\\n").encode())
        os.close(fd)
        with open("state.txt") as file:
            answers.append(file.read().split())
    return answers
"""
"""Answers with all that was ever sent, which is in a file."""

SQLITE = """
import contextlib, sqlite3
def handle(data, context):
    if data is None:
        return
    answers = []
    for row in data:
        with contextlib.closing(sqlite3.connect("cache.db", timeout=30)) as cache, cache:
            cache.execute("CREATE TABLE IF NOT EXISTS answers (question PRIMARY KEY, answer)")
            cache.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (row["body"], context.model_name))
            answers += cache.execute("SELECT answer FROM answers WHERE question = ?", (row["body"],)).fetchone()
    return answers
"""
"""Answers with the model's name, by way of a cache on the disk."""

BESIDE_ITSELF = SQLITE.replace(
    '"cache.db"', "os.path.join(os.path.dirname(os.path.realpath(__file__)), 'cache.db')"
).replace("import contextlib", "import os, contextlib")


@pytest.fixture(params=["archive", "plain folder"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a source of a handler, that has been used in place before, too, if it is a folder."""

    def make(handler: str) -> Path:
        folder = write_manifest(write_folder(tmp_path / "model", handler), modelName="m", handler="handler.py")
        if request.param == "archive":
            return Path(shutil.make_archive(str(tmp_path / "packed"), "zip", folder))
        (folder / "sub").mkdir()
        return folder

    return make


def ask_all(models: list[Model], ask: Callable[[Model, int], bool]) -> int:
    """Have 60 callers of each model ask at once; return how many had the right answer."""
    with ThreadPoolExecutor(CALLERS * len(models)) as callers:
        asked = [callers.submit(ask, model, number) for number in range(CALLERS) for model in models]
        return sum(each.result(50) for each in asked)


def register_three(manager: ModelManager, source: Path) -> list[Model]:
    """Register a source under two names, and as two versions of one of them; each with two workers."""
    return [
        manager.register(source, model_name=name, version=version, initial_workers=2, max_batch_delay=0)
        for name, version in (("camera_a", "1"), ("camera_b", "1"), ("camera_b", "2"))
    ]


def test_each_version_has_its_own_state_file(manager: ModelManager, make: Callable[[str], Path]) -> None:
    """Its workers share it, and nobody else: 60 callers each find what was sent to their version, and only that."""
    models = register_three(manager, make(STATE))

    def ask(model: Model, number: int) -> bool:
        mark = f"{model.name}-{model.version}"
        seen = model.predict(f"{mark}-{number}")
        return f"{mark}-{number}" in seen and all(each.startswith(mark) for each in seen)

    assert ask_all(models, ask) == len(models) * CALLERS
    for model in models:
        assert len(model.predict(f"{model.name}-{model.version}")) == CALLERS + 1


@pytest.mark.parametrize("handler", [SQLITE, BESIDE_ITSELF], ids=["in the directory", "beside the code"])
def test_each_version_has_its_own_cache(manager: ModelManager, make: Callable[[str], Path], handler: str) -> None:
    """One question, put to versions with a cache on the disk: 60 callers each get the answer of the model that they asked."""
    models = register_three(manager, make(handler))[:2]
    assert ask_all(models, lambda model, number: model.predict(f"q{number % 7}") == model.name) == 2 * CALLERS


def test_a_restarted_worker_finds_what_its_version_wrote(manager: ModelManager, make: Callable[[str], Path]) -> None:
    """The folder is the version's, not the worker's: it outlives a worker, and is another one after a new registration."""
    source = make(STATE)
    model = manager.register(source, model_name="m", initial_workers=1)
    assert model.predict("one") == ["one"]
    (worker,) = model.describe().workers
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    until(lambda: is_gone(worker.pid or 0))
    assert model.predict("two") == ["one", "two"]
    folder = Path(model.describe().spec.model_dir)
    model.unregister()
    assert not folder.exists()
    assert manager.register(source, model_name="m").predict("three") == ["three"]


def test_a_restored_version_begins_anew(backend: ProcessBackend, make: Callable[[str], Path], tmp_path: Path) -> None:
    """What is restored from a state file gets a new working folder, as does each of the others."""
    source, state = make(STATE), tmp_path / "state.json"
    with ModelManager(backend=backend, state_file=state) as manager:
        for name in ("a", "b"):
            assert manager.register(source, model_name=name).predict(name) == [name]
    with ModelManager(backend=backend, state_file=state) as manager:
        manager.restore()
        assert [manager.predict(name, name) for name in ("a", "b")] == [["a"], ["b"]]
        assert len({manager.describe(name).spec.model_dir for name in ("a", "b")}) == 2


def test_a_handler_may_do_as_it_likes_with_its_own_files(manager: ModelManager, make: Callable[[str], Path]) -> None:
    """One that renames and removes its files, its own code among them, does so to no other version."""
    source = make(STATE + "\nimport os\nos.rename('handler.py', 'used.py')\nos.remove('MAR-INF/MANIFEST.json')\n")
    for name in ("a", "b", "c"):
        assert manager.register(source, model_name=name).predict(name) == [name]


@pytest.fixture
def keeping_compiled(light_torch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelManager]:
    """A manager whose workers keep what Python compiles, whatever this program does."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    with ModelManager() as manager:
        yield manager


def test_code_is_compiled_once_and_each_version_runs_its_own(keeping_compiled: ModelManager, tmp_path: Path) -> None:
    """What Python keeps of the code is shared; a version that changes its code runs what it has changed, and no other does."""
    source = """
import importlib, pathlib
import word
def handle(data, context):
    if data is None:
        return
    if data[0]["body"] != "?":
        pathlib.Path("word.py").write_text(data[0]["body"])
    return [(word.WORD, word.__cached__) for _ in data]
"""
    folder = write_folder(tmp_path / "model", source, word="WORD = 'one'")
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", folder))

    def register(name: str) -> Model:
        return keeping_compiled.register(archive, model_name=name, handler="handler.py", share_weights="never")

    one, two = register("one"), register("two")
    (_, cached), (_, cached_two) = one.predict("WORD = 'two'"), two.predict("?")
    assert Path(cached).samefile(cached_two)
    written = Path(cached).stat().st_ino
    register("three")
    assert Path(cached).stat().st_ino == written
    for model, word in ((one, "two"), (two, "one"), (one, "two"), (two, "one")):
        model.scale(0, synchronous=True)
        model.scale(1, synchronous=True)
        assert model.predict("?")[0] == word


NET = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.big = torch.nn.Linear(512, 512, bias=False)
    def forward(self, rows):
        return self.big(rows)
"""
TRAINED = """
import torch
from pathlib import Path
from torchmgmt.handlers.base_handler import BaseHandler
class Handler(BaseHandler):
    def preprocess(self, rows):
        for row in rows:
            if row["body"] == "train":
                torch.save({"big.weight": torch.full((512, 512), 2.0)}, "state.pt")
        return super().preprocess([[1.0] * 512 for row in rows])
    def postprocess(self, data):
        at = self.model.big.weight.data_ptr()
        for line in Path("/proc/self/maps").read_text().splitlines():
            start, end = (int(each, 16) for each in line.split()[0].split("-"))
            if start <= at < end:
                return [(float(row[0]), line.split()[5] if len(line.split()) > 5 else "") for row in data]
"""
"""Answers with 512 times the weight, and the file that is mapped for it; saves other weights over its own if told to."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("clones", [False, True])
def test_versions_map_one_copy_that_none_can_write_to(
    manager: ModelManager, tmp_path: Path, clones: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the third on, weights are in memory once; who saves other ones over its own answers by them, and no other does."""
    monkeypatch.setattr(pristine, "LARGE_BYTES", 1 << 20)
    for module in (copying, pristine):
        monkeypatch.setattr(module, "is_write_protected", lambda path: False)  # as for root
    if clones:
        monkeypatch.setattr(copying, "clone", copy_blocks)
    folder = write_folder(tmp_path / "m", TRAINED, model=NET)
    script = "import torch; torch.save({'big.weight': torch.ones(512, 512)}, 'state.pt')"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=folder, check=True, timeout=60)
    write_manifest(folder, modelName="m", handler="handler.py", modelFile="model.py", serializedFile="state.pt")
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", folder))

    def register(number: int) -> Model:
        return manager.register(archive, version=str(number), share_weights="never", max_batch_delay=0)

    models = [register(number) for number in range(4)]
    own = [Path(model.describe().spec.model_dir, "state.pt") for model in models]
    common = Path(models[0].describe().spec.pristine_dir or "", "state.pt")
    asked: list[Any] = [model.predict("x") for model in models]
    assert [weight for weight, _ in asked] == [512.0] * 4
    assert [file for _, file in asked] == [str(own[0]), str(own[1]), str(common), str(common)]
    for model in models[:2]:
        model.submit("train").exception(20)
    for model in models:
        model.scale(0, synchronous=True)
        model.scale(1, synchronous=True)
    asked = [model.predict("x") for model in models]
    assert [weight for weight, _ in asked] == [1024.0, 1024.0, 512.0, 512.0]
    assert [file for _, file in asked] == [str(own[0]), str(own[1]), str(common), str(common)]
    assert register(4).predict("x") == (512.0, str(common))


def copy_blocks(source: int, target: int) -> bool:
    """Stand in for a file system that can clone."""
    return os.sendfile(target, source, 0, 1 << 30) > 0
