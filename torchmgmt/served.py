"""One model version as a manager serves it: its files, its queue and its workers together."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen

from torchmgmt.announcer import Announcer
from torchmgmt.backends import Backend
from torchmgmt.batch import Promise
from torchmgmt.batcher import Batcher
from torchmgmt.checks import check_number
from torchmgmt.errors import DeadlineExceeded, ModelNotFound, TorchmgmtError
from torchmgmt.exchange import Encoded, WorkerRequest
from torchmgmt.lifecycle import VersionState
from torchmgmt.pool import WorkerPool
from torchmgmt.records import CloseReport, ModelInfo, ModelSpec

if TYPE_CHECKING:
    from torchmgmt.archive import ModelFolder

__all__ = ["ServedVersion", "close_all", "new_served", "total_of"]

# So often, in s, who waits for a version to finish looks whether there is less time for that now.
_ASKED_EACH_S = 0.1


@frozen(eq=False)
class ServedVersion:
    """What serves one model version: its files, its queue and its workers."""

    spec: ModelSpec
    folder: ModelFolder
    batcher: Batcher[WorkerRequest, Encoded]
    pool: WorkerPool
    on_cancelled: Callable[[], object]
    """Told of each request that its caller takes back. On the dispatcher's thread."""

    @property
    def is_wanted(self) -> bool:
        """Whether it shall have workers at all times, or has failed."""
        return self.pool.wanted.min_workers > 0 or self.pool.state is VersionState.FAILED

    def submit(
        self,
        request: WorkerRequest,
        promise: Promise[Encoded],
        timeout: float | None,
        wait_timeout: float | None,
        priority: int,
        *,
        is_urgent: bool = False,
    ) -> None:
        """Queue a request whose answer goes to ``promise``; see :meth:`torchmgmt.ModelManager.submit`. Does not block."""
        spec = self.spec
        if timeout is None and spec.client_timeout_ms:
            timeout = spec.client_timeout_ms / 1000
        if wait_timeout is None and spec.queue_timeout_ms:
            wait_timeout = spec.queue_timeout_ms / 1000
        if timeout is not None:
            check_number("timeout", timeout, minimum=0, unit="seconds", whole=False)
            request.deadline, request.limit_s = time.monotonic() + timeout, timeout
        self.pool.check_serving()
        self.batcher.queue(request, promise, timeout, wait_timeout, priority, is_urgent=is_urgent)

    def refuse(self) -> None:
        """Take no new request; what was accepted is still run."""
        self.batcher.drain(ModelNotFound(self.spec.key.name))
        self.pool.retire()

    def close(self, timeout: float) -> CloseReport:
        """Finish what was accepted within ``timeout`` seconds, then leave nothing behind."""
        until = time.monotonic() + timeout
        return close_all([self], lambda: max(0.0, until - time.monotonic()))[0]

    def customized_metadata(self) -> Any:
        """Return what the handler says of its model, within the time that a batch may take."""
        limit = self.spec.response_timeout_s
        future = self.pool.describe()
        try:
            return future.result(limit)
        except concurrent.futures.TimeoutError as error:
            # Raised by the wait; before Python 3.11 it is no TimeoutError. The worker's own errors are of our tree.
            if isinstance(error, TorchmgmtError):
                raise
            raise DeadlineExceeded(f"Asking the handler of {self.spec.key} to describe its model", limit) from None
        finally:
            future.abandon()  # unless it has ended

    def info(self, *, is_default: bool, metadata: object = None) -> ModelInfo:
        """Return what ``describe`` shows of it. Does not block."""
        pool = self.pool
        return ModelInfo(
            spec=self.spec,
            state=pool.state,
            is_default=is_default,
            scale=pool.wanted,
            workers=pool.info(),
            queue_capacity=self.spec.job_queue_size,
            queue_length=len(self.batcher),
            sharing=pool.sharing,
            last_error=str(pool.last_error or ""),
            customized_metadata=metadata,
        )


def new_served(
    spec: ModelSpec, folder: ModelFolder, *, backend: Backend, worker_ids: Iterator[int], announcer: Announcer
) -> ServedVersion:
    """Return what can serve a version, with no worker yet: it starts nothing."""
    key = spec.key

    def on_expired(count: int) -> None:
        announcer.tell_dropped(key, DeadlineExceeded.__name__, count)
        pool.abandon_unwanted()  # nobody waits any more for those that run

    pool = WorkerPool(
        spec,
        backend=backend,
        worker_ids=worker_ids,
        listener=announcer,
    )
    batcher: Batcher[WorkerRequest, Encoded] = Batcher(
        batch_size=spec.batch_size,
        max_batch_delay=spec.max_batch_delay_ms,
        capacity=spec.job_queue_size,
        name=f"model {key.name} version {key.version}",
        on_ready=pool.pump,
        dispatcher=backend.dispatcher,
        on_expired=on_expired,
    )
    pool.feed_from(batcher, batcher)
    return ServedVersion(spec, folder, batcher, pool, functools.partial(announcer.tell_dropped, key, "Cancelled"))


def close_all(versions: Sequence[ServedVersion], remaining_s: Callable[[], float]) -> list[CloseReport]:
    """Finish what was accepted in the time that remains, then leave nothing behind; return what each took.

    Each phase for all of them before the next one: their workers finish and end side by side. ``remaining_s`` is asked again
    and again: somebody may have less time by then.
    """
    started = time.monotonic()
    with contextlib.ExitStack() as at_end:
        for version in versions:
            at_end.callback(version.folder.release)
            version.refuse()
        for version in versions:
            while not version.pool.wait_quiet(min(_ASKED_EACH_S, remaining_s())) and remaining_s() > 0:
                pass
        for version in versions:
            version.pool.end(time.monotonic() + remaining_s())
        return [version.pool.join(started) for version in versions]


def total_of(seconds: float, reports: Sequence[CloseReport]) -> CloseReport:
    """Return what closing several came to, which took ``seconds`` in all."""
    return CloseReport(
        seconds,
        sum(report.stopped_workers for report in reports),
        tuple(pid for report in reports for pid in report.killed_pids),
        sum(report.failed_requests for report in reports),
    )
