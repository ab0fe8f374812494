"""Live objects: modules, functions and handlers that a program registers as they are, and model files without an archive.

What is registered is written down once (:mod:`torchmgmt.live.snapshot`), into memory that has no name and that every
process of the version maps; so it stays what it was, whatever the program does to the object afterwards. Workers that are
threads use the object itself. torch is not imported here: whoever has a module has imported it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

from torchmgmt.errors import InvalidArgument

__all__ = ["HANDLER", "MODEL_FILES", "Batching", "LiveObject", "Role", "live_file", "live_object"]

HANDLER = "torchmgmt.handlers.live"
"""The handler that runs it."""
MODEL_FILES = frozenset({".pt", ".pth", ".pt2", ".safetensors"})
"""How the names of files end that are models without an archive."""
_ALLOWED = (
    "a model's name, path or URL, or a live object: a torch.nn.Module, a function of a batch, an exported program, or a"
    " handler with handle(data, context)"
)


class Batching(Enum):
    """What a module or function is called with."""

    STACK = "stack"
    """The tensors of a batch, stacked along a new dimension 0; its output is split as a batch of one and one of two show."""
    LIST = "list"
    """The list of what the requests brought; it returns a list with one answer for each."""


class Role(Enum):
    """What a live object is."""

    MODULE = "a module"
    PROGRAM = "an exported program"
    FUNCTION = "a function"
    HANDLER = "a handler"
    HANDLER_CLASS = "a class of handlers"
    FILE = "a file"
    """One that holds a whole model."""
    WEIGHTS = "a file of weights"
    """And a callable that makes the module that they belong to."""


class LiveObject:
    """A live object as its version holds it, from registration to release. Thread-safe.

    When pickled it leaves the object behind: a process is given the descriptor beside it, to :meth:`attach`.

    Args:
        role: what it is.
        shown: how it is shown.
        target: the object; of WEIGHTS what makes the module, of FILE None.
        batching: what it is called with; None for handlers.
        file: the file of FILE and WEIGHTS.
    """

    def __init__(
        self, role: Role, shown: str, target: object, batching: Batching | None, file: Path | None = None
    ) -> None:
        self.role = role
        self.shown = shown
        self.batching = batching
        self.file = file
        self.isolates_errors = False
        """Whether requests that failed together are to be run again, one by one."""
        self.is_written = False
        """Whether a descriptor goes with it."""
        self.target = target
        """The object itself, in the process that registered it, for workers that are threads there; else None."""
        self._fd: int | None = None
        self._lock = threading.Lock()
        self._doing = threading.Lock()
        self._done: set[str] = set()  # guarded by _doing

    def __repr__(self) -> str:
        return f"<LiveObject: {self.role.value}, {self.shown}>"

    def __getstate__(self) -> dict[str, Any]:
        kept = ("role", "shown", "batching", "file", "isolates_errors", "is_written")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["role"], state["shown"], None, state["batching"], state["file"])  # type: ignore[misc]
        vars(self).update(state)

    @property
    def is_restorable(self) -> bool:
        """Whether a state file can say where it came from."""
        return self.role is Role.FILE

    def prepare(self, backend: str, *, isolates_errors: bool) -> None:
        """Make it ready for the workers of ``backend``; for those that are processes, write it down, which blocks.

        Raises:
            InvalidArgument: it cannot be pickled, or is a module in training mode that threads are to share.
            OSError: there is no memory for it.
        """
        self.isolates_errors = isolates_errors
        if backend == "thread":
            _check_not_training(self)
        elif self.target is not None:
            from torchmgmt.live.snapshot import write_snapshot

            self._fd = write_snapshot(self.target, self.shown)
            self.is_written, self.target = True, None

    def descriptors(self) -> tuple[int, ...]:
        """Return a copy of the descriptor for one process, to be closed by the caller; none if none goes with it.

        Raises:
            OSError: there is no room for one more, or it was released.
        """
        if not self.is_written:
            return ()
        with self._lock:
            return (os.dup(-1 if self._fd is None else self._fd),)

    def attach(self, fds: tuple[int, ...]) -> None:
        """Take, in the process of a worker or template, the descriptor that came with it."""
        (self._fd,) = fds or (None,)

    def take(self) -> int | None:
        """Return the descriptor, which is the caller's from now on; None if there is none."""
        with self._lock:
            fd, self._fd = self._fd, None
        return fd

    def release(self) -> None:
        """Give back the memory, as soon as no process uses it any more. Idempotent."""
        fd = self.take()
        if fd is not None:
            os.close(fd)
        self.target = None

    def do_once(self, name: str, call: Callable[[], object]) -> None:
        """Make a call of this name unless it was made before: threads share one object. Blocks while another makes one.

        One that raises counts as not made.
        """
        with self._doing:
            if name not in self._done:
                call()
                self._done.add(name)


def live_object(source: object, batching: str | None) -> LiveObject:
    """Return what ``source`` is as a live object.

    Raises:
        InvalidArgument: it is nothing that can be run, or ``batching`` is nothing for it.
    """
    role = _role_of(source)
    if role in {Role.HANDLER, Role.HANDLER_CLASS}:
        if batching is not None:
            raise InvalidArgument("batching", batching, "None for a handler, which is always given the whole batch")
        return LiveObject(role, _shown(source), source, None)
    default = Batching.LIST if role is Role.FUNCTION else Batching.STACK
    return LiveObject(role, _shown(source), source, default if batching is None else Batching(batching))


def live_file(path: Path, model_class: object, batching: str | None) -> LiveObject:
    """Return the model in a file, which is made by ``model_class`` if the file holds its weights alone.

    Raises:
        InvalidArgument: ``model_class`` is not callable, or missing.
    """
    if model_class is None and path.suffix.lower() == ".safetensors":
        raise InvalidArgument("model_class", None, f"what makes the module that the weights in {path.name} belong to")
    if model_class is not None and not callable(model_class):
        raise InvalidArgument("model_class", model_class, "a class, or another callable, that makes a torch.nn.Module")
    role = Role.FILE if model_class is None else Role.WEIGHTS
    return LiveObject(role, path.name, model_class, Batching.STACK if batching is None else Batching(batching), path)


def _role_of(source: object) -> Role:
    module = _torch_class("torch.nn", "Module")
    if isinstance(source, type):
        if issubclass(source, module):
            what = f"an instance, {source.__name__}(...), or the path of its weights with model_class={source.__name__}"
            raise InvalidArgument("url", source, what)
        if not _handles(source):
            raise InvalidArgument("url", source, f"an instance of it, or {_ALLOWED}")
        return Role.HANDLER_CLASS
    if _is_program(source):
        return Role.PROGRAM
    if isinstance(source, (module, _torch_class("torch.jit", "ScriptFunction"))):
        return Role.MODULE
    if _handles(source) and not isinstance(source, ModuleType):
        return Role.HANDLER
    if not callable(source):
        raise InvalidArgument("url", source, _ALLOWED)
    return Role.FUNCTION


def _torch_class(module: str, name: str) -> type[Any]:
    """Return a class of torch; one that has no instances if that is not imported, so that there can be none."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind if isinstance(kind, type) else _Never


class _Never:
    """Nothing is one of these."""


def _is_program(source: object) -> bool:
    return isinstance(source, _torch_class("torch.export", "ExportedProgram"))


def _handles(source: object) -> bool:
    return callable(getattr(source, "handle", None))


def _shown(source: object) -> str:
    """Return how it is shown: what is the same in each run of the program."""
    if isinstance(source, type) or not hasattr(source, "__qualname__"):
        kind = source if isinstance(source, type) else type(source)
        # torch calls every script the same; it knows the class that it was made from.
        script = getattr(source, "original_name", None) if kind.__module__.startswith("torch.jit") else None
        return f"<ScriptModule {script}>" if script else f"<class '{kind.__module__}.{kind.__qualname__}'>"
    return f"<function {getattr(source, '__module__', None) or 'builtins'}.{source.__qualname__}>"


def _check_not_training(live: LiveObject) -> None:
    if live.role is Role.MODULE and getattr(live.target, "training", False):
        allowed = 'in evaluation mode (call its eval()) for backend="thread", which uses the module itself'
        raise InvalidArgument("url", live.shown, allowed)
