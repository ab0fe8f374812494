"""Which Python interpreter is started for the processes of ours: never this program once more."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

__all__ = ["STARTED", "interpreter", "is_frozen"]

STARTED = "TORCHMGMT_STARTED_AS_PYTHON"
"""Is in the environment of what was started as an interpreter, until that has become one of ours."""

_AT_FIRST = sys.executable
"""What multiprocessing starts as long as nobody names anything, whatever ``sys.executable`` is set to later."""
_RUNNING = "/proc/self/exe"
# python3.11, pypy3, and what programs that embed Python bring along: mayapy, hython, pvpython.
_CALLED_PYTHON = re.compile(r"^(python|pypy|graalpy|pyston)|(py|ython)[\d.]*(\.exe)?$", re.IGNORECASE)
_WHAT_TO_DO = (
    "Name an interpreter that can import torch and torchmgmt: multiprocessing.set_executable('/path/to/python'), before the"
    " first model has a worker"
)


def interpreter() -> str:
    """Return the path of the interpreter to start: what ``multiprocessing.set_executable`` named, else ``sys.executable``.

    A program that was frozen (PyInstaller, cx_Freeze), or embeds Python (uWSGI, QGIS, Maya), has its own path as
    ``sys.executable``: started with what is meant for an interpreter it would run once more, and so start itself again,
    without end. Any thread; multiprocessing is not imported for it.

    Raises:
        OSError: none is known; says how to name one.
    """
    own = sys.executable
    if STARTED in os.environ:
        raise OSError(f"this program was itself started, as {own!r}, in place of a Python interpreter. {_WHAT_TO_DO}")
    named = _named()
    if named is not None and not _would_be_us(named, is_named=True):
        return named
    if not own:
        raise OSError(f"sys.executable is empty, so no interpreter is known that could load a model. {_WHAT_TO_DO}")
    if _would_be_us(own, is_named=False):
        what = "this program, which is frozen" if is_frozen() else "this program, which embeds Python"
        raise OSError(f"sys.executable, {own!r}, is {what}, and no interpreter that could load a model. {_WHAT_TO_DO}")
    return own


def is_frozen() -> bool:
    """Return whether this program was packed together with its modules, which are no files then."""
    return bool(getattr(sys, "frozen", False))


def _named() -> str | None:
    """Return what the program has told multiprocessing to start; None if nothing."""
    spawn = sys.modules.get("multiprocessing.spawn")
    executable = spawn.get_executable() if spawn is not None else None
    path = os.fsdecode(executable) if executable else None
    return None if path in {sys.executable, _AT_FIRST} else path


def _would_be_us(path: str, *, is_named: bool) -> bool:
    """Whether this program would run once more."""
    is_called_python = bool(_CALLED_PYTHON.search(Path(path).name))
    if not is_frozen():
        return _is_same(path, _RUNNING) and not is_called_python
    if is_named:
        return _is_same(path, sys.executable)
    # Perhaps it brings an interpreter along; anything else may be a script that starts the program.
    return _is_same(path, _RUNNING) or not is_called_python


def _is_same(path: str, other: str) -> bool:
    try:
        return Path(path).samefile(other)
    except OSError:  # a system without /proc, or nothing is there
        return path == sys.executable
