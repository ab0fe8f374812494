"""What a model's loading does outside its process, as Python's audit events tell: files, folders, databases, sockets, processes.

An audit hook is there for ever, and in every process that is forked; so there is one, which does nothing unless a model is
being loaded.
"""

from __future__ import annotations

import functools
import os
import pathlib
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

from attrs import frozen

from torchmgmt.worker.provenance import Provenance, Site, module_of

__all__ = ["LoadAudit", "Trace"]

_WRITES = os.O_WRONLY | os.O_RDWR
_UNNAMED = getattr(os, "O_TMPFILE", 0)
_RANDOM = frozenset({"/dev/urandom", "/dev/random", "/proc/sys/kernel/random/uuid"})
_NOWHERE = ("/dev/", "/proc/", "/sys/")
_MEMORY = "/dev/shm/"  # noqa: S108 - where files in memory are, not where one is made
_BYTECODE = "__pycache__"
# They unpack what the archive holds under the names that it has there.
_UNPACKING = frozenset(
    {
        ("zipfile", "_extract_member"),
        ("tarfile", "_extract_member"),
        ("shutil", "_unpack_zipfile"),
        ("shutil", "_unpack_tarfile"),
    }
)
# They run programs to find out what this machine is like, which is the same for all workers.
_ASKING_THE_MACHINE = frozenset({"platform", "ctypes.util"})
_FOLDER_MAKERS = frozenset({os.makedirs.__code__, pathlib.Path.mkdir.__code__})


@frozen
class Trace:
    """A file or folder that was made or written."""

    path: str
    site: Site
    is_folder: bool
    is_common: bool
    """Whether any number of workers may do this with one path, so that only a unique name makes it one worker's own."""


class LoadAudit:
    """What the model's code does to the world outside, between :meth:`start` and :meth:`stop`."""

    def __init__(self, provenance: Provenance) -> None:
        self.traces: dict[str, Trace] = {}
        """By their paths."""
        self.unique: dict[str, Site] = {}
        """What else it did, in words, and where."""
        self._provenance = provenance

    def start(self) -> None:
        """Begin to look. One may look at a time."""
        _install_hook()
        _looking.append(self)

    def stop(self) -> None:
        """Look no more."""
        _looking.remove(self)

    def see(self, event: str, arguments: tuple[Any, ...], frame: FrameType) -> None:
        """Note what the event is about, if it is the model's doing."""
        if (look := _EVENTS.get(event)) is not None:
            look(self, frame, *arguments)

    def writing(self, place: int, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return what does as ``original``, which writes the file that its argument at ``place`` names and tells nobody."""

        @functools.wraps(original)
        def substitute(*args: Any, **kwargs: Any) -> Any:
            if self in _looking and len(args) > place and isinstance(args[place], (str, bytes, os.PathLike)):
                self._trace(sys._getframe(1), args[place])
            return original(*args, **kwargs)

        return substitute

    # -- events --------------------------------------------------------------------------------------------------------

    def _on_open(self, frame: FrameType, path: Any, _mode: object, flags: int) -> None:
        if isinstance(path, int) or not isinstance(flags, int):
            return
        if os.fspath(path) in _RANDOM:
            self._note(f"what it made of {os.fsdecode(path)}", frame)
        elif flags & _WRITES and not (_UNNAMED and flags & _UNNAMED == _UNNAMED):
            is_appending = flags & os.O_APPEND and not flags & (os.O_RDWR | os.O_TRUNC | os.O_EXCL)
            self._trace(frame, path, is_common=bool(is_appending))

    def _on_mkdir(self, frame: FrameType, path: Any, _mode: object, _dir_fd: object) -> None:
        if not os.path.lexists(path):  # else it fails
            self._trace(frame, path, is_folder=True, is_common=_may_exist(frame))

    def _on_new_name(self, frame: FrameType, _source: object, target: Any, *_dir_fds: object) -> None:
        self._trace(frame, target)

    def _on_database(self, frame: FrameType, database: Any) -> None:
        name = os.fsdecode(database)
        if not any(mark in name for mark in (":memory:", "mode=memory", "mode=ro", "immutable=1")):
            self._note(f"the database {name}", frame)

    def _on_bind(self, frame: FrameType, _socket: object, address: object) -> None:
        self._note(f"the address {_shown(address)}, to which it bound a socket", frame)

    def _on_connect(self, frame: FrameType, _socket: object, address: object) -> None:
        self._note(f"what it has from a connection to {_shown(address)}", frame)

    def _on_process(self, frame: FrameType, *arguments: object) -> None:
        if not any(module_of(each) in _ASKING_THE_MACHINE for each in _frames(frame)):
            program = _shown(arguments[0]) if arguments else "a process of its own"
            self._note(f"what it has from running {program}", frame)

    # ------------------------------------------------------------------------------------------------------------------

    def _note(self, what: str, frame: FrameType) -> None:
        if what not in self.unique and (site := self._provenance.site(frame)) is not None:
            self.unique[what] = site

    def _trace(self, frame: FrameType, path: Any, *, is_folder: bool = False, is_common: bool = False) -> None:
        name = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 - and no link followed
        if _is_no_file(name) or (site := self._provenance.site(frame)) is None:
            return
        before = self.traces.get(name)
        is_common = is_common or any((module_of(each), each.f_code.co_name) in _UNPACKING for each in _frames(frame))
        self.traces[name] = Trace(name, site, is_folder, is_common and (before is None or before.is_common))


_EVENTS: Mapping[str, Callable[..., None]] = {
    "open": LoadAudit._on_open,
    "os.mkdir": LoadAudit._on_mkdir,
    "os.rename": LoadAudit._on_new_name,
    "os.link": LoadAudit._on_new_name,
    "os.symlink": LoadAudit._on_new_name,
    "sqlite3.connect": LoadAudit._on_database,
    "socket.bind": LoadAudit._on_bind,
    "socket.connect": LoadAudit._on_connect,
    "socket.sendto": LoadAudit._on_connect,
    "subprocess.Popen": LoadAudit._on_process,
    "os.system": LoadAudit._on_process,
    "os.posix_spawn": LoadAudit._on_process,
    "os.fork": LoadAudit._on_process,
    "os.forkpty": LoadAudit._on_process,
    "pty.spawn": LoadAudit._on_process,
}
_looking: list[LoadAudit] = []
_is_installed = False


def _install_hook() -> None:
    global _is_installed  # noqa: PLW0603 - it cannot be taken away again
    if not _is_installed:
        _is_installed = True
        sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _looking:
        return
    if event in _EVENTS:
        try:
            _looking[-1].see(event, arguments, sys._getframe(1))
        except Exception:  # what it raises would be raised by what is looked at, which may raise that itself
            _looking[-1].unique.setdefault(f"what could not be looked at ({event})", Site("", 0))


def _may_exist(frame: FrameType) -> bool:
    """Whether a folder is made by a call that does not mind if it is there: then it is not meant for one worker."""
    return any(each.f_code in _FOLDER_MAKERS and bool(each.f_locals.get("exist_ok")) for each in _frames(frame, 2))


def _frames(frame: FrameType | None, most: int = 50) -> Iterator[FrameType]:
    while frame is not None and most:
        yield frame
        frame, most = frame.f_back, most - 1


def _is_no_file(path: str) -> bool:
    """Whether what is opened for writing there is a device, a folder (in which a file without a name is made), or bytecode."""
    if (path.startswith(_NOWHERE) and not path.startswith(_MEMORY)) or _BYTECODE in pathlib.Path(path).parts:
        return True
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - a hook is to be quick
    except OSError:
        return False
    return stat.S_ISCHR(mode) or stat.S_ISDIR(mode)


def _shown(what: Any) -> str:
    if isinstance(what, tuple) and len(what) >= 2:
        return f"{what[0]}:{what[1]}"
    return os.fsdecode(what) if isinstance(what, (str, bytes, os.PathLike)) else repr(what)
