"""The one thread that waits for everything and decides everything: readable sockets, ended processes, timers, requests.

Whatever number of models a manager holds, one dispatcher serves them all; a model version without workers has nothing
registered here and so costs no thread and no descriptor.

Callers' threads may be interrupted at every call that they make: by Ctrl-C, a signal handler that raises, or an exception
that another thread sets. So they only append to the inbox and wake the thread, which nothing interrupts. A signal handler
may do the same in the midst of that: no lock is held there while another call is made.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import heapq
import itertools
import logging
import math
import os
import selectors
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from attrs import define, field

from torchmgmt.errors import ManagerClosed
from torchmgmt.log_relay import AnyLogger, LogRelay
from torchmgmt.loop_takeover import Callback, Loop, LoopTakeover, RoundsOwner
from torchmgmt.thread_call import ThreadCall, on_new_thread

__all__ = ["Alarm", "Dependent", "Dispatcher", "HasFileno", "Loop", "Timer"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_LONGEST_WAIT_S = 3600.0
"""The system refuses to wait for more than 24 days; to wake once an hour for nothing costs nothing."""
_PARKED_LOOK_S = 0.5
"""So often the parked thread looks whether the loop that has its rounds still runs."""
_FEW_TIMERS = 64
"""So many cancelled timers may lie in the heap, however few others there are."""
_MOST_BAD_ROUNDS = 3
"""So many rounds in a row may fail as a whole."""
_left_open: list[selectors.BaseSelector] = []
"""What was closed by somebody else is not closed again, with its object: its number may be another file's by now."""
_ONE = (1).to_bytes(8, sys.byteorder)


class HasFileno(Protocol):
    """Anything that the operating system can wait for."""

    def fileno(self) -> int:
        """Return the file descriptor."""


class Dependent(Protocol):
    """What cannot go on without the dispatcher's thread."""

    def dispatcher_ended(self) -> None:
        """See to what is left. On that thread, which ends; what asks for it after this is refused."""


@define(eq=False)
class Timer:
    """A callback that is due at a time of the dispatcher's clock, unless cancelled before."""

    when: float
    callback: Callback | None
    _on_cancel: Callable[[], object] = field(default=bool, repr=False)

    def cancel(self) -> None:
        """Make sure that the callback does not run, unless it runs already. Any thread; does not block."""
        if self.callback is not None:
            self.callback = None
            self._on_cancel()

    def run(self) -> None:
        """Run the callback, unless it was cancelled. For the dispatcher."""
        callback, self.callback = self.callback, None
        if callback is not None:
            callback()


class Dispatcher:
    """Runs callbacks on one daemon thread: when a descriptor is readable or writable, when a time has come, or soon.

    Every public method may be called from any thread and in signal handlers, and does not block, except :meth:`close` and
    :meth:`call`. The thread is started by the first call that needs it. What a callback raises is logged; the others go on.

    Args:
        name: the thread's.
        clock: a monotonic clock in seconds.
        relay: logs for it; closed by whoever made it. None: one of its own.
    """

    def __init__(
        self,
        name: str = "torchmgmt-dispatcher",
        clock: Callable[[], float] = time.monotonic,
        relay: LogRelay | None = None,
    ) -> None:
        self.clock = clock
        self.owner = RoundsOwner()
        self._name = name
        self._relay = LogRelay(f"{name}-log") if relay is None else relay
        self._owns_relay = relay is None
        self._inbox: deque[Callback] = deque()
        self._wake_up: _WakeUp | None = None
        self._is_asleep = False  # whether what is put into the inbox may go unnoticed
        self._is_running = False
        self._is_closed = False
        self._has_ended = False
        self._start_lock = threading.Lock()  # held while the thread is started, or while somebody stands in for it
        self._thread: threading.Thread | None = None  # guarded by _start_lock
        # of whoever runs the rounds
        self._round_lock = threading.Lock()
        self._unparked = threading.Event()
        self._selector: selectors.BaseSelector | None = None
        self._timers = _Timers()
        self._bad_rounds = 0  # that failed as a whole, one after the other
        self._dependents: weakref.WeakSet[Dependent] = weakref.WeakSet()

    def call_soon(self, callback: Callback) -> None:
        """Run ``callback`` on the dispatcher's thread.

        Raises:
            ManagerClosed: it was closed.
            OSError: its thread cannot be started: there is no more of something.
        """
        is_here = self.owner.is_here()  # what the last callbacks have to put away is put away, too
        if not (self._is_running or is_here):
            on_new_thread(self._start_thread)
        # Whatever interrupts the first comes after it, and the second is done all the same.
        try:
            self._inbox.append(callback)
        finally:
            if not is_here:
                if self._is_asleep and (wake_up := self._wake_up) is not None:
                    wake_up.send()
            elif self.owner.host is not None:
                self.owner.host.wake()
        if self._has_ended and not is_here:
            self._take_back(callback)

    def call_at(self, when: float, callback: Callback) -> Timer:
        """Run ``callback`` when the clock shows ``when`` (seconds of ``clock``, by default monotonic) or later.

        Raises:
            ManagerClosed, OSError: as :meth:`call_soon`.
        """
        timer = Timer(when, callback, self._timers.note_cancelled)
        if self.owner.is_here() and not self._is_closed:
            if self._timers.push(timer) and self.owner.host is not None:
                self.owner.host.wake()
        else:
            self.call_soon(lambda: self._timers.push(timer))
        return timer

    def call(self, act: Callable[[], T]) -> T:
        """Return what ``act`` returns, or raise what it raises; it runs on the dispatcher's thread. Blocks until then.

        Where there is no thread yet, a short-lived one stands in for it, unless ``act`` needs it. Who is interrupted while
        it waits leaves ``act`` to be done.

        Raises:
            ManagerClosed, OSError: as :meth:`call_soon`.
        """
        if self.owner.is_here():
            return self.act_here(act)
        if not (self._is_running or self._is_closed):
            return on_new_thread(lambda: self._call_without_thread(act))
        call = ThreadCall(act)
        self.call_soon(call.run)
        return call.result()

    def act_here(self, act: Callable[[], T]) -> T:
        """Return what ``act`` returns, or raise what it raises; the caller is on the dispatcher's thread.

        Where that is the main thread, as its event loop has the rounds, no signal handler interrupts it.
        """
        host = self.owner.host
        if host is None:
            return act()
        with host.held_signals:
            return act()

    def add_dependent(self, dependent: Dependent) -> None:
        """Tell ``dependent`` should the thread end, in which way ever. It is not kept alive by this."""
        self._dependents.add(dependent)

    def watch(self, source: HasFileno, on_readable: Callback) -> None:
        """Call ``on_readable`` whenever ``source`` is readable, until :meth:`unwatch`."""
        self.call_soon(lambda: self._set_event(source, selectors.EVENT_READ, on_readable))

    def watch_writable(self, source: HasFileno, on_writable: Callback | None) -> None:
        """Call ``on_writable`` whenever ``source`` can be written to; None ends that. ``source`` must be watched."""
        self.call_soon(lambda: self._set_event(source, selectors.EVENT_WRITE, on_writable))

    def unwatch(self, source: HasFileno, then: Callback | None = None) -> None:
        """Forget ``source``, then call ``then`` on the dispatcher's thread: the place to close it without a race."""
        self.call_soon(lambda: self._unwatch(source, then))

    @property
    def has_ended(self) -> bool:
        """Whether its thread has ended, in which way ever: nothing that it is asked for is done any more."""
        return self._has_ended

    def on_thread(self) -> bool:
        """Return whether the caller runs on the dispatcher's thread, or on that of the loop that has its rounds."""
        return self.owner.is_here()

    def log(self, logger: AnyLogger, level: int, message: str, *args: object, exc_info: Any = None) -> None:
        """Have ``logger`` log a message, on another thread; see :meth:`torchmgmt.log_relay.LogRelay.log`."""
        self._relay.log(logger, level, message, *args, exc_info=exc_info)

    def run_on(self, loop: Loop) -> Callback:
        """Have an event loop do what the thread of the dispatcher does, until what this returns is called.

        So an answer that is for the loop wakes no other thread first. Both are to be called on the loop's thread, the
        second before the loop is closed; the loop begins as soon as the other thread has let go. Meanwhile the loop must
        never wait for anything. One that has stopped for a second without having given the work back loses it. Changes
        nothing if another loop has it already, or the system has no selector that can be waited for.

        Where the loop is the main thread's, signal handlers run between the rounds, not in the midst of one.

        Raises:
            ManagerClosed, OSError: as :meth:`call_soon`.
        """
        if not self._is_running:
            on_new_thread(self._start_thread)
        poll_fd = getattr(self._selector, "fileno", lambda: -1)()
        takeover = LoopTakeover(self, loop, poll_fd)
        if poll_fd < 0 or not self.owner.ask(takeover):
            return _nothing
        self._unparked.set()
        self.call_soon(_nothing)  # the thread sees that it is asked once it is awake
        return takeover.end

    def close(self) -> None:
        """Stop after the callbacks that are due already, and what those ask for. Idempotent.

        Blocks until the thread ended, unless called on it.
        """
        with self._start_lock:
            self._is_closed = True
            thread = self._thread
        if (wake_up := self._wake_up) is not None:
            wake_up.send()
            self._unparked.set()
        if not self.owner.is_here():
            if thread is not None:
                thread.join()
            if self._owns_relay:
                self._relay.close()

    # -- starting ------------------------------------------------------------------------------------------------------

    def _start_thread(self) -> None:
        """Start the thread, if there is none. On another one than a caller's."""
        with self._start_lock, contextlib.ExitStack() as undo:
            if self._is_closed:
                raise ManagerClosed("The dispatcher")
            if self._thread is not None:
                return
            selector = undo.enter_context(selectors.DefaultSelector())
            wake_up = _WakeUp(_event_fds())
            selector.register(wake_up, selectors.EVENT_READ)
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._selector, self._wake_up = selector, wake_up
            self._is_asleep = True  # as far as anybody knows: what comes before it has looked wakes it for nothing
            try:
                thread.start()
            except RuntimeError as error:
                self._selector = self._wake_up = None
                raise OSError(errno.EAGAIN, str(error)) from error
            undo.pop_all()
            self._thread, self._is_running = thread, True

    def _take_back(self, callback: Callback) -> None:
        """Raise ManagerClosed if the thread ended before it came to ``callback``, which is put away."""
        try:
            self._inbox.remove(callback)
        except ValueError:
            return  # it ran
        raise ManagerClosed("The dispatcher")

    def _call_without_thread(self, act: Callable[[], T]) -> T:
        with self._start_lock:
            if self._thread is None and not self._is_closed:
                return self._stand_in(act)
        return self.call(act)

    def _stand_in(self, act: Callable[[], T]) -> T:
        """Do what the thread would do, which is not started; what asks for it meanwhile has it started."""
        self.owner.stand_in()
        try:
            return act()
        finally:
            self.owner.end_standing_in()
            if self._inbox or len(self._timers):
                _thread.start_new_thread(self._start_if_possible, ())  # not here, where its lock is held

    def _start_if_possible(self) -> None:
        with contextlib.suppress(ManagerClosed, OSError):
            self._start_thread()

    # -- for whoever runs the rounds -----------------------------------------------------------------------------------

    def run_round(self, timeout: float | None) -> None:
        """Wait for at most ``timeout`` seconds, and run what is due."""
        selector = self._selector
        if selector is None:
            return
        self._is_asleep = True
        # In this order: what is put into the inbox from now on wakes the selector.
        ready = selector.select(0 if self._inbox else timeout)
        self._is_asleep = False
        for key, events in ready:
            if key.data is None:
                key.fileobj.drain()  # type: ignore[union-attr]  # the one source without callbacks is ours
            else:
                self._serve(key, events)
        self._run_due()

    def visit(self) -> float | None:
        """Run a round for the loop that has taken over; see :class:`torchmgmt.loop_takeover.Rounds`."""
        with self._round_lock:
            if not self.owner.is_here():
                return None
            try:
                self.run_round(0)
            except BaseException as error:
                self.log(log, logging.ERROR, "%s goes back to its own thread", self._name, exc_info=error)
                if self.owner.host is not None:
                    self.owner.host.lose()
                return None
            self._is_asleep = True
            return self.clock() if self._inbox else self._timers.next_at()

    def note_returned(self) -> None:
        """Wake the parked thread. For takeovers."""
        self._unparked.set()

    def _run(self) -> None:
        self.owner.begin()
        try:
            self._run_rounds()
        except BaseException as error:  # what is owed to others must not depend on what somebody has foreseen
            self.log(log, logging.CRITICAL, "%s ends", self._name, exc_info=error)
        self._is_closed = True
        self._is_running = False
        for dependent in list(self._dependents):
            self._call(dependent.dispatcher_ended)
        self._has_ended = True  # from here on, who has put something into the inbox looks whether it is still there
        while self._inbox:
            self._run_due()
        self.owner.end()
        self._wake_up = None
        if self._selector is not None:
            with contextlib.suppress(OSError):
                self._selector.close()

    def _run_rounds(self) -> None:
        while not self._is_closed or self._inbox:
            takeover = self.owner.park()
            if takeover is not None:
                self._wait_for_return_of(takeover)
                continue
            try:
                with self._round_lock:
                    self.run_round(self._timeout())
                self._bad_rounds = 0
            except BaseException as error:  # such as that somebody has closed all descriptors of the program
                self._bad_rounds += 1
                if self._bad_rounds > _MOST_BAD_ROUNDS:
                    raise
                self.log(log, logging.ERROR, "%s begins anew", self._name, exc_info=error)
                self._begin_anew()

    def _begin_anew(self) -> None:
        """Wait for all that is watched in a new selector. What that refuses hears that it can be read, and sees why not."""
        broken, wake_up = self._selector, self._wake_up
        keys = list(broken.get_map().values()) if broken is not None else []
        if broken is not None and _is_closed_elsewhere(broken):
            _left_open.append(broken)
            if wake_up is not None:
                wake_up.leave_open()
        self._selector, self._wake_up = selectors.DefaultSelector(), _WakeUp(_event_fds())
        self._selector.register(self._wake_up, selectors.EVENT_READ)
        for key in keys:
            if key.data is None:
                continue  # the old wake-up
            try:
                self._selector.register(key.fileobj, key.events, key.data)
            except (OSError, ValueError):
                self._inbox.append(key.data[selectors.EVENT_READ])

    def _wait_for_return_of(self, takeover: LoopTakeover) -> None:
        """Let a loop run the rounds until it gives them back, or has stopped."""
        self._unparked.clear()
        with contextlib.suppress(RuntimeError):  # it is closed: then it does not run, either
            takeover.loop.call_soon_threadsafe(takeover.begin)
        was_running = True
        while self.owner.host is takeover:
            if self._unparked.wait(_PARKED_LOOK_S) and not self._is_closed:
                continue
            is_running = takeover.loop.is_running()
            if self._is_closed or not (is_running or was_running):
                with self._round_lock:  # not in the midst of a round
                    takeover.lose()
            was_running = is_running
        self.owner.resume()

    def _timeout(self) -> float | None:
        if self._inbox or self._is_closed:
            return 0
        next_at = self._timers.next_at()
        return None if next_at is None else min(max(0.0, next_at - self.clock()), _LONGEST_WAIT_S)

    def _run_due(self) -> None:
        if len(self._timers):
            for timer in self._timers.take_due(self.clock()):
                self._inbox.append(timer.run)
        for _ in range(len(self._inbox)):
            self._call(self._inbox.popleft())

    def _serve(self, key: selectors.SelectorKey, events: int) -> None:
        if events & selectors.EVENT_READ and (callback := key.data.get(selectors.EVENT_READ)) is not None:
            self._call(callback)
        if events & selectors.EVENT_WRITE and (callback := key.data.get(selectors.EVENT_WRITE)) is not None:
            self._call(callback)

    def _call(self, callback: Callback) -> None:
        try:
            callback()
        except BaseException as error:  # sys.exit() in one callback must not end what serves all models
            self.log(log, logging.ERROR, "A callback of %s failed", self._name, exc_info=error)

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
            then()


class Alarm:
    """A callback that is due at one time, which may be moved. For the dispatcher's thread.

    To move it to a later time costs nothing: it is looked at when the earlier one comes.

    Args:
        dispatcher: whose thread it runs on.
        callback: what runs.
    """

    def __init__(self, dispatcher: Dispatcher, callback: Callback) -> None:
        self._dispatcher = dispatcher
        self._callback = callback
        self._timer: Timer | None = None
        self.when = math.inf
        """When it is due; infinity: never."""

    def set(self, when: float) -> None:
        """Have it due at ``when``, by the dispatcher's clock, in place of any other time; infinity: never."""
        self.when = when
        if when < (math.inf if self._timer is None else self._timer.when):
            if self._timer is not None:
                self._timer.cancel()
            with contextlib.suppress(ManagerClosed):  # then nobody is there whom it could wake
                self._timer = self._dispatcher.call_at(when, self._look)

    def _look(self) -> None:
        self._timer = None
        when = self.when
        if when <= self._dispatcher.clock():
            self.when = math.inf
            self._callback()
        elif when < math.inf:
            self.set(when)


class _Timers:
    """A heap of timers, the next one first. For one thread, but for :meth:`note_cancelled`."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._heap: list[tuple[float, int, Timer]] = []  # the number keeps the order of those of one time
        self._cancelled = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, timer: Timer) -> bool:
        """Add one; return whether it is the next."""
        if self._cancelled > max(_FEW_TIMERS, len(self._heap) // 2):
            self._heap = [entry for entry in self._heap if entry[2].callback is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0
        heapq.heappush(self._heap, (timer.when, next(self._numbers), timer))
        return self._heap[0][2] is timer

    def next_at(self) -> float | None:
        """Return when the next one is due that was not cancelled; None if there is none."""
        while self._heap and self._heap[0][2].callback is None:
            self._pop()
        return self._heap[0][0] if self._heap else None

    def take_due(self, now: float) -> list[Timer]:
        """Take those away that are due by now, in their order."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            due.append(self._heap[0][2])
            self._pop()
        return due

    def note_cancelled(self) -> None:
        """Note that one was cancelled: to look for them all takes its time, and is done when they are many. Any thread."""
        self._cancelled += 1

    def _pop(self) -> None:
        if heapq.heappop(self._heap)[2].callback is None and self._cancelled:
            self._cancelled -= 1


class _WakeUp:
    """A descriptor that is readable once somebody has called :meth:`send`. Any thread, and signal handlers.

    It is closed with the object: its number may be another file's afterwards, and who is in the midst of sending has the
    object. A lock would not do: a signal handler in the midst of sending may wait for a thread that sends, too.
    """

    def __init__(self, fds: tuple[int, int]) -> None:
        self._reader, self._writer = fds
        self._is_ours = True

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._reader

    def send(self) -> None:
        """Make it readable."""
        try:
            os.write(self._writer, _ONE)
        except BlockingIOError:
            pass  # so much is there to be read that more says nothing

    def drain(self) -> None:
        """Read all that was sent."""
        try:
            os.read(self._reader, 4096)
        except BlockingIOError:
            pass  # it was read with what was sent before

    def leave_open(self) -> None:
        """Close nothing: its numbers may be another file's."""
        self._is_ours = False

    def __del__(self) -> None:
        for fd in {self._reader, self._writer} if self._is_ours else ():
            os.close(fd)


def _event_fds() -> tuple[int, int]:
    """Return where to read and where to write, not blocking; the same descriptor where the system has such."""
    try:
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    except (AttributeError, OSError):  # another system, or a container that forbids it
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        return reader, writer
    return fd, fd


def _is_closed_elsewhere(selector: selectors.BaseSelector) -> bool:
    """Whether somebody has closed what it waits with, such as a program that closes all descriptors that it does not know."""
    try:
        selector.select(0)
    except Exception as error:
        return isinstance(error, OSError)
    return False


def _nothing() -> None:
    """Undo what was not done."""


def _is_open(source: HasFileno) -> bool:
    """Whether ``source`` still has a descriptor; a closed socket says -1, a closed file raises."""
    try:
        return source.fileno() >= 0
    except ValueError:
        return False
