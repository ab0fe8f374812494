"""AnswerStream: the parts of one answer, for a thread or an event loop, as they come."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, InvalidStateError
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from torchmgmt import forks
from torchmgmt.answer_future import is_slow_to_read, value_of
from torchmgmt.errors import ManagerClosed, ReaderTooSlow
from torchmgmt.exchange import Response
from torchmgmt.segments import size_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from torchmgmt.exchange import Encoded
    from torchmgmt.records import ModelKey

__all__ = ["AnswerStream"]

MOST_WAITING_BYTES = 64 << 20
"""So much of one answer may wait to be read, or one part that is larger."""

_WAITING = "waiting"
_RUNNING = "running"
_CANCELLED = "cancelled"
_ENDED = "ended"
_OVER = (_ENDED, _CANCELLED)


class AnswerStream:
    """The parts of one answer, in order: what ``for part in stream`` or ``async for part in stream`` gives, as it comes.

    The parts are what the handler yields, or sends with ``send_intermediate_predict_response``, and then what it returns,
    if that is anything. So the answer of a handler that knows nothing of parts is one. Iterating raises what ended the
    request otherwise, after the parts that came before. For one reader at a time; every method may be called from any
    thread. Close it, or leave its ``with`` block, to have nothing more of it: then the handler is stopped at its next
    part, unless others wait for the same batch. Where more than 64 MiB of it wait to be read, it ends with ReaderTooSlow.
    """

    # To whoever queues and answers requests it is what a Future is (torchmgmt.batch.Promise), at a fraction of its cost:
    # predictions over HTTP are read through one.

    def __init__(
        self,
        key: ModelKey,
        keeps_alive: object,
        on_abandon: Callable[[], object],
        on_cancelled: Callable[[], object],
    ) -> None:
        self._key = key
        self._keeps_alive = keeps_alive
        self._on_abandon = on_abandon
        self._on_cancelled = on_cancelled
        self._depth = forks.depth()
        self._lock = threading.Lock()
        # guarded by _lock
        self._state = _WAITING
        self._parts: deque[Encoded] | None = None  # that came before the last
        self._waiting_bytes = 0
        self._last: Encoded | None = None
        self._error: BaseException | None = None
        self._is_read = False  # whether the last part was taken
        # An answer, and the shared memory that it lies in, is to go with its last reader and not at a garbage collection:
        # so who is called here, and may have the stream, is called once and forgotten.
        self._wake: Callable[[], object] | None = None
        self._callback: Callable[[Any], object] | None = None

    def __repr__(self) -> str:
        state = "closed" if self._is_read else self._state
        return f"<AnswerStream: {state}, {len(self._parts or ())} parts to read>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        """Return the next part; block until it is there."""
        there = threading.Event()
        if not self.when_due(there.set):
            there.wait()
        part = self._take()
        if part is None:
            raise StopIteration
        return value_of(self._key, part)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        """Return the next part."""
        part = await self._next()
        if part is None:
            raise StopAsyncIteration
        if not is_slow_to_read(part):
            return value_of(self._key, part)
        import asyncio  # for 30 ms that a program without an event loop need not pay

        return await asyncio.to_thread(value_of, self._key, part)

    async def next_body(self) -> Response | None:
        """Return the next part of the answer to an :class:`~torchmgmt.HttpBody`; None after the last. It unpickles nothing.

        Status, headers and content type are those of the first part. Raises TypeError if the request was no HttpBody.
        """
        part = await self._next()
        return None if part is None else Response.of(part)

    def whole_body(self) -> Response | None:
        """Return the answer to an :class:`~torchmgmt.HttpBody` that is there and did not come in parts; else None.

        Then nothing was taken. Does not block; raises what ended the request, and TypeError as :meth:`next_body`.
        """
        with self._lock:
            if self._parts or self._is_read:
                return None
            last = self._last if self._error is None else self._fail_locked()
            if last is None or not last.segments:
                return None
            self._is_read = True
        return Response.of(last)

    def when_due(self, wake: Callable[[], object]) -> bool:
        """Return whether there is something to read; if not, have ``wake`` called once there is. Does not block.

        ``wake`` runs on the thread that brings it, so it must not block, nor raise. For one reader at a time.
        """
        if forks.depth() != self._depth:
            raise ManagerClosed("This stream", "belongs to the process that this one was forked from")
        with self._lock:
            if self._parts or self._is_read or self._state in _OVER:
                return True
            self._wake = wake
            return False

    def call_when_due(self, callback: Callable[[], object]) -> bool:
        """As :meth:`when_due`, with a callback that is to be called on the event loop that runs now."""
        return self.when_due(functools.partial(_loops().running_bridge().post, callback))

    @property
    def is_complete(self) -> bool:
        """Whether nothing more comes after the parts that were read. False does not mean that there is more to read."""
        with self._lock:
            return self._is_read or (self._last is not None and not self._parts and not self._last.segments)

    def close(self) -> None:
        """Have nothing more of it. Does not block; idempotent."""
        self._abandon(CancelledError())
        with self._lock:
            self._is_read = True
            self._parts = None

    # -- for who makes it, and queues and answers the request: as of concurrent.futures.Future -------------------------

    def running(self) -> bool:
        """Whether a worker has it."""
        return self._state is _RUNNING

    def done(self) -> bool:
        """Whether it has ended, all of it read or not."""
        return self._state in _OVER

    def cancelled(self) -> bool:
        """Whether it was taken back before it was begun."""
        return self._state is _CANCELLED

    def exception(self) -> BaseException | None:
        """Return what ended it, if that was an error that nobody has read. It has ended."""
        return self._error

    def set_running_or_notify_cancel(self) -> bool:
        """Mark it as begun; False if it was taken back.

        Raises RuntimeError if it was begun before, or has ended.
        """
        with self._lock:
            if self._state is _WAITING:
                self._state = _RUNNING
                return True
            if self._state is _CANCELLED:
                return False
        raise RuntimeError(f"it is {self._state} already")

    def set_waiting(self) -> bool:
        """Mark it as not begun, so that it can be taken back again; False if it has ended."""
        with self._lock:
            if self._state is not _RUNNING:
                return False
            self._state = _WAITING
            return True

    def set_result(self, answer: Encoded) -> None:
        """Take the rest of the answer, which is all of it if there was no part; raise InvalidStateError if it has ended."""
        self._end(answer, None)

    def set_exception(self, error: BaseException) -> None:
        """End it with an error; raise InvalidStateError if it has ended."""
        self._end(None, error)

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        """Have ``callback`` called with it when it has ended; one such callback at most."""
        with self._lock:
            if not self.done():
                self._callback = callback
                return
        callback(self)

    def take_part(self, part: Encoded) -> None:
        """Note a part that came before the rest."""
        with self._lock:
            if self._is_read:
                return
            self._waiting_bytes += _bytes_of(part)
            is_too_much = self._waiting_bytes > MOST_WAITING_BYTES and bool(self._parts)
            if not is_too_much:
                self._parts = self._parts or deque()
                self._parts.append(part)
            wake, self._wake = self._wake, None
        if is_too_much:
            self._abandon(ReaderTooSlow(self._waiting_bytes, MOST_WAITING_BYTES))
        if wake is not None:
            wake()

    # ------------------------------------------------------------------------------------------------------------------

    def _abandon(self, error: BaseException) -> None:
        """End it with ``error``, unless it has ended, and let those know that may stop working for it."""
        try:
            was_running = self._end(None, error, takes_back=True)
        except InvalidStateError:
            return
        self._on_cancelled()
        if was_running:
            self._on_abandon()

    def _end(self, last: Encoded | None, error: BaseException | None, *, takes_back: bool = False) -> bool:
        """End it; return whether it was begun. Raises InvalidStateError if it has ended."""
        with self._lock:
            before = self._state
            if before in _OVER:
                raise InvalidStateError(f"it is {before} already")
            self._state = _CANCELLED if takes_back and before is _WAITING else _ENDED
            self._last, self._error = last, error
            wake, self._wake = self._wake, None
            callback, self._callback = self._callback, None
        if callback is not None:
            callback(self)
        if wake is not None:
            wake()
        return before is _RUNNING

    async def _next(self) -> Encoded | None:
        waiter = _loops().Waiter()
        if not self.when_due(waiter.wake):
            await waiter.future
        return self._take()

    def _take(self) -> Encoded | None:
        """Return the next part; None after the last. There is one, or it has ended."""
        with self._lock:
            if self._parts:
                part = self._parts.popleft()
                self._waiting_bytes -= _bytes_of(part)
                return part
            if self._is_read:
                return None
            self._is_read = True
            last = self._last if self._error is None else self._fail_locked()
        return last if last is not None and last.segments else None

    def _fail_locked(self) -> NoReturn:
        """Raise what ended it, once: the error refers to frames that have the stream, so the stream lets go of it."""
        error, self._error = self._error, None
        self._is_read = True
        try:
            raise error or InvalidStateError("it has not ended")
        finally:
            del error  # it refers to this frame


def _bytes_of(part: Encoded) -> int:
    return sum(map(size_of, part.segments))


@functools.cache
def _loops() -> ModuleType:
    from torchmgmt import loops  # it imports asyncio: 30 ms that a program without an event loop need not pay

    return loops
