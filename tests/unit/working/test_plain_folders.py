"""Plain folders: each version has a working folder like it, and it is left as it is."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.working.conftest import FILES, LARGE, FileSystem, content_of
from torchmgmt.archive import ModelSources, copying, working


def test_versions_of_one_plain_folder_work_apart(sources: ModelSources, plain: Path) -> None:
    """What they write, also over what is there, reaches neither each other nor the folder; nor do later edits reach them."""
    with sources.open(plain) as one, sources.open(plain) as two:
        (one.path / "state.txt").write_text("one")
        (one.path / "labels.json").write_text("mine")
        (one.path / "sub" / "new").write_text("x")
        (one.path / "sub" / "deep" / "note.txt").unlink()
        assert content_of(two.path) == content_of(plain) == FILES
        (plain / "handler.py").write_text("edited")
        assert (two.path / "handler.py").read_bytes() == FILES["handler.py"]
    with sources.open(plain) as three:
        assert (three.path / "handler.py").read_text() == "edited"


def test_large_files_of_a_plain_folder_are_not_copied(
    sources: ModelSources, plain: Path, kind: str, file_system: FileSystem
) -> None:
    """They are clones where there are such, which a handler may write to, and else links to the owner's; but for databases."""
    with sources.open(plain) as model:
        assert file_system.copied == ["index.db"]
        assert content_of(model.path) == FILES
        assert (model.path / "weights.pt").is_symlink() == (kind != "clones")
        (model.path / "sub" / "index.db").write_text("mine")
    assert content_of(plain) == FILES


def test_a_file_that_finds_itself_finds_the_working_folder(sources: ModelSources, plain: Path, mar: Path) -> None:
    """Handlers write beside the real path of their code."""
    for url in (plain, mar):
        with sources.open(url) as model:
            assert (model.path / "handler.py").resolve().parent == model.path.resolve()


def test_links_in_a_plain_folder(sources: ModelSources, plain: Path, tmp_path: Path) -> None:
    """Those within it lead to the working folder's own; what lies elsewhere is copied if it is a small file, else linked."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "small").write_text("s")
    (outside / "large").write_bytes(LARGE)
    (plain / "absolute").symlink_to(plain / "sub")
    (plain / "sub" / "relative").symlink_to("../labels.json")
    (plain / "small").symlink_to(outside / "small")
    (plain / "large").symlink_to(outside / "large")
    (plain / "folder").symlink_to(outside)
    (plain / "nowhere").symlink_to("missing")
    (plain / "itself").symlink_to("itself")
    with sources.open(plain) as model:
        path = model.path
        assert (path / "absolute").resolve() == path.resolve() / "sub"
        assert (path / "sub" / "relative").resolve() == path.resolve() / "labels.json"
        assert not (path / "small").is_symlink()
        assert (path / "large").read_bytes() == LARGE
        assert (path / "folder").resolve() == outside
        assert [(path / name).is_symlink() for name in ("nowhere", "itself")] == [True, True]
        (path / "small").write_text("mine")
    assert (outside / "small").read_text() == "s"
    assert sorted(each.name for each in outside.iterdir()) == ["large", "small"]


def test_what_else_may_be_in_a_plain_folder(sources: ModelSources, plain: Path) -> None:
    """A pipe, read-only files and folders, and what developers have beside a model: nothing blocks, fails or is copied."""
    os.mkfifo(plain / "pipe")
    (plain / ".git" / "objects").mkdir(parents=True)
    (plain / "labels.json").chmod(0o444)
    (plain / "sub" / "deep").chmod(0o555)
    with sources.open(plain) as model:
        assert (model.path / "pipe").is_fifo()
        assert (model.path / ".git").is_symlink()
        assert (model.path / "labels.json").stat().st_mode & 0o200
        (model.path / "sub" / "deep" / "new").write_text("x")
    (plain / "sub" / "deep").chmod(0o755)


def test_what_may_not_be_read_is_a_link(sources: ModelSources, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file or folder of somebody else's, which the handler may not need, does not fail the registration."""
    real_open, real_access = os.open, os.access
    forbidden = {plain / "labels.json", plain / "sub"}

    def refuse(path: Any, *args: Any, **more: Any) -> int:
        if path in forbidden:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_open(path, *args, **more)

    monkeypatch.setattr(copying.os, "open", refuse)
    monkeypatch.setattr(working.os, "access", lambda path, mode: path not in forbidden and real_access(path, mode))
    with sources.open(plain) as model:
        assert [(model.path / path.name).is_symlink() for path in sorted(forbidden)] == [True, True]
        assert (model.path / "handler.py").exists()


def test_what_vanishes_meanwhile_is_left_out(
    sources: ModelSources, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An editor's temporary file is there when the folder is looked at, and gone when it is to be copied."""
    real = working.copy_file

    def vanish(source: Path, target: Path, keep_on: Callable[[], None]) -> None:
        if source.name == "labels.json":
            source.unlink()
        real(source, target, keep_on)

    monkeypatch.setattr(working, "copy_file", vanish)
    with sources.open(plain) as model:
        assert sorted(content_of(model.path)) == sorted(FILES.keys() - {"labels.json"})


@pytest.mark.parametrize("where", ["", "sub/cache"])
def test_a_folder_that_the_cache_lies_in_is_not_copied_into_itself(plain: Path, where: str) -> None:
    """The folder that is registered may hold the cache, or the folder for temporary files."""
    sources = ModelSources(None, cache_dir=plain / where)
    with sources.open(plain) as one, sources.open(plain) as two:
        for model in (one, two):
            assert {name: (model.path / name).read_bytes() for name in FILES} == FILES
    sources.close()


def test_deep_folders_end_in_a_link(sources: ModelSources, plain: Path) -> None:
    """What is deeper than an archive may be could not be removed again."""
    deep = plain.joinpath(*["d"] * 150)
    deep.mkdir(parents=True)
    (deep / "f").write_text("x")
    with sources.open(plain) as model:
        assert model.path.joinpath(*["d"] * 150, "f").read_text() == "x"
