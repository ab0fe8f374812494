"""Model: one registered version, as whoever registered it holds it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torchmgmt.checks import check_number
from torchmgmt.errors import InvalidArgument, ManagerClosed, QueueFull
from torchmgmt.lifecycle import VersionState
from torchmgmt.records import CloseReport, ModelInfo, ModelKey

if TYPE_CHECKING:
    from torchmgmt.answer_future import AnswerFuture
    from torchmgmt.manager import ModelManager
    from torchmgmt.streams import AnswerStream

__all__ = ["Model"]


class Model:
    """One version of a registered model: what :meth:`ModelManager.register` returns. Thread-safe.

    It keeps its manager alive. As a context manager it is unregistered at the end of the block. Every method raises
    ModelNotFound or ModelVersionNotFound once the version is unregistered.
    """

    def __init__(self, manager: ModelManager, key: ModelKey) -> None:
        self._manager = manager
        self._key = key

    def __repr__(self) -> str:
        return f"<Model {self._key}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Model) and (self._manager, self._key) == (other._manager, other._key)

    def __hash__(self) -> int:
        return hash(self._key)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.unregister()

    @property
    def name(self) -> str:
        """The model's name."""
        return self._key.name

    @property
    def version(self) -> str:
        """The version's name."""
        return self._key.version

    @property
    def manager(self) -> ModelManager:
        """The manager that it is registered with."""
        return self._manager

    @property
    def state(self) -> VersionState:
        """Where it stands. GONE once it is unregistered; does not raise then."""
        try:
            return self.describe().state
        except (LookupError, ManagerClosed):
            return VersionState.GONE

    def predict(
        self,
        data: object = None,
        *,
        fields: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        wait_timeout: float | None = None,
        priority: int = 0,
    ) -> Any:
        """Run one request on this version; see :meth:`ModelManager.predict`."""
        return self._manager.predict(
            self.name,
            data,
            fields=fields,
            version=self.version,
            headers=headers,
            timeout=timeout,
            wait_timeout=wait_timeout,
            priority=priority,
        )

    async def apredict(
        self,
        data: object = None,
        *,
        fields: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        wait_timeout: float | None = None,
        priority: int = 0,
    ) -> Any:
        """Run one request on this version without blocking the event loop; see :meth:`ModelManager.apredict`."""
        return await self._manager.apredict(
            self.name,
            data,
            fields=fields,
            version=self.version,
            headers=headers,
            timeout=timeout,
            wait_timeout=wait_timeout,
            priority=priority,
        )

    def submit(
        self,
        data: object = None,
        *,
        fields: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        wait_timeout: float | None = None,
        priority: int = 0,
        request_id: str | None = None,
    ) -> AnswerFuture:
        """Queue one request for this version; see :meth:`ModelManager.submit`."""
        return self._manager.submit(
            self.name,
            data,
            fields=fields,
            version=self.version,
            headers=headers,
            timeout=timeout,
            wait_timeout=wait_timeout,
            priority=priority,
            request_id=request_id,
        )

    def stream(
        self,
        data: object = None,
        *,
        fields: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        wait_timeout: float | None = None,
        priority: int = 0,
        request_id: str | None = None,
    ) -> AnswerStream:
        """Give the parts of the answer to one request as they come; see :meth:`ModelManager.stream`."""
        return self._manager.stream(
            self.name,
            data,
            fields=fields,
            version=self.version,
            headers=headers,
            timeout=timeout,
            wait_timeout=wait_timeout,
            priority=priority,
            request_id=request_id,
        )

    def map(self, items: Iterable[object], *, timeout: float | None = None) -> Iterator[Any]:
        """Run a request for each item and give the answers in the order of the items, as they come.

        Several requests are under way at once, but never so many that they fill the queue; ``items`` may be endless.
        ``timeout`` is that of each request, in seconds. Raises InvalidArgument at once for what is no iterable or no
        timeout, and what :meth:`predict` raises at the item's turn.
        """
        if timeout is not None:
            check_number("timeout", timeout, minimum=0, unit="seconds", whole=False)
        if not isinstance(items, Iterable):
            raise InvalidArgument("items", items, "an iterable of what predict takes")
        return self._map(items, timeout)

    def _map(self, items: Iterable[object], timeout: float | None) -> Iterator[Any]:
        waiting: deque[AnswerFuture] = deque()
        window = self._window()
        try:
            for item in items:
                if len(waiting) >= window:
                    yield _answer_of_first(waiting)
                while (future := self._submit_if_room(item, timeout, must=not waiting)) is None:
                    yield _answer_of_first(waiting)
                waiting.append(future)
            while waiting:
                yield _answer_of_first(waiting)
        finally:
            for future in waiting:
                future.abandon()  # whoever iterated was interrupted, or has left

    def scale(
        self, min_worker: int = 1, max_worker: int | None = None, *, synchronous: bool = True, timeout: float = -1
    ) -> ModelInfo:
        """Set how many workers it has; see :meth:`ModelManager.scale`."""
        return self._manager.scale(
            self.name, min_worker, max_worker, version=self.version, synchronous=synchronous, timeout=timeout
        )

    def describe(self, *, customized: bool = False) -> ModelInfo:
        """Return what is known of it; see :meth:`ModelManager.describe`."""
        return self._manager.describe(self.name, self.version, customized=customized)

    def wait_ready(self, timeout: float | None = None) -> None:
        """Block until as many workers as wanted are ready; at most ``timeout`` seconds.

        Raises:
            WorkerStartFailed: a worker could not be started meanwhile.
            DeadlineExceeded: the time was over.
        """
        self._manager.wait_ready(self.name, self.version, timeout=timeout)

    def unregister(self, *, timeout: float | None = None) -> CloseReport:
        """Remove it; see :meth:`ModelManager.unregister`."""
        return self._manager.unregister(self.name, self.version, timeout=timeout)

    def _window(self) -> int:
        """How many requests keep all workers busy and the next batches ready, within half of the queue."""
        info = self.describe()
        busy = 2 * info.spec.batch_size * max(1, info.scale.max_workers)
        return max(1, min(busy, info.queue_capacity // 2))

    def _submit_if_room(self, item: object, timeout: float | None, *, must: bool) -> AnswerFuture | None:
        try:
            return self.submit(item, timeout=timeout)
        except QueueFull:
            if must:
                raise
            return None


def _answer_of_first(waiting: deque[AnswerFuture]) -> Any:
    """Return the first answer once it is there. Until then the future stays where it is found by who is interrupted."""
    answer = waiting[0].result()
    waiting.popleft()
    return answer
