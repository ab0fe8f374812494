"""Large files stand on the disk as seldom as they can, and nobody writes to another version's by that."""

from __future__ import annotations

import itertools
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.unit.working.conftest import FILES, KINDS, LARGE, LARGE_NAMES, FileSystem, content_of, write_mar
from torchmgmt.archive import ModelFolder, ModelSources, copying, pristine, shelves


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
        "keeps nothing": ([4, 4], [4, 4]),
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
