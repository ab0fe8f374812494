"""Packages of a model's own in its workers: found first, beside those of others, with nothing of it in the program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.handlers import EVAL, write_folder, write_manifest
from tests.wheels import make_wheel, requirements
from torchmgmt import Model, ModelManager, ProcessBackend, Settings
from torchmgmt.archive.environments import PINNED
from torchmgmt.errors import InvalidArchive, InvalidArgument

HANDLER = "import tinypkg\n" + EVAL

Register = Callable[..., Model]


@pytest.fixture
def manager(backend: ProcessBackend) -> Iterator[ModelManager]:
    settings = Settings(install_py_dep_per_model=True)
    with ModelManager(settings=settings, backend=backend) as manager:
        yield manager


@pytest.fixture
def register(manager: ModelManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Register:
    """Register a model that asks for tinypkg of a version."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)

    def begin(version: str, name: str = "m", **options: object) -> Model:
        make_wheel(tmp_path / "index", "tinypkg", version, f"VALUE = {version!r}\n")
        folder = write_folder(tmp_path / name / version, HANDLER)
        write_manifest(folder, modelName=name, modelVersion=version, handler="handler", requirementsFile="needs.txt")
        (folder / "needs.txt").write_text(requirements(tmp_path / "index", f"tinypkg=={version}"))
        return manager.register(folder, **options)  # type: ignore[arg-type]

    return begin


def test_two_versions_of_a_package_side_by_side(register: Register) -> None:
    """Each model version has its own; the program has neither; describe says who has packages of its own."""
    first, second = register("1.0", initial_workers=2), register("2.0", share_weights="never")
    assert [first.predict("tinypkg.VALUE"), second.predict("tinypkg.VALUE")] == ["1.0", "2.0"]
    assert "tinypkg" not in sys.modules
    assert first.describe().to_dict()["useVenv"] is True
    second.unregister()
    assert first.predict("__import__('importlib.metadata').metadata.version('tinypkg')") == "1.0"


def test_where_a_worker_looks_for_modules(register: Register) -> None:
    """In the model's folder, then in its packages, then where the program does; so do Python programs that it starts."""
    model = register("1.0")
    folder, packages, *rest = model.predict("sys.path")
    assert folder == model.describe().spec.model_dir
    assert packages == model.describe().spec.packages
    assert [entry for entry in rest if entry] == [entry for entry in sys.path if entry]
    script = "import tinypkg; print(tinypkg.VALUE)"
    code = f"__import__('subprocess').check_output([sys.executable, '-c', {script!r}], text=True)"
    assert model.predict(code) == "1.0\n"


def test_what_cannot_be_installed_fails_the_registration(register: Register, manager: ModelManager) -> None:
    """The caller gets pip's words, and nothing is registered."""
    with pytest.raises(InvalidArchive, match=r"(?s)pip's log ends with:.*Invalid requirement"):
        register("no version")
    assert not manager.models()


def test_threads_have_no_packages_of_their_own(register: Register, manager: ModelManager) -> None:
    """A model that needs some is refused on the thread backend, with what to do."""
    with pytest.raises(InvalidArgument, match="backend is 'thread', but must be process: its requirements file asks"):
        register("1.0", backend="thread")
    assert not manager.models()


def test_what_workers_have_imported_already_is_pinned() -> None:
    """Other versions of that would be installed, and not be used."""
    code = """
import importlib.metadata, json, sys
import torchmgmt.worker.forkserver
of = importlib.metadata.packages_distributions()
print(json.dumps(sorted({name for module in sys.modules for name in of.get(module.partition(".")[0], ())})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50)
    # setuptools puts a module of its own before every program.
    assert set(json.loads(done.stdout)) - {"torchmgmt", "setuptools"} <= set(PINNED)
