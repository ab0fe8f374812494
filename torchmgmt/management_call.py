"""Management calls: made on threads of the library for callers, who wait and may be interrupted meanwhile.

To register or to unregister a model takes many steps, and a caller may be interrupted after each of them: by Ctrl-C, or by a
signal handler that raises. So they are done by a thread that nothing interrupts. An interrupted caller leaves the call to
that thread, which goes on, or goes no further and takes back what it has done, whatever the call says.
"""

from __future__ import annotations

import _thread
import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from torchmgmt import forks
from torchmgmt.thread_call import on_new_thread

__all__ = ["CallAbandoned", "ManagementThreads", "check_wanted", "still_wanted", "when_abandoned"]

T = TypeVar("T")

_LINGER_S = 0.1
"""For so long a thread waits for another call: they come in bursts, and a program that makes none has no such thread."""
_GIVEN_S = 1.0
"""For so long it waits for a call that somebody was about to give it, and may have been interrupted in that."""
_TAKEN_BACK_S = 3.0
"""So long an interrupted caller waits at most until what was done for it is taken back."""

_FINISHED_S = 0.5
"""So long for what goes on to its end: mostly that is there by then, and the next call finds all as it is to be."""

_current: contextvars.ContextVar[_Call[Any] | None] = contextvars.ContextVar("torchmgmt_management_call", default=None)


class CallAbandoned(BaseException):
    """Nobody waits for the management call any more: raised where it can go no further, and for nobody to catch."""


def check_wanted() -> None:
    """Raise :class:`CallAbandoned` if this runs for a caller who was interrupted, and wants it to be taken back."""
    call = _current.get()
    if call is not None and call.is_abandoned:
        raise CallAbandoned


def still_wanted() -> Callable[[], bool]:
    """Return what says, on any thread, whether the caller for whom this runs still wants it."""
    call = _current.get()
    return lambda: call is None or not call.is_abandoned


@contextlib.contextmanager
def when_abandoned(wake: Callable[[], object]) -> Iterator[None]:
    """Have ``wake`` called, on the caller's thread, should it be interrupted meanwhile; it must not block."""
    call = _current.get()
    if call is None:
        yield
        return
    call.wake = wake
    try:
        if call.is_abandoned:
            raise CallAbandoned
        yield
    finally:
        call.wake = None


class ManagementThreads:
    """Makes calls on threads of its own. Thread-safe; it may be used in signal handlers, too.

    A thread is started where none is idle, and ends when it has been so for a moment.
    """

    def __init__(self) -> None:
        self._depth = forks.depth()
        self._local = threading.local()
        self._idle: list[_Helper] = []

    def is_here(self) -> bool:
        """Whether the caller is one of these threads."""
        return getattr(self._local, "is_ours", False)

    def call(self, act: Callable[[], T], take_back: Callable[[T], object] | None = None) -> T:
        """Return what ``act`` returns, or raise what it raises. Blocks until then.

        Args:
            act: runs on one of these threads, in the caller's context; on one of them, at once.
            take_back: called with its result if the caller was interrupted; then ``act`` goes no further where it asks
                :func:`check_wanted`. None: it is done to its end, for which the caller waits only shortly.

        Where the system has no thread for it, the calling one makes it.
        """
        if self.is_here():
            return act()
        call = _Call(act, take_back)
        try:
            try:
                self._give(call)
            except OSError as error:
                if (
                    error.errno is None
                ):  # not the system's: it is what has interrupted the caller, such as a TimeoutError
                    raise
                call.run()
            return call.result()
        except BaseException:
            if take_back is None:
                call.wait(_FINISHED_S)
            elif not call.has_failed:
                if call.abandon():
                    self.post(call.take_back)
                call.wait_until_settled(_TAKEN_BACK_S)
            raise

    def post(self, act: Callable[[], object]) -> None:
        """Have ``act`` run on one of these threads, or where the system has none, on the calling one. Does not block.

        What it raises is dropped.
        """
        call = _Call(act, None)
        try:
            self._give(call)
        except OSError as error:
            if error.errno is None:
                raise
            call.run()

    def _give(self, call: _Call[Any]) -> None:
        if forks.depth() != self._depth:  # the threads are not there
            self._depth, self._idle = forks.depth(), []
        try:
            helper = self._idle.pop()
        except IndexError:
            helper = _Helper(self._idle, self._local)
            helper.give(call)
            on_new_thread(helper.start)
            return
        helper.give(call)
        if helper.is_gone:  # it did not wait for so long
            on_new_thread(call.start_thread)


class _Call(Generic[T]):
    """One call, and what becomes of it. It is made once, whoever is asked to make it."""

    def __init__(self, act: Callable[[], T], take_back: Callable[[T], object] | None) -> None:
        self.is_abandoned = False
        """Whether the caller was interrupted, and what was done is to be taken back."""
        self.has_failed = False
        self.wake: Callable[[], object] | None = None
        """Called when that is so: the call waits for something that may take long."""
        self._act: Callable[[], T] | None = act
        self._take_back = take_back
        self._context = contextvars.copy_context()
        self._result: T | None = None
        self._error: BaseException | None = None
        self._is_over = False
        self._waits, self._settles = _thread.allocate_lock(), _thread.allocate_lock()
        self._waits.acquire()
        self._settles.acquire()

    def run(self) -> None:
        """Make the call, unless it was made, or nobody wants it any more."""
        act, self._act = self._act, None
        if act is None:
            return
        try:
            self._result = self._context.run(self._make, act)
        except BaseException as error:
            self._error, self.has_failed = error, True
        self._is_over = True  # first: whoever abandons it afterwards sees to what is to be taken back
        if self.is_abandoned:
            self.take_back()
        elif self._error is not None:
            self._settles.release()
        self._waits.release()

    def start_thread(self) -> None:
        """Make it on a thread for it alone."""
        threading.Thread(target=self.run, name="torchmgmt-management", daemon=True).start()

    def result(self) -> T:
        """Return what came of it, or raise what it raised. Blocks until then."""
        self._waits.acquire()
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # its frames refer to this object
        return self._result  # type: ignore[return-value]  # it is what the function returned

    def wait(self, timeout: float) -> None:
        """Block until it is made, for at most ``timeout`` seconds; for who was interrupted in :meth:`result`."""
        if not self._is_over:
            self._waits.acquire(timeout=timeout)

    def abandon(self) -> bool:
        """Have it go no further; return whether the caller is to see to :meth:`take_back`, as it is over already."""
        self.is_abandoned = True
        wake = self.wake
        if wake is not None:
            with contextlib.suppress(Exception):  # its backend was closed
                wake()
        if self._act is not None:
            self._act = None  # it was not begun, and never is
            self._settles.release()
            return False
        return self._is_over

    def take_back(self) -> None:
        """Take back what it has done, once."""
        take_back, self._take_back = self._take_back, None
        if take_back is None:
            return
        try:
            if self._error is None:
                take_back(self._result)  # type: ignore[arg-type]  # it is what the function returned
        finally:
            self._settles.release()

    def wait_until_settled(self, timeout: float) -> None:
        """Block until nothing is left of it, for at most ``timeout`` seconds."""
        self._settles.acquire(timeout=timeout)

    def _make(self, act: Callable[[], T]) -> T:
        _current.set(self)
        return act()


class _Helper:
    """A thread that makes one call after the other."""

    def __init__(self, idle: list[_Helper], local: threading.local) -> None:
        self.is_gone = False
        self._idle = idle
        self._local = local
        self._call: _Call[Any] | None = None
        self._waits = _thread.allocate_lock()
        self._waits.acquire()

    def give(self, call: _Call[Any]) -> None:
        """Have it make a call; for who has taken it from the idle ones."""
        self._call = call
        self._waits.release()

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="torchmgmt-management", daemon=True).start()

    def _run(self) -> None:
        self._local.is_ours = True
        while self._next():
            call, self._call = self._call, None
            if call is not None:
                call.run()
            del call  # while it waits it keeps nothing of it
            self._idle.append(self)
        self.is_gone = True

    def _next(self) -> bool:
        """Wait for a call; False if none comes."""
        if self._waits.acquire(timeout=_LINGER_S):
            return True
        try:
            self._idle.remove(self)
        except ValueError:  # somebody has taken it, and is about to give it a call
            return self._waits.acquire(timeout=_GIVEN_S)
        return False
