"""Working folders: one for each version, which no other one writes to or sees writes of, until its version is released."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.unit.working.conftest import FILES, FileSystem, content_of, write_mar
from torchmgmt.archive import ModelSources, cache, shelves, working
from torchmgmt.errors import ManagerClosed


def test_versions_of_one_archive_work_apart(sources: ModelSources, mar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each begins with what is in the archive, which is unpacked once; what one writes, removes or renames is its own."""
    unpackings: list[object] = []
    real = cache.unpack
    monkeypatch.setattr(cache, "unpack", lambda *args, **more: unpackings.append(1) or real(*args, **more))
    with sources.open(mar) as one, sources.open(mar) as two:
        (one.path / "state.txt").write_text("one")
        (one.path / "labels.json").write_text("mine")
        (one.path / "sub" / "deep" / "note.txt").unlink()
        (one.path / "handler.py").rename(one.path / "sub" / "handler.py")
        assert content_of(two.path) == FILES
        (two.path / "state.txt").write_text("two")
        assert (one.path / "state.txt").read_text() == "one"
        with sources.open(mar) as three:
            assert content_of(three.path) == FILES
            assert {one.path, two.path, three.path} == {model.path.resolve() for model in (one, two, three)}
        assert not three.path.exists()
    assert len(unpackings) == 1


def test_a_folder_is_there_until_its_own_release(sources: ModelSources, mar: Path) -> None:
    """It goes with its version, with all that was written there, and the others stay."""
    one, two = sources.open(mar), sources.open(mar)
    (one.path / "made").mkdir()
    (one.path / "made" / "state").write_text("x")
    one.release()
    assert not one.path.exists()
    assert content_of(two.path) == FILES
    two.release()
    assert not two.path.exists()


def test_two_managers_share_no_folder(mar: Path, tmp_path: Path) -> None:
    """Two that share a cache have one pristine copy, and a folder for each of their versions."""
    several = [ModelSources(None, cache_dir=tmp_path / "cache") for _ in range(2)]
    models = [sources.open(mar) for sources in several for _ in range(2)]
    assert len({model.path for model in models}) == 4
    assert len({model.pristine for model in models}) == 1
    for number, model in enumerate(models):
        for name in FILES:
            (model.path / name).write_text(f"{number}")
    assert [content_of(model.path) for model in models] == [
        dict.fromkeys(FILES, str(number).encode()) for number in range(4)
    ]
    for sources, model in zip([several[0], several[0], several[1], several[1]], models, strict=True):
        model.release()
        sources.close()
    assert list((tmp_path / "cache" / "unpacked").iterdir()) == []


def test_modes_are_kept_and_the_owner_may_write(sources: ModelSources, tmp_path: Path) -> None:
    """What is executable stays so, in whichever folder; no file is more open than it was unpacked."""
    mar = write_mar(tmp_path / "x.mar", {"run.sh": b"#!/bin/sh\n", "plain": b"x"})
    with sources.open(mar) as one, sources.open(mar) as two:
        for model in (one, two):
            assert os.access(model.path / "run.sh", os.X_OK)
            modes = [(model.path / name).stat().st_mode & 0o777 for name in ("run.sh", "plain")]
            assert modes == [0o755 & ~umask(), 0o644 & ~umask()]


def umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def test_removing_follows_no_link(sources: ModelSources, mar: Path, tmp_path: Path) -> None:
    """A model may put links in its folder, or one in its place: what they lead to keeps its files, and their modes."""
    outside = tmp_path / "outside"
    (outside / "inner").mkdir(parents=True)
    (outside / "inner" / "kept").write_text("x")
    (outside / "inner").chmod(0o555)
    one, two, three = (sources.open(mar) for _ in range(3))
    (one.path / "link").symlink_to(outside)
    one.path.joinpath("locked").mkdir(mode=0o500)
    (one.path / "locked" / "link").symlink_to(outside)
    two.path.rename(two.path.with_name("moved"))
    two.path.symlink_to(outside)
    three.path.rename(three.path.with_name("moved-too"))
    three.path.write_text("a file")
    for model in (one, two, three):
        model.release()
        assert not os.path.lexists(model.path)
    for name in ("moved", "moved-too"):
        shelves.remove_tree(one.path.with_name(name))
    sources.close()
    assert (outside / "inner" / "kept").read_text() == "x"
    assert (outside / "inner").stat().st_mode & 0o777 == 0o555
    (outside / "inner").chmod(0o755)


def test_removing_leaves_the_modes_of_files_alone(
    sources: ModelSources, mar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is read-only as others have it, too, is so after the one that locked its folder is gone."""
    FileSystem(monkeypatch, "protects")
    with sources.open(mar) as one:
        two = sources.open(mar)
        (two.path / "sub").chmod(0)
        two.path.chmod(0)
        two.release()
        assert not two.path.exists()
        assert (one.path / "weights.pt").stat().st_mode & 0o222 == 0


def test_closing_ends_a_copy_under_way(sources: ModelSources, mar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for it gets ManagerClosed, and close returns when its files are gone."""
    begun, go_on = threading.Event(), threading.Event()
    real = working.copy_file

    def slow(*args: Any) -> None:
        begun.set()
        assert go_on.wait(10)
        real(*args)

    monkeypatch.setattr(working, "copy_file", slow)
    with ThreadPoolExecutor(2) as pool:
        user = pool.submit(sources.open, mar)
        assert begun.wait(10)
        closing = pool.submit(sources.close)
        while not sources._unpacked._closed:
            pass
        go_on.set()
        closing.result(10)
        assert type(user.exception(10)) is ManagerClosed
