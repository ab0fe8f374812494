"""The embedding process's handle on one worker process."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import attrs

from torchmgmt.backends import Outcome, WorkerListener
from torchmgmt.backends.child import Child, describe_exit
from torchmgmt.backends.forker import FORK_LIMIT_S
from torchmgmt.backends.output import Output
from torchmgmt.channel import Buffer, Channel, Frame, Kind, frame_parts
from torchmgmt.dispatcher import Dispatcher, Timer
from torchmgmt.errors import ManagerClosed
from torchmgmt.exchange import AnswerHead, Encoded, WorkerRequest
from torchmgmt.page import PAGE_BYTES, Page
from torchmgmt.process_signals import HURRY
from torchmgmt.records import WorkerExit, WorkerFault, WorkerJob
from torchmgmt.seat import Seat
from torchmgmt.segments import size_of
from torchmgmt.system_calls import fix_size, nameless_file

__all__ = ["Parent", "ProcessWorker", "no_watch", "watch_exit"]

log = logging.getLogger(__name__)

# A worker whose channel is closed can do nothing for us any more; it gets this long to end by itself.
_LINGER_S = 2.0
# Whoever has forked a worker reports its end within this time, or hangs.
_REPORT_LIMIT_S = 2.0
# After so long each side has seen what the other one wrote before: the worker that a batch is recalled, or we that it has
# begun it. It takes microseconds.
_SEEN_S = 0.002


# What a caller sends itself is in its worker's socket by then, or never.
_SENT_S = 0.1
_MOST_AT_ONCE = 8 << 10


class Parent(Protocol):
    """Who has workers forked. Thread-safe; nothing blocks."""

    @property
    def dispatcher(self) -> Dispatcher:
        """Reads the workers' channels."""

    @property
    def is_closed(self) -> bool:
        """Whether there will be no more workers."""

    def open_output(self, fd: int, job: WorkerJob) -> Output:
        """Read what a worker prints."""

    def fork(self, worker: ProcessWorker, job: WorkerJob, fds: Sequence[int]) -> None:
        """Have a worker forked now, or once its template is ready. The descriptors are its own, and closed here."""

    def withdraw(self, worker: ProcessWorker) -> bool:
        """Take back the wish to have it forked; whether that was in time."""

    def end_loading(self, worker: ProcessWorker) -> bool:
        """End the process that the worker waits to be forked from; whether it waits for one."""

    def hung_after_fork(self, worker: ProcessWorker) -> None:
        """The worker was forked from a template and showed no sign of life."""

    def was_forked(self, worker: ProcessWorker) -> None:
        """It has a process of its own."""

    def forget(self, worker: ProcessWorker) -> None:
        """It is gone."""


class ProcessWorker:
    """One worker process; see :class:`torchmgmt.backends.WorkerHandle`."""

    def __init__(self, parent: Parent, job: WorkerJob, listener: WorkerListener) -> None:
        self.child = Child(parent.dispatcher.call_at)
        self.template: Child | None = None
        """What it is forked from, if that has loaded the model, so that little is left to do before it is ready."""
        self._parent = parent
        self._dispatcher = parent.dispatcher
        self._job = job
        self._listener = listener
        self._fault: WorkerFault | None = None
        self._is_alive = False
        self._end_reason = ""
        self._stop_watching: Callable[[], object] = no_watch
        self._timers: list[Timer] = []
        self._is_orphan = False
        self._is_gone = False
        self._is_broken = False
        self._was_cut_off = False
        self._channel: Channel  # these three from start on
        self._output: Output
        self._page: Page
        self._is_open = False
        self._lock = threading.Lock()
        # guarded by _lock
        self._is_over = False
        self._is_started = False
        self._is_to_be_killed = False

    def __repr__(self) -> str:
        return f"<ProcessWorker {self._job.worker_id} of {self._job.spec.key}, pid {self.child.pid}>"

    @property
    def pid(self) -> int | None:
        """Its process id, before it is forked that of its template; None until known."""
        waits = self.child.pid is None and self.template is not None
        return self.template.pid if waits and self.template is not None else self.child.pid

    @property
    def memory_bytes(self) -> int:
        """Its proportional (else resident) set size when last sampled; 0 before that."""
        return self.child.memory_bytes

    @property
    def private_bytes(self) -> int:
        """Its unique set size when last sampled; 0 before that."""
        return self.child.private_bytes

    def start(self) -> None:
        """Have the process forked. What it is sent before it runs waits in the socket."""
        fds = self._open()
        try:
            self._parent.fork(self, self._job, fds)
        except BaseException:
            if not self._is_last():
                return  # the backend was closed meanwhile, and the listener told
            self._output.close()
            self._close_ends()
            raise
        with self._lock:
            self._is_started = True
            is_to_be_killed = self._is_to_be_killed
        if is_to_be_killed:
            self.kill()

    def last_lines(self) -> Sequence[str]:
        """Return the last lines that the worker printed."""
        return self._output.last_lines() if self._is_open else ()

    def run(self, number: int, requests: Sequence[WorkerRequest]) -> None:
        """Send it a batch."""
        head = [each.head() for each in requests]
        segments = [segment for request in requests for segment in request.row.segments]
        self._send(Frame(Kind.RUN, head, segments, number))

    def seat(self, number: int) -> Seat | None:
        """Return a place from which a batch can be sent to it, unless there is something to be sent along."""
        if self._is_over or not self._channel.is_plain:
            return None
        return Seat(number, functools.partial(_written, number), self._channel.send_raw)

    def see_to_seat(self, seat: Seat) -> None:
        """Look a moment later whether all was sent."""
        self._after(_SENT_S, functools.partial(self._check_sent, seat))

    def _check_sent(self, seat: Seat) -> None:
        if not (seat.was_sent() or self._is_over):
            self._end("a request could be sent to it only in part")

    def abandon(self, number: int) -> None:
        """Let it know that nobody waits for a batch any more."""
        with contextlib.suppress(ValueError):  # it is gone, and its page closed
            self._page.abandon(number)

    def recall(self, numbers: Collection[int], *, but: int) -> None:
        """Have it begin none of these batches that it has not begun, and tell which those are."""
        with contextlib.suppress(ValueError, ManagerClosed):
            with self._lock:
                self._page.recall(max(numbers), but=but)
            self._after(_SEEN_S, functools.partial(self._tell_skipped, numbers))

    def describe(self, number: int) -> None:
        """Have it run its handler's ``describe_handle``."""
        self._send(Frame(Kind.DESCRIBE, number=number))

    def stop(self) -> None:
        """Ask it to end after what it was sent."""
        self._send(Frame(Kind.STOP))

    def terminate(self) -> None:
        """End it as it loads, or although it did not heed :meth:`stop`; one that is not forked yet never is."""
        with self._lock:
            if not self._is_started:
                return
        if self._parent.withdraw(self) or not self.child.send(HURRY):
            self._on_dispatcher(lambda: self._finish_unforked("it was told to end before it was forked"))

    def kill(self) -> None:
        """Have it write down where it is, then send it SIGKILL."""
        with self._lock:
            self._is_to_be_killed = True
            if not self._is_started:
                return  # whoever starts it sees to that
        if self._parent.end_loading(self) or self.child.kill():
            return
        # Not forked yet, perhaps because torch is being imported. Nobody shall wait for that; if the process still comes
        # to be, it is killed at once.
        self._on_dispatcher(lambda: self._finish_unforked("it was not forked in time"))

    def end_if_stopped(self) -> None:
        """Kill it if somebody has stopped it for too long. Not for a thread that carries answers."""
        if self.child.is_stopped_for_long():
            self._end("it was stopped (SIGSTOP) for over a second")

    # -- called by who forks it, on the dispatcher's thread ------------------------------------------------------------

    def forked(self, pid: int, pidfd: int | None) -> None:
        """The process runs."""
        self.child.forked(pid, pidfd)
        self._parent.was_forked(self)
        if self._is_over:
            return
        self._dispatcher.watch(self._channel, self._on_readable)
        if pidfd is not None:
            self._stop_watching = watch_exit(self._dispatcher, self.child, self._on_gone)
        if self.template is not None:
            self._after(FORK_LIMIT_S, self._check_sign_of_life)

    def fork_failed(self, reason: str, last_lines: Sequence[str], *, is_retryable: bool = False) -> None:
        """There is no process."""
        self._finish(WorkerExit(0, None, reason, last_lines, is_retryable=is_retryable))

    def template_failed(self, exit: WorkerExit) -> None:
        """There is no process, because the one that it was to be forked from ended while it loaded the model."""
        self._finish(exit)

    def process_exited(self, exitcode: int | None) -> None:
        """The process is gone; what it sent before is read first, so that no finished batch is lost with it."""
        if self._is_over:
            return  # it was given up before it came to be
        self._read_the_rest()
        reason = self._end_reason or describe_exit(exitcode)
        if self._was_cut_off and exitcode in {None, -signal.SIGKILL} and not self._end_reason:
            reason = "it had closed the socket through which it is spoken to, and was killed"
        lines = self.last_lines()
        started = self._page.started
        self._finish(WorkerExit(self.child.pid or 0, exitcode, reason, lines, self._fault, started))

    def orphaned(self) -> None:
        """The process may live on without anybody who reports its end: what we see of that counts."""
        self._is_orphan = True
        if self._is_gone:
            self.process_exited(None)
        elif self._stop_watching is no_watch:
            self._stop_watching = watch_exit(self._dispatcher, self.child, self.process_exited)

    def _on_gone(self, _exitcode: int | None) -> None:
        """It has ended. Whoever has forked it is to say how, if that one is there and well."""
        self._is_gone = True
        if self._is_orphan:
            self.process_exited(None)
        else:
            self._after(_REPORT_LIMIT_S, functools.partial(self.process_exited, None))

    def _tell_skipped(self, numbers: Collection[int]) -> None:
        """Tell which of these batches it has not begun by now: that it never does."""
        if self._is_over:
            return  # its end tells that, too
        started = self._page.started
        # What it began before that one it has answered before: those answers are here, and are to be told first.
        self._read_the_rest()
        for number in numbers:
            if number != started and self._page.is_recalled(number):
                self._listener.skipped(number)

    def _finish_unforked(self, reason: str) -> None:
        if self.child.pid is None:
            self._finish(WorkerExit(0, None, reason, last_started=0))

    def _check_sign_of_life(self) -> None:
        if not (self._is_alive or self._fault or self._is_over):
            self._parent.hung_after_fork(self)
            self._end(f"it was forked, but gave no sign of life within {FORK_LIMIT_S:g} s")

    def _end(self, reason: str) -> None:
        self._end_reason = reason
        message = "Killing worker %s of %s: %s"
        self._dispatcher.log(log, logging.ERROR, message, self._job.worker_id, self._job.spec.key, reason)
        self.child.kill()

    def _on_readable(self) -> None:
        try:
            frames = self._channel.read()
            for frame in frames or ():
                self._on_frame(frame)
        except BlockingIOError:
            return
        except Exception as error:  # nonsense, or more than there is memory for: nobody knows what follows it
            self._break(error)
            return
        if frames is None:
            self._on_channel_closed()

    def _break(self, error: Exception) -> None:
        """Read nothing of it any more, and end it."""
        self._is_broken = True
        self._dispatcher.unwatch(self._channel)
        what = "the connection to it broke" if isinstance(error, OSError) else "what it sent could not be read"
        self._end(f"{what} ({type(error).__name__}: {error})")

    def _on_channel_closed(self) -> None:
        self._channel.close_sending()
        self._dispatcher.unwatch(self._channel, self._channel.close)
        # Its end is reported by whoever reaps it. A handler may have closed the descriptor and live on, though.
        self._after(_LINGER_S, self._cut_off)

    def _cut_off(self) -> None:
        self._was_cut_off = self.child.send(signal.SIGKILL)

    def _read_the_rest(self) -> None:
        if self._is_broken:
            return
        with contextlib.suppress(Exception):  # nothing is there, or what cannot be read; it has ended anyway
            while (frames := self._channel.read()) is not None:
                for frame in frames:
                    self._on_frame(frame)

    def _on_frame(self, frame: Frame) -> None:
        if frame.kind is Kind.DONE:
            head, metrics, handler_s = frame.head
            self._listener.done(frame.number, _outcomes(head, frame.segments), handler_s)
            if metrics:
                self._listener.measured(metrics)
        elif frame.kind is Kind.PART:
            index, head = frame.head
            self._listener.part(frame.number, index, _answer(head, frame.segments))
        elif frame.kind is Kind.SKIPPED:
            self._listener.skipped(frame.number)
        elif frame.kind is Kind.REFUSED:
            self._listener.refused(frame.number, frame.head)
        elif frame.kind is Kind.READY:
            self._is_alive = True
            self._listener.ready()
            if frame.head:
                self._listener.measured(frame.head)
        elif frame.kind is Kind.ALIVE:
            self._is_alive = True
        elif frame.kind is Kind.FAILED:
            self._fault = frame.head

    def _finish(self, exit: WorkerExit) -> None:
        if not self._is_last():
            return
        self._stop_watching()
        for timer in self._timers:
            timer.cancel()  # or it would keep this one until it goes off
        self._timers.clear()
        self.child.forget()
        self._channel.close_sending()
        self._dispatcher.unwatch(self._channel, self._close_ends)
        self._output.close()
        self._parent.forget(self)
        self._listener.exited(attrs.evolve(exit, is_final=True) if self._parent.is_closed else exit)

    def _is_last(self) -> bool:
        """Mark it as over; return whether it was not before."""
        with self._lock:
            was_over, self._is_over = self._is_over, True
        return not was_over

    def _close_ends(self) -> None:
        self._channel.close()
        self._page.close()

    def _open(self) -> Sequence[int]:
        """Make what connects it with its process, and return the descriptors that the process gets."""
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            undo.callback(theirs.close)
            reader, writer = os.pipe()
            undo.callback(os.close, writer)
            output = self._parent.open_output(reader, self._job)
            undo.callback(output.close)
            snapshot = self._job.spec.live.descriptors() if self._job.spec.live is not None else ()
            for fd in snapshot:
                undo.callback(os.close, fd)
            page_fd, page = _shared_page()
            undo.pop_all()
        ours.setblocking(False)
        self._channel, self._output, self._page = Channel(ours, self._watch_writable), output, page
        self._is_open = True
        return theirs.detach(), writer, page_fd, *snapshot

    def _send(self, frame: Frame) -> None:
        if self._is_open:
            self._channel.send(frame)

    def _on_dispatcher(self, callback: Callable[[], object]) -> None:
        with contextlib.suppress(ManagerClosed):  # then all are told of their end
            self._dispatcher.call_soon(callback)

    def _after(self, seconds: float, callback: Callable[[], object]) -> None:
        """Have ``callback`` called, unless this one has ended by then."""
        if not self._is_over:
            self._timers = [timer for timer in self._timers if timer.callback is not None]
            self._timers.append(self._dispatcher.call_at(time.monotonic() + seconds, callback))

    def _watch_writable(self, on: bool) -> None:
        self._dispatcher.watch_writable(self._channel, self._channel.flush if on else None)


def no_watch() -> None:
    """Stop watching what was never watched."""


def watch_exit(dispatcher: Dispatcher, child: Child, on_exit: Callable[[int | None], object]) -> Callable[[], object]:
    """Have ``on_exit`` called when a process has ended that nobody else watches; without pidfds it is ended now.

    Returns what ends that, which is to be called on the dispatcher's thread and does nothing the second time.
    """
    pidfd = child.copy_pidfd()
    if pidfd is None:
        child.send(signal.SIGKILL)
        on_exit(None)
        return no_watch
    watched = os.fdopen(pidfd, "rb", buffering=0)

    def stop() -> None:
        dispatcher.unwatch(watched, watched.close)

    def on_readable() -> None:
        stop()
        on_exit(None)

    dispatcher.watch(watched, on_readable)
    return stop


def _shared_page() -> tuple[int, Page]:
    """Return the memory that a worker shares with us, as a descriptor for it and mapped for us."""
    fd = nameless_file("torchmgmt-started")
    try:
        os.write(fd, bytes(PAGE_BYTES))
        fix_size(fd)
        return fd, Page(fd)
    except BaseException:
        os.close(fd)
        raise


def _written(number: int, request: WorkerRequest) -> bytes | None:
    """Return the frame of a batch of one; None if it is too large to be sent at once."""
    if sum(map(size_of, request.row.segments)) > _MOST_AT_ONCE:
        return None
    parts = frame_parts(Frame(Kind.RUN, [request.head()], request.row.segments, number))
    return parts[0] if len(parts) == 1 and isinstance(parts[0], bytes) else None


def _outcomes(head: Sequence[AnswerHead | WorkerFault], segments: Sequence[Buffer]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    start = 0
    for each in head:
        if isinstance(each, WorkerFault):
            outcomes.append(each)
            continue
        stop = start + (each if isinstance(each, int) else each[0])
        outcomes.append(_answer(each, segments[start:stop]))
        start = stop
    return outcomes


def _answer(head: AnswerHead, segments: Sequence[Buffer]) -> Encoded:
    return Encoded(segments) if isinstance(head, int) else Encoded(segments, head[1], head[2])
