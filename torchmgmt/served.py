"""What stands behind a registered version: its files, its queue and its workers, or why there are none."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from typing import Any, TypeAlias

import attrs
from attrs import define, field

from torchmgmt.archive import ModelFolder
from torchmgmt.batcher import Batcher
from torchmgmt.channel import AnswerFuture
from torchmgmt.errors import (
    DeadlineExceeded,
    ManagerClosed,
    ModelNotFound,
    NoWorker,
    TorchmgmtError,
    WorkerStartFailed,
)
from torchmgmt.lifecycle import VersionState
from torchmgmt.pool import WorkerPool
from torchmgmt.records import CloseReport, Encoded, ModelInfo, ModelKey, ModelSpec, Scale, WorkerRequest, check_number
from torchmgmt.state import StoredVersion

__all__ = ["AbsentVersion", "ServedVersion", "Version"]


@define(eq=False)
class ServedVersion:
    """A version that is served: its files, its queue and its workers. Thread-safe."""

    spec: ModelSpec
    folder: ModelFolder
    batcher: Batcher[WorkerRequest, Encoded]
    pool: WorkerPool
    stored: StoredVersion
    """How it is to be registered again, but for the numbers of workers, which the pool knows."""
    is_kept: bool
    """Whether it belongs to the desired state: not before its registration is known to succeed. Guarded by the catalog."""
    # Reentrant, since listeners are called while it is held, and may scale.
    _scaling: threading.RLock = field(factory=threading.RLock, init=False)
    _was_scaled: bool = field(default=False, init=False)

    @property
    def key(self) -> ModelKey:
        """Its name and version."""
        return self.spec.key

    def desired(self) -> StoredVersion:
        """Return what is to be stored of it now."""
        return attrs.evolve(self.stored, scale=self.pool.wanted)

    def info(self, *, is_default: bool, metadata: object = None) -> ModelInfo:
        """Return what ``describe`` shows of it."""
        return ModelInfo(
            spec=self.spec,
            state=self.pool.state,
            is_default=is_default,
            scale=self.pool.wanted,
            workers=self.pool.info(),
            queue_capacity=self.spec.job_queue_size,
            queue_length=len(self.batcher),
            sharing=self.pool.sharing,
            last_error=str(self.pool.last_error or ""),
            customized_metadata=metadata,
        )

    def customized(self) -> Any:
        """Return what the handler says of its model, within the time that a batch may take."""
        limit = self.spec.response_timeout_s
        future = self.pool.describe()
        try:
            return future.result(limit)
        except concurrent.futures.TimeoutError as error:
            # Raised by the wait; before Python 3.11 it is no TimeoutError. The worker's own errors are of our tree.
            if isinstance(error, TorchmgmtError):
                raise
            future.cancel()
            raise DeadlineExceeded(f"Asking the handler of {self.key} to describe its model", limit) from None

    def submit(self, request: WorkerRequest, timeout: float | None, future: AnswerFuture) -> None:
        """Queue a request; raises what the pool and the batcher raise."""
        self.pool.check_serving()
        self.batcher.submit(request, timeout=timeout, future=future)

    def start(self, scale: Scale) -> None:
        """Give it its first workers, unless somebody has scaled it since it can be found."""
        with self._scaling:
            if not self._was_scaled and scale.max_workers:
                self.pool.scale(scale)

    def scale(self, wanted: Scale, timeout: float) -> None:
        """Set how many workers it shall have, as :meth:`WorkerPool.scale` does."""
        with self._scaling:
            self._was_scaled = True
            self.pool.scale(wanted, timeout=timeout)

    def wait_ready(self, timeout: float | None = None) -> None:
        """Block until its workers are ready, as :meth:`WorkerPool.wait_ready` does."""
        self.pool.wait_ready(timeout)

    def refuse(self) -> None:
        """Take no new request; what was accepted is still run."""
        self.batcher.drain(ModelNotFound(self.key.name))
        self.pool.retire()

    def wait_quiet(self, timeout: float) -> None:
        """Block until what was accepted is finished; at most ``timeout`` seconds."""
        self.pool.wait_quiet(timeout)

    def end(self, deadline: float) -> None:
        """Tell all workers to end by ``deadline`` (monotonic, s). Does not block."""
        self.pool.end(deadline)

    def join(self, started: float) -> CloseReport:
        """Block until no worker is left; return what closing, begun at ``started``, has done."""
        return self.pool.join(started)

    def release(self) -> None:
        """Give its files back."""
        self.folder.release()

    def close(self, timeout: float) -> CloseReport:
        """Finish what was accepted within ``timeout`` seconds, then leave nothing behind."""
        self.batcher.drain(ModelNotFound(self.key.name))
        try:
            return self.pool.close(timeout)
        finally:
            self.folder.release()


class AbsentVersion:
    """A version that is stored, but not served (yet): its turn has not come, or its source could not be opened.

    It is described, scaled, made the default and unregistered as any other; requests for it fail. Thread-safe.
    """

    is_kept = True

    def __init__(self, spec: ModelSpec, stored: StoredVersion) -> None:
        self.spec = spec
        self._changed = threading.Condition()
        # guarded by _changed
        self._stored = stored
        self._is_tried = False
        self._reason = ""
        self._is_gone = False
        self._successor: ServedVersion | None = None

    @property
    def key(self) -> ModelKey:
        """Its name and version."""
        return self.spec.key

    @property
    def stored(self) -> StoredVersion:
        """How it is to be registered again."""
        return self._stored

    def begin(self) -> bool:
        """Claim to try it, until :meth:`give_way` or :meth:`fail`; False if another thread does, or it is over."""
        with self._changed:
            if self._is_tried or self._is_gone or self._successor is not None:
                return False
            self._is_tried, self._reason = True, ""
            return True

    def fail(self, reason: str) -> None:
        """Say why it could not be brought back; it may be tried again."""
        with self._changed:
            self._is_tried, self._reason = False, reason
            self._changed.notify_all()

    def give_way(self, successor: ServedVersion) -> None:
        """Hand on to what serves the version from now on."""
        with self._changed:
            self._successor = successor
            self._changed.notify_all()

    def desired(self) -> StoredVersion:
        """Return what is to be stored of it."""
        return self._stored

    def info(self, *, is_default: bool, metadata: object = None) -> ModelInfo:
        """Return what ``describe`` shows of it."""
        return ModelInfo(
            spec=self.spec,
            state=VersionState.FAILED if self._reason else VersionState.LOADING,
            is_default=is_default,
            scale=self._stored.scale,
            queue_capacity=self.spec.job_queue_size,
            last_error=self._reason,
            customized_metadata=metadata,
        )

    def customized(self) -> Any:
        """Raise NoWorker."""
        raise self._no_worker()

    def submit(self, request: WorkerRequest, timeout: float | None, future: AnswerFuture) -> None:
        """Raise NoWorker."""
        raise self._no_worker()

    def scale(self, wanted: Scale, timeout: float) -> None:
        """Set how many workers it shall have once it is served."""
        check_number("timeout", timeout, minimum=-1, unit="seconds (-1: no limit)", whole=False)
        with self._changed:
            successor = self._successor
            self._stored = attrs.evolve(self._stored, scale=wanted)
        if successor is not None:
            successor.scale(wanted, timeout)

    def wait_ready(self, timeout: float | None = None) -> None:
        """Block until it is served with the workers that it shall have; at most ``timeout`` seconds.

        Raises:
            WorkerStartFailed: it could not be brought back, or no worker could be started.
            DeadlineExceeded: the time was over.
            ManagerClosed: it was unregistered, or the manager closed.
        """
        begun = time.monotonic()
        with self._changed:
            if not self._changed.wait_for(self._is_settled, timeout):
                raise DeadlineExceeded(f"Restoring {self.key}", timeout or 0)
            successor, reason = self._successor, self._reason
        if successor is not None:
            successor.wait_ready(None if timeout is None else max(0.0, begun + timeout - time.monotonic()))
        elif reason:
            raise WorkerStartFailed(self.key.name, self.key.version, reason)
        else:
            raise ManagerClosed("The model version")

    def refuse(self) -> None:
        """End what waits for it, and every later attempt to bring it back."""
        with self._changed:
            self._is_gone = True
            self._changed.notify_all()

    def wait_quiet(self, timeout: float) -> None:
        """Do nothing: it runs nothing."""

    def end(self, deadline: float) -> None:
        """Do nothing: it has no workers."""

    def join(self, started: float) -> CloseReport:
        """Return that there was nothing to end."""
        return CloseReport(time.monotonic() - started)

    def release(self) -> None:
        """Do nothing: it has no files."""

    def close(self, timeout: float) -> CloseReport:
        """Leave nothing behind: end what waits for it."""
        self.refuse()
        return CloseReport(0.0)

    def _is_settled(self) -> bool:
        return self._is_gone or bool(self._reason) or self._successor is not None

    def _no_worker(self) -> NoWorker:
        why = f"it could not be restored: {self._reason}" if self._reason else "it has not been restored yet"
        return NoWorker(self.key.name, self.key.version, why)


Version: TypeAlias = ServedVersion | AbsentVersion
