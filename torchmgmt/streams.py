"""AnswerStream: the parts of one answer, for a thread or an event loop, as they come."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torchmgmt.errors import ReaderTooSlow
from torchmgmt.exchange import Response
from torchmgmt.segments import size_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from torchmgmt.answer_future import AnswerFuture
    from torchmgmt.exchange import Encoded

__all__ = ["AnswerStream"]

MOST_WAITING_BYTES = 64 << 20
"""So much of one answer may wait to be read, or one part that is larger."""


class AnswerStream:
    """The parts of one answer, in order: what ``for part in stream`` or ``async for part in stream`` gives, as it comes.

    The parts are what the handler yields, or sends with ``send_intermediate_predict_response``, and then what it returns,
    if that is anything. So the answer of a handler that knows nothing of parts is one. Iterating raises what ended the
    request otherwise, after the parts that came before. For one reader at a time; every method may be called from any
    thread. Close it, or leave its ``with`` block, to have nothing more of it: then the handler is stopped at its next
    part, unless others wait for the same batch. Where more than 64 MiB of it wait to be read, it ends with ReaderTooSlow.
    """

    def __init__(self) -> None:
        self._future: AnswerFuture  # from bind on
        self._bell = _Bell()
        self._lock = self._bell.lock
        # guarded by _lock
        self._parts: deque[Encoded] = deque()
        self._waiting_bytes = 0
        self._is_read = False  # whether the last part was taken

    def __repr__(self) -> str:
        state = "closed" if self._is_read else "running"
        return f"<AnswerStream: {state}, {len(self._parts)} parts to read>"

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
        self._wait()
        part = self._take()
        if part is None:
            raise StopIteration
        return self._future.value_of(part)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        """Return the next part."""
        part = await self._next()
        if part is None:
            raise StopAsyncIteration
        return await self._future.value_on_loop(part)

    async def next_body(self) -> Response | None:
        """Return the next part of the answer to an :class:`~torchmgmt.HttpBody`; None after the last. It unpickles nothing.

        Status, headers and content type are those of the first part. Raises TypeError if the request was no HttpBody.
        """
        part = await self._next()
        return None if part is None else Response.of(part)

    @property
    def is_complete(self) -> bool:
        """Whether nothing more comes after the parts that were read. False does not mean that there is more to read."""
        with self._lock:
            return self._is_read or (self._future.done() and not self._parts and self._has_nothing_final())

    def close(self) -> None:
        """Have nothing more of it. Does not block; idempotent."""
        self._future.abandon()
        with self._lock:
            self._is_read = True
            self._parts.clear()

    # -- for who makes it ----------------------------------------------------------------------------------------------

    def bind(self, future: AnswerFuture) -> None:
        """Take the end of the answer from ``future``; to be called once, before the request can be answered."""
        self._future = future
        future.add_done_callback(self._bell.ring)

    def take_part(self, part: Encoded) -> None:
        """Note a part that came before the rest."""
        with self._lock:
            self._waiting_bytes += _bytes_of(part)
            is_too_much = self._waiting_bytes > MOST_WAITING_BYTES and bool(self._parts)
            if not is_too_much:
                self._parts.append(part)
        if is_too_much:
            self._future.abandon(ReaderTooSlow(self._waiting_bytes, MOST_WAITING_BYTES))
        self._bell.ring()

    # ------------------------------------------------------------------------------------------------------------------

    def _is_due_locked(self, wake: Callable[[], object]) -> bool:
        """Whether there is something to take; if not, have ``wake`` called when there is."""
        if self._parts or self._is_read or self._future.done():
            return True
        self._bell.wake = wake
        return False

    def _wait(self) -> None:
        there = threading.Event()
        with self._lock:
            is_due = self._is_due_locked(there.set)
        if not is_due:
            there.wait()

    async def _next(self) -> Encoded | None:
        waiter = _loops().Waiter()
        with self._lock:
            is_due = self._is_due_locked(waiter.wake)
        if not is_due:
            await waiter.future
        return self._take()

    def _take(self) -> Encoded | None:
        """Return the next part; None after the last. There is one, or the future is done."""
        with self._lock:
            if self._parts:
                part = self._parts.popleft()
                self._waiting_bytes -= _bytes_of(part)
                return part
            if self._is_read:
                return None
            self._is_read = True
        last = self._future.encoded()
        return last if last.segments else None

    def _has_nothing_final(self) -> bool:
        return self._future.exception() is None and not self._future.encoded().segments


class _Bell:
    """Wakes who waits for a part. A future keeps its callbacks, so that what it calls must not keep the future.

    Otherwise an answer, and the shared memory that it lies in, would stay until a garbage collection.
    """

    __slots__ = ("lock", "wake")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.wake: Callable[[], object] | None = None  # guarded by lock

    def ring(self, _of: object = None) -> None:
        """Wake who waits, if anybody does. Any thread."""
        with self.lock:
            wake, self.wake = self.wake, None
        if wake is not None:
            wake()


def _bytes_of(part: Encoded) -> int:
    return sum(map(size_of, part.segments))


@functools.cache
def _loops() -> ModuleType:
    from torchmgmt import loops  # it imports asyncio: 30 ms that a program without an event loop need not pay

    return loops
