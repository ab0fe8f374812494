"""Pristine copies of archives, of which working folders are made: nobody writes to them, or it is seen that somebody did.

A pristine copy is known by the path of its files. Large ones shall not stand on the disk once more for each version, so
a working folder may have them by a second name:

- read-only ones, where this program could not open them for writing: any number of working folders;
- all others, if it is the first one: they are lent to it, which may write to them, and are kept apart from the pristine
  files meanwhile. The second working folder gets clones or copies. So do the third and all that follow; but before that
  the pristine copy gets files of its own again, which they can map.

Each file has a time stamp that no write leaves alone, of a time when nobody wrote. It shows that a large one was written to
while it was lent, or by who made a read-only one writable: no other folder is made of it then, but of a new pristine copy.
And it shows whether a file in a working folder is still what the pristine copy has.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from attrs import frozen

from torchmgmt.archive.copying import can_clone, clone_file, copy_file, is_write_protected, link, protect, set_time

__all__ = ["FILES", "LARGE_BYTES", "WEIGHTS", "LargeFiles", "Spoiled", "is_intact", "seal", "share_compiled"]

FILES = "files"
"""The folder of a pristine copy's files, in what the cache keeps."""

LARGE_BYTES = 16 << 20
"""Files from this size on are not copied where that can be avoided; smaller ones are copied within milliseconds."""

WEIGHTS = frozenset({".bin", ".ckpt", ".gguf", ".npz", ".onnx", ".pt", ".pt2", ".pth", ".safetensors"})
"""How files end that are made read-only if that lets versions share them: programs read weights, but write to databases."""

_LEDGER = "large.json"
_LENT = "lent"
_COMPILED = "compiled"
_FIRST, _SECOND = "first", "second"
_AGE_S = 24 * 3600
# The coarsest file systems keep time in steps of 2 s.
_STEP_S = 2


class Spoiled(Exception):
    """Somebody has written to a pristine copy."""


@frozen
class _Large:
    mtime_ns: int
    is_read_only: bool


def seal(files: Path) -> None:
    """Set the time stamps, once all files are in place, and note which are large; before anybody knows of the copy."""
    shares_blocks = can_clone(files.parent)
    # Each has a time of its own: one that is copied over another, time stamp and all, is still seen.
    last_s = int(time.time() - _AGE_S) // _STEP_S * _STEP_S
    ledger: dict[str, tuple[int, bool]] = {}
    for number, path in enumerate(_files_below(files)):
        mtime_ns = (last_s - _STEP_S * number) * 1_000_000_000
        # One whose time the file system does not keep is never lent, but copied as small ones are.
        if set_time(path, mtime_ns) and path.lstat().st_size >= LARGE_BYTES:
            is_read_only = path.suffix.lower() in WEIGHTS and not shares_blocks and protect(path)
            ledger[str(path.relative_to(files))] = mtime_ns, is_read_only
    (files.parent / _LEDGER).write_text(json.dumps(ledger), encoding="utf-8")


def is_intact(files: Path) -> bool:
    """Whether nobody has written to a copy since it was sealed."""
    try:
        return all(_is_intact(files, name, large) for name, large in _read_ledger(files).items())
    except (OSError, Spoiled):  # a file of it is gone
        return False


def share_compiled(files: Path, into: Path) -> None:
    """Have Python keep what it compiles of the code in a working folder in one place for all of them.

    It takes nothing from there but what has the time stamp and the size of the very file that it is to run.
    """
    for root, folders, names in os.walk(files):
        if "__pycache__" in folders or not any(name.endswith(".py") for name in names):
            continue
        place = Path(root).relative_to(files)
        compiled = files.parent / _COMPILED / place
        compiled.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(PermissionError):  # a file system without links
            (into / place / "__pycache__").symlink_to(compiled)


class LargeFiles:
    """Places the large files of one pristine copy in one working folder. For one thread.

    Args:
        files: the copy, which is there until this is done.
        keep_on: called before each MiB that is copied; copying ends with what it raises.
    """

    def __init__(self, files: Path, keep_on: Callable[[], None]) -> None:
        self._files = files
        self._lent = files.parent / _LENT
        self._keep_on = keep_on
        self._ledger = _read_ledger(files)
        self._is_first = False
        self._is_second = False

    def __contains__(self, path: Path) -> bool:
        return str(path.relative_to(self._files)) in self._ledger

    def place(self, into: Path) -> None:
        """Have them in ``into``, too, whose folders are there.

        Raises Spoiled if somebody has written to one of them; what is in ``into`` then is of no use. Raises OSError.
        """
        if any(not large.is_read_only for large in self._ledger.values()):
            self._is_first = self._is_our_turn(_FIRST)
            self._is_second = not self._is_first and self._is_our_turn(_SECOND)
        for name, large in self._ledger.items():
            is_linked = self._link(name, into / name) if large.is_read_only else self._borrow(name, into / name)
            if not is_linked:
                self._copy(name, into / name, large)
            if not _has_time(into / name, large):
                raise Spoiled(name)

    def _is_our_turn(self, turn: str) -> bool:
        """Take a turn, of all working folders that there ever are of this copy, if nobody has it; whether it is ours."""
        try:
            (self._files.parent / turn).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _link(self, name: str, target: Path) -> bool:
        return is_write_protected(self._files / name) and link(self._files / name, target)

    def _borrow(self, name: str, target: Path) -> bool:
        if not (self._is_first and link(self._files / name, target)):
            return False
        (self._lent / name).parent.mkdir(parents=True, exist_ok=True)
        (self._files / name).rename(self._lent / name)
        return True

    def _copy(self, name: str, target: Path, large: _Large) -> None:
        if not (large.is_read_only or self._is_first or self._is_second):
            self._end_lending(name, large)
        # It may just be lent, and then be replaced; neither comes a second time.
        for folder in (self._files, self._lent, self._files):
            with contextlib.suppress(FileNotFoundError):
                return self._copy_file(folder / name, target)
        raise FileNotFoundError(errno.ENOENT, "It was removed", str(self._files / name))

    def _end_lending(self, name: str, large: _Large) -> None:
        """Give the pristine copy a file of its own for one that is lent; if others do so, too, any of these is right."""
        fresh = self._files.parent / os.urandom(8).hex()
        try:
            if not (self._files / name).exists():
                self._copy_file(self._lent / name, fresh)
                if not _has_time(fresh, large):
                    raise Spoiled(name)
                fresh.replace(self._files / name)
                (self._lent / name).unlink()
        except FileNotFoundError:
            pass  # somebody else has done it
        finally:
            fresh.unlink(missing_ok=True)

    def _copy_file(self, source: Path, target: Path) -> None:
        if not clone_file(source, target):
            copy_file(source, target, self._keep_on)


def _read_ledger(files: Path) -> Mapping[str, _Large]:
    text = (files.parent / _LEDGER).read_text(encoding="utf-8")
    try:
        return {name: _Large(*facts) for name, facts in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise Spoiled(f"{_LEDGER} cannot be read: {error}") from error


def _is_intact(files: Path, name: str, large: _Large) -> bool:
    try:
        return _has_time(files / name, large)
    except FileNotFoundError:
        return not large.is_read_only and _has_time(files.parent / _LENT / name, large)


def _has_time(path: Path, large: _Large) -> bool:
    return path.lstat().st_mtime_ns == large.mtime_ns


def _files_below(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (Path(root, name) for name in names)
