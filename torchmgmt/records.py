"""Frozen facts that cross threads, processes and the public API.

Units are in the names (``_s``, ``_ms``, ``_bytes``). ``to_dict`` writes the names that clients of the Management API
parse; their source is TorchServe's Management API.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias

from attrs import Attribute, field, frozen
from attrs.validators import optional

from torchmgmt.checks import number, plain_fields, text, truth
from torchmgmt.errors import InvalidArgument
from torchmgmt.lifecycle import VersionState, WorkerState

if TYPE_CHECKING:
    from torchmgmt.live import LiveObject

__all__ = [
    "BACKENDS",
    "ENVELOPES",
    "EXPIRED",
    "CancelRunning",
    "CloseReport",
    "MetricKind",
    "MetricRecord",
    "ModelInfo",
    "ModelKey",
    "ModelSpec",
    "RawMetric",
    "Scale",
    "ShareWeights",
    "Sharing",
    "TemplateJob",
    "WorkerExit",
    "WorkerFault",
    "WorkerInfo",
    "WorkerJob",
    "backend_name",
    "cancel_running_of",
    "envelope_name",
    "share_weights_of",
]

WIRE_STATUS: Mapping[WorkerState, str] = {
    WorkerState.WANTED: "LOADING",
    WorkerState.LOADING: "LOADING",
    WorkerState.READY: "READY",
    WorkerState.BUSY: "READY",
    WorkerState.DRAINING: "UNLOADING",
    WorkerState.STOPPING: "UNLOADING",
    WorkerState.EXITED: "UNLOADING",
}
"""What clients of the Management API read for each state; they know these three words only."""


@frozen(order=True, field_transformer=plain_fields)
class ModelKey:
    """The name and version that identify a model version."""

    name: str = field(validator=text("model_name"))
    version: str = field(validator=text("version"))

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"


@frozen(field_transformer=plain_fields)
class Scale:
    """How many workers a version shall have: always at least the one, never more than the other."""

    min_workers: int = field(validator=number("min_worker", 0))
    max_workers: int = field(validator=number("max_worker", 0))

    def __attrs_post_init__(self) -> None:
        if self.max_workers < self.min_workers:
            raise InvalidArgument("max_worker", self.max_workers, f"at least min_worker, which is {self.min_workers}")


BACKENDS = ("process", "thread")


def backend_name(_instance: object, _attribute: Attribute[Any], value: object) -> None:
    """Check, as an attrs validator, that ``value`` names a backend; raise InvalidArgument otherwise."""
    if value not in BACKENDS:
        raise InvalidArgument("backend", value, " or ".join(BACKENDS))


ENVELOPES = ("body", "json", "kserve", "kservev2")
"""In which forms a request may be wrapped before a handler gets it; TorchServe's."""


def envelope_name(_instance: object, _attribute: Attribute[Any], value: object) -> None:
    """Check, as an attrs validator, that ``value`` names an envelope; raise InvalidArgument otherwise."""
    if value not in ENVELOPES:
        raise InvalidArgument("envelope", value, f"one of {', '.join(ENVELOPES)}")


class ShareWeights(Enum):
    """Whether workers are forked from a process that has loaded the model once, and so share its memory."""

    AUTO = "auto"
    """If loading it left nothing behind that forked processes must not share."""
    ALWAYS = "always"
    """Even then; the handler's author vouches for it. A context on an accelerator, which no fork survives, still forbids it."""
    NEVER = "never"
    """Each worker loads the model by itself."""


def share_weights_of(value: object) -> ShareWeights:
    """Return the member that ``value`` is or names, in any case; raise InvalidArgument for anything else."""
    text = value.value if isinstance(value, ShareWeights) else value
    try:
        return ShareWeights(text.lower() if isinstance(text, str) else text)
    except ValueError:
        raise InvalidArgument("share_weights", value, "auto, always or never") from None


class CancelRunning(Enum):
    """What becomes of a batch that a worker runs and for which nobody waits any more."""

    WHEN_NEEDED = "when_needed"
    """Its worker is ended when others have waited for one for longer than a new one takes to start, and at close."""
    NOW = "now"
    """Its worker is ended at once."""
    NEVER = "never"
    """It is run to its end, but at close."""


def cancel_running_of(value: object) -> CancelRunning:
    """Return the member that ``value`` is or names, in any case; raise InvalidArgument for anything else."""
    text = value.value if isinstance(value, CancelRunning) else value
    try:
        return CancelRunning(text.lower() if isinstance(text, str) else text)
    except ValueError:
        raise InvalidArgument("cancel_running", value, "when_needed, now or never") from None


@frozen
class Sharing:
    """Which way a version's workers get their weights, and why."""

    is_shared: bool | None = None
    """True: forked from a template that loaded them once. False: each loads its own. None: not known yet."""
    reason: str = "no worker has been started yet"


@frozen(kw_only=True, field_transformer=plain_fields)
class ModelSpec:
    """All that a worker needs to serve a version, and the limits it was registered with."""

    key: ModelKey
    model_dir: str
    """The folder with the model's files: the working directory of its workers."""
    handler: str = field(validator=text("handler"))
    """``module``, ``module.py``, ``module:function``, or the name of a shipped handler."""
    url: str = ""
    """Where the model came from, as the caller gave it."""
    manifest: Mapping[str, Any] = field(factory=dict)
    """``MAR-INF/MANIFEST.json``, as found; made up for a folder without one."""
    config: Mapping[str, Any] = field(factory=dict)
    """``model-config.yaml``, as found; empty if there is none."""
    runtime: str = "python"
    envelope: str | None = field(default=None, validator=optional(envelope_name))
    """What stands around the handler and unwraps its requests: one of :data:`ENVELOPES`; None: nothing."""
    packages: str | None = None
    """A folder with packages of its own, which its workers import before those of the program; None if it has none."""
    blacklist_env_vars: str | None = None
    """A regular expression: no environment variable whose whole name matches is in its workers. None: all are."""
    batch_size: int = field(default=1, validator=number("batch_size", 1))
    max_batch_delay_ms: int = field(default=100, validator=number("max_batch_delay", 0, "milliseconds"))
    response_timeout_s: float = field(default=120, validator=number("response_timeout", 1e-3, "seconds", whole=False))
    startup_timeout_s: float = field(default=120, validator=number("startup_timeout", 1e-3, "seconds", whole=False))
    max_retry_timeout_s: float = field(default=300, validator=number("max_retry_timeout", 0, "seconds", whole=False))
    job_queue_size: int = field(default=100, validator=number("job_queue_size", 1))
    weights_only: bool = True
    """Whether checkpoints are loaded with ``torch.load(weights_only=True)``, which runs no code found in them."""
    is_sealed: bool = False
    """Whether nobody but its workers rewrites the files in ``model_dir``: they may map them."""
    pristine_dir: str | None = None
    """Where the same files lie in the one copy that all versions of an archive share; None if there is none."""
    loaded_at_startup: bool = False
    client_timeout_ms: int = field(default=0, validator=number("client_timeout", 0, "milliseconds"))
    """How long a request may take in all whose caller sets no limit; 0: no limit."""
    queue_timeout_ms: int = field(default=0, validator=number("queue_timeout", 0, "milliseconds"))
    """How long a request may wait whose caller sets no limit for that; 0: no limit."""
    backend: str = field(default="process", validator=backend_name)
    """How its workers are run: one of :data:`BACKENDS`."""
    share_weights: ShareWeights = field(default=ShareWeights.AUTO, converter=share_weights_of)
    threads_per_worker: int | None = field(default=None, validator=optional(number("threads_per_worker", 1)))
    """Threads that one operation may use (intra-op); None: the cores divided by the most workers."""
    batches_in_flight: int = field(default=4, validator=number("batches_in_flight", 1))
    """The most batches that may be with a worker at once, the one that it computes included."""
    max_requests: int | None = field(default=None, validator=optional(number("max_requests", 1)))
    """A worker that has answered so many requests is replaced; None: no limit."""
    max_memory_bytes: int | None = field(default=None, validator=optional(number("max_memory", 1, "bytes")))
    """A worker that has more private memory is replaced; None: no limit."""
    isolate_errors: bool = field(default=False, validator=truth("isolate_errors"))
    """Whether a batch that raised as a whole is run again, request by request."""
    cancel_running: CancelRunning = field(default=CancelRunning.WHEN_NEEDED, converter=cancel_running_of)
    """What becomes of a batch that a worker runs and for which nobody waits any more."""
    scale_down_delay_s: float = field(default=60, validator=number("scale_down_delay", 0, "seconds", whole=False))
    """For how long a worker above the least number must not have been needed before it goes."""
    template_idle_timeout_s: float = field(
        default=600, validator=number("template_idle_timeout", 0, "seconds", whole=False)
    )
    """For how long there may be no worker before what is kept loaded for the next one is given up."""
    live: LiveObject | None = None
    """What was registered in place of an archive, if it was no archive."""
    is_trusted: bool = False
    """Whether the program registered it itself: then values of its own classes go there and come back with their code."""


@frozen
class WorkerFault:
    """What a worker says of something that its handler, or loading it, raised."""

    error_type: str
    """The qualified name of the exception's class."""
    reason: str
    """One line: the class and the message."""
    traceback: str
    error_code: int | None = None
    out_of_memory: bool = False


EXPIRED = WorkerFault("DeadlineExceeded", "its deadline was over before it was begun, or before it was done", "")
"""What a worker says of a request that it did not begin, or not go on with, because nobody waited for it any more."""


class MetricKind(Enum):
    """How the figures of a metric belong together."""

    COUNTER = "counter"
    """They add up."""
    GAUGE = "gauge"
    """The last one counts."""
    HISTOGRAM = "histogram"
    """Each one counts."""


RawMetric: TypeAlias = tuple[str, str, str, float, tuple[tuple[str, str], ...]]
"""A :class:`MetricRecord` as it travels from a worker: name, value of the kind, unit, figure, dimensions."""


@frozen
class MetricRecord:
    """One figure that a handler has measured, or several that were made one on the way (of a counter, of a gauge)."""

    name: str
    kind: MetricKind
    unit: str
    """As TorchServe calls it: ``Milliseconds``, ``Count``, ...; or what the handler says."""
    value: float
    """Of a counter by how much it grew, of a gauge what it is now, of a histogram one observation."""
    dimensions: Mapping[str, str]

    @classmethod
    def of(cls, raw: RawMetric) -> MetricRecord:
        """Return the record that has travelled as ``raw``."""
        name, kind, unit, value, dimensions = raw
        return cls(name, MetricKind(kind), unit, value, dict(dimensions))


@frozen
class TemplateJob:
    """What a process is told that is to be the template of a version."""

    spec: ModelSpec


@frozen
class WorkerJob:
    """What a process is told that is to be a worker."""

    spec: ModelSpec
    worker_id: str
    threads: int
    """Threads that one operation may use, at least 1."""


@frozen
class WorkerExit:
    """How a worker ended."""

    pid: int
    exitcode: int | None
    """Its exit status, minus the signal's number if one killed it, None if nobody could tell."""
    reason: str
    """That in words, with the likely cause."""
    last_lines: Sequence[str] = ()
    fault: WorkerFault | None = None
    """What it said before it went, if loading its model failed."""
    last_started: int | None = None
    """The number of the last batch that it began, 0 for none; None if nobody can tell, so that all may have begun."""
    is_final: bool = False
    """Whether another worker must not be started in its place: what ended it would end that one, too."""
    is_retryable: bool = False
    """Whether it never came to be because who should fork it had died: that says nothing against another attempt."""


@frozen(kw_only=True)
class WorkerInfo:
    """One worker as ``describe`` shows it."""

    id: str
    state: WorkerState
    start_time: datetime
    """When it was wanted, in UTC."""
    pid: int | None = None
    """None while it has no process yet."""
    memory_bytes: int = 0
    """Proportional set size where the system tells it, else resident set size; 0 until first sampled."""

    def to_dict(self) -> dict[str, Any]:
        """Return the worker as an item of ``workers`` in the Management API."""
        return {
            "id": self.id,
            "startTime": self.start_time.strftime("%Y-%m-%dT%H:%M:%S.") + f"{self.start_time.microsecond // 1000:03d}Z",
            "status": WIRE_STATUS[self.state],
            "memoryUsage": self.memory_bytes,
            "pid": self.pid if self.pid is not None else 0,
            "gpu": False,
            "gpuUsage": "N/A",
        }


@frozen(kw_only=True)
class ModelInfo:
    """A model version at one moment, as ``describe`` shows it."""

    spec: ModelSpec
    state: VersionState
    is_default: bool
    scale: Scale
    workers: Sequence[WorkerInfo] = ()
    queue_capacity: int = 0
    queue_length: int = 0
    sharing: Sharing = field(factory=Sharing)
    last_error: str = ""
    """Why a worker failed last: its reason, traceback and last lines; empty if none did since it last was well."""
    customized_metadata: Any = None

    @property
    def name(self) -> str:
        """The model's name."""
        return self.spec.key.name

    @property
    def version(self) -> str:
        """The version's name."""
        return self.spec.key.version

    def to_dict(self) -> dict[str, Any]:
        """Return the version as an item of the Management API's describe: TorchServe's keys, then ours."""
        spec = self.spec
        item: dict[str, Any] = {
            "modelName": self.name,
            "modelVersion": self.version,
            "modelUrl": spec.url,
            "engine": "Torch",
            "runtime": spec.runtime,
            "minWorkers": self.scale.min_workers,
            "maxWorkers": self.scale.max_workers,
            "batchSize": spec.batch_size,
            "maxBatchDelay": spec.max_batch_delay_ms,
            "responseTimeout": _plain(spec.response_timeout_s),
            "startupTimeout": _plain(spec.startup_timeout_s),
            "maxRetryTimeoutInSec": _plain(spec.max_retry_timeout_s),
            "clientTimeoutInMills": spec.client_timeout_ms,
            "parallelType": "",
            "parallelLevel": 0,
            "deviceType": "cpu",
            "continuousBatching": False,
            "useJobTicket": False,
            "useVenv": spec.packages is not None,
            "stateful": False,
            "sequenceMaxIdleMSec": 0,
            "sequenceTimeoutMSec": 0,
            "maxNumSequence": 0,
            "maxSequenceJobQueueSize": 0,
            "loadedAtStartup": spec.loaded_at_startup,
            "workers": [worker.to_dict() for worker in self.workers],
            "jobQueueStatus": {
                "remainingCapacity": max(0, self.queue_capacity - self.queue_length),
                "pendingRequests": self.queue_length,
            },
            "state": self.state.value,
            "defaultVersion": self.is_default,
            "queueTimeoutInMills": spec.queue_timeout_ms,
            "shareWeights": spec.share_weights.value,
            "weightsShared": self.sharing.is_shared,
            "weightsSharedReason": self.sharing.reason,
        }
        if self.last_error:
            item["lastError"] = self.last_error
        if self.customized_metadata is not None:
            item["customizedMetadata"] = self.customized_metadata
        return item


@frozen
class CloseReport:
    """What closing did: whether all ended by itself in time, and what had to be done where it did not."""

    seconds: float
    stopped_workers: int = 0
    """Worker processes that ended, in whatever way."""
    killed_pids: Sequence[int] = ()
    """Worker processes that were sent SIGKILL because they did not end when told to."""
    failed_requests: int = 0
    """Accepted requests that were answered with an error because the time was over."""

    @property
    def clean(self) -> bool:
        """True if nothing was killed and no accepted request failed."""
        return not self.killed_pids and not self.failed_requests


def _plain(seconds: float) -> float:
    """Write whole seconds without a fraction: strict clients parse an int."""
    return int(seconds) if float(seconds).is_integer() else seconds
