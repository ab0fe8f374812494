"""Pristine copies: one for each content, for as long as somebody uses it, and nothing left after that."""

from __future__ import annotations

import io
import os
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from torchmgmt.archive import ModelSources, UnpackLimits, cache
from torchmgmt.archive.cache import Lease, UnpackedArchives
from torchmgmt.errors import InvalidArchive, InvalidArgument, ManagerClosed, SourceNotFound

LONG_AGO_NS = 1_000_000_000_000_000_000


def write_mar(path: Path, files: dict[str, str]) -> Path:
    """Put an archive in place as one should: under another name first."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text)  # the same bytes each time
    partial = path.with_suffix(".partial")
    partial.write_bytes(out.getvalue())
    os.utime(partial, ns=(LONG_AGO_NS, LONG_AGO_NS))
    return partial.replace(path)


def our_folders() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob("torchmgmt-*"))


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test sees only its own leftovers, and fails if there are any."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


@pytest.fixture
def mar(tmp_path: Path) -> Path:
    return write_mar(tmp_path / "m.mar", {"handler.py": "one"})


@pytest.fixture
def archives() -> Iterator[UnpackedArchives]:
    archives = UnpackedArchives()
    yield archives
    archives.close()


@pytest.fixture
def unpackings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources of all unpackings, in their order."""
    return spy(monkeypatch, "unpack", lambda *args, source, **more: source)


@pytest.fixture
def hashings(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    return spy(monkeypatch, "_sha256", lambda file: file)


def spy(monkeypatch: pytest.MonkeyPatch, name: str, note: Callable[..., Any]) -> list[Any]:
    calls: list[Any] = []
    real = getattr(cache, name)

    def spied(*args: Any, **more: Any) -> Any:
        calls.append(note(*args, **more))
        return real(*args, **more)

    monkeypatch.setattr(cache, name, spied)
    return calls


# ---------------------------------------------------------------------------------- sharing, and its end


def test_no_folder_before_the_first_need(archives: UnpackedArchives) -> None:
    """Creating it touches no disk."""
    assert our_folders() == []


def test_the_last_release_removes_all(archives: UnpackedArchives, mar: Path) -> None:
    """The copy stays for the second user when the first goes, and goes with the second."""
    first, second = archives.acquire(mar, "m"), archives.acquire(mar, "m")
    assert first.folder == second.folder
    assert first.digest == second.digest
    first.release()
    first.release()
    assert (second.folder / "handler.py").read_text() == "one"
    second.release()
    assert our_folders() == []


def test_equal_content_is_one_copy(archives: UnpackedArchives, mar: Path, unpackings: list[str]) -> None:
    """Two files of the same bytes share a copy; other bytes have their own."""
    twin = write_mar(mar.with_name("twin.mar"), {"handler.py": "one"})
    other = write_mar(mar.with_name("other.mar"), {"handler.py": "two"})
    leases = [archives.acquire(path, path.name) for path in (mar, twin, other)]
    assert leases[0].folder == leases[1].folder != leases[2].folder
    assert unpackings == ["m.mar", "other.mar"]
    for lease in leases:
        lease.release()


def test_after_the_end_it_begins_anew(archives: UnpackedArchives, mar: Path, unpackings: list[str]) -> None:
    """A copy that was removed is unpacked again for the next user."""
    for _ in range(2):
        archives.acquire(mar, "m").release()
    assert unpackings == ["m", "m"]


def test_a_copy_that_its_model_locked_is_removed(archives: UnpackedArchives, mar: Path) -> None:
    """A model may write into its folder, and even take away the permission to."""
    lease = archives.acquire(mar, "m")
    inner = lease.folder / "made" / "inner"
    inner.mkdir(parents=True)
    (inner / "file").touch()
    (inner / "link").symlink_to("/")
    inner.chmod(0)
    inner.parent.chmod(0o500)
    lease.release()
    assert our_folders() == []


# ------------------------------------------------------------------------------------------- threads


def in_parallel(count: int, call: Callable[[], Any]) -> list[Any]:
    barrier = threading.Barrier(count)

    def run() -> Any:
        barrier.wait()
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return [future.result() for future in [pool.submit(run) for _ in range(count)]]


def test_eight_threads_cause_one_unpacking(archives: UnpackedArchives, mar: Path, unpackings: list[str]) -> None:
    """Who comes while it is unpacked waits for it, and gets it whole."""
    leases = in_parallel(8, lambda: archives.acquire(mar, "m"))
    assert len(unpackings) == 1
    assert {lease.folder for lease in leases} == {leases[0].folder}
    in_parallel(8, lambda: leases.pop().release())
    assert our_folders() == []


def test_eight_threads_each_get_the_error(archives: UnpackedArchives, tmp_path: Path) -> None:
    """A failure is not remembered as a copy; everybody hears of it, by the name they used."""
    bad = write_mar(tmp_path / "bad.mar", {"../evil": "x"})
    errors = in_parallel(8, lambda: archives.acquire(bad, "bad.mar"))
    assert [type(error) for error in errors] == [InvalidArchive] * 8
    assert len({id(error) for error in errors}) == 8
    assert our_folders() == []


def test_acquiring_and_releasing_at_once(archives: UnpackedArchives, mar: Path) -> None:
    """Nobody is ever handed a folder that somebody else is removing."""

    def use() -> None:
        for _ in range(30):
            lease = archives.acquire(mar, "m")
            assert (lease.folder / "handler.py").read_text() == "one"
            lease.release()

    assert in_parallel(8, use) == [None] * 8
    assert our_folders() == []


class Sharing(RuleBasedStateMachine):
    """Whatever the order of acquiring and releasing, each lease's files are there and no others."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = tempfile.TemporaryDirectory()
        self.archives = UnpackedArchives()
        self.leases: list[tuple[str, Lease]] = []

    @rule(text=st.sampled_from("ab"), name=st.sampled_from("xy"))
    def acquire(self, text: str, name: str) -> None:
        path = write_mar(Path(self.scratch.name, f"{name}.mar"), {"f": text})
        self.leases.append((text, self.archives.acquire(path, name)))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        _, lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        lease.release()

    @invariant()
    def files_are_there(self) -> None:
        assert all((lease.folder / "f").read_text() == text for text, lease in self.leases)
        copies = [path for base in our_folders() for path in base.iterdir()]
        assert len(copies) == len({text for text, _ in self.leases})
        assert bool(our_folders()) == bool(self.leases)

    def teardown(self) -> None:
        self.archives.close()
        self.scratch.cleanup()


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)


# -------------------------------------------------------------------------- files that change meanwhile


def an_hour_later() -> int:
    return time.time_ns() + 3_600_000_000_000


def test_an_unchanged_file_is_hashed_once(mar: Path, hashings: list[object]) -> None:
    """Registering again costs no second look at gigabytes; a changed time does."""
    archives = UnpackedArchives(now_ns=an_hour_later)
    for _ in range(3):
        archives.acquire(mar, "m").release()
    assert len(hashings) == 1
    os.utime(mar)
    archives.acquire(mar, "m").release()
    assert len(hashings) == 2


def test_a_twin_in_size_and_time_is_told_apart(mar: Path) -> None:
    """Written into the same file and given the old time, as cp -p and reproducible builds do."""
    archives = UnpackedArchives(now_ns=an_hour_later)
    archives.acquire(mar, "m").release()
    twin = write_mar(mar.with_name("twin"), {"handler.py": "two"})
    assert twin.stat().st_size == mar.stat().st_size
    mar.write_bytes(twin.read_bytes())
    os.utime(mar, ns=(LONG_AGO_NS, LONG_AGO_NS))
    lease = archives.acquire(mar, "m")
    assert (lease.folder / "handler.py").read_text() == "two"
    lease.release()


def test_a_file_of_this_moment_is_not_trusted(mar: Path, hashings: list[object]) -> None:
    """Within one tick of the clock it could change again without a new time stamp."""
    archives = UnpackedArchives(now_ns=lambda: mar.stat().st_ctime_ns + 1_000_000)
    for _ in range(2):
        archives.acquire(mar, "m").release()
    assert len(hashings) == 2


def test_only_so_many_digests_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store whose files are replaced for ever costs no memory for ever."""
    archives = UnpackedArchives(now_ns=an_hour_later)
    monkeypatch.setattr(cache, "MAX_REMEMBERED", 3)
    for number in range(6):
        path = write_mar(tmp_path / f"{number}.mar", {"f": str(number)})
        archives.acquire(path, "m").release()
    assert len(archives._digests) == 3


def test_a_replaced_file_is_unpacked_as_it_was_hashed(
    archives: UnpackedArchives, mar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new archive renamed into place between the two steps has no part in either."""
    real = cache._sha256
    digests = []

    def replace_after_hashing(file: Any) -> str:
        digests.append(real(file))
        write_mar(mar, {"handler.py": "another"})
        return digests[0]

    monkeypatch.setattr(cache, "_sha256", replace_after_hashing)
    lease = archives.acquire(mar, "m")
    assert (lease.folder / "handler.py").read_text() == "one"
    assert lease.digest == digests[0]
    lease.release()


@pytest.mark.parametrize("step", ["_sha256", "unpack"])
def test_a_file_that_is_written_to_meanwhile_is_refused(
    archives: UnpackedArchives, mar: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of one archive and half of another is no model; the message says how to do it right."""
    real = getattr(cache, step)

    def write_during(*args: Any, **more: Any) -> Any:
        result = real(*args, **more)
        mar.write_bytes(mar.read_bytes() + b"more")
        return result

    monkeypatch.setattr(cache, step, write_during)
    with pytest.raises(InvalidArchive, match="changed while it was read"):
        archives.acquire(mar, "m")


# --------------------------------------------------------------------------------------------- errors


def test_errors_leave_nothing(archives: UnpackedArchives, tmp_path: Path) -> None:
    """An archive that fails half-way leaves neither files nor the folder they were in."""
    bad = write_mar(tmp_path / "bad.mar", {"good": "x", "sub/also": "y", "../evil": "z"})
    with pytest.raises(InvalidArchive, match=r"^bad\.mar is not a usable model archive: the name"):
        archives.acquire(bad, "bad.mar")


def test_an_interrupt_leaves_nothing(archives: UnpackedArchives, mar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle is cleaned up after, and the next attempt works."""

    def interrupted(file: object, into: Path, *_: object, **__: object) -> None:
        (into / "half").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "unpack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            archives.acquire(mar, "m")
    assert our_folders() == []
    archives.acquire(mar, "m").release()


def test_what_cannot_be_opened(archives: UnpackedArchives, tmp_path: Path) -> None:
    """Gone since it was looked up, or replaced by a folder or a pipe: our errors, no blocking."""
    with pytest.raises(SourceNotFound, match="Model not found at: m"):
        archives.acquire(tmp_path / "gone", "m")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "tmp"):
        with pytest.raises(InvalidArchive, match=r"it is no file|it cannot be read"):
            archives.acquire(path, "m")


def test_a_temporary_folder_that_somebody_cleaned_is_made_again(
    archives: UnpackedArchives, mar: Path, tmp_path: Path
) -> None:
    """Machines that run for months clean /tmp."""
    lease = archives.acquire(mar, "m")
    our_folders()[0].rename(tmp_path / "swept")
    other = archives.acquire(write_mar(tmp_path / "o.mar", {"f": "o"}), "o")
    assert (other.folder / "f").read_text() == "o"
    lease.release()
    other.release()


# -------------------------------------------------------------------------------------------- closing


def test_closing_removes_all_and_is_final(archives: UnpackedArchives, mar: Path) -> None:
    """Leased or not; twice is once; releasing later is harmless; nothing opens any more."""
    lease = archives.acquire(mar, "m")
    (lease.folder.parent / "beside").touch()  # a model may write next to its folder
    archives.close()
    archives.close()
    assert our_folders() == []
    lease.release()
    with pytest.raises(ManagerClosed):
        archives.acquire(mar, "m")


def test_closing_ends_an_unpacking_under_way(
    archives: UnpackedArchives, mar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for it gets ManagerClosed, and close returns when its files are gone."""
    real = cache.unpack
    begun, go_on = threading.Event(), threading.Event()

    def slow(file: Any, into: Path, *args: Any, **more: Any) -> None:
        begun.set()
        assert go_on.wait(10)
        real(file, into, *args, **more)

    monkeypatch.setattr(cache, "unpack", slow)
    with ThreadPoolExecutor(3) as pool:
        users = [pool.submit(archives.acquire, mar, "m") for _ in range(2)]
        assert begun.wait(10)
        closing = pool.submit(archives.close)
        while not archives._closed:
            time.sleep(0.001)
        go_on.set()
        closing.result(10)
        assert our_folders() == []
        assert [type(user.exception(10)) for user in users] == [ManagerClosed] * 2


def test_a_forked_copy_is_closed_and_removes_nothing(
    archives: UnpackedArchives, mar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pre-fork server's children neither hang on the parent's locks nor delete its files."""
    lease = archives.acquire(mar, "m")
    with monkeypatch.context() as patch, archives._lock:  # a fork copies a held lock as held
        patch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(ManagerClosed, match="forked"):
            archives.acquire(mar, "m")
        archives.close()
        Lease(lease.folder, "", lease._give_back or (lambda: None)).release()
    assert (lease.folder / "handler.py").exists()
    lease.release()


# ------------------------------------------------------------------------------------------- the face


@pytest.fixture
def sources(tmp_path: Path) -> Iterator[ModelSources]:
    sources = ModelSources(tmp_path)
    yield sources
    sources.close()


def test_nothing_is_left_when_the_manifest_is_bad(sources: ModelSources, tmp_path: Path) -> None:
    """An error after the unpacking gives the copy back before it leaves."""
    write_mar(tmp_path / "a.mar", {"MAR-INF/MANIFEST.json": "{"})
    write_mar(tmp_path / "b.mar", {"model-config.yaml": "["})
    for name in ("a.mar", "b.mar"):
        with pytest.raises(InvalidArchive) as caught:
            sources.open(name)
        assert caught.value.source == name
        assert our_folders() == []


def test_a_model_folder_releases_once(sources: ModelSources, mar: Path) -> None:
    """As a context manager, by hand, or both."""
    with sources.open("m.mar") as model, sources.open("m.mar") as second:
        model.release()
        model.release()
        assert (second.path / "handler.py").exists()
    assert our_folders() == []


def test_a_plain_folder_has_no_digest(sources: ModelSources, tmp_path: Path) -> None:
    """Without a manifest it has none; it is still there when nobody uses it any more."""
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "model-config.yaml").write_text("minWorkers: 1")
    with sources.open("plain") as model:
        assert (model.digest, model.pristine, model.manifest) == (None, None, None)
        assert model.config == {"minWorkers": 1}
        assert model.url == "plain"
    sources.close()
    assert [path.name for path in folder.iterdir()] == ["model-config.yaml"]


@pytest.mark.parametrize(
    "names, top",
    [
        (["MAR-INF/MANIFEST.json", "sub/f"], "."),
        (["m/MAR-INF/MANIFEST.json", "m/f"], "m"),
        (["m/MAR-INF/MANIFEST.json", "._m", "__MACOSX/x"], "m"),
        (["m/MAR-INF/MANIFEST.json", "README"], "."),
        (["m/f"], "."),
    ],
    ids=str,
)
def test_where_the_model_lies_in_its_archive(sources: ModelSources, tmp_path: Path, names: list[str], top: str) -> None:
    """At the top, or in the one folder there that has a manifest."""
    write_mar(tmp_path / "m.mar", dict.fromkeys(names, '{"model": {}}'))
    with sources.open("m.mar") as model:
        base = our_folders()[0]
        assert model.path == base.joinpath(model.path.relative_to(base).parts[0], top)
        assert model.pristine is not None
        assert {p.relative_to(model.path) for p in model.path.rglob("*")} == {
            p.relative_to(model.pristine) for p in model.pristine.rglob("*")
        }
        assert (model.manifest is not None) == (top != "." or "MAR-INF/MANIFEST.json" in names)


def test_the_limits_are_used(tmp_path: Path, mar: Path) -> None:
    """What the constructor was given bounds every archive."""
    sources = ModelSources(None, limits=UnpackLimits(max_bytes=2))
    with pytest.raises(InvalidArchive, match="allowed 2 bytes"):
        sources.open(mar)
    sources.close()


def test_after_close_nothing_opens(sources: ModelSources, mar: Path) -> None:
    """Plain folders neither."""
    sources.close()
    for url in (mar, mar.parent):
        with pytest.raises(ManagerClosed):
            sources.open(url)


@pytest.mark.parametrize("store", ["", " ", b"x", 3, "a\0b"])
def test_a_store_is_a_path(store: object) -> None:
    """Anything else is an error that names the argument."""
    with pytest.raises(InvalidArgument) as caught:
        ModelSources(store)  # type: ignore[arg-type]
    assert caught.value.argument == "model_store"
