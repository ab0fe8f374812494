"""How a worker is run, as one small interface; each file here is a way to do it.

A pool decides when a worker starts, which batch it gets and when it goes. A backend knows how: what a worker is made
of, how a batch reaches it, how one learns that it is gone. A :class:`Backend` gives a :class:`ModelHost` for each model
version, and that one :class:`WorkerHandle` for each of its workers. Processes and threads are the two ways there are;
an actor of a cluster engine could be the third: nothing here says that a worker is on this machine.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from torchmgmt.dispatcher import Dispatcher
from torchmgmt.exchange import Encoded, WorkerRequest
from torchmgmt.records import ModelSpec, RawMetric, Sharing, WorkerExit, WorkerFault
from torchmgmt.seat import Seat

__all__ = ["Backend", "ModelHost", "Outcome", "WorkerHandle", "WorkerListener"]

Outcome = Encoded | WorkerFault
"""What a worker answers to one request."""


class WorkerListener(Protocol):
    """Whom a backend tells what becomes of one worker.

    Called on the thread of :attr:`Backend.dispatcher`, in order and with no lock held.
    """

    def ready(self) -> None:
        """The model is loaded; the worker takes batches from now on. At most once."""

    def done(self, number: int, outcomes: Sequence[Outcome], handler_s: float | None = None) -> None:
        """The batch of this number was run, in ``handler_s`` seconds; one outcome for each of its requests, in order."""

    def skipped(self, number: int) -> None:
        """The batch of this number was recalled, and is not begun; unless there was a ``done``, there will be none."""

    def refused(self, number: int, fault: WorkerFault) -> None:
        """The batch of this number could not be read by the worker, and is not begun."""

    def part(self, number: int, index: int, part: Encoded) -> None:
        """A part of the answer to the request at ``index`` of the batch of this number is there, before ``done``."""

    def measured(self, metrics: Sequence[RawMetric]) -> None:
        """Its handler has measured these since it told last; never empty. They come after the batch's answers."""

    def exited(self, exit: WorkerExit) -> None:
        """The worker is gone. Exactly once, and nothing follows it."""


class WorkerHandle(Protocol):
    """One worker. Every method is called on the thread of :attr:`Backend.dispatcher`, and does not block.

    What comes before :meth:`start` or after the worker's end does nothing.
    """

    def start(self) -> None:
        """Start it; to be called once. Whatever goes wrong later is told to ``exited``.

        Raises:
            OSError: nothing was started, and the listener will hear nothing.
            ManagerClosed: the backend was closed; the same.
        """

    @property
    def pid(self) -> int | None:
        """The id of the process that it runs in, perhaps this one, or that loads its model for it; None until known."""

    @property
    def memory_bytes(self) -> int:
        """The proportional (else resident) set size of that process when last sampled; 0 before that."""

    @property
    def private_bytes(self) -> int:
        """The memory that its end would free (its unique set size) when last sampled; 0 before that, or if none would."""

    def last_lines(self) -> Sequence[str]:
        """Return the last lines that it printed, where the backend can tell."""

    def run(self, number: int, requests: Sequence[WorkerRequest]) -> None:
        """Hand it a batch, to be answered by ``done(number, …)``.

        It may be handed more while it computes; it runs one after the other. What it does not begin, also because it was
        told to end before, is not answered: ``WorkerExit.last_started`` tells, which counts descriptions as well.
        """

    def seat(self, number: int) -> Seat | None:
        """Return a place beside it from which its next batch, with this ``number``, can be handed to it; None: there is none.

        It is idle, and is told nothing else before the seat is closed.
        """

    def see_to_seat(self, seat: Seat) -> None:
        """End it if what was to be handed to it from ``seat`` does not come: nobody knows what it has of that."""

    def abandon(self, number: int) -> None:
        """Let it know that nobody waits for this batch any more: a handler that sends parts can be stopped there."""

    def recall(self, numbers: Collection[int], *, but: int) -> None:
        """Have it begin none of these batches, at least one, that it has not begun: ``skipped`` tells of each, mostly at once.

        ``but`` is the one before them, which it runs, or will when it has it. It may be told of one again, or of one whose
        ``done`` came before. Recalls may come in another order than that in which they were decided.
        """

    def describe(self, number: int) -> None:
        """Have it run its handler's ``describe_handle``, to be answered by ``done(number, [answer])``."""

    def stop(self) -> None:
        """Ask it to end when what it was handed is done."""

    def terminate(self) -> None:
        """Make it end soon: it begins nothing more, and what runs may be cut off."""

    def kill(self) -> None:
        """End it now, whatever it does; it first says in its last lines where it was. ``exited`` follows shortly.

        One that cannot be ended is abandoned: then ``exited`` says that it is final.
        """


class ModelHost(Protocol):
    """How a backend runs the workers of one model version, and what it keeps for them. Thread-safe."""

    @property
    def sharing(self) -> Sharing:
        """Which way the workers get their weights, and why."""

    def worker(self, worker_id: str, threads: int, listener: WorkerListener) -> WorkerHandle:
        """Return a worker, not started yet, that will compute with ``threads`` threads. Starts nothing."""

    def rest(self) -> None:
        """Give up what is kept for further workers; the next one loads the model anew. Does not block; idempotent.

        Workers that run are not touched.
        """

    def close(self) -> None:
        """Give up everything, and block until it is gone. To be called when no worker is left; idempotent."""


class Backend(Protocol):
    """A way to run workers. Thread-safe."""

    @property
    def dispatcher(self) -> Dispatcher:
        """Its own one thread, which calls listeners, and on which pools decide. It ends when the backend is closed."""

    @property
    def can_kill(self) -> bool:
        """Whether a worker that hangs can be ended. If not, none is started in its place: each would leave one more."""

    def host(self, spec: ModelSpec) -> ModelHost:
        """Return what will run the workers of ``spec``. Starts nothing."""

    def warm(self) -> None:
        """Prepare for a first worker in the background. Does not block; idempotent."""

    def close(self) -> None:
        """End everything that the backend runs for itself. Blocks shortly; idempotent.

        Workers still alive are killed, perhaps after a short moment to end by themselves, and their listeners told,
        before this returns.
        """
