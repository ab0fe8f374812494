"""A cache folder that real processes share: one pristine copy, gone with its last user; kill -9 leaves nothing that stays."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tests.unit.file_server import FileServer, answers
from torchmgmt.archive import ModelSources

PROGRAM = """\
import sys
from torchmgmt.archive import ModelSources
url, cache = sys.argv[1:3]
folder = ModelSources(None, cache_dir=cache or None).open(url)
print(folder.path, folder.pristine, flush=True)
sys.stdin.read()
folder.release()
"""


@pytest.fixture
def mar(tmp_path: Path) -> Path:
    """An archive with some weights."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as zipped:
        zipped.writestr("handler.py", "x = 1\n")
        zipped.writestr("weights.bin", b"w" * 100_000)
    (tmp_path / "m.mar").write_bytes(packed.getvalue())
    return tmp_path / "m.mar"


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer().running() as running:
        yield running


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a program that opens a model, prints where it lies, and releases it when its input ends."""
    monkeypatch.setenv("NO_PROXY", "*")
    running: list[subprocess.Popen[str]] = []

    def begin(url: object, cache: object = "", **more: str) -> subprocess.Popen[str]:
        for name, value in more.items():
            monkeypatch.setenv(name, value)
        command = [sys.executable, "-c", PROGRAM, str(url), str(cache)]
        running.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def places_of(process: subprocess.Popen[str]) -> list[Path]:
    """The working folder, and the pristine copy that it was made of."""
    assert process.stdout is not None
    return [Path(each) for each in process.stdout.readline().split()]


def place_of(process: subprocess.Popen[str]) -> Path:
    return places_of(process)[0]


def finish(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=30)
    assert process.returncode == 0


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)


def test_two_programs_share_one_copy_until_the_last_ends(start, mar: Path, tmp_path: Path) -> None:
    """The first to go leaves it to the other, unchanged; then nothing is left. Each works in a folder of its own."""
    cache = tmp_path / "cache"
    first, second = start(mar, cache), start(mar, cache)
    working, pristine = places_of(first)
    other, same = places_of(second)
    assert (same, other != working) == (pristine, True)
    inode = (pristine / "weights.bin").stat().st_ino
    finish(first)
    assert not working.exists()
    assert (pristine / "weights.bin").stat().st_ino == inode
    assert (other / "weights.bin").read_bytes() == b"w" * 100_000
    finish(second)
    assert not list((cache / "unpacked").iterdir())


def test_what_a_killed_program_used_is_used_on_and_removed_by_the_next(start, mar: Path, tmp_path: Path) -> None:
    """Its locks ended with it."""
    cache = tmp_path / "cache"
    killed, other = start(mar, cache), start(mar, cache)
    left, pristine = places_of(killed)
    assert places_of(other)[1] == pristine
    kill(killed)
    assert (pristine / "weights.bin").read_bytes() == b"w" * 100_000
    third = start(mar, cache)
    assert places_of(third)[1] == pristine
    assert not left.exists()
    finish(other)
    finish(third)
    assert not list((cache / "unpacked").iterdir())


def test_what_a_killed_program_left_alone_is_swept(start, mar: Path, tmp_path: Path) -> None:
    """Whole copies, half ones, half removed ones and files on their way, by who begins next, whatever it opens."""
    cache = tmp_path / "cache"
    killed = start(mar, cache)
    path = place_of(killed)
    kill(killed)
    unpacked = cache / "unpacked"
    for name in ("a" * 64 + ".partial", "b" * 64 + ".removed"):
        (unpacked / name).mkdir()
        (unpacked / name / "weights.bin").write_bytes(b"half")
    assert path.is_dir()
    other = tmp_path / "other.mar"
    with zipfile.ZipFile(other, "w") as zipped:
        zipped.writestr("handler.py", "x = 2\n")
    sources = ModelSources(None, cache_dir=cache)
    with sources.open(other) as folder:
        assert {each.name for each in unpacked.iterdir()} == {folder.digest, folder.path.name}
    sources.close()


def test_a_program_killed_while_it_downloads_leaves_nothing_that_stays(
    start, server: FileServer, mar: Path, tmp_path: Path
) -> None:
    """The one that waited for it fetches for itself; what was half there is not used."""
    arrived, again, cache = threading.Event(), threading.Event(), tmp_path / "cache"

    def half(request: BaseHTTPRequestHandler) -> None:
        if arrived.is_set():
            again.set()
            answers(mar.read_bytes())(request)
            return
        answers(mar.read_bytes(), sent=1000)(request)
        arrived.set()
        server.released.wait(60)

    server.paths["/m.mar"] = half
    killed = start(server.url("/m.mar"), cache)
    assert arrived.wait(60)
    waiting = start(server.url("/m.mar"), cache)
    assert not again.is_set()
    kill(killed)
    path = place_of(waiting)
    assert (path / "weights.bin").read_bytes() == b"w" * 100_000
    finish(waiting)
    assert not [each for each in (cache / "urls").iterdir() if each.suffix != ".json"]
    assert not list((cache / "unpacked").iterdir())


def test_two_programs_fetch_a_url_once(start, server: FileServer, mar: Path, tmp_path: Path) -> None:
    """Who comes second either waits or is told that nothing changed."""
    sent: list[int] = []

    def respond(request: BaseHTTPRequestHandler) -> None:
        if request.headers.get("If-None-Match") == '"1"':
            answers(b"", status=304, length=None)(request)
            return
        sent.append(1)
        answers(mar.read_bytes(), ETag='"1"')(request)

    server.paths["/m.mar"] = respond
    programs = [start(server.url("/m.mar"), tmp_path / "cache") for _ in range(2)]
    assert len({places_of(program)[1] for program in programs}) == 1
    for program in programs:
        finish(program)
    assert len(sent) == 1


def test_a_killed_programs_temporary_folder_is_swept_and_a_living_ones_is_not(
    start, mar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without cache_dir, by the next program with the same temporary folder."""
    temp = tmp_path / "temp"
    temp.mkdir()
    killed, living = start(mar, TMPDIR=str(temp)), start(mar, TMPDIR=str(temp))
    gone, stays = place_of(killed), place_of(living)
    kill(killed)
    assert gone.is_dir()
    monkeypatch.setattr(tempfile, "tempdir", str(temp))
    sources = ModelSources(None)
    with sources.open(mar):
        assert not gone.exists()
        assert stays.is_dir()
    sources.close()
    finish(living)
    assert not list(temp.iterdir())


def test_programs_that_come_and_go_always_find_a_whole_copy(mar: Path, tmp_path: Path) -> None:
    """Two objects exclude each other as two programs do: making, sharing and removing race for a while."""

    def come_and_go(sources: ModelSources) -> None:
        for _ in range(20):
            with sources.open(mar) as folder:
                assert (folder.path / "weights.bin").stat().st_size == 100_000
                (folder.path / "weights.bin").write_bytes(b"")

    several = [ModelSources(None, cache_dir=tmp_path / "cache") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(come_and_go, each) for each in several]:
            done.result(60)
    for each in several:
        each.close()
    assert not list((tmp_path / "cache" / "unpacked").iterdir())
