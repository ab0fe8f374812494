"""OwnedFuture: a Future that its owner settles whatever happens to those who wait for it.

The standard library's guards its state with a Condition. A caller that is interrupted in there, by Ctrl-C or a signal
handler that raises, may leave it locked for ever, and then whoever settles the future waits for ever. Here a caller holds a
lock only while it calls nothing, so nothing interrupts it meanwhile; what it begins and does not end is ended by the owner.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED, PENDING, RUNNING
from typing import Any, Protocol, TypeAlias, TypeVar

from torchmgmt.errors import ManagerClosed, copy_of
from torchmgmt.log_relay import AnyLogger, log_guarded

__all__ = ["SEATED_S", "OwnedFuture", "Owner", "Waits"]

log = logging.getLogger(__name__)

T = TypeVar("T")

Chain: TypeAlias = "tuple[Any, Chain] | None"
"""The last one and those before it: one more is put in front without a call."""

SEATED_S = 0.002
"""So long who waits for a request that went to a worker at once does so before its owner is told of it."""
_OVER = frozenset({CANCELLED_AND_NOTIFIED, FINISHED})


class Owner(Protocol):
    """The thread that settles futures, and tells those who wait for them. Thread-safe; nothing blocks."""

    def call_soon(self, callback: Callable[[], object]) -> object:
        """Run ``callback`` on that thread; raise ManagerClosed or OSError if there will be none."""

    def on_thread(self) -> bool:
        """Whether the caller is that thread."""

    def act_here(self, act: Callable[[], T]) -> T:
        """Return what ``act`` returns; the caller is that thread."""

    def log(self, logger: AnyLogger, level: int, message: str, *args: object, exc_info: Any = None) -> None:
        """Log a message."""


class Waits(Protocol):
    """The place of a request in a queue."""

    is_seated: bool
    """Whether it may be with a worker, and the owner not have seen it yet."""

    def ask(self) -> object:
        """Have the owner look at it. Any thread."""

    def leave(self) -> None:
        """Give it up, if it has not been given up. Any thread."""


class OwnedFuture(Future[T]):
    """A :class:`concurrent.futures.Future` that its owner settles without waiting for any caller.

    Callbacks run on the owner's thread, also when the future is cancelled, which may be a moment after ``cancel`` has
    returned; those of a future that is done, on the thread that adds them. What a callback raises is logged, whatever it is.
    Functions of the standard library that wait for several futures take it, too. Every method may be called from any thread,
    and in a signal handler.
    """

    def __init__(self) -> None:
        self.owner: Owner | None = None
        """Whose thread settles it; None: nobody's in particular, so that it is told on the thread that ends it."""
        self.place: Waits | None = None
        """Where it waits, if it does."""
        self._gate = threading.Lock()
        # guarded by _gate
        self._phase = PENDING
        self._result: T | None = None
        self._exception: BaseException | None = None
        self._is_told = False  # whether its callbacks are being called
        self._sleepers: Chain = None
        self._callbacks: Chain = None
        self._standard: _StandardSide | None = None

    # -- for any thread --------------------------------------------------------------------------------------------------

    def cancel(self) -> bool:
        """Take it back if it was not begun; return whether it is taken back. Does not block."""
        was = RUNNING
        try:
            with self._gate:
                was = self._phase
                if was is PENDING:
                    self._phase = CANCELLED_AND_NOTIFIED
            if was is PENDING:
                self._note_end()
        except BaseException:
            if was is PENDING:
                self._note_end()
            raise
        return was is PENDING or was is CANCELLED_AND_NOTIFIED

    def cancelled(self) -> bool:
        """Whether it was taken back before it was begun."""
        return self._phase is CANCELLED_AND_NOTIFIED

    def running(self) -> bool:
        """Whether it was begun, and has not ended."""
        return self._phase is RUNNING

    def done(self) -> bool:
        """Whether it has ended."""
        return self._phase in _OVER

    def result(self, timeout: float | None = None) -> T:
        """Return the result; block for at most ``timeout`` seconds. Raises what ended it, CancelledError or TimeoutError.

        Whoever asks gets a copy of the error: its traceback has the frames of that one alone, and keeps alive nothing that
        leads back to it.
        """
        error = self.exception(timeout)
        if error is not None:
            raise copy_of(error)
        return self._result  # type: ignore[return-value]  # it is what the owner has set

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what ended it, or None if that was a result. Waits and raises as :meth:`result`."""
        if self._phase not in _OVER and not self._wait(timeout):
            raise FutureTimeout
        if self._phase is CANCELLED_AND_NOTIFIED:
            raise CancelledError
        return self._exception

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Have ``fn`` called with it once it has ended."""
        with self._gate:
            is_told = self._is_told
            if not is_told:
                self._callbacks = (fn, self._callbacks)
        if is_told:
            self._call(fn)

    # -- for its owner ---------------------------------------------------------------------------------------------------

    def set_running_or_notify_cancel(self) -> bool:
        """Mark it as begun; False if it was taken back. Raises RuntimeError if it was begun before, or has ended."""
        with self._gate:
            was = self._phase
            if was is PENDING:
                self._phase = RUNNING
        if was is RUNNING or was is FINISHED:
            raise RuntimeError(f"it is {was} already")
        return was is PENDING

    def set_waiting(self) -> bool:
        """Mark it as not begun, so that it can be taken back again; False if it has ended."""
        with self._gate:
            was = self._phase
            if was is RUNNING:
                self._phase = PENDING
        return was is RUNNING

    def set_result(self, result: T) -> None:
        """Take the result; raise InvalidStateError if it has ended."""
        self._settle(result, None)

    def set_exception(self, exception: BaseException | None) -> None:
        """Take what ended it; raise InvalidStateError if it has ended."""
        self._settle(None, exception)

    # --------------------------------------------------------------------------------------------------------------------

    def _settle(self, result: T | None, error: BaseException | None) -> None:
        with self._gate:
            was = self._phase
            if was not in _OVER:
                self._phase, self._result, self._exception = FINISHED, result, error
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
        """Wake those who wait, and call the callbacks. Once, however often it is called."""
        with self._gate:
            was_told, self._is_told = self._is_told, True
            sleepers, self._sleepers = self._sleepers, None
            callbacks, self._callbacks = self._callbacks, None
        if not was_told:
            self._told()
        while sleepers is not None:
            sleeper, sleepers = sleepers
            sleeper.release()
        if self._standard is not None:
            self._standard.tell(self)
        if callbacks is not None:
            for callback in _oldest_first(callbacks):
                self._call(callback)

    def _told(self) -> None:
        """Do what is to be done once when it has ended."""
        if self.place is not None:
            self.place.leave()
            self.place = None  # which has the request

    def _call(self, callback: Callable[[Future[T]], object]) -> None:
        try:
            callback(self)
        except BaseException as error:  # sys.exit() in one of them must not keep the others waiting
            if self.owner is not None:
                self.owner.log(log, logging.ERROR, "A callback of a future failed", exc_info=error)
            elif isinstance(error, Exception):
                log_guarded(log, logging.ERROR, "A callback of a future failed", exc_info=error)
            else:
                raise

    def _wait(self, timeout: float | None) -> bool:
        """Block until it has ended; False if that took longer than ``timeout`` seconds."""
        sleeper = _thread.allocate_lock()
        sleeper.acquire()
        with self._gate:
            is_told = self._is_told
            if not is_told:
                self._sleepers = (sleeper, self._sleepers)
        if is_told:
            return True
        place = self.place
        if place is not None and place.is_seated and (timeout is None or timeout > SEATED_S):
            # Mostly the answer is there before: then the owner has seen to all at once, and was woken once.
            if sleeper.acquire(timeout=SEATED_S):
                return True
            place.ask()
        if timeout is None:
            return sleeper.acquire()
        is_over = sleeper.acquire(timeout=min(max(0.0, timeout), threading.TIMEOUT_MAX))
        if not is_over:
            self._forget(sleeper)
        return is_over

    def _forget(self, sleeper: _thread.LockType) -> None:
        """Drop one who does not wait any more: who asks again and again would leave many."""
        while True:
            seen = self._sleepers
            rest: Chain = None
            for each in _oldest_first(seen):
                if each is not sleeper:
                    rest = (each, rest)
            with self._gate:
                is_same = self._sleepers is seen
                if is_same:
                    self._sleepers = rest
            if is_same:
                return

    # -- what the standard library's wait() and as_completed() look at -----------------------------------------------------

    @property
    def _state(self) -> str:  # type: ignore[override]
        standard = self._standard
        return self._phase if standard is None else standard.phase()

    @property
    def _condition(self) -> _StandardSide:  # type: ignore[override]
        return self._standard_side()

    @property
    def _waiters(self) -> _StandardSide:  # type: ignore[override]
        return self._standard_side()

    def _standard_side(self) -> _StandardSide:
        made = _StandardSide(self)
        with self._gate:
            if self._standard is None:
                self._standard = made
            return self._standard


class _StandardSide:
    """A future's Condition and its list of waiters, as functions of the standard library use them.

    Who holds the Condition sees the future as it was when it was acquired, so that what ends meanwhile is told to a waiter
    that is installed then; and nobody who settles the future needs it. It does not keep alive the future, which has it: an
    answer is to go with its last reference.
    """

    def __init__(self, future: OwnedFuture[Any]) -> None:
        self._future = weakref.ref(future)
        self._lock = threading.RLock()
        self._holder = 0
        self._seen = PENDING
        self._waiters: dict[Any, _Teller] = {}

    def acquire(self) -> bool:
        """Hold the Condition."""
        self._lock.acquire()
        self._seen = self._phase_now()
        self._holder = threading.get_ident()
        return True

    def release(self) -> None:
        """Let go of it."""
        self._holder = 0
        self._lock.release()

    __enter__ = acquire

    def __exit__(self, *_exc: object) -> None:
        self.release()

    def phase(self) -> str:
        """Return the state that the caller is to see."""
        return self._seen if self._holder == threading.get_ident() else self._phase_now()

    def append(self, waiter: Any) -> None:
        """Install a waiter."""
        if self.phase() not in _OVER:
            self._waiters[waiter] = _teller_of(waiter)
            future = self._future()
            if future is not None and future._is_told:
                self.tell(future)

    def remove(self, waiter: Any) -> None:
        """Remove a waiter."""
        self._waiters.pop(waiter, None)

    def tell(self, future: OwnedFuture[Any]) -> None:
        """Have those told who wait for ``future``, each once. Does not block."""
        for waiter in list(self._waiters):
            teller = self._waiters.pop(waiter, None)
            if teller is not None:
                teller.tell(future)

    def _phase_now(self) -> str:
        future = self._future()
        return FINISHED if future is None else future._phase


class _Teller:
    """Tells one waiter of the standard library which futures have ended, in their order, on a thread of its own.

    A waiter has locks, which a caller that is interrupted in there may leave held for ever. Whoever settles futures must not
    meet them: it would serve nobody any more.
    """

    def __init__(self, waiter: Any) -> None:
        self._waiter = weakref.ref(waiter)  # which has this
        self._ended: queue.SimpleQueue[OwnedFuture[Any]] = queue.SimpleQueue()
        self._telling = threading.Lock()  # held by who tells; nobody waits for it

    def tell(self, future: OwnedFuture[Any]) -> None:
        """Have it told that ``future`` has ended. Does not block."""
        self._ended.put(future)
        if not self._telling.locked():  # else who tells looks again after it has let go
            try:
                _thread.start_new_thread(self._tell_all, ())
            except RuntimeError:  # the system has no more threads
                self._tell_all()

    def _tell_all(self) -> None:
        while not self._ended.empty() and self._telling.acquire(blocking=False):
            try:
                with contextlib.suppress(queue.Empty):
                    while True:
                        self._tell_one(self._ended.get_nowait())
            finally:
                self._telling.release()

    def _tell_one(self, future: OwnedFuture[Any]) -> None:
        waiter = self._waiter()
        if waiter is None:
            return
        if future.cancelled():
            waiter.add_cancelled(future)
        elif future._exception is not None:
            waiter.add_exception(future)
        else:
            waiter.add_result(future)


def _teller_of(waiter: Any) -> _Teller:
    """Return the one that a waiter has, which waits for several futures."""
    teller = getattr(waiter, "torchmgmt_teller", None)
    if teller is None:
        waiter.torchmgmt_teller = teller = _Teller(waiter)
    return teller


def _oldest_first(chain: Chain) -> list[Any]:
    found = []
    while chain is not None:
        found.append(chain[0])
        chain = chain[1]
    return found[::-1]
