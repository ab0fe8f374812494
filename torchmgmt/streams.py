"""AnswerStream: the parts of one answer, for a thread or an event loop, as they come."""

from __future__ import annotations

import _thread
import functools
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, InvalidStateError
from types import ModuleType
from typing import TYPE_CHECKING, Any

from attrs import define

from torchmgmt import forks
from torchmgmt.answer_future import is_slow_to_read, value_of
from torchmgmt.errors import ManagerClosed, ReaderTooSlow, copy_of
from torchmgmt.exchange import Response
from torchmgmt.segments import size_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from torchmgmt.exchange import Encoded
    from torchmgmt.owned_future import Owner, Waits
    from torchmgmt.records import ModelKey

__all__ = ["AnswerStream"]

MOST_WAITING_BYTES = 64 << 20
"""So much of one answer may wait to be read, or one part that is larger."""
_PART_BYTES = 640  # that a part takes beside its content

_WAITING = "waiting"
_RUNNING = "running"
_CANCELLED = "cancelled"
_ENDED = "ended"
_OVER = frozenset({_ENDED, _CANCELLED})


class AnswerStream:
    """The parts of one answer, in order: what ``for part in stream`` or ``async for part in stream`` gives, as it comes.

    The parts are what the handler yields, or sends with ``send_intermediate_predict_response``, and then what it returns,
    if that is anything. So the answer of a handler that knows nothing of parts is one. Iterating raises what ended the
    request otherwise, after the parts that came before. For one reader at a time; every method may be called from any
    thread. Close it, or leave its ``with`` block, to have nothing more of it: then the handler is stopped at its next
    part, unless others wait for the same batch. Where more than 64 MiB of it wait to be read, it ends with ReaderTooSlow.
    """

    # To whoever queues and answers requests it is what an OwnedFuture is (torchmgmt.batch.Promise), at a fraction of its
    # cost: predictions over HTTP are read through one. As there, a caller calls nothing while it holds the lock.

    def __init__(
        self,
        key: ModelKey,
        keeps_alive: object,
        on_abandon: Callable[[], object],
        on_cancelled: Callable[[], object],
    ) -> None:
        self.owner: Owner | None = None
        """Whose thread brings the answer."""
        self.place: Waits | None = None
        """Where it waits, if it does."""
        self._key = key
        self._keeps_alive = keeps_alive
        self._on_abandon = on_abandon
        self._on_cancelled = on_cancelled
        self._depth = forks.depth()
        self._gate = threading.Lock()
        # guarded by _gate
        self._state = _WAITING
        self._first_part: _Part | None = None  # of those that came before the last
        self._last_part: _Part | None = None
        self._waiting_bytes = 0
        self._last: Encoded | None = None
        self._error: BaseException | None = None
        self._is_read = False  # whether the last part was taken
        self._is_told = False
        self._was_taken_back = False
        self._was_running = False  # then
        # An answer, and the shared memory that it lies in, is to go with its last reader and not at a garbage collection:
        # so who is called here, and may have the stream, is called once and forgotten.
        self._wake: Callable[[], object] | None = None
        self._callback: Callable[[Any], object] | None = None

    def __repr__(self) -> str:
        state = "closed" if self._is_read else self._state
        return f"<AnswerStream: {state}, {self._waiting_bytes} bytes of parts to read>"

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
        """Return the next part; block until it is there. Who is interrupted meanwhile has closed it, as any iterator."""
        try:
            sleeper = _thread.allocate_lock()
            sleeper.acquire()
            if not self.when_due(sleeper.release):
                sleeper.acquire()
        except BaseException:
            self.close()
            raise
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
        with self._gate:
            if self._first_part is not None or self._is_read:
                return None
            last, error = self._last, self._error
            if error is not None or (last is not None and last.segments):
                self._is_read, self._error = True, None
        if error is not None:
            raise copy_of(error)  # as of OwnedFuture.result
        return Response.of(last) if last is not None and last.segments else None

    def when_due(self, wake: Callable[[], object]) -> bool:
        """Return whether there is something to read; if not, have ``wake`` called once there is. Does not block.

        ``wake`` runs on the thread that brings it, so it must not block, nor raise. For one reader at a time.
        """
        if forks.depth() != self._depth:
            raise ManagerClosed("This stream", "belongs to the process that this one was forked from")
        with self._gate:
            if self._first_part is not None or self._is_read or self._state in _OVER:
                return True
            self._wake = wake
            return False

    def call_when_due(self, callback: Callable[[], object]) -> bool:
        """As :meth:`when_due`, with a callback that is to be called on the event loop that runs now."""
        return self.when_due(functools.partial(_loops().running_bridge().post, callback))

    @property
    def is_complete(self) -> bool:
        """Whether nothing more comes after the parts that were read. False does not mean that there is more to read."""
        with self._gate:
            return self._is_read or (self._last is not None and self._first_part is None and not self._last.segments)

    def close(self) -> None:
        """Have nothing more of it. Does not block; idempotent."""
        self._abandon(CancelledError(), is_read=True)

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
        with self._gate:
            was = self._state
            if was is _WAITING:
                self._state = _RUNNING
        if was is _WAITING or was is _CANCELLED:
            return was is _WAITING
        raise RuntimeError(f"it is {was} already")

    def set_waiting(self) -> bool:
        """Mark it as not begun, so that it can be taken back again; False if it has ended."""
        with self._gate:
            was = self._state
            if was is _RUNNING:
                self._state = _WAITING
        return was is _RUNNING

    def set_result(self, answer: Encoded) -> None:
        """Take the rest of the answer, which is all of it if there was no part; raise InvalidStateError if it has ended."""
        self._settle(answer, None)

    def set_exception(self, error: BaseException) -> None:
        """End it with an error; raise InvalidStateError if it has ended."""
        self._settle(None, error)

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        """Have ``callback`` called with it when it has ended; one such callback at most."""
        with self._gate:
            is_told = self._is_told
            if not is_told:
                self._callback = callback
        if is_told:
            callback(self)

    def take_part(self, part: Encoded) -> None:
        """Note a part that came before the rest."""
        size = _bytes_of(part) + _PART_BYTES
        added = _Part(part, size)
        with self._gate:
            if self._is_read:
                return
            is_too_much = self._first_part is not None and self._waiting_bytes + size > MOST_WAITING_BYTES
            if not is_too_much:
                if self._last_part is None:
                    self._first_part = added
                else:
                    self._last_part.next = added
                self._last_part = added
                self._waiting_bytes += size
            wake, self._wake = self._wake, None
        if is_too_much:
            self._abandon(ReaderTooSlow(self._waiting_bytes + size, MOST_WAITING_BYTES))
        if wake is not None:
            wake()

    # ------------------------------------------------------------------------------------------------------------------

    def abandon(self) -> None:
        """Have nothing more of it; as :meth:`close`, for who has not read of it. Does not block; idempotent."""
        self._abandon(CancelledError())

    def _abandon(self, error: BaseException, *, is_read: bool = False) -> None:
        """End it with ``error``, unless it has ended, and let those know that may stop working for it.

        ``is_read``: nobody is to read what it has, nor the error.
        """
        was = _ENDED
        try:
            with self._gate:
                was = self._state
                if was is _WAITING or was is _RUNNING:
                    self._state = _CANCELLED if was is _WAITING else _ENDED
                    self._error, self._was_taken_back, self._was_running = error, True, was is _RUNNING
                if is_read:
                    self._is_read = True
                    self._first_part = self._last_part = None
            if was not in _OVER:
                self._note_end()
        except BaseException:
            if was not in _OVER:
                self._note_end()
            raise

    def _settle(self, last: Encoded | None, error: BaseException | None) -> None:
        with self._gate:
            was = self._state
            if was not in _OVER:
                self._state, self._last, self._error = _ENDED, last, error
        if was in _OVER:
            raise InvalidStateError(f"it is {was} already")
        self._tell()

    def _note_end(self) -> None:
        """Have the owner tell of an end that was not the owner's doing. Again, if it was interrupted."""
        place, owner = self.place, self.owner
        if place is not None:
            place.leave()
        if owner is not None and owner.on_thread():
            owner.act_here(self._tell)
            return
        if owner is not None:
            try:
                owner.call_soon(self._tell)
                return
            except (ManagerClosed, OSError) as error:  # it is gone; so nobody else is in the midst of telling
                if isinstance(error, OSError) and error.errno is None:
                    raise  # not the system's: it is what has interrupted the caller, such as a TimeoutError
        self._tell()

    def _tell(self) -> None:
        """Tell those who wait for it, once, however often it is called."""
        with self._gate:
            was_told, self._is_told = self._is_told, True
            wake, self._wake = self._wake, None
            callback, self._callback = self._callback, None
        if was_told:
            return
        if self.place is not None:
            self.place.leave()
            self.place = None  # which has the request
        if callback is not None:
            callback(self)
        if wake is not None:
            wake()
        if self._was_taken_back:
            self._on_cancelled()
            if self._was_running:
                self._on_abandon()

    async def _next(self) -> Encoded | None:
        waiter = _loops().Waiter()
        if not self.when_due(waiter.wake):
            await waiter.future
        return self._take()

    def _take(self) -> Encoded | None:
        """Return the next part; None after the last. There is one, or it has ended."""
        with self._gate:
            part, was_read = self._first_part, self._is_read
            if part is not None:
                self._first_part = part.next
                if part.next is None:
                    self._last_part = None
                self._waiting_bytes -= part.size
                return part.content
            self._is_read = True
            last, error = self._last, self._error
            self._error = None
        if was_read:
            return None
        if error is not None:
            raise copy_of(error)  # as of OwnedFuture.result
        if last is None:
            raise InvalidStateError("it has not ended")
        return last if last.segments else None


@define(eq=False)
class _Part:
    """A part that waits to be read. They are chained: to add and to take one calls nothing."""

    content: Encoded
    size: int
    next: _Part | None = None


def _bytes_of(part: Encoded) -> int:
    return sum(map(size_of, part.segments))


@functools.cache
def _loops() -> ModuleType:
    from torchmgmt import loops  # it imports asyncio: 30 ms that a program without an event loop need not pay

    return loops
