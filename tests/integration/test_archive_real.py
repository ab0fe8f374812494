"""Archives made by the real torch-model-archiver, in each of its formats, open alike."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchmgmt.archive import Manifest, ModelFolder, ModelSources

FORMATS = {"default": "m.mar", "zip-store": "m.mar", "tgz": "m.tar.gz", "no-archive": "m"}
FILES = {
    "MAR-INF/MANIFEST.json",
    "handler.py",
    "model.py",
    "weights.pt",
    "requirements.txt",
    "settings.yaml",
    "nested/labels.json",
    "index_to_name.json",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Format -> what the archiver made of the same files."""
    folder = tmp_path_factory.mktemp("archiver")
    return {name: build(folder, name) for name in FORMATS}


def build(folder: Path, archive_format: str) -> Path:
    content = folder / "content"
    (content / "extra" / "nested").mkdir(parents=True, exist_ok=True)
    (content / "scratch").mkdir(exist_ok=True)
    (content / "handler.py").write_text("def handle(data, context): ...\n")
    (content / "model.py").write_text("class Model: ...\n")
    (content / "weights.pt").write_bytes(bytes(100_000))
    (content / "requirements.txt").write_text("attrs\n")
    (content / "settings.yaml").write_text("minWorkers: 2\nhandler:\n  mean: [0.5, 0.5]\n")
    (content / "extra" / "index_to_name.json").write_text('{"0": "zero"}')
    (content / "extra" / "nested" / "labels.json").write_text("[]")
    out = folder / archive_format
    out.mkdir()
    archiver = Path(sysconfig.get_path("scripts"), "torch-model-archiver")
    options = {
        "--model-name": "m",
        "--version": "2.10",
        "--handler": "handler:handle",  # with .py it would look for a file of that whole name
        "--model-file": "model.py",
        "--serialized-file": "weights.pt",
        "--requirements-file": "requirements.txt",
        "--config-file": "settings.yaml",
        "--extra-files": "extra",
        "--archive-format": archive_format,
        "--export-path": str(out),
    }
    command = [sys.executable, str(archiver), *(text for pair in options.items() for text in pair)]
    # It collects in <temporary folder>/<model name>, and removes what it finds there.
    environment = {"TMPDIR": str(content / "scratch"), "PATH": "/usr/bin:/bin"}
    subprocess.run(command, check=True, cwd=content, env=environment, timeout=50)
    return out / FORMATS[archive_format]


@pytest.fixture
def sources() -> Iterator[ModelSources]:
    sources = ModelSources(None)
    yield sources
    sources.close()


def files_of(model: ModelFolder) -> set[str]:
    return {p.relative_to(model.path).as_posix() for p in model.path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("archive_format", FORMATS)
def test_every_format_opens_alike(built: dict[str, Path], archive_format: str, sources: ModelSources) -> None:
    """Files, manifest and configuration are the same, whatever they were packed in."""
    with sources.open(built[archive_format]) as model:
        assert files_of(model) == FILES
        assert (model.path / "weights.pt").stat().st_size == 100_000
        assert model.config == {"minWorkers": 2, "handler": {"mean": [0.5, 0.5]}}
        assert model.manifest == Manifest(
            model_name="m",
            version="2.10",
            handler="handler:handle",
            model_file="model.py",
            serialized_file="weights.pt",
            requirements_file="requirements.txt",
            config_file="settings.yaml",
            raw=model.manifest.raw if model.manifest else {},
        )
        assert model.manifest.raw["archiverVersion"]
    assert not model.path.exists()
    assert built[archive_format].exists()


@pytest.mark.parametrize("archive_format", ["default", "tgz"])
def test_the_digest_is_that_of_the_file(built: dict[str, Path], archive_format: str, sources: ModelSources) -> None:
    """What sha256sum prints."""
    archive = built[archive_format]
    with sources.open(archive) as model:
        assert model.digest == hashlib.sha256(archive.read_bytes()).hexdigest()


@pytest.mark.parametrize("archive_format", ["default", "tgz"])
@pytest.mark.parametrize("name", ["m.mar", "m.tgz", "m.tar.gz", "m"])
def test_the_content_tells_the_format(
    built: dict[str, Path], archive_format: str, name: str, sources: ModelSources, tmp_path: Path
) -> None:
    """What a file is called does not matter."""
    (tmp_path / name).write_bytes(built[archive_format].read_bytes())
    with sources.open(tmp_path / name) as model:
        assert files_of(model) == FILES


@pytest.mark.parametrize("how", ["dot", "names"])
@pytest.mark.parametrize("tar_format", ["gnu", "pax", "ustar", "v7"])
def test_archives_made_with_tar_itself(
    built: dict[str, Path], how: str, tar_format: str, sources: ModelSources, tmp_path: Path
) -> None:
    """``tar czf m.tgz -C folder .`` is how people pack a folder by hand, in tar's every dialect."""
    archive = tmp_path / "m.tgz"
    options = ["--format", tar_format, "-czf", str(archive), "-C", str(built["no-archive"])]
    folder = built["no-archive"]
    what = ["."] if how == "dot" else sorted(path.name for path in folder.iterdir())
    subprocess.run(["tar", *options, *what], check=True, timeout=50)
    with sources.open(archive) as model:
        assert files_of(model) == FILES


def test_an_archive_from_the_store_by_its_name(built: dict[str, Path]) -> None:
    """For a caller over HTTP the name in the store is the way."""
    sources = ModelSources(built["default"].parent)
    with sources.open("m.mar", trusted=False) as model:
        assert model.manifest is not None
        assert model.url == "m.mar"
    sources.close()


def test_what_the_archiver_writes_into_a_tgz(built: dict[str, Path]) -> None:
    """The reason why a single folder at the top is looked into: it is what the tool makes."""
    with tarfile.open(built["tgz"]) as archive:
        assert {name.split("/")[0] for name in archive.getnames()} == {"m"}
