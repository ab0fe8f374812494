"""As the first process of a container the server gets the orphans of all others, and has to say that it saw them end."""

from __future__ import annotations

import contextlib
import os
import threading
import time

import psutil

__all__ = ["OrphanReaper"]

INIT_PID = 1
LOOK_S = 1.0


class OrphanReaper(threading.Thread):
    """Reaps children that have ended and that nobody waits for. Where this is process 1; for programs alone, not libraries.

    Whoever has started a child waits for it and is quicker: what has lain there from one look to the next is nobody's.
    """

    def __init__(self) -> None:
        super().__init__(name="torchmgmt-orphans", daemon=True)
        self._seen: frozenset[int] = frozenset()

    @staticmethod
    def is_needed() -> bool:
        """Whether orphans come to this process."""
        return os.getpid() == INIT_PID

    def run(self) -> None:
        """Look once a second, as long as this process lives."""
        while True:
            time.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """Reap those that had ended at the last look."""
        ended = _ended_children()
        for pid in ended & self._seen:
            with contextlib.suppress(ChildProcessError):  # somebody did wait for it
                os.waitpid(pid, os.WNOHANG)
        self._seen = ended


def _ended_children() -> frozenset[int]:
    with contextlib.suppress(ChildProcessError):
        if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:  # much cheaper than the list
            return frozenset(child.pid for child in psutil.Process().children() if _is_zombie(child))
    return frozenset()


def _is_zombie(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    return False
