"""Locks of many keys: each excludes as a lock file would, and all of one object need one descriptor together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchmgmt.archive import locks as locks_module
from torchmgmt.archive.locks import KeyLocks

DIGESTS = [f"{number:064x}"[::-1] for number in range(1, 301)]
ONE = DIGESTS[0]


def locks_in(folder: Path) -> KeyLocks:
    return KeyLocks(folder / "all.locks", folder)


def give_up() -> None:
    raise TimeoutError


def never() -> None:
    raise AssertionError("it waits, though nobody holds it")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - their number is enough


@pytest.fixture(params=["ranges", "files"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on a system that has locks of parts of a file, and on one that has not."""
    monkeypatch.setattr(locks_module, "_HAS_RANGES", request.param == "ranges")
    return tmp_path


def test_any_number_of_locks_needs_one_descriptor(tmp_path: Path) -> None:
    """Thousands of models from archives of their own must not use up what a program may have open."""
    locks, before = locks_in(tmp_path), descriptors()
    held = [locks.of(digest) for digest in DIGESTS]
    for lock in held:
        lock.share(never)
    assert descriptors() == before + 1
    for lock in held:
        lock.release()
    assert descriptors() == before


@pytest.mark.parametrize("same_object", [True, False])
def test_who_holds_one_with_others_keeps_out_who_wants_it_alone(folder: Path, same_object: bool) -> None:
    """Any number share a key; while they do nobody owns it, and while one owns it nobody shares it. Other keys are free."""
    locks = locks_in(folder)
    others = locks if same_object else locks_in(folder)
    first, second = locks.of(ONE), others.of(ONE)
    first.share(never)
    second.share(never)
    assert not second.try_own()
    second.release()
    assert first.try_own()
    with pytest.raises(TimeoutError):
        second.share(give_up)
    with pytest.raises(TimeoutError):
        second.own(give_up)
    other_key = others.of(DIGESTS[1])
    other_key.own(never)
    first.share(never)  # from owning to sharing
    second.share(never)
    for lock in (first, second, other_key):
        lock.release(remove=lock is other_key)
        lock.release()  # the second time it does nothing
    second.own(never)
    second.release(remove=True)


def test_two_who_share_and_both_want_it_alone_do_not_wait_for_each_other(folder: Path) -> None:
    """Who waits to hold it alone has given up what it held with others."""
    first, second = locks_in(folder).of(ONE), locks_in(folder).of(ONE)
    first.share(never)
    second.share(never)
    with pytest.raises(TimeoutError):
        first.own(give_up)
    second.own(never)
    second.release(remove=True)


def test_a_lock_ends_with_its_program(tmp_path: Path) -> None:
    """What a killed program held is free at once."""
    code = f"""
import os, signal, sys
from pathlib import Path
from torchmgmt.archive.locks import KeyLocks
folder = Path(sys.argv[1])
KeyLocks(folder / "all.locks", folder).of({ONE!r}).own(lambda: None)
print("held", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    mine = locks_in(tmp_path).of(ONE)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "held\n"
        assert not mine.try_own()
        program.kill()
        program.wait()
        assert mine.try_own()
        mine.release()


def test_locks_work_on_when_their_folder_was_cleaned(tmp_path: Path) -> None:
    """Whoever locks after the file was removed is excluded by whoever did so before him, and after the removal."""
    locks = locks_in(tmp_path)
    old = locks.of(ONE)
    old.share(never)
    (tmp_path / "all.locks").unlink()
    new = locks.of(DIGESTS[1])
    new.own(never)
    wants = [_tried(locks_in(tmp_path), DIGESTS[1]), _tried(locks, ONE)]
    assert wants == [False, False]
    before = descriptors()
    old.release()
    new.release()
    assert descriptors() == before - 2


def _tried(locks: KeyLocks, digest: str) -> bool:
    lock = locks.of(digest)
    try:
        return lock.try_own()
    finally:
        lock.release()
