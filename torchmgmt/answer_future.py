"""AnswerFuture: the future of an answer, unpickled by whoever asks for it; for threads and for event loops."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED, PENDING, RUNNING
from typing import Any

from torchmgmt import forks
from torchmgmt.encoding import decode
from torchmgmt.errors import HandlerFailed, ManagerClosed
from torchmgmt.exchange import Encoded, Response, ResponseProperties
from torchmgmt.owned_future import OwnedFuture
from torchmgmt.records import ModelKey

__all__ = ["AnswerFuture", "is_slow_to_read", "value_of"]

_UNREAD = object()


class AnswerFuture(OwnedFuture[Any]):
    """The future of an :class:`Encoded` answer, or of a list of them, which gives what was encoded.

    It is unpickled by whoever asks for it, not by the thread that received it: unpickling a tensor imports torch, which
    takes seconds the first time, and no other answer may have to wait for that.
    """

    def __init__(
        self,
        key: ModelKey,
        keeps_alive: object = None,
        on_abandon: Callable[[], object] | None = None,
        on_cancelled: Callable[[], object] | None = None,
    ) -> None:
        """Make the future of an answer of model version ``key``; ``keeps_alive`` is not forgotten before the future.

        ``on_abandon`` is called when it is abandoned while it runs, ``on_cancelled`` once it is taken back in either way;
        both on the thread that settles it.
        """
        super().__init__()
        self._was_running = False  # when it was abandoned
        self._key = key
        self._keeps_alive = keeps_alive
        self._on_abandon = on_abandon
        self._on_cancelled = on_cancelled
        self._depth = forks.depth()
        self._answer: Any = _UNREAD

    def result(self, timeout: float | None = None) -> Any:
        """Return the answer, waiting for at most ``timeout`` seconds; raise what ended the request otherwise.

        Raises HandlerFailed, too, if the answer cannot be unpickled in this process, and ManagerClosed in one that was
        forked before the answer was read: it may never come there.
        """
        self._check_process()
        received = super().result(timeout)
        if self._answer is _UNREAD:
            self._answer = self._read(received)
        return self._answer

    def response_properties(self, timeout: float | None = None) -> ResponseProperties | None:
        """Return what the handler has set for the answer beside its body; None if nothing. Waits and raises as :meth:`result`.

        It unpickles nothing, so it may be called on a thread that must not wait for that.
        """
        self._check_process()
        received = super().result(timeout)
        return received.properties if isinstance(received, Encoded) else None

    def response(self, timeout: float | None = None) -> Response:
        """Return the answer to an :class:`~torchmgmt.HttpBody`, ready to be sent. Waits and raises as :meth:`result`.

        Raises TypeError, too, if the request was none. It unpickles nothing.
        """
        return Response.of(self.encoded(timeout))

    def encoded(self, timeout: float | None = None) -> Encoded:
        """Return the answer to one request as it came. Waits and raises as :meth:`result`, but unpickles nothing."""
        self._check_process()
        received: Encoded = super().result(timeout)
        return received

    def abandon(self, error: BaseException | None = None) -> None:
        """Have nothing more of it, whether it runs or not: it ends as if cancelled, or with ``error``. Any thread; idempotent.

        What was not started never runs. A handler that answers in parts is stopped at the next one once nobody waits for
        its batch any more; what becomes of others is what ``cancel_running`` of their model says.
        """
        was = FINISHED
        end = error or CancelledError()
        try:
            with self._gate:
                was = self._phase
                if was is PENDING:
                    self._phase = CANCELLED_AND_NOTIFIED
                elif was is RUNNING:
                    self._phase, self._exception, self._was_running = FINISHED, end, True
            if was is PENDING or was is RUNNING:
                self._note_end()
        except BaseException:
            if was is PENDING or was is RUNNING:
                self._note_end()
            raise

    def _told(self) -> None:
        is_with_worker = self._was_running or (self.cancelled() and self.place is not None and self.place.is_seated)
        super()._told()
        if (self._was_running or self.cancelled()) and self._on_cancelled is not None:
            self._on_cancelled()
        if is_with_worker and self._on_abandon is not None:
            self._on_abandon()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what ended the request, or None if it has an answer; waits and raises as :meth:`result` does."""
        self._check_process()
        return super().exception(timeout)

    def _check_process(self) -> None:
        # No lock is asked for: in a forked copy it may be held by a thread that is not there.
        if forks.depth() != self._depth and self._answer is _UNREAD:
            raise ManagerClosed("This future", "belongs to the process that this one was forked from")

    def _read(self, received: Any) -> Any:
        if isinstance(received, list):
            return [value_of(self._key, each) for each in received]
        return value_of(self._key, received)

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait for the answer on the event loop that runs; what ends the waiting ends the request, too."""
        return self._awaited().__await__()

    async def _awaited(self) -> Any:
        import asyncio  # 30 ms that a program without an event loop need not pay

        from torchmgmt.loops import settled

        try:
            await settled(self)
        except asyncio.CancelledError:
            self.abandon()
            raise
        if self.exception() is None and self._answer is _UNREAD and is_slow_to_read(self.encoded()):
            return await asyncio.to_thread(self.result)
        return self.result()


def value_of(key: ModelKey, answer: Encoded) -> Any:
    """Return what was encoded in an answer of a model version; raise HandlerFailed if it cannot be made in this process."""
    try:
        return bytes(answer.segments[0]) if answer.content_type is not None else decode(answer)
    except Exception as error:  # whatever a pickle may raise
        reason = f"its answer cannot be unpickled in this process; it should answer with plain data ({error!r})"
        raise HandlerFailed(key.name, key.version, reason, error_type=type(error).__name__) from error


def is_slow_to_read(answer: Encoded) -> bool:
    """Whether unpickling would import torch, which takes seconds."""
    return "torch" not in sys.modules and answer.content_type is None and b"torch" in bytes(answer.segments[0])
