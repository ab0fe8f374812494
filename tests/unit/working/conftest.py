"""A small archive and the same as a plain folder, where to open them, and what file systems may be like."""

from __future__ import annotations

import errno
import io
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from torchmgmt.archive import ModelSources, copying, pristine, working

LARGE = b"w" * 2000
FILES: Mapping[str, bytes] = {
    "handler.py": b"x = 1\n",
    "labels.json": b"{}",
    "sub/deep/note.txt": b"a note",
    "weights.pt": b"w" * 2000,
    "sub/index.db": b"d" * 2000,
}
LARGE_NAMES = {"weights.pt", "sub/index.db"}


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each test sees only its own leftovers, and fails if there are any; files of 1000 bytes are large."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    for module in (pristine, working):
        monkeypatch.setattr(module, "LARGE_BYTES", 1000)
    yield folder
    assert list(folder.iterdir()) == []


def write_mar(path: Path, files: Mapping[str, bytes] = FILES) -> Path:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (0o100755 if name.endswith(".sh") else 0o100644) << 16
            archive.writestr(info, content)
    path.write_bytes(out.getvalue())
    return path


@pytest.fixture
def mar(tmp_path: Path) -> Path:
    return write_mar(tmp_path / "m.mar")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A plain folder with the same files."""
    for name, content in FILES.items():
        path = tmp_path / "plain" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "plain"


@pytest.fixture(params=["private", "shared"])
def sources(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ModelSources]:
    sources = ModelSources(None, cache_dir=tmp_path / "cache" if request.param == "shared" else None)
    yield sources
    sources.close()
    if request.param == "shared":
        assert list((tmp_path / "cache" / "unpacked").glob("*")) == []


def content_of(folder: Path | None) -> dict[str, bytes]:
    assert folder is not None
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class FileSystem:
    """What a file system, and a program's rights on it, may be like."""

    def __init__(self, patch: pytest.MonkeyPatch, kind: str) -> None:
        self.copied: list[str] = []
        """The large files whose bytes were copied."""
        for module in (copying, pristine):
            patch.setattr(
                module, "is_write_protected", lambda path: kind == "protects" and path.stat().st_mode & 0o222 == 0
            )
        if kind == "has no links":
            patch.setattr(pristine, "link", lambda source, target: False)
        if kind == "keeps nothing":
            patch.setattr(copying.os, "utime", self._refuse)
            patch.setattr(copying.os, "fchmod", self._refuse)
            patch.setattr(Path, "chmod", self._refuse)
        patch.setattr(copying, "clone", self._clone if kind == "clones" else lambda source, target: False)
        real = copying.copy_file

        def copy_file(source: Path, target: Path, keep_on: Callable[[], None]) -> None:
            if source.stat().st_size >= pristine.LARGE_BYTES:
                self.copied.append(source.name)
            real(source, target, keep_on)

        for module in (pristine, working):
            patch.setattr(module, "copy_file", copy_file)

    def _refuse(self, *_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def _clone(self, source: int, target: int) -> bool:
        os.pwrite(target, os.pread(source, 1 << 20, 0), 0)
        return True


KINDS = ["root on ext4", "clones", "protects", "has no links", "keeps nothing"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def file_system(kind: str, monkeypatch: pytest.MonkeyPatch) -> FileSystem:
    return FileSystem(monkeypatch, kind)
