"""Archives of the real torch-model-archiver are served: by name, by path, in each format, and predict rightly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import pytest

from examples.digits import pack
from tests.handlers import Deployer
from torchmgmt import Model, ModelManager, ProcessBackend
from torchmgmt.errors import SourceNotFound

DIGITS = Path(pack.__file__).parent
SAMPLES = sorted((DIGITS / "samples").glob("*.pgm"))
ARCHIVED = "def handle(data, context):\n    return data and [(context.manifest['model']['modelVersion'], open('note.txt').read())]\n"


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with digits.mar (1.0) and digits_v2.mar (2.0)."""
    folder = tmp_path_factory.mktemp("store")
    pack.build(folder)
    return folder


@pytest.fixture(scope="session")
def formats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Archive format -> the same small model in it."""
    folder = tmp_path_factory.mktemp("formats")
    (folder / "handler.py").write_text(ARCHIVED)
    (folder / "note.txt").write_text("a note")
    made = {}
    for kind, name in (("default", "small.mar"), ("tgz", "small.tar.gz"), ("no-archive", "small")):
        scratch = folder / "scratch" / kind
        scratch.mkdir(parents=True)
        export = folder / kind
        export.mkdir()
        command = [
            Path(sysconfig.get_path("scripts"), "torch-model-archiver"),
            "--model-name",
            "small",
            "--version",
            "5.1",
        ]
        command += ["--handler", "handler.py", "--extra-files", "note.txt", "--export-path", export]
        command += ["--archive-format", kind]
        subprocess.run(command, cwd=folder, check=True, timeout=60, env={**os.environ, "TMPDIR": str(scratch)})
        made[kind] = export / name
    return made


@pytest.fixture
def managed(backend: ProcessBackend, store: Path) -> Any:
    with ModelManager(store, backend=backend) as manager:
        yield manager


def labels() -> list[int]:
    found = json.loads((DIGITS / "samples" / "labels.json").read_text())
    return [found[path.name] for path in SAMPLES] if isinstance(found, dict) else found


def count_right(model: Model) -> int:
    answers = list(model.map(path.read_bytes() for path in SAMPLES))
    assert all(0 <= answer["probability"] <= 1 for answer in answers)
    return sum(answer["digit"] == label for answer, label in zip(answers, labels(), strict=True))


@pytest.mark.parametrize("name, version", [("digits.mar", "1.0"), ("digits_v2.mar", "2.0")])
def test_digits_are_recognised(managed: ModelManager, name: str, version: str) -> None:
    """Both versions of the digits example predict as many samples rightly as were measured when they were trained."""
    model = managed.register(name, batch_size=8, max_batch_delay=5)
    assert (model.name, model.version) == ("digits", version)
    right = json.loads((DIGITS / "metrics.json").read_text())["versions"][version]["samples_right"]
    assert count_right(model) == right


def test_answers_are_those_of_the_model_called_directly(managed: ModelManager, tmp_path: Path) -> None:
    """A served model answers exactly what the network gives when it is called without any server."""
    script = """
import json, sys
import torch
from pathlib import Path
folder = Path(sys.argv[1])
sys.path.insert(0, str(folder))
import model as module
(network,) = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, torch.nn.Module) and v.__module__ == "model"]
net = network()
net.load_state_dict(torch.load(folder / "digits_v1.pt", weights_only=True))
net.eval()
answers = []
for path in sorted((folder / "samples").glob("*.pgm")):
    pixels = torch.tensor(list(path.read_bytes()[-64:]), dtype=torch.float32).reshape(1, 1, 8, 8) / 16
    with torch.inference_mode():
        best = torch.softmax(net(pixels), dim=1).max(dim=1)
    answers.append([int(best.indices), float(best.values)])
print(json.dumps(answers))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, DIGITS], capture_output=True, text=True, timeout=50, check=True
    )
    model = managed.register("digits.mar")
    served = [model.predict(path.read_bytes()) for path in SAMPLES]
    direct = json.loads(done.stdout)
    assert [answer["digit"] for answer in served] == [digit for digit, _ in direct]
    assert [answer["probability"] for answer in served] == pytest.approx([share for _, share in direct], abs=1e-3)


def test_both_versions_live_side_by_side(managed: ModelManager) -> None:
    """Two archives of one model name are two versions: the first is the default until another one is set."""
    managed.register("digits.mar")
    managed.register("digits_v2.mar")
    image = SAMPLES[0].read_bytes()
    one, two = (managed.predict("digits", image, version=version) for version in ("1.0", "2.0"))
    assert managed.predict("digits", image) == one
    managed.set_default("digits", "2.0")
    assert managed.predict("digits", image) == two
    managed.unregister("digits", "1.0")
    assert managed.predict("digits", image) == two


def test_a_bad_image_is_told_to_its_sender(managed: ModelManager) -> None:
    """What the example's handler says of a bad request arrives, and the model goes on."""
    model = managed.register("digits.mar")
    error = model.submit(b"no image").exception(20)
    assert "not a P5 header" in str(error)
    assert model.predict(SAMPLES[0].read_bytes())["digit"] == labels()[0]


@pytest.mark.parametrize("kind", ["default", "tgz", "no-archive"])
@pytest.mark.parametrize("how", ["name", "path", "text", "url"])
def test_each_format_is_served_from_anywhere(
    backend: ProcessBackend, formats: dict[str, Path], kind: str, how: str
) -> None:
    """A .mar, a .tar.gz and a folder are registered by name in the store, by path, and by file URL."""
    path = formats[kind]
    url = {"name": path.name, "path": path, "text": str(path), "url": path.as_uri()}[how]
    with ModelManager(path.parent if how == "name" else None, backend=backend) as manager:
        model = manager.register(url)
        assert (model.name, model.version) == ("small", "5.1")
        assert model.predict() == ("5.1", "a note")
        assert model.describe().spec.url == os.fspath(url)


def test_a_tgz_is_an_archive_too(manager: ModelManager, formats: dict[str, Path], tmp_path: Path) -> None:
    """The same content under the name .tgz is served."""
    path = tmp_path / "small.tgz"
    shutil.copy(formats["tgz"], path)
    assert manager.register(path).predict() == ("5.1", "a note")


def test_a_name_needs_a_store(manager: ModelManager) -> None:
    """Without a model store a bare name that is no path is not found."""
    with pytest.raises(SourceNotFound):
        manager.register("digits.mar")


def test_an_archive_is_unpacked_once_and_removed_with_its_last_version(managed: ModelManager, store: Path) -> None:
    """Registrations of one archive each have a folder, removed with them; what they share goes with the last of them."""

    def unpacked() -> set[str]:
        return {model for model in os.listdir(tempfile.gettempdir()) if model.startswith("torchmgmt")}  # noqa: PTH208

    before = unpacked()
    one = managed.register("digits.mar", model_name="one")
    two = managed.register(store / "digits.mar", model_name="two")
    specs = [model.describe().spec for model in (one, two)]
    folders = [Path(spec.model_dir) for spec in specs]
    assert folders[0] != folders[1]
    shared = Path(specs[0].pristine_dir or "")
    assert specs[1].pristine_dir == str(shared)
    one.unregister()
    assert [folder.is_dir() for folder in (*folders, shared)] == [False, True, True]
    assert count_right(two) == 32
    two.unregister()
    assert [folder.is_dir() for folder in (*folders, shared)] == [False, False, False]
    assert unpacked() == before


def test_an_archive_may_be_replaced_while_it_is_served(managed: ModelManager, store: Path, tmp_path: Path) -> None:
    """Replacing or deleting an archive's file changes nothing for versions that were registered from it."""
    path = tmp_path / "digits.mar"
    shutil.copy(store / "digits.mar", path)
    model = managed.register(path)
    shutil.copy(store / "digits_v2.mar", path)
    other = managed.register(path)
    assert (model.version, other.version) == ("1.0", "2.0")
    path.unlink()
    model.scale(2)
    assert count_right(model) == count_right(other) == 32


def test_a_plain_folder_is_served_and_left_alone(deploy: Deployer) -> None:
    """A folder without a manifest, given name and handler, is version 1.0, is never written to, and never removed."""
    model = deploy()
    (folder,) = deploy.root.glob("model*")
    before = sorted(path.name for path in folder.rglob("*"))
    assert model.version == "1.0"
    assert model.predict("os.getcwd()") == model.describe().spec.model_dir != str(folder)
    assert model.predict("open('new', 'w').close() or os.path.exists('new')") is True
    model.unregister()
    assert sorted(path.name for path in folder.rglob("*")) == before
