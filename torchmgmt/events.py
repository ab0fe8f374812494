"""What a ModelManager tells whoever listens: frozen records, one class for each kind of event.

A listener is any callable that takes one event. It is called after the fact, with no lock of torchmgmt held, one event at a
time and in the order in which they happened; what happens meanwhile is told after it, also what the listener itself sets off.

That is done by a thread of the library: by the one that reads all answers, or by one that makes a management call, which
then ends only after it; where an event loop reads the answers (``run_on``), by that loop's. So a listener that is slow keeps
answers and calls waiting. It may call what does not block, such as ``describe``, ``submit`` or ``scale(synchronous=False)``,
but must not wait for anything that a worker does (``predict`` raises WouldWaitForever where answers are read).
What it raises, be it SystemExit, is logged and goes no further.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

from attrs import define, field, frozen

from torchmgmt.exchange import WorkerRequest
from torchmgmt.lifecycle import VersionState
from torchmgmt.records import MetricRecord, ModelKey, WorkerExit

__all__ = [
    "NO_FAILURES",
    "BatchFinished",
    "DefaultVersionSet",
    "DownloadProgress",
    "Event",
    "HandlerMetrics",
    "Listener",
    "ModelRegistered",
    "ModelUnregistered",
    "RequestsDropped",
    "VersionStateChanged",
    "WorkerReady",
    "WorkerStopped",
]


NO_FAILURES: Mapping[int, str] = MappingProxyType({})
"""What :class:`BatchFinished` says where all went well."""


@frozen
class ModelRegistered:
    """The version can be routed to from now on."""

    key: ModelKey


@frozen
class ModelUnregistered:
    """The version is being withdrawn: it takes no request from now on."""

    key: ModelKey


@frozen
class DefaultVersionSet:
    """Requests that name no version go to this one from now on."""

    key: ModelKey


@frozen
class VersionStateChanged:
    """The version went from one state to another."""

    key: ModelKey
    before: VersionState
    after: VersionState


@frozen
class DownloadProgress:
    """So much of an archive has been downloaded: every few seconds, and once all is there.

    ``url`` is without credentials. ``total_bytes`` is None while the server does not say how much there is; all is there
    when it is ``received_bytes``. ``seconds`` is how long it took so far.
    """

    url: str
    received_bytes: int
    total_bytes: int | None
    seconds: float


@frozen
class WorkerReady:
    """A worker loaded the model and may be handed batches; ``seconds`` is how long that took since it was spawned."""

    key: ModelKey
    worker_id: str
    pid: int
    seconds: float


@frozen
class WorkerStopped:
    """A worker's process is gone; ``expected`` is whether it was told to go."""

    key: ModelKey
    worker_id: str
    exit: WorkerExit
    expected: bool


@frozen
class HandlerMetrics:
    """What the handler of one worker has measured since it told last; never empty. It comes after the batch's answers."""

    key: ModelKey
    worker_id: str
    records: Sequence[MetricRecord]


@define(eq=False)
class BatchFinished:
    """A worker has answered a batch, or ended while it had it. It comes after the answers, and not for descriptions.

    Times are those of ``time.monotonic``, in seconds. Not frozen, as other events are: one is made for each batch. Nobody
    may change it, nor keep ``requests``: they hold the data.
    """

    key: ModelKey
    worker_id: str
    requests: Sequence[WorkerRequest] = field(repr=False)
    arrived: Sequence[float]
    """When each request was accepted."""
    began: float
    """When the worker could begin the batch: it had it, and was done with the one before."""
    ended: float
    """When its answer was here, or the worker gone."""
    handler_s: float | None
    """How long the worker took: to read the requests, to run the handler, to write the answers; None: it ended."""
    failed: Mapping[int, str] = NO_FAILURES
    """The class of the error of each request that failed, by its place in ``requests``."""
    abandoned: Sequence[int] = ()
    """The places of requests whose answers nobody got: they had expired or been taken back, as RequestsDropped has told."""


@frozen
class RequestsDropped:
    """Requests ended that no worker has answered: refused at once, expired, taken back, or left over at the end."""

    key: ModelKey
    error: str
    """The class of the error that the callers got; ``Cancelled`` for what they took back themselves."""
    count: int = 1


Event: TypeAlias = (
    ModelRegistered
    | ModelUnregistered
    | DefaultVersionSet
    | VersionStateChanged
    | DownloadProgress
    | WorkerReady
    | WorkerStopped
    | HandlerMetrics
    | BatchFinished
    | RequestsDropped
)
Listener: TypeAlias = Callable[[Event], None]
