"""What a ModelManager tells whoever listens: frozen records, one class for each kind of event.

A listener is any callable that takes one event. It is called after the fact, on the thread that caused it, with no lock
of torchmgmt held. That thread may be the one that reads all answers: so a listener may call what does not block, such as
``describe`` or ``submit``, but must not wait for anything that a worker does (``predict`` raises WouldWaitForever there).
What it raises is logged and goes no further.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from attrs import frozen

from torchmgmt.lifecycle import VersionState
from torchmgmt.records import MetricRecord, ModelKey, WorkerExit

__all__ = [
    "DefaultVersionSet",
    "DownloadProgress",
    "Event",
    "HandlerMetrics",
    "Listener",
    "ModelRegistered",
    "ModelUnregistered",
    "VersionStateChanged",
    "WorkerReady",
    "WorkerStopped",
]


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


Event: TypeAlias = (
    ModelRegistered
    | ModelUnregistered
    | DefaultVersionSet
    | VersionStateChanged
    | DownloadProgress
    | WorkerReady
    | WorkerStopped
    | HandlerMetrics
)
Listener: TypeAlias = Callable[[Event], None]
