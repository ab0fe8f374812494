"""Errors, interrupts, kill -9 and other programs while working folders are made: nothing is left, and nothing half-made is used."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import linecache
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import torchmgmt.archive
from tests.unit.working.conftest import FILES, content_of
from torchmgmt.archive import ModelSources, cache, copying, pristine, shelves, working
from torchmgmt.archive.shelves import PrivateShelf
from torchmgmt.errors import InvalidArchive

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
    gc.collect()  # or it would say so in another test


def everything_in(root: Path) -> set[Path]:
    """All but the notes of which places were taken, which a failure does not give back, in a pristine copy in use."""
    return {path for path in root.rglob("*") if path.name not in {"first", "second", "lent", "compiled"}}


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
