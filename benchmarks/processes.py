"""The processes of a program that was started here: what belongs to it, and its certain end."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from contextlib import suppress

import psutil

_GRACE_S = 20.0


def tree(pid: int) -> list[psutil.Process]:
    """Return a process and all that descend from it; nothing if it is gone."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def descendant_above(pid: int) -> psutil.Process:
    """Return the child of this process from which ``pid`` descends, or which it is."""
    line = [psutil.Process(pid), *psutil.Process(pid).parents()]
    above = {process.pid: place for place, process in enumerate(line)}
    return line[above[os.getpid()] - 1]


def end_session(process: subprocess.Popen[bytes], first: Iterable[psutil.Process] = ()) -> None:
    """End a process that leads a session of its own, and all that belong to it or descend from it. Blocks.

    Those in ``first`` (the process itself if there are none) are asked to end and get 20 s for it, with all the others;
    what is left then, or was forked meanwhile, is killed, each by its own pid.
    """
    known = {*tree(process.pid), *_session(process.pid)}
    try:
        for each in list(first) or tree(process.pid)[:1]:
            with suppress(psutil.NoSuchProcess):
                each.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
        psutil.wait_procs(known, timeout=_GRACE_S)
    finally:
        left = {*known, *_session(process.pid)}
        for each in left:
            with suppress(psutil.NoSuchProcess):  # psutil knows a pid that was given to another process
                each.kill()
        process.kill()
        process.wait()
        psutil.wait_procs(left, timeout=_GRACE_S)


def _session(leader: int) -> list[psutil.Process]:
    """The processes of a session; its number is not given to another one while any of them lives."""
    found = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader:
                found.append(process)
    return found
