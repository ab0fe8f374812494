"""Takes the requests that callers make of a manager's models: names them, has them traced, queues them."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torchmgmt.announcer import Announcer
from torchmgmt.answer_future import AnswerFuture
from torchmgmt.catalogue import Catalogue
from torchmgmt.errors import InvalidArgument, ManagerClosed, ModelNotFound, NoWorker, QueueFull, TorchmgmtError
from torchmgmt.exchange import WorkerRequest
from torchmgmt.request import new_request
from torchmgmt.served import ServedVersion
from torchmgmt.streams import AnswerStream

if TYPE_CHECKING:
    from torchmgmt.tracing import Tracing

__all__ = ["Intake", "tracing_for"]

P = TypeVar("P", AnswerFuture, AnswerStream)


class Intake:
    """Queues requests with the versions that they are for. Thread-safe; nothing blocks.

    Args:
        catalogue: where the versions are.
        announcer: told of requests that were not accepted.
        tracing: makes their spans; None: nobody does.
    """

    def __init__(self, catalogue: Catalogue, announcer: Announcer, tracing: Tracing | None) -> None:
        self.tracing = tracing
        self._catalogue = catalogue
        self._announcer = announcer
        # 32 hexadecimal digits that no other request of this or another manager has: its own, and a number.
        self._prefix = os.urandom(8).hex()
        self._numbers = itertools.count()

    def request(
        self,
        data: object,
        fields: Mapping[str, Any] | None,
        headers: Mapping[str, str] | None,
        request_id: str | None = None,
    ) -> WorkerRequest:
        """Return a request as :func:`torchmgmt.request.new_request` does, with an id of its own unless one is given."""
        if request_id is None:
            request_id = f"{self._prefix}{next(self._numbers):016x}"
        return new_request(data, fields, headers, request_id)

    def submit(
        self,
        kind: type[P],
        owner: object,
        name: str,
        version: str | None,
        request: WorkerRequest,
        timeout: float | None,
        wait_timeout: float | None,
        priority: int,
        *,
        is_urgent: bool = False,
    ) -> P:
        """Queue a request and return the future, or the stream, of its answer; see :meth:`torchmgmt.ModelManager.submit`.

        It keeps ``owner`` alive: a caller may hold nothing else.
        """
        served = self._catalogue.get(name, version)
        if request.code and not served.spec.is_trusted:
            allowed = (
                f"made of what workers find by its name: {served.spec.key} was not registered by this program itself, and is"
                " given no code of it"
            )
            raise InvalidArgument("data", request.code, allowed)
        promise = kind(served.spec.key, owner, served.pool.abandon_unwanted, served.on_cancelled)
        if isinstance(promise, AnswerStream):
            request.on_part = promise.take_part
        try:
            if self.tracing is not None:
                self.tracing.begin(served.spec.key, request, promise)
            served.submit(request, promise, timeout, wait_timeout, priority, is_urgent=is_urgent)
        except TorchmgmtError as error:
            self._note_refused(served, request, error)
            if isinstance(error, (ManagerClosed, ModelNotFound)):
                raise self._catalogue.not_found(served) from None
            raise
        except BaseException:  # interrupted: nobody gets it
            promise.abandon()
            raise
        return promise

    def _note_refused(self, served: ServedVersion, request: WorkerRequest, error: TorchmgmtError) -> None:
        if isinstance(error, (NoWorker, QueueFull)):  # else the version is gone, and what was counted of it, too
            self._announcer.note_dropped(served.spec.key, type(error).__name__)
        if self.tracing is not None:
            self.tracing.refuse(request, error)


def tracing_for(wish: str) -> Tracing | None:
    """Return what makes spans, as the setting ``tracing`` says; None if nothing does.

    Raises InvalidArgument if it is "on" and OpenTelemetry is not installed.
    """
    if wish == "off" or (wish == "auto" and "opentelemetry" not in sys.modules):
        return None
    try:
        from torchmgmt.tracing import tracing_of  # most programs have no OpenTelemetry
    except ImportError as error:
        if wish == "auto":
            return None
        allowed = f"auto or off without {error.name}: pip install 'torchmgmt[otel]'"
        raise InvalidArgument("tracing", wish, allowed) from error
    return tracing_of(wish)
