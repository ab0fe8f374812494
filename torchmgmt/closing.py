"""How a manager is closed: once, by one thread, in the time that the most impatient caller gives it."""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING

from torchmgmt.announcer import Announcer
from torchmgmt.backends.backend_set import BackendSet
from torchmgmt.catalogue import Catalogue
from torchmgmt.records import CloseReport
from torchmgmt.served import close_all, total_of

if TYPE_CHECKING:
    from torchmgmt.archive import ModelSources

__all__ = ["Closing"]


class Closing:
    """Closes what a manager has. Thread-safe.

    Args:
        catalogue: the versions.
        backends: what runs their workers.
        sources: where their files are.
        announcer: who tells of them.
    """

    def __init__(self, catalogue: Catalogue, backends: BackendSet, sources: ModelSources, announcer: Announcer) -> None:
        self._catalogue = catalogue
        self._backends = backends
        self._sources = sources
        self._announcer = announcer
        self._gate = threading.Lock()  # nothing is called while it is held
        self._until = math.inf  # guarded by _gate
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._report: CloseReport | None = None  # guarded by _lock

    @property
    def is_inherited(self) -> bool:
        """Whether what it would close belongs to the process that this one was forked from."""
        return self._catalogue.is_inherited

    def hurry(self, timeout: float) -> None:
        """Have requests finish within ``timeout`` seconds from now, if they do not have less already. Does not block."""
        until = time.monotonic() + timeout
        with self._gate:
            if until < self._until:  # noqa: PLR1730 - a signal handler may come here at each call
                self._until = until

    def run(self) -> CloseReport:
        """Close all, and return what had to be done for it; who comes later waits, and gets the same. Blocks.

        On a thread that nothing interrupts.
        """
        with self._lock:
            try:
                if self._report is None:
                    self._report = self._close()
            finally:
                self._is_over.set()
            return self._report

    def wait(self, timeout: float) -> None:
        """Block until it is over that somebody else began or is about to begin, for at most ``timeout`` seconds."""
        self._is_over.wait(timeout)

    def run_on_thread(self) -> None:
        """Close all on a thread that has a name, started by one that has none."""
        threading.Thread(target=self.run, name="torchmgmt-abandoned", daemon=True).start()

    def _close(self) -> CloseReport:
        started = time.monotonic()
        reports = close_all(self._catalogue.close(), self._remaining_s)
        self._backends.close()
        self._sources.close()
        self._catalogue.let_go()
        self._announcer.close()
        return total_of(time.monotonic() - started, reports)

    def _remaining_s(self) -> float:
        return max(0.0, self._until - time.monotonic())
