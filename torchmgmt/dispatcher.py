"""The one thread that waits for everything: readable sockets, ended processes, timers.

Whatever number of models a manager holds, one dispatcher serves them all; a model version without workers has nothing
registered here and so costs no thread and no descriptor.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import itertools
import logging
import math
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from attrs import define

from torchmgmt.errors import ManagerClosed

__all__ = ["Dispatcher", "HasFileno", "Timer"]

log = logging.getLogger(__name__)

Callback = Callable[[], object]

_LONGEST_WAIT_S = 3600.0
"""The system refuses to wait for more than 24 days; to wake once an hour for nothing costs nothing."""


class HasFileno(Protocol):
    """Anything that the operating system can wait for."""

    def fileno(self) -> int:
        """Return the file descriptor."""


@define(eq=False)
class Timer:
    """A callback that is due at a time of the monotonic clock, unless cancelled before."""

    when: float
    callback: Callback | None

    def cancel(self) -> None:
        """Make sure that the callback does not run, unless it runs already. Any thread; does not block."""
        self.callback = None

    def run(self) -> None:
        """Run the callback, unless it was cancelled. For the dispatcher."""
        callback = self.callback
        if callback is not None:
            callback()


class Loop(Protocol):
    """What of an :class:`asyncio.AbstractEventLoop` a dispatcher needs."""

    def add_reader(self, fd: int, callback: Callback, /) -> None:
        """Call ``callback`` whenever ``fd`` is readable."""

    def remove_reader(self, fd: int, /) -> bool:
        """End that."""

    def call_soon(self, callback: Callback, /) -> object:
        """Call ``callback`` in the next round. On the loop's thread."""

    def call_later(self, delay: float, callback: Callback, /) -> Handle:
        """Call ``callback`` in ``delay`` seconds."""


class Handle(Protocol):
    """What undoes a :meth:`Loop.call_later`."""

    def cancel(self) -> None:
        """Undo it."""


class Dispatcher:
    """Runs callbacks on one daemon thread: when a descriptor is readable or writable, when a time has come, or soon.

    Every public method may be called from any thread and does not block, except :meth:`close`. The thread is started by
    the first call that needs it. What a callback raises is logged; the others go on.
    """

    def __init__(self, name: str = "torchmgmt-dispatcher", clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._name = name
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        # guarded by _lock
        self._soon: deque[Callback] = deque()
        self._timers: list[tuple[float, int, Timer]] = []  # a heap; the number keeps the order of those of one time
        self._thread: threading.Thread | None = None
        self._thread_id = 0
        self._closed = False
        self._wake_fds: tuple[int, int] | None = None
        self._poll_fd: int | None = None
        self._visit: _Visit | None = None
        # belongs to the dispatcher's thread
        self._selector: selectors.BaseSelector | None = None

    def call_soon(self, callback: Callback) -> None:
        """Run ``callback`` on the dispatcher's thread.

        Raises:
            ManagerClosed: it was closed.
            OSError: its thread cannot be started: there is no more of something.
        """
        with self._lock:
            if not self.on_thread():  # what the last callbacks have to put away is put away, too
                self._ensure_running_locked()
            self._soon.append(callback)
            self._wake_locked()

    def call_at(self, when: float, callback: Callback) -> Timer:
        """Run ``callback`` when the clock shows ``when`` (seconds of ``clock``, by default monotonic) or later.

        Raises:
            ManagerClosed: it was closed.
        """
        timer = Timer(when, callback)
        with self._lock:
            self._ensure_running_locked()
            heapq.heappush(self._timers, (when, next(self._numbers), timer))
            if self._timers[0][2] is timer:
                self._wake_locked()
        return timer

    def watch(self, source: HasFileno, on_readable: Callback) -> None:
        """Call ``on_readable`` whenever ``source`` is readable, until :meth:`unwatch`."""
        self.call_soon(lambda: self._set_event(source, selectors.EVENT_READ, on_readable))

    def watch_writable(self, source: HasFileno, on_writable: Callback | None) -> None:
        """Call ``on_writable`` whenever ``source`` can be written to; None ends that. ``source`` must be watched."""
        self.call_soon(lambda: self._set_event(source, selectors.EVENT_WRITE, on_writable))

    def unwatch(self, source: HasFileno, then: Callback | None = None) -> None:
        """Forget ``source``, then call ``then`` on the dispatcher's thread: the place to close it without a race."""
        self.call_soon(lambda: self._unwatch(source, then))

    def on_thread(self) -> bool:
        """Return whether the caller runs on the dispatcher's thread."""
        return threading.get_ident() == self._thread_id

    def run_on(self, loop: Loop) -> Callback:
        """Have an event loop do what the thread of the dispatcher does, until what this returns is called.

        So an answer that is for the loop wakes no other thread first. Both are to be called on the loop's thread, the
        second before the loop is closed; they block for a moment, until the other thread has let go. Meanwhile the loop
        must never wait for anything. Changes nothing if another loop has it already, or the system has no selector that
        can be waited for.

        Raises:
            ManagerClosed: it was closed.
        """
        with self._lock:
            self._ensure_running_locked()
            if self._visit is not None or self._poll_fd is None:
                return _nothing
            self._visit = visit = _Visit(self, loop, self._poll_fd)
            self._wake_locked()
        visit.begin()
        return visit.end

    def close(self) -> None:
        """Stop after the callbacks that are due already, and what those ask for. Idempotent.

        Blocks until the thread ended, unless called on it.
        """
        with self._lock:
            self._closed = True
            thread = self._thread
            self._wake_locked()
        if thread is not None and not self.on_thread():
            thread.join()

    def _ensure_running_locked(self) -> None:
        if self._closed:
            raise ManagerClosed("The dispatcher")
        if self._thread is None:
            with contextlib.ExitStack() as undo:
                # Here, where there may be no descriptor left for it: a thread that failed would be waited for for ever.
                selector = undo.enter_context(selectors.DefaultSelector())
                fds = os.pipe()
                for fd in fds:
                    undo.callback(os.close, fd)
                    os.set_blocking(fd, False)
                thread = threading.Thread(target=self._run, args=(selector, *fds), name=self._name, daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # the system gives us no more threads
                    raise OSError(errno.EAGAIN, str(error)) from error
                undo.pop_all()
            self._wake_fds, self._thread, self._thread_id = fds, thread, thread.ident or 0
            # Whether a selector can be waited for itself depends on the system.
            self._poll_fd = selector.fileno() if hasattr(selector, "fileno") else None

    def _wake_locked(self) -> None:
        if self._wake_fds is None:
            return
        if self.on_thread():
            if self._visit is not None:
                self._visit.wake()
        else:
            # When the pipe is full, so many wake-ups are waiting that one more says nothing.
            with contextlib.suppress(BlockingIOError):
                os.write(self._wake_fds[1], b"\0")

    # -- all below runs on the dispatcher's thread ---------------------------------------------------------------------

    def _run(self, selector: selectors.BaseSelector, wake_fd: int, wake_writer_fd: int) -> None:
        with selector:
            self._selector = selector
            selector.register(wake_fd, selectors.EVENT_READ)
            while not self._closed:
                self.run_round(self._timeout())
                if self._visit is not None:
                    self._visit.host()
            if self._visit is not None:  # it came just before the end, and waits
                self._visit.host()
            while self._soon:
                self._run_due()
        with self._lock:
            self._wake_fds = None
            self._thread_id = 0  # a thread that is started later may be given the same
            os.close(wake_fd)
            os.close(wake_writer_fd)

    def run_round(self, timeout: float | None) -> None:
        """Wait for at most ``timeout`` seconds, and run what is due. For whoever has the dispatcher's work."""
        selector = self._selector
        if selector is None:
            return
        for key, events in selector.select(timeout):
            if key.data is None:
                self._drain_wake_ups(key.fd)
            else:
                self._serve(key, events)
        if self._has_due():
            self._run_due()

    def _timeout(self) -> float | None:
        with self._lock:
            if self._soon:
                return 0
            while self._timers and self._timers[0][2].callback is None:
                heapq.heappop(self._timers)
            if not self._timers:
                return None
            return min(max(0.0, self._timers[0][0] - self.clock()), _LONGEST_WAIT_S)

    def _has_due(self) -> bool:
        """Whether there is something to run. Without the lock: what comes at this moment also wakes the selector."""
        timers = self._timers
        return bool(self._soon) or bool(timers and timers[0][0] <= self.clock())

    def _run_due(self) -> None:
        now = self.clock()
        due: list[Callback] = []
        with self._lock:
            due += self._soon
            self._soon.clear()
            while self._timers and self._timers[0][0] <= now:
                due.append(heapq.heappop(self._timers)[2].run)
        for callback in due:
            self._call(callback)

    def _serve(self, key: selectors.SelectorKey, events: int) -> None:
        if events & selectors.EVENT_READ and (callback := key.data.get(selectors.EVENT_READ)) is not None:
            self._call(callback)
        if events & selectors.EVENT_WRITE and (callback := key.data.get(selectors.EVENT_WRITE)) is not None:
            self._call(callback)

    def _call(self, callback: Callback) -> None:
        try:
            callback()
        except BaseException:  # sys.exit() in one callback must not end what serves all models
            log.exception("A callback of %s failed", self._name)

    def _drain_wake_ups(self, fd: int) -> None:
        # Its byte may have been read together with an earlier one.
        with contextlib.suppress(BlockingIOError):
            os.read(fd, 4096)

    def _set_event(self, source: HasFileno, event: int, callback: Callback | None) -> None:
        selector = self._selector
        if selector is None or not _is_open(source):
            return
        known = selector.get_map().get(source)
        callbacks = dict(known.data) if known else {}
        callbacks[event] = callback
        mask = sum(bit for bit, wanted in callbacks.items() if wanted is not None)
        if known:
            selector.modify(source, mask, callbacks)
        else:
            selector.register(source, mask, callbacks)

    def _unwatch(self, source: HasFileno, then: Callback | None) -> None:
        if self._selector is not None and _is_open(source) and source in self._selector.get_map():
            self._selector.unregister(source)
        if then is not None:
            self._call(then)


class _Visit:
    """The time in which an event loop does a dispatcher's work, whose own thread waits for its return."""

    def __init__(self, dispatcher: Dispatcher, loop: Loop, poll_fd: int) -> None:
        self._dispatcher = dispatcher
        self._loop = loop
        self._poll_fd = poll_fd
        self._has_begun = threading.Event()
        self._is_over = threading.Event()
        self._thread_id = threading.get_ident()
        # of the loop's thread
        self._is_awake = False  # whether a round is running, or about to
        self._timer: Handle | None = None
        self._timer_at = math.inf

    def host(self) -> None:
        """Let the loop do the work until it has enough of that. On the dispatcher's own thread."""
        own = self._dispatcher._thread_id
        self._dispatcher._thread_id = self._thread_id
        self._has_begun.set()
        self._is_over.wait()
        self._dispatcher._thread_id = own

    def begin(self) -> None:
        """Take the work over."""
        self._has_begun.wait()
        self._loop.add_reader(self._poll_fd, self._run)
        self.wake()

    def end(self) -> None:
        """Give the work back. Idempotent; on the loop's thread."""
        if self._is_over.is_set():
            return
        self._loop.remove_reader(self._poll_fd)
        self._set_timer(math.inf)
        self._is_awake = True  # nobody is to wake it any more
        with self._dispatcher._lock:
            self._dispatcher._visit = None
        self._is_over.set()

    def wake(self) -> None:
        """Have a round run soon: something may be due that no descriptor tells of. On the loop's thread."""
        if not self._is_awake:
            self._is_awake = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        if self._is_over.is_set():
            return
        self._is_awake = True
        self._dispatcher.run_round(0)
        if self._is_over.is_set():
            return
        if self._dispatcher._closed:
            self.end()
            return
        self._is_awake = False
        timeout = self._dispatcher._timeout()
        if timeout == 0:
            self.wake()
        else:
            self._set_timer(math.inf if timeout is None else self._dispatcher.clock() + timeout)

    def _set_timer(self, when: float) -> None:
        """Have a round run at ``when``; a timer that is too early is left: it finds nothing to do."""
        if self._timer is not None:
            if self._timer_at <= when < math.inf:
                return
            self._timer.cancel()
            self._timer = None
        if when < math.inf:
            self._timer_at = when
            # Loops count in whole milliseconds, and uvloop takes what is left of the last one for none: until that is over
            # it would look again and again, and take the time from who is waited for.
            delay_ms = math.ceil((when - self._dispatcher.clock()) * 1000)
            self._timer = self._loop.call_later(max(0, delay_ms) / 1000, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None  # perhaps a little early: then the round sets it again
        self._run()


def _nothing() -> None:
    """Undo what was not done."""


def _is_open(source: HasFileno) -> bool:
    """Whether ``source`` still has a descriptor; a closed socket says -1, a closed file raises."""
    try:
        return source.fileno() >= 0
    except ValueError:
        return False
