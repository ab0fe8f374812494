"""Everything that torchmgmt raises on purpose.

One tree under :class:`TorchmgmtError`. Each class carries the facts as fields and makes its text from them, so that a
caller can decide by type and field while a person reads what happened, what was got and what to do. Nothing here knows
of HTTP: the codes are one table in ``torchmgmt.http``. They survive pickling where the values they carry do.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

from attrs import define

__all__ = [
    "AlreadyRegistered",
    "DeadlineExceeded",
    "DefaultVersionInUse",
    "DownloadFailed",
    "HandlerFailed",
    "InvalidArchive",
    "InvalidArgument",
    "InvalidSetting",
    "InvalidStateFile",
    "ManagerClosed",
    "ModelNotFound",
    "ModelVersionNotFound",
    "NoWorker",
    "QueueFull",
    "ReaderTooSlow",
    "SourceNotAllowed",
    "SourceNotFound",
    "StateFileInUse",
    "TorchmgmtError",
    "WorkerDied",
    "WorkerStartFailed",
    "WouldWaitForever",
    "WrongNumberOfAnswers",
]

E = TypeVar("E", bound=BaseException)

# attrs fills ``args`` of an exception from its fields, which is what makes these picklable.


class TorchmgmtError(Exception):
    """The root of everything that torchmgmt raises on purpose."""


@define(slots=False, eq=False, repr=False)
class InvalidArgument(TorchmgmtError, ValueError):
    """An argument has the wrong type or lies outside its range."""

    argument: str
    given: object
    allowed: str

    def __str__(self) -> str:
        return f"{self.argument} is {_shorten(repr(self.given))}, but must be {self.allowed}"


@define(slots=False, eq=False, repr=False)
class InvalidSetting(InvalidArgument):
    """A setting in a file or in the environment is wrong; ``source`` says where it stands."""

    source: str

    def __str__(self) -> str:
        return f"{self.source}: {super().__str__()}"


@define(slots=False, eq=False, repr=False)
class ModelNotFound(TorchmgmtError, LookupError):
    """No model of this name is registered."""

    name: str

    def __str__(self) -> str:
        return f"Model not found: {self.name}"


@define(slots=False, eq=False, repr=False)
class ModelVersionNotFound(TorchmgmtError, LookupError):
    """The model is registered, but not in this version."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"Model version: {self.version} does not exist for model: {self.name}"


@define(slots=False, eq=False, repr=False)
class AlreadyRegistered(TorchmgmtError):
    """This version of the model is registered already, or is being registered by another caller."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"Model version {self.version} is already registered for model {self.name}"


@define(slots=False, eq=False, repr=False)
class DefaultVersionInUse(TorchmgmtError):
    """The default version cannot be removed while other versions exist; make another one the default first."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"Cannot remove default version for model {self.name}"


@define(slots=False, eq=False, repr=False)
class SourceNotFound(ModelNotFound):
    """Nothing is at the place that a model should be registered from. ``name`` is that place, as given."""

    detail: str = ""

    def __str__(self) -> str:
        return f"Model not found at: {self.name}" + (f" ({self.detail})" if self.detail else "")


@define(slots=False, eq=False, repr=False)
class SourceNotAllowed(TorchmgmtError):
    """The place exists or may exist, but models must not be registered from there."""

    url: str
    reason: str

    def __str__(self) -> str:
        return self.reason


@define(slots=False, eq=False, repr=False)
class DownloadFailed(TorchmgmtError):
    """An archive could not be fetched."""

    url: str
    reason: str

    def __str__(self) -> str:
        return f"Failed to download archive from: {self.url}: {self.reason}"


@define(slots=False, eq=False, repr=False)
class InvalidArchive(TorchmgmtError):
    """An archive or model folder is corrupt, hostile or incomplete."""

    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source} is not a usable model archive: {self.reason}"


@define(slots=False, eq=False, repr=False)
class WorkerStartFailed(TorchmgmtError):
    """No worker of a version could be started.

    ``reason`` is one line; ``traceback`` is the worker's own (empty if it had none), ``last_lines`` what it printed last.
    ``pid`` is the process that was to load the model (0 if there was none); ``exitcode`` is as in :class:`WorkerDied`.
    """

    name: str
    version: str
    reason: str
    traceback: str = ""
    last_lines: Sequence[str] = ()
    out_of_memory: bool = False
    pid: int = 0
    exitcode: int | None = None

    def __str__(self) -> str:
        head = f"Failed to start workers for model {self.name} version: {self.version}"
        return _with_evidence(f"{head}: {self.reason}", self.traceback, self.last_lines)


@define(slots=False, eq=False, repr=False)
class WorkerDied(TorchmgmtError):
    """The worker process that ran the request ended before it answered.

    ``exitcode`` is its exit status, or minus the signal's number as in :mod:`subprocess`; None when nobody could tell.
    """

    name: str
    version: str
    pid: int
    exitcode: int | None
    reason: str
    last_lines: Sequence[str] = ()

    def __str__(self) -> str:
        head = f"Worker {self.pid} of model {self.name} version {self.version} died: {self.reason}"
        return _with_evidence(head, "", self.last_lines)


class WorkerTraceback(Exception):
    """What was raised in a worker, as the text of its traceback there: the cause of the error that a caller gets.

    So that a traceback of the program goes on where the worker's begins, as of :mod:`concurrent.futures`.
    """

    def __init__(self, traceback: str) -> None:
        super().__init__(traceback)
        self.traceback = traceback

    def __str__(self) -> str:
        return f'\n"""\n{self.traceback.rstrip()}\n"""'


@define(slots=False, eq=False, repr=False)
class HandlerFailed(TorchmgmtError):
    """The handler raised, or answered with something that cannot be an answer.

    ``error_type`` is the qualified name of what it raised, ``error_code`` the code it asked for (``PredictionException``
    carries one), ``out_of_memory`` whether it ran out of memory, on the host or on an accelerator; any "CUDA error" counts as
    that, as for TorchServe: a GPU that is nearly full fails in many ways that are called only this.
    """

    name: str
    version: str
    reason: str
    error_type: str = ""
    error_code: int | None = None
    out_of_memory: bool = False
    traceback: str = ""
    last_lines: Sequence[str] = ()

    def __str__(self) -> str:
        return f"Model {self.name} version {self.version} failed: {self.reason}"

    def report(self) -> str:
        """Return all that is known: the text, the traceback and the worker's last lines."""
        return _with_evidence(str(self), self.traceback, self.last_lines)


@define(slots=False, eq=False, repr=False)
class ReaderTooSlow(TorchmgmtError):
    """The parts of an answer came so much faster than they were read that too many waited."""

    waiting_bytes: int
    limit_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.waiting_bytes} bytes of parts of an answer wait to be read, more than {self.limit_bytes}; the request was"
            " given up: read faster, or have the handler send less"
        )


@define(slots=False, eq=False, repr=False)
class WrongNumberOfAnswers(TorchmgmtError):
    """A batch was answered with more or fewer answers than it has requests, so nobody could tell whose is whose."""

    expected: int
    got: int

    def __str__(self) -> str:
        return f"a batch of {self.expected} was answered with {self.got} answers; there must be one for each, in order"


@define(slots=False, eq=False, repr=False)
class NoWorker(TorchmgmtError):
    """The version has no worker and will get none by itself: it is scaled to zero, or its workers failed to start."""

    name: str
    version: str
    reason: str

    def __str__(self) -> str:
        return f"No worker is available to serve model {self.name} version {self.version}: {self.reason}"


@define(slots=False, eq=False, repr=False)
class QueueFull(TorchmgmtError):
    """As many requests wait as the queue may hold; try again after about ``retry_after_s`` seconds."""

    queue: str
    capacity: int
    retry_after_s: float

    def __str__(self) -> str:
        return (
            f"The queue of {self.queue} is full: {self.capacity} requests wait already;"
            f" try again in {self.retry_after_s:g} s, or raise job_queue_size"
        )


@define(slots=False, eq=False, repr=False)
class DeadlineExceeded(TorchmgmtError, TimeoutError):
    """What was asked for did not end in the time it was given."""

    what: str
    limit_s: float

    def __str__(self) -> str:
        return f"{self.what} did not end within {self.limit_s:g} s"


@define(slots=False, eq=False, repr=False)
class ManagerClosed(TorchmgmtError):
    """The object was closed, or belongs to the process that this one was forked from."""

    what: str = "This ModelManager"
    why: str = "is closed"

    def __str__(self) -> str:
        return f"{self.what} {self.why}"


@define(slots=False, eq=False, repr=False)
class InvalidStateFile(TorchmgmtError):
    """What a state file holds cannot be understood; it is left as it is, and nothing is restored from it."""

    path: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.path} cannot be restored: {self.reason}; it is left untouched: put it right, move it away to begin"
            " without it, or name another state file"
        )


@define(slots=False, eq=False, repr=False)
class StateFileInUse(TorchmgmtError):
    """Another manager keeps its state in this file. ``pid`` is its process, 0 if that could not be read."""

    path: str
    pid: int = 0

    def __str__(self) -> str:
        holder = f"process {self.pid}" if self.pid else "another process"
        return f"The state file {self.path} is in use by {holder}; close that one, or name another state file"


@define(slots=False, eq=False, repr=False)
class WouldWaitForever(TorchmgmtError):
    """A call that waits for a worker was made on the thread that hears from the workers: it would never end.

    Callbacks of futures run on that thread, and most calls of listeners do.
    """

    call: str

    def __str__(self) -> str:
        return (
            f"{self.call} waits for a worker, but was called on the thread that hears from the workers (in a future's"
            " callback, or in a listener); use submit and synchronous=False there, or another thread"
        )


def copy_of(error: E) -> E:
    """Return an error like ``error``, for one more who is to be told: each raise adds the frames of who raises it.

    What cannot be copied is returned itself.
    """
    try:
        copied = copy.copy(error)
    except Exception:  # whatever the __init__ of somebody's error asks for
        return error
    if type(copied) is not type(error):
        return error
    copied.__cause__ = error.__cause__
    return copied.with_traceback(error.__traceback__)


def _with_evidence(head: str, traceback: str, last_lines: Sequence[str]) -> str:
    parts = [head]
    if traceback:
        parts.append(traceback.rstrip())
    if last_lines:
        parts.append("Its last lines:\n" + "\n".join(last_lines))
    return "\n".join(parts)


def _shorten(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
