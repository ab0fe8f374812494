"""The backends of one manager: that which it was given or made for itself, and others made when a model asks for them."""

from __future__ import annotations

import threading

from torchmgmt.backends import Backend
from torchmgmt.backends.process import ProcessBackend
from torchmgmt.dispatcher import Dispatcher
from torchmgmt.errors import ManagerClosed, WouldWaitForever

__all__ = ["BackendSet"]


class BackendSet:
    """Gives a backend by name, and closes those that it has made. Thread-safe.

    Args:
        process: that for worker processes; not closed with this. None: one is made.
        blacklist_env_vars: which environment variables the workers of one that is made do not get; see the settings.
    """

    def __init__(self, process: Backend | None, blacklist_env_vars: str | None) -> None:
        self._process: Backend = ProcessBackend(blacklist_env_vars) if process is None else process
        self._all: tuple[Backend, ...] = (self._process,)  # never changed, but replaced: it may be read at any time
        self._lock = threading.Lock()
        # guarded by _lock
        self._threads: Backend | None = None
        self._made: list[Backend] = [self._process] if process is None else []
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<BackendSet: {len(self._all)} backends>"

    def get(self, name: str) -> Backend:
        """Return the backend of a name in :data:`torchmgmt.records.BACKENDS`; raise ManagerClosed. Does not block."""
        with self._lock:
            if self._is_closed:
                raise ManagerClosed
            return self._process if name == "process" else self._threads_locked()

    def warm(self) -> None:
        """Start the process that imports torch, so that a first worker need not wait for it. Does not block."""
        self._process.warm()

    def check_may_wait(self, call: str) -> None:
        """Raise :class:`WouldWaitForever` on a thread that reads answers: ``call`` waits for one. Takes no lock."""
        if self.dispatcher_here() is not None:
            raise WouldWaitForever(call)

    def dispatcher_here(self) -> Dispatcher | None:
        """Return the dispatcher whose thread the caller is; None if it is none. Takes no lock."""
        for backend in self._all:
            if backend.dispatcher.on_thread():
                return backend.dispatcher
        return None

    def close(self) -> None:
        """End what was made here, and make no further one. Blocks until that is over; idempotent."""
        with self._lock:
            self._is_closed = True
            made = tuple(self._made)
        for backend in made:
            backend.close()

    def _threads_locked(self) -> Backend:
        if self._threads is None:
            from torchmgmt.backends.thread import ThreadBackend  # most programs use none

            self._threads = ThreadBackend()
            self._made.append(self._threads)
            self._all = (*self._all, self._threads)
        return self._threads
