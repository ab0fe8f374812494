"""Working folders: one for each version, which no other one writes to or sees writes of, whatever is shared below them."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import linecache
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import torchmgmt.archive
from torchmgmt.archive import ModelFolder, ModelSources, cache, copying, pristine, shelves, working
from torchmgmt.archive.shelves import PrivateShelf
from torchmgmt.errors import InvalidArchive, ManagerClosed

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
        if kind == "protects":
            patch.setattr(pristine, "is_write_protected", lambda path: path.stat().st_mode & 0o222 == 0)
        else:
            patch.setattr(pristine, "is_write_protected", lambda path: False)
        if kind == "has no links":
            patch.setattr(pristine, "link", lambda source, target: False)
        if kind == "keeps no times":
            patch.setattr(pristine.os, "utime", lambda *args, **more: None)
        patch.setattr(copying, "clone", self._clone if kind == "clones" else lambda source, target: False)
        real = copying.copy_file

        def copy_file(source: Path, target: Path, keep_on: Callable[[], None]) -> None:
            if source.stat().st_size >= pristine.LARGE_BYTES:
                self.copied.append(source.name)
            real(source, target, keep_on)

        for module in (pristine, working):
            patch.setattr(module, "copy_file", copy_file)

    def _clone(self, source: int, target: int) -> bool:
        os.pwrite(target, os.pread(source, 1 << 20, 0), 0)
        return True


KINDS = ["root on ext4", "clones", "protects", "has no links", "keeps no times"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def file_system(kind: str, monkeypatch: pytest.MonkeyPatch) -> FileSystem:
    return FileSystem(monkeypatch, kind)


# ------------------------------------------------------------------------------------------- apart


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


# ------------------------------------------------------------------------------------------- large files


def test_large_files_stand_on_the_disk_as_seldom_as_they_can(
    sources: ModelSources, mar: Path, kind: str, file_system: FileSystem
) -> None:
    """They are copied only where they can neither be cloned nor linked, and not for the first version if they can be lent."""
    models = [sources.open(mar) for _ in range(4)]
    assert all(content_of(model.path) == FILES for model in models)
    copies = {name: file_system.copied.count(Path(name).name) for name in LARGE_NAMES}
    inodes = {name: len({(model.path / name).stat().st_ino for model in models}) for name in LARGE_NAMES}
    expected: dict[str, tuple[list[int], list[int]]] = {
        # copies, and different files, of: the database, the weights. The third version adds a copy that nobody may write to.
        "root on ext4": ([4, 4], [4, 4]),
        "clones": ([0, 0], [4, 4]),
        "protects": ([4, 0], [4, 1]),
        "has no links": ([4, 4], [4, 4]),
        "keeps no times": ([4, 4], [4, 4]),
    }
    in_order = sorted(LARGE_NAMES)
    assert ([copies[name] for name in in_order], [inodes[name] for name in in_order]) == expected[kind]
    for model in models:
        model.release()


def test_the_first_version_needs_no_copy(sources: ModelSources, mar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it is the only one, large files stand on the disk once; it may write to them."""
    file_system = FileSystem(monkeypatch, "root on ext4")
    with sources.open(mar) as model:
        assert file_system.copied == []
        assert model.pristine is not None
        assert not LARGE_NAMES & content_of(model.pristine).keys()
        assert not (model.path / "handler.py").samefile(model.pristine / "handler.py")
        (model.path / "weights.pt").write_bytes(b"trained")


def void(_value: object) -> None: ...


def write_into(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"new")


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"new")


def write_mapped(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[:3] = b"new"


WAYS_TO_WRITE: Mapping[str, Callable[[Path], None]] = {
    "over": lambda path: void(path.write_bytes(b"new")),
    "into": write_into,
    "behind": append,
    "cut": lambda path: os.truncate(path, 10),
    "emptied": lambda path: os.truncate(path, 0),
    "mapped": write_mapped,
}


@pytest.mark.parametrize("way", WAYS_TO_WRITE)
@pytest.mark.parametrize("before", [1, 2, 3])
def test_nobody_gets_what_another_version_wrote_into_its_own_large_files(
    sources: ModelSources, mar: Path, way: str, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it was written, and however many there were: who comes later begins with what is in the archive."""
    FileSystem(monkeypatch, "root on ext4")
    models = [sources.open(mar) for _ in range(before)]
    for model in models:
        WAYS_TO_WRITE[way](model.path / "weights.pt")
    written = [content_of(model.path) for model in models]
    assert len({each["weights.pt"] for each in written}) == 1
    later = [sources.open(mar) for _ in range(3)]
    assert [content_of(model.path) for model in later] == [FILES] * 3
    assert [content_of(model.path) for model in models] == written
    for model in [*models, *later]:
        model.release()


def test_a_file_that_is_copied_over_another_with_its_time_is_noticed(
    sources: ModelSources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As cp -p does it with the weights of the customer, of the same size as all others."""
    FileSystem(monkeypatch, "root on ext4")
    files = {"default.pt": b"d" * 2000, "other.pt": b"o" * 2000}
    mar = write_mar(tmp_path / "w.mar", files)
    with sources.open(mar) as one:
        status = (one.path / "other.pt").stat()
        (one.path / "default.pt").write_bytes(b"o" * 2000)
        os.utime(one.path / "default.pt", ns=(status.st_atime_ns, status.st_mtime_ns))
        with sources.open(mar) as two:
            assert content_of(two.path) == files


def test_a_write_in_the_middle_of_a_copy_is_noticed(
    sources: ModelSources, mar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is thrown away, and one of another pristine copy is taken."""
    FileSystem(monkeypatch, "root on ext4")
    monkeypatch.setattr(copying, "CHUNK_BYTES", 500)
    with sources.open(mar) as one:
        real = pristine.clone_file

        def write_meanwhile(source: Path, target: Path) -> bool:
            cloned = real(source, target)
            if (one.path / "weights.pt").samefile(source):
                write_into(one.path / "weights.pt")
            return cloned

        monkeypatch.setattr(pristine, "clone_file", write_meanwhile)
        with sources.open(mar) as two:
            assert content_of(two.path) == FILES
            assert two.pristine != one.pristine
            assert two.digest == one.digest


def test_a_read_only_file_that_a_version_made_writable_spoils_no_later_one(
    sources: ModelSources, mar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who takes the protection from its weights, which others have too, and writes to them, does not write to new ones."""
    FileSystem(monkeypatch, "protects")
    with sources.open(mar) as one:
        assert (one.path / "weights.pt").stat().st_mode & 0o222 == 0
        assert (one.path / "sub" / "index.db").stat().st_mode & 0o200
        (one.path / "weights.pt").chmod(0o644)
        with sources.open(mar) as two:  # it is writable, so it is not linked any more
            assert not (two.path / "weights.pt").samefile(one.path / "weights.pt")
            write_into(one.path / "weights.pt")
            assert content_of(two.path) == FILES
        with sources.open(mar) as three:
            assert content_of(three.path) == FILES


@pytest.mark.parametrize(
    "ledger", ["", "{", "[]", "null", '{"weights.pt": 1}', '{"weights.pt": [1]}', '{"gone": [1, true]}']
)
def test_a_ledger_that_makes_no_sense_is_not_believed(sources: ModelSources, mar: Path, ledger: str) -> None:
    """A disk that lies costs another unpacking, and no error."""
    with sources.open(mar) as one:
        assert one.pristine is not None
        (one.pristine.parent / "large.json").write_text(ledger)
        with sources.open(mar) as two:
            assert content_of(two.path) == FILES


def test_a_program_without_roots_rights_links_weights_and_cannot_write_to_them(mar: Path) -> None:
    """Really: two versions have the same weights, read-only, and other large files apart; on this file system."""
    program = """
import os, sys, tempfile
from torchmgmt.archive import ModelSources, pristine, working
pristine.LARGE_BYTES = working.LARGE_BYTES = 1000
sources = ModelSources(None)
with sources.open(sys.argv[1]) as one, sources.open(sys.argv[1]) as two:
    same = [(one.path / name).samefile(two.path / name) for name in ("weights.pt", "sub/index.db")]
    try:
        (one.path / "weights.pt").write_bytes(b"x")
        wrote = True
    except PermissionError:
        wrote = False
    (one.path / "sub/index.db").write_bytes(b"x")
    os.replace(one.path / "handler.py", one.path / "weights.pt")
    print(pristine.can_clone(one.path), same, wrote, (two.path / "weights.pt").read_bytes() == b"w" * 2000)
sources.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, mar],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        preexec_fn=give_up_roots_rights,
    )
    assert done.stdout in {"False [True, False] False True\n", "True [False, False] True True\n"}, done.stderr


def give_up_roots_rights() -> None:
    """Have the program that is run next obey the modes of files, as whom it may run."""
    import ctypes

    pr_capbset_drop, cap_dac_override = 24, 1
    if os.geteuid() == 0:
        assert ctypes.CDLL(None).prctl(pr_capbset_drop, cap_dac_override, 0, 0, 0) == 0


def test_what_is_cloned_is_apart(tmp_path: Path) -> None:
    """On this file system, whatever it can: who writes to the one does not write to the other."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(LARGE)
    can = copying.can_clone(tmp_path)
    assert copying.clone_file(source, target) is can
    assert target.exists() is can
    if not can:
        copying.copy_file(source, target, lambda: None)
    write_into(target)
    assert (source.read_bytes(), target.read_bytes()) == (LARGE, b"new" + LARGE[3:])
    assert [path.name for path in tmp_path.iterdir() if path.name not in {"source", "target", "tmp"}] == []


class Versions(RuleBasedStateMachine):
    """Whatever versions do to their own files, each sees what it did itself and nothing else, on every file system."""

    kind = "root on ext4"

    def __init__(self) -> None:
        super().__init__()
        self.scratch = Path(tempfile.mkdtemp(prefix="scratch-"))
        self.patch = pytest.MonkeyPatch()
        FileSystem(self.patch, self.kind)
        self.several = [ModelSources(None, cache_dir=self.scratch / "cache") for _ in range(2)]
        self.mar = write_mar(self.scratch / "m.mar")
        self.versions: list[tuple[ModelFolder, dict[str, bytes]]] = []
        self.count = itertools.count()

    @rule(by=st.integers(0, 1))
    def register(self, by: int) -> None:
        if len(self.versions) < 5:
            self.versions.append((self.several[by].open(self.mar), dict(FILES)))

    def chosen(self, data: st.DataObject) -> tuple[Path, dict[str, bytes], str]:
        model, content = self.versions[data.draw(st.integers(0, len(self.versions) - 1))]
        return model.path, content, data.draw(st.sampled_from(sorted(content)))

    @precondition(lambda self: any(content for _, content in self.versions[:1]) and all(c for _, c in self.versions))
    @rule(data=st.data(), size=st.sampled_from([3, 2000]))
    def write(self, data: st.DataObject, size: int) -> None:
        folder, content, name = self.chosen(data)
        if (folder / name).stat().st_mode & 0o200:
            new = f"{next(self.count):03}".encode() * (size // 3)
            (folder / name).write_bytes(new)
            content[name] = new

    @precondition(lambda self: self.versions and all(len(content) > 1 for _, content in self.versions))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        folder, content, name = self.chosen(data)
        (folder / name).unlink()
        del content[name]

    @precondition(lambda self: self.versions and all(len(content) > 2 for _, content in self.versions))
    @rule(data=st.data())
    def move_over_another(self, data: st.DataObject) -> None:
        folder, content, name = self.chosen(data)
        other = data.draw(st.sampled_from(sorted(content.keys() - {name})))
        (folder / name).replace(folder / other)
        content[other] = content.pop(name)

    @precondition(lambda self: self.versions)
    @rule(data=st.data())
    def unregister(self, data: st.DataObject) -> None:
        model, _ = self.versions.pop(data.draw(st.integers(0, len(self.versions) - 1)))
        model.release()
        assert not model.path.exists()

    @invariant()
    def each_sees_its_own(self) -> None:
        assert all(content_of(model.path) == content for model, content in self.versions)

    @invariant()
    def what_can_be_mapped_in_common_is_as_it_was_unpacked(self) -> None:
        for model, _ in self.versions:
            assert content_of(model.pristine).items() <= FILES.items()

    def teardown(self) -> None:
        for model, _ in self.versions:
            model.release()
        for sources in self.several:
            sources.close()
        assert list((self.scratch / "cache" / "unpacked").glob("*")) == []
        self.patch.undo()
        shelves.remove_tree(self.scratch)


@pytest.mark.parametrize("kind", KINDS)
def test_versions_are_apart_whatever_they_do(kind: str) -> None:
    """On a file system of each kind."""
    machine = type("Versions", (Versions,), {"kind": kind})
    case: Any = machine.TestCase
    case.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
    case().runTest()


# ------------------------------------------------------------------------------------------- plain folders


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
    """They are clones where there are such, which a handler may write to, and else links to the owner's."""
    with sources.open(plain) as model:
        assert file_system.copied == []
        assert content_of(model.path) == FILES
        assert all((model.path / name).is_symlink() == (kind != "clones") for name in LARGE_NAMES)
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


# ------------------------------------------------------------------------------------------- the end


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


# ------------------------------------------------------------------------------------------- faults

WING = {module.__file__ for module in (torchmgmt.archive, cache, copying, pristine, shelves, working)}


@contextlib.contextmanager
def raising_at(line: int, error: BaseException, where: list[str]) -> Iterator[None]:
    """Raise at the so-and-so-many-th line of the wing that is run in the block; ``where`` is told which that was."""
    lines = itertools.count(1)
    entered: set[tuple[FrameType, int]] = set()

    def at_line(frame: FrameType, event: str, _arg: object) -> Any:
        place = (frame, frame.f_lineno)
        if event != "line" or place in entered:
            return at_line
        if linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            entered.add(place)  # it comes by again on the way out, where nothing can interrupt it
        if next(lines) == line:
            where.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            raise error
        return at_line

    sys.settrace(lambda frame, *_: at_line if frame.f_code.co_filename in WING else None)
    try:
        yield
    finally:
        sys.settrace(None)


# An interrupt between opening a file and the block that closes it leaves that to the garbage collector, which says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError], ids=["interrupt", "disk full"])
@pytest.mark.parametrize("what", ["archive", "archive again", "plain"])
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_an_error_at_any_step_leaves_nothing(
    mar: Path, plain: Path, tmp_path: Path, what: str, shared: bool, error: type[BaseException]
) -> None:
    """An interrupt or a full disk, at whichever line: no file is left, no half-made folder is used, and the next one works."""
    url = plain if what == "plain" else mar
    cache_dir = tmp_path / "cache" if shared else None
    root = tmp_path / "cache" / "unpacked" if shared else tmp_path / "tmp"
    sources = ModelSources(None, cache_dir=cache_dir)
    with contextlib.ExitStack() as undo:
        if what == "archive again":
            undo.enter_context(sources.open(url))
        for line in itertools.count(1):
            before = everything_in(root)
            where: list[str] = []
            with contextlib.suppress(error, InvalidArchive):
                with raising_at(line, error(errno.ENOSPC, "No space left on device"), where):
                    model = sources.open(url)
                assert content_of(model.path) == FILES, where  # something else was done in place of what failed
                model.release()
            if not where:
                break
            assert everything_in(root) <= before, where
            if line % 10 == 0:
                with sources.open(url) as model:
                    assert content_of(model.path) == FILES, where
        assert line > 100
    sources.close()
    assert everything_in(root) == set()


def everything_in(root: Path) -> set[Path]:
    """All but the notes of which places were taken, which a failure does not give back, in a pristine copy in use."""
    return {path for path in root.rglob("*") if path.name not in {"first", "second", "lent"}}


STUCK = """
import sys, threading
from torchmgmt.archive import ModelSources, pristine, working
pristine.LARGE_BYTES = working.LARGE_BYTES = 1000
step, url, cache = sys.argv[1:]
module, name = {"copying": (working, "copy_file"), "sealing": (pristine, "can_clone"), "lending": (pristine, "link")}[step]
def stick(*args):
    print("stuck", flush=True)
    threading.Event().wait()
setattr(module, name, stick)
ModelSources(None, cache_dir=cache or None).open(url)
"""


@pytest.mark.parametrize("step", ["copying", "sealing", "lending"])
def test_what_a_program_killed_in_the_middle_left_is_removed_by_the_next(
    sources: ModelSources, mar: Path, tmp_path: Path, step: str
) -> None:
    """kill -9 while a folder is made: nobody uses it, and it goes when another program begins."""
    cache_dir = tmp_path / "cache"
    is_shared = not isinstance(sources._unpacked._shelf, PrivateShelf)
    command = [sys.executable, "-c", STUCK, step, str(mar), str(cache_dir) if is_shared else ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"stuck\n"
        root = cache_dir / "unpacked" if is_shared else tmp_path / "tmp"
        left = set(root.iterdir())
        assert left
        program.send_signal(signal.SIGKILL)
        program.wait(20)
    with sources.open(mar) as model:
        assert content_of(model.path) == FILES
        remaining = {path.name for path in root.iterdir()}
        assert not {path.name for path in left if path.suffix == ".partial"} & remaining
        assert len(remaining) == (2 if is_shared else 1)


USER = """
import sys
from torchmgmt.archive import ModelSources, pristine, working
pristine.LARGE_BYTES = working.LARGE_BYTES = 1000
url, cache, name = sys.argv[1:]
sources = ModelSources(None, cache_dir=cache)
sys.stdin.readline()
for _ in range(10):
    with sources.open(url) as model:
        weights = model.path / "weights.pt"
        assert weights.read_bytes() == b"w" * 2000, weights.read_bytes()[:10]
        assert not (model.path / "state").exists()
        (model.path / "state").write_text(name)
        weights.write_text(name)
        for _ in range(3):
            assert weights.read_text() == (model.path / "state").read_text() == name
sources.close()
print("well")
"""


def test_programs_that_register_one_archive_at_once_are_apart(mar: Path, tmp_path: Path) -> None:
    """They make, lend, copy and remove at the same time; each sees the archive's files first, and then what it wrote."""
    cache_dir = tmp_path / "cache"
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", USER, str(mar), str(cache_dir), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "abcd"
    ]
    for program in programs:
        assert program.stdin is not None
        program.stdin.write("go\n")
        program.stdin.flush()
    assert [program.communicate(timeout=50)[0] for program in programs] == ["well\n"] * 4
    assert list((cache_dir / "unpacked").iterdir()) == []
