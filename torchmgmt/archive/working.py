"""Working folders: each registered version has one of its own, made of an archive's pristine copy or of a plain folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from torchmgmt.archive.cache import Lease, UnpackedArchives
from torchmgmt.archive.copying import clone_file, copy_file
from torchmgmt.archive.names import MAX_DEPTH
from torchmgmt.archive.pristine import LARGE_BYTES, LargeFiles, share_compiled

__all__ = ["WorkingFolders"]

_BESIDE_MODELS = frozenset({".git", ".hg", ".svn", ".tox", ".venv", "node_modules", "venv"})
"""Folders of very many files that lie beside a model's where it is written, and that are no part of it."""


_DATABASES = frozenset({".db", ".db3", ".duckdb", ".lmdb", ".mdb", ".sqlite", ".sqlite3"})
"""How files end that are copied whatever their size: programs write into them where they lie."""


class WorkingFolders:
    """Makes working folders. Thread-safe; every method blocks, and leaves nothing on the disk after an error.

    Args:
        copies: where they are kept, each until its lease is released; not closed with this.
    """

    def __init__(self, copies: UnpackedArchives) -> None:
        self._copies = copies

    def of_archive(self, files: Path) -> Lease:
        """Return a lease on a working folder like a pristine copy, which must stay meanwhile.

        Large files are there by a second name where nobody can write to another version's by it, else cloned or copied.

        Raises:
            Spoiled: somebody has written to the pristine copy.
            ManagerClosed: it was closed meanwhile.
            OSError: the disk is full or fails.
        """

        def build(into: Path) -> None:
            large = LargeFiles(files, self._copies.check_open)
            _fill(files, into, _OfArchive(large, self._copies.check_open))
            large.place(into)
            share_compiled(files, into)

        return self._make(build)

    def of_folder(self, source: Path) -> Lease:
        """Return a lease on a working folder like a plain one, which is its owner's and left as it is.

        Files are copied. Large ones but databases are cloned where the file system can; else they are links to the owner's,
        as are folders that lie elsewhere, what cannot be read, and what is neither file nor folder.

        Raises:
            ManagerClosed: it was closed meanwhile.
            OSError: the disk is full or fails.
        """
        real = Path(os.path.realpath(source))
        return self._make(lambda into: _fill(real, into, _OfFolder(real, into, self._copies.check_open)))

    def _make(self, build: Callable[[Path], None]) -> Lease:
        def build_while_open(into: Path) -> None:
            build(into)
            self._copies.check_open()

        try:
            return self._copies.acquire_made(os.urandom(32).hex(), build_while_open)
        except OSError:
            self._copies.check_open()  # then that is why: closing removes what it is made of
            raise


class _Rules(Protocol):
    """What becomes of the entries of a folder."""

    def entries(self, folder: Path) -> Iterable[os.DirEntry[str]]:
        """Return what is in a folder."""

    def is_entered(self, source: Path) -> bool:
        """Whether a folder is made anew, and its entries placed in that."""

    def place(self, source: Path, target: Path) -> None:
        """Place anything but a folder that is entered."""


def _fill(source: Path, into: Path, rules: _Rules) -> None:
    """Make a folder, and in it what the rules make of another one's entries."""
    pending = [(source, into)]
    while pending:
        folder, made = pending.pop()
        made.mkdir(mode=0o755)
        for entry in rules.entries(folder):
            path, target = folder / entry.name, made / entry.name
            if entry.is_dir(follow_symlinks=False) and rules.is_entered(path):
                pending.append((path, target))
            else:
                rules.place(path, target)


class _OfArchive:
    """The rules for a pristine copy, in which there are files and folders only; large ones are placed later."""

    def __init__(self, large: LargeFiles, keep_on: Callable[[], None]) -> None:
        self._large = large
        self._keep_on = keep_on

    def entries(self, folder: Path) -> Iterable[os.DirEntry[str]]:
        with os.scandir(folder) as found:
            return list(found)

    def is_entered(self, source: Path) -> bool:
        self._keep_on()
        return True

    def place(self, source: Path, target: Path) -> None:
        self._keep_on()
        if source not in self._large:
            copy_file(source, target, self._keep_on)


class _OfFolder:
    """The rules for a plain folder, in which anything may be, and may change meanwhile."""

    def __init__(self, root: Path, into: Path, keep_on: Callable[[], None]) -> None:
        self._root = root
        self._into = Path(os.path.realpath(into))
        self._keep_on = keep_on

    def entries(self, folder: Path) -> Iterable[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as found:
                return list(found)
        except (FileNotFoundError, PermissionError):  # since it was looked at
            return ()

    def is_entered(self, source: Path) -> bool:
        self._keep_on()
        is_too_deep = len(source.parts) - len(self._root.parts) > MAX_DEPTH
        if is_too_deep or source.name in _BESIDE_MODELS or not os.access(source, os.R_OK | os.X_OK):
            return False
        # A folder that the working folder lies in would be copied into itself, for ever.
        return not self._into.is_relative_to(source)

    def place(self, source: Path, target: Path) -> None:
        self._keep_on()
        real = Path(os.path.realpath(source)) if source.is_symlink() else source
        if real is not source and real.is_relative_to(self._root):
            target.symlink_to(os.path.relpath(real, source.parent))
        elif not self._copy(real, target) and os.path.lexists(source):
            target.symlink_to(real)

    def _copy(self, source: Path, target: Path) -> bool:
        """Copy or clone a file, if it is one that should be and may be read; whether that is so."""
        try:
            status = source.lstat()
            if not stat.S_ISREG(status.st_mode):
                return False
            if status.st_size >= LARGE_BYTES and source.suffix.lower() not in _DATABASES:
                return clone_file(source, target)
            copy_file(source, target, self._keep_on)
        except (FileNotFoundError, PermissionError):
            return False
        return True
