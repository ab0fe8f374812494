"""How a worker is run, as one small interface; each file here is a way to do it.

A pool decides when a worker starts, which batch it gets and when it goes. A backend knows how: what a worker is made
of, how a batch reaches it, how one learns that it is gone. Processes are the one way there is now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torchmgmt.records import Encoded, ModelSpec, WorkerExit, WorkerFault, WorkerRequest

__all__ = ["Backend", "Outcome", "WorkerHandle", "WorkerListener"]

Outcome = Encoded | WorkerFault
"""What a worker answers to one request."""


class WorkerListener(Protocol):
    """Whom a backend tells what becomes of one worker. Called on one thread at a time, with no lock held."""

    def ready(self) -> None:
        """The model is loaded; the worker takes batches from now on. At most once."""

    def done(self, number: int, outcomes: Sequence[Outcome]) -> None:
        """The batch of this number was run; one outcome for each of its requests, in order."""

    def exited(self, exit: WorkerExit) -> None:
        """The worker is gone. Exactly once, and nothing follows it."""


class WorkerHandle(Protocol):
    """One worker. Every method may be called from any thread and does not block."""

    def start(self) -> None:
        """Start it; to be called once, before anything else. Whatever goes wrong later is told to ``exited``.

        Raises:
            OSError: nothing was started, and the listener will hear nothing.
        """

    @property
    def pid(self) -> int | None:
        """Its process id; None until known."""

    @property
    def memory_bytes(self) -> int:
        """Its proportional (else resident) set size when last sampled; 0 before that."""

    def last_lines(self) -> Sequence[str]:
        """Return the last lines that it printed."""

    def run(self, number: int, requests: Sequence[WorkerRequest]) -> None:
        """Hand it a batch, to be answered by ``done(number, …)``."""

    def describe(self, number: int) -> None:
        """Have it run its handler's ``describe_handle``, to be answered by ``done(number, [answer])``."""

    def stop(self) -> None:
        """Ask it to end when what it was handed is done."""

    def terminate(self) -> None:
        """Make it end soon, whatever it does (SIGTERM)."""

    def kill(self) -> None:
        """End it now; it first says in its last lines where it was."""


class Backend(Protocol):
    """A way to run workers. Thread-safe."""

    def worker(self, spec: ModelSpec, worker_id: str, threads: int, listener: WorkerListener) -> WorkerHandle:
        """Return a worker, not started yet, that will load ``spec`` and compute with ``threads`` threads."""

    def call_at(self, when: float, callback: Callable[[], object]) -> object:
        """Run ``callback`` at a time of the monotonic clock, on the thread that calls listeners."""

    def on_own_thread(self) -> bool:
        """Return whether the caller runs on the thread that calls listeners; one that waits there waits for ever."""

    def warm(self) -> None:
        """Prepare for a first worker in the background. Does not block; idempotent."""

    def close(self) -> None:
        """End everything that the backend runs for itself. Blocks shortly; idempotent.

        Workers still alive are killed, and their listeners told, before this returns.
        """
