"""Where copies lie, pristine ones and working folders: in a temporary folder of one program, or in a folder that programs share.

Neither is ever left in a state that the next program could not deal with: a copy gets its name when it is whole and loses
it before it is removed, and who uses something holds a lock that ends with it. Files are unlinked, never cut or written
to again: they are mapped into the memory of workers.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from attrs import frozen

from torchmgmt.archive.locks import KeyLock, KeyLocks, hold_folder
from torchmgmt.errors import ManagerClosed

__all__ = ["Place", "PrivateShelf", "SharedShelf", "Shelf", "remove_tree"]

_log = logging.getLogger(__name__)

PREFIX = "torchmgmt-unpacked-"
_OURS = re.compile(PREFIX + r"\w{8}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@frozen(eq=False)
class Place:
    """A copy that is there until it is given back, which must be done once."""

    folder: Path
    give_back: Callable[[], None]


class Shelf(Protocol):
    """Keeps the copies, one for each digest that is in use. Thread-safe."""

    def take(self, digest: str, build: Callable[[Path], None], keep_on: Callable[[], None]) -> Place:
        """Return the copy; ``build`` makes it in a folder of the given name, which is not there yet, if it is missing.

        ``keep_on`` is called often while another program is waited for. Raises what the two raise, and leaves nothing then.
        """

    def find(self, digest: str, keep_on: Callable[[], None]) -> Place | None:
        """Return the copy if another program has made it; None if not. Raises what ``keep_on`` raises."""

    def close(self) -> None:
        """Remove what only this program may use. Idempotent."""


class PrivateShelf:
    """Copies in a temporary folder, which exists only while something is in it.

    Its lock, held for as long as it exists, tells other programs that it is in use; those of killed programs are removed
    when the next one makes its own.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        # guarded by _lock
        self._closed = False
        self._users: set[str] = set()
        self._base: Path | None = None
        self._hold: int | None = None

    def take(self, digest: str, build: Callable[[Path], None], keep_on: Callable[[], None]) -> Place:
        """Make a copy; see :class:`Shelf`."""
        name = f"{digest[:16]}-{next(self._numbers)}"
        folder: Path | None = None

        def give_back() -> None:
            if folder is not None:
                remove_tree(folder.with_suffix(".partial"))
                remove_tree(folder)
            self._leave(name)

        try:
            folder = self._join(name) / name
            partial = folder.with_suffix(".partial")
            build(partial)
            partial.rename(folder)
            return Place(folder, give_back)
        except BaseException:
            give_back()
            raise

    def find(self, digest: str, keep_on: Callable[[], None]) -> Place | None:
        """Return None: nobody else makes copies here."""
        return None

    @contextlib.contextmanager
    def scratch_file(self) -> Iterator[Path]:
        """Yield the path of a file that nobody else uses, and remove it at the end of the block."""
        name = f"{next(self._numbers)}.download"
        path: Path | None = None
        try:
            path = self._join(name) / name
            yield path
        finally:
            if path is not None:
                path.unlink(missing_ok=True)
            self._leave(name)

    def close(self) -> None:
        """Remove the folder, with all that models may have written there. Idempotent."""
        with self._lock:
            self._closed = True
            base, hold = self._base, self._hold
            self._base = self._hold = None
        if base is not None:
            remove_tree(base)
        if hold is not None:
            os.close(hold)

    def _join(self, user: str) -> Path:
        with self._lock:  # a few quick system calls, so that there is one folder and not two
            if self._closed:
                raise ManagerClosed("This ModelSources")
            if self._base is None or not self._base.is_dir():  # somebody may have cleaned /tmp
                if self._hold is not None:
                    os.close(self._hold)
                self._base, self._hold = _make_base()
            self._users.add(user)
            return self._base

    def _leave(self, user: str) -> None:
        with self._lock:
            self._users.discard(user)
            if self._users or self._base is None:
                return
            try:
                self._base.rmdir()
            except FileNotFoundError:
                pass
            except OSError:  # a model wrote beside its folder
                return
            if self._hold is not None:
                os.close(self._hold)
            self._base = self._hold = None


def _make_base() -> tuple[Path, int | None]:
    import tempfile  # brings shutil and random: 10 ms

    _sweep(Path(tempfile.gettempdir()))
    while True:
        base: Path | None = None
        try:
            base = Path(tempfile.mkdtemp(prefix=PREFIX))
            hold = hold_folder(base)
            if hold is not None:
                return base, hold
        except OSError:
            if base is None:
                raise
            return base, None  # a file system without locks for folders: nobody can sweep there either
        except BaseException:
            if base is not None:
                base.rmdir()
            raise
        # Another program's sweep took it in the moment before it was locked, and removes it.


def _sweep(root: Path) -> None:
    """Remove the folders of programs that are gone."""
    for path in root.glob(PREFIX + "*"):
        if not _OURS.fullmatch(path.name):
            continue
        try:
            hold = hold_folder(path)
        except OSError:
            continue
        if hold is not None:
            _log.info("Removing %s, which a program that is gone left behind", path)
            remove_tree(path)
            os.close(hold)


class SharedShelf:
    """Copies in a folder that programs share; each is there for as long as one of them uses it, and ``keep_s`` longer.

    ``DIGEST`` is a copy, and its lock is held by all who use it, or alone by who makes or removes it. What a killed program
    left, locked by nobody, is removed when the next one begins. The locks are those of a file beside the folder.

    Args:
        root: a folder on a file system with locks; made when it is first needed.
        keep_s: for how long a copy is kept that nobody uses, in s, at least; it is removed when a program begins after that.
    """

    def __init__(self, root: Path, keep_s: float = 0) -> None:
        self._root = root
        self._keep_s = keep_s
        self._lock = threading.Lock()
        self._is_swept = False  # guarded by _lock
        self._locks = KeyLocks(root.with_name(root.name + ".locks"), root)

    def take(self, digest: str, build: Callable[[Path], None], keep_on: Callable[[], None]) -> Place:
        """Return the copy, whoever made it; see :class:`Shelf`. Blocks while another program makes or removes it."""
        self._prepare()
        lock = self._locks.of(digest)
        try:
            while True:
                lock.share(keep_on)
                if self._folder(digest).is_dir():
                    return self._place(digest, lock)
                lock.own(keep_on)
                if not self._folder(digest).is_dir():
                    self._make(digest, build)
                # From owning to sharing there is a moment in which another program may remove it again: so look again.
        except BaseException:
            self._remove_unused(digest, lock)
            raise

    def find(self, digest: str, keep_on: Callable[[], None]) -> Place | None:
        """Return the copy if there is one; see :class:`Shelf`. Blocks while another program makes or removes it."""
        self._prepare()
        if not self._folder(digest).is_dir():
            return None
        lock = self._locks.of(digest)
        try:
            lock.share(keep_on)
            if self._folder(digest).is_dir():
                return self._place(digest, lock)
        except BaseException:
            self._remove_unused(digest, lock)
            raise
        lock.release(remove=lock.try_own())
        return None

    def close(self) -> None:
        """Do nothing: what this program used, it gave back."""

    def _prepare(self) -> None:
        with self._lock:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._is_swept:
                return
            self._is_swept = True
            for digest in {path.name.partition(".")[0] for path in self._root.iterdir()}:
                if _DIGEST.fullmatch(digest):
                    self._remove_unused(digest, self._locks.of(digest))

    def _make(self, digest: str, build: Callable[[Path], None]) -> None:
        partial = self._root / f"{digest}.partial"
        remove_tree(partial)  # of a program that was killed while it made one
        build(partial)
        partial.rename(self._folder(digest))

    def _place(self, digest: str, lock: KeyLock) -> Place:
        def give_back() -> None:
            self._note_use(digest)
            self._remove_unused(digest, lock)

        self._note_use(digest)
        return Place(self._folder(digest), give_back)

    def _note_use(self, digest: str) -> None:
        if self._keep_s:
            with contextlib.suppress(FileNotFoundError):  # somebody has cleaned the folder
                os.utime(self._folder(digest))

    def _is_kept(self, digest: str) -> bool:
        """Whether a copy that nobody uses is to stay. Its time stamp, that of its last use, is the machine's clock's."""
        try:
            return time.time() - self._folder(digest).stat().st_mtime < self._keep_s
        except FileNotFoundError:
            return False

    def _remove_unused(self, digest: str, lock: KeyLock) -> None:
        is_unused = lock.try_own()
        try:
            if is_unused and not self._is_kept(digest):
                self._clear(digest)
        finally:
            lock.release(remove=is_unused)

    def _clear(self, digest: str) -> None:
        """Remove what there is of a copy; by another name, as a killed program must not leave half of one."""
        folder, removed = self._folder(digest), self._root / f"{digest}.removed"
        remove_tree(removed)
        if os.path.lexists(folder):
            folder.rename(removed)
        remove_tree(removed)
        remove_tree(self._root / f"{digest}.partial")

    def _folder(self, digest: str) -> Path:
        return self._root / digest


def remove_tree(folder: Path) -> None:
    """Remove a folder with all that is in it, as far as possible; what is left is logged. Links are not followed."""
    import shutil

    if folder.is_symlink() or not folder.is_dir():  # a model has put that in the place of its folder, or removed it
        folder.unlink(missing_ok=True)
        return
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        return
    # A model may have taken the write permission from folders of its own. Files keep their modes: some are others', too.
    _permit(folder)
    for root, names, _files in os.walk(folder):
        for name in names:
            _permit(Path(root, name))
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        _log.warning("The folder %s could not be removed", folder)


def _permit(folder: Path) -> None:
    with contextlib.suppress(OSError):  # what then cannot be removed is logged
        if not folder.is_symlink():
            folder.chmod(0o700)
