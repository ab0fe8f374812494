"""The desired state on disk: one file, for one program at a time.

A reader finds the old state or the new one, whenever the writer is killed. The whole state is written to a file beside it,
flushed to the disk, and then renamed over it. (No library does it: atomicwrites, which did, is given up.) A change is one
line more at the file's end, which does not count before it is whole: with 5,000 versions, to write them all for each change
took 60 to 200 ms, and 5 GB until they were registered; a line takes what the first registration takes. When the lines are
longer than the state that they change, it is written whole again.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

from torchmgmt.errors import InvalidArgument, InvalidStateFile, StateFileInUse, TorchmgmtError
from torchmgmt.state import DesiredState, change_to_json, from_json, to_json

__all__ = ["StateFile", "StateKeeper"]

log = logging.getLogger(__name__)

MOST_LINES_BYTES = 64 << 10
"""Lines of this size together may stay, however small the state is that they change."""
CLOSE_LIMIT_S = 10.0
"""So long a write that is under way may take once nothing more is to be written."""
PRIVATE = 0o600  # URLs may carry what is for nobody else


class StateFile:
    """A state file that this object alone uses, until it is closed. For one thread at a time.

    Beside it lie ``<name>.lock``, which stays, and while it is written ``<name>.tmp``. The folder is made if need be.

    Raises:
        InvalidArgument: ``path`` is no path of a file.
        StateFileInUse: another one holds it, in this process or in another.
        OSError: the folder or the lock cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # Links are followed now, or the rename would replace the link.
        self.path = Path(os.path.realpath(_check_path(path)))
        if self.path.is_dir():
            raise InvalidArgument("state_file", str(path), "the path of a file; that is a folder")
        self._temporary = self.path.with_name(self.path.name + ".tmp")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = _hold(self.path.with_name(self.path.name + ".lock"), self.path)
        self._closing = weakref.finalize(self, _let_go, lock)
        self._closing.atexit = False  # the system does that
        # What this object has written, if nothing went wrong since: what else is there may end in half a line.
        self._written: DesiredState | None = None
        self._whole_bytes = 0
        self._size = 0
        _open_files[self] = lock

    def read(self) -> DesiredState | None:
        """Return what was written last; None if there is no file yet.

        Raises:
            InvalidStateFile: it holds something else, or what a later release wrote.
            OSError: it cannot be read.
        """
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return from_json(text)
        except (ValueError, TorchmgmtError) as error:
            raise InvalidStateFile(str(self.path), str(error)) from error

    def write(self, state: DesiredState) -> None:
        """Have the file hold a state. Blocks until it is on the disk; raises OSError, and then it holds the old one."""
        before, self._written = self._written, None
        change = before.change_to(state) if before is not None else None
        if change is None or not self._append(change_to_json(change)):
            self._replace(to_json(state))
        self._written = state

    def _append(self, line: bytes) -> bool:
        """Add a line; False if nothing was done, because the file is not what was written, or has many."""
        if self._size + len(line) - self._whole_bytes > max(self._whole_bytes, MOST_LINES_BYTES):
            return False
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        except FileNotFoundError:
            return False  # somebody may have cleaned it away
        try:
            if os.fstat(fd).st_size != self._size:
                return False
            _write_out(fd, line)
        finally:
            os.close(fd)
        self._size += len(line)
        return True

    def _replace(self, text: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have cleaned the logs away
        self._temporary.unlink(missing_ok=True)  # what a kill left behind
        try:
            _write_new(self._temporary, text)
            self._temporary.replace(self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                self._temporary.unlink(missing_ok=True)
            raise
        _flush_folder(self.path.parent)
        self._whole_bytes = self._size = len(text)

    def close(self) -> None:
        """Let others use it. Idempotent; in a forked copy it does nothing."""
        _open_files.pop(self, None)
        self._closing()


class StateKeeper:
    """Writes the state after each change, in the order of the changes. Thread-safe; holds no lock while it writes.

    Who has changed something calls :meth:`record` and returns when it is written. There is no thread for that: one of
    those who wait writes for all who asked before it began, so that a burst of changes is few writes.

    Args:
        file: where to; closed with this.
    """

    def __init__(self, file: StateFile) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        # guarded by _lock
        self._asked = 0
        self._done = 0  # of those asked
        self._is_writing = False
        self._is_closed = False
        self._is_left_to_writer = False  # to close the file
        # belongs to whoever writes
        self._on_disk: DesiredState | None = None
        self._is_failing = False

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> tuple[StateKeeper, DesiredState | None]:
        """Take hold of a state file and return what it holds, None if there was none; raise as :class:`StateFile` does."""
        keeper = cls(StateFile(path))
        try:
            return keeper, keeper.load()
        except BaseException:
            keeper.close()
            raise

    @property
    def path(self) -> Path:
        """The state file."""
        return self._file.path

    def load(self) -> DesiredState | None:
        """Return what is stored, as :meth:`StateFile.read` does. To be called before the first :meth:`record`."""
        self._on_disk = self._file.read()
        return self._on_disk

    def record(self, desired: Callable[[], DesiredState]) -> None:
        """Return when a state as ``desired`` gives it from now on is on the disk, or could not be written.

        Blocks while the disk is written. ``desired`` may be called on another thread that records, without any lock.
        A failure is logged; it does not raise.
        """
        with self._changed:
            self._asked += 1
            mine = self._asked
            while self._done < mine and self._is_writing and not self._is_left_to_writer:
                self._changed.wait()
            if self._done >= mine or self._is_closed:
                return
            self._is_writing = True
            covered = self._asked
        try:
            self._write(desired())
        finally:
            with self._changed:
                self._is_writing = False
                self._done = covered
                self._changed.notify_all()
                is_left_to_me = self._is_left_to_writer
            if is_left_to_me:
                self._file.close()

    def close(self, timeout: float = CLOSE_LIMIT_S) -> None:
        """Wait for a write that is under way, write nothing more, and let others use the file. Idempotent.

        Blocks for at most ``timeout`` seconds: a disk that has gone may keep who writes to it for ever. That one lets go of
        the file then, should it come back.
        """
        with self._changed:
            self._is_closed = True
            is_idle = self._changed.wait_for(lambda: not self._is_writing, timeout)
            self._is_left_to_writer = not is_idle
            self._changed.notify_all()  # those who wait to have theirs written, too
        if is_idle:
            self._file.close()
        else:
            log.error("The state file %s is still being written after %g s; nobody waits for that", self.path, timeout)

    def _write(self, state: DesiredState) -> None:
        if state == self._on_disk:
            return
        try:
            self._file.write(state)
        except OSError as error:
            self._on_disk = None  # the rename may have happened
            self._tell_once(error)
            return
        self._on_disk = state
        if self._is_failing:
            self._is_failing = False
            log.warning("The state file %s is written again", self.path)

    def _tell_once(self, error: OSError) -> None:
        was_failing, self._is_failing = self._is_failing, True
        if not was_failing:
            log.error(
                "The state file %s could not be written: %s. Models are served on, but a restart would not bring this"
                " change back; the next change tries again",
                self.path,
                error.strerror or error,
            )


def _check_path(path: object) -> str:
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise InvalidArgument("state_file", path, "the path of a file, or None")
    return text


def _write_new(path: Path, text: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE)
    try:
        _write_out(
            fd, text
        )  # a rename that reached the disk before the content would leave an empty file after a power cut
    finally:
        os.close(fd)


def _write_out(fd: int, text: bytes) -> None:
    """Write all of it, and wait until it is on the disk."""
    rest = memoryview(text)
    while rest:
        rest = rest[os.write(fd, rest) :]
    os.fsync(fd)


def _flush_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _hold(lock: Path, path: Path) -> int:
    """Return the open descriptor of the lock file; the system gives it up when this process ends, however it ends."""
    fd = os.open(lock, os.O_RDWR | os.O_CREAT, PRIVATE)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
    except BaseException as error:
        holder = _pid_in(fd)
        os.close(fd)
        if isinstance(error, BlockingIOError):
            raise StateFileInUse(str(path), holder) from None
        raise
    return fd


def _let_go(lock: int) -> None:
    fcntl.flock(
        lock, fcntl.LOCK_UN
    )  # closing alone would not do it while a process that was forked just now has it open
    os.close(lock)


def _pid_in(fd: int) -> int:
    """Return the process that a lock file names; 0 if it names none."""
    try:
        return int(os.pread(fd, 20, 0))
    except (OSError, ValueError):
        return 0


_open_files: weakref.WeakKeyDictionary[StateFile, int] = weakref.WeakKeyDictionary()


def _forget_in_child() -> None:
    """Close a forked copy's descriptors: the lock would else last until the copy has ended, too."""
    for file, fd in list(_open_files.items()):
        if file._closing.detach() is not None:
            os.close(fd)
    _open_files.clear()


os.register_at_fork(after_in_child=_forget_in_child)
