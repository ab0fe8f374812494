"""The embedding process's side of a process that forks others: the torch-only process, or a template."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from torchmgmt.backends.child import Child
from torchmgmt.channel import Frame, FrameReader, FrameSender, Kind
from torchmgmt.dispatcher import Dispatcher
from torchmgmt.errors import ManagerClosed
from torchmgmt.records import TemplateJob, WorkerJob

__all__ = ["FORK_LIMIT_S", "ForkListener", "Forker"]

log = logging.getLogger(__name__)

# A fork takes milliseconds, so a process that answers nothing for longer than this hangs. One of many forks that were
# asked for together may take longer: a hundred models that are loaded at once leave the torch-only process little time.
FORK_LIMIT_S = 10.0
_MAX_FDS = 16


class ForkListener(Protocol):
    """Who is told of one child. Called on the dispatcher's thread."""

    @property
    def child(self) -> Child:
        """The process; its pid is None before ``forked``."""

    def forked(self, pid: int, pidfd: int | None) -> None:
        """The child runs. The descriptor is the listener's from now on; None where the system has none."""

    def fork_failed(self, reason: str, last_lines: Sequence[str], *, is_retryable: bool = False) -> None:
        """There is no child and there will be none. ``is_retryable``: because who should fork it has died since."""

    def process_exited(self, exitcode: int | None) -> None:
        """The child is gone; None if its status is not known."""

    def orphaned(self) -> None:
        """The process that forked it is gone, the child perhaps not: nobody will report its end."""


class Forker:
    """Has children forked by one process, and tells their listeners what becomes of them. Thread-safe; nothing blocks.

    Args:
        control: a non-blocking socket to the process; owned and, in the end, closed here.
        dispatcher: reads it.
        numbers: where the children's numbers come from; no two processes of one backend may use the same.
        on_message: gets what the process says beside what becomes of its children.
        on_end: called once when the process has closed its end, after all that it had said was dealt with.
        on_stuck: called when it was asked, and has answered nothing at all for so long that it must hang; returns whether
            to go on waiting.
    """

    def __init__(
        self,
        control: socket.socket,
        dispatcher: Dispatcher,
        numbers: itertools.count[int],
        *,
        on_message: Callable[[Frame], object],
        on_end: Callable[[], object],
        on_stuck: Callable[[], bool],
    ) -> None:
        control.setblocking(False)
        self._control = control
        self._dispatcher = dispatcher
        self._numbers = numbers
        self._on_message = on_message
        self._on_end = on_end
        self._on_stuck = on_stuck
        self._reader = FrameReader(max_fds=_MAX_FDS)
        self._sender = FrameSender(control, self._watch_writable)
        self._heard_at = 0.0  # belongs to the dispatcher's thread
        self._lock = threading.Lock()
        # guarded by _lock
        self._listeners: dict[int, ForkListener] = {}
        self._unanswered: set[int] = set()  # noted before it is asked
        self._is_over = False  # whoever asks from now on is told so at once

    def listen(self) -> None:
        """Begin to read."""
        self._dispatcher.watch(self._control, self._on_readable)

    def send(self, frame: Frame) -> None:
        """Send the process a message."""
        self._sender.send(frame)

    def fork(
        self, job: WorkerJob | TemplateJob, fds: Sequence[int], listener: ForkListener, *, in_place: bool = False
    ) -> int:
        """Have a child forked that does ``job``; its descriptors ``fds`` are closed here. Return its number.

        ``in_place``: the process shall not fork but do it itself, and forks no more. It is told of as what it was.

        Raises:
            ManagerClosed: the process is gone, and so is the dispatcher that would tell ``listener`` of it.
            Exception: ``job`` cannot be pickled; whatever that raises.
        """
        number = next(self._numbers)
        with self._lock:
            is_over = self._is_over
            if not (is_over or in_place):
                self._listeners[number] = listener
                self._unanswered.add(number)
        if is_over:
            _close_all(fds)
            if not in_place:
                # Its end was dealt with while we were on our way here: nobody else will say so.
                reason = "the process that was to fork it ended"
                self._dispatcher.call_soon(lambda: listener.fork_failed(reason, [], is_retryable=True))
            return number
        try:
            # By itself, so that a job which cannot be unpickled over there is known by its number.
            pickled = pickle.dumps((job, in_place), pickle.HIGHEST_PROTOCOL)
            self._sender.send(Frame(Kind.FORK, (pickled, len(fds)), number=number), fds)
        except Exception:  # the job cannot be written down: nothing was sent
            self._answered(number, is_over=True)
            _close_all(fds)
            raise
        self._look_later(number, time.monotonic() + FORK_LIMIT_S)
        return number

    def adopt(self, template: int, orphans: Mapping[int, tuple[int, ForkListener]]) -> None:
        """Have the process report the ends of a dead template's workers: by number, the pid and the listener of each."""
        with self._lock:
            self._listeners.update({number: listener for number, (_, listener) in orphans.items()})
        self.send(Frame(Kind.ADOPT, (template, {pid: number for number, (pid, _) in orphans.items()})))

    def take_listeners(self) -> dict[int, ForkListener]:
        """Return, by their numbers, those that wait to be told of something; who asks later is told at once."""
        with self._lock:
            self._is_over = True
            listeners, self._listeners = self._listeners, {}
            self._unanswered.clear()
        return listeners

    def close(self) -> None:
        """Stop reading and sending. Idempotent."""
        self._sender.close()
        try:
            self._dispatcher.unwatch(self._control, self._close_control)
        except ManagerClosed:
            self._close_control()

    def close_when_ended(self) -> None:
        """Close as soon as the process has closed its end, which it does soon."""
        self._on_end = self.close

    def hang_up(self) -> None:
        """Close the connection at once, so that the process ends; to be followed by :meth:`close`."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)

    # -- all below runs on the dispatcher's thread ---------------------------------------------------------------------

    def read_the_rest(self) -> None:
        """Deal with what the process said before it ended."""
        with contextlib.suppress(Exception):  # nothing is there, or what cannot be read; it has ended anyway
            while (frames := self._reader.read(self._control)) is not None:
                for frame in frames:
                    self._on_frame(frame)

    def _on_readable(self) -> None:
        try:
            frames = self._reader.read(self._control)
            for frame in frames or ():
                self._on_frame(frame)
        except BlockingIOError:
            return
        except Exception as error:  # nobody knows what follows it
            message = "What a process that forks others has said cannot be read"
            self._dispatcher.log(log, logging.ERROR, message, exc_info=error)
            frames = None
        if frames is None:
            self._dispatcher.unwatch(self._control)
            self._on_end()

    def _on_frame(self, frame: Frame) -> None:
        self._heard_at = time.monotonic()
        if frame.kind is Kind.FORKED:
            number, (pid, has_pidfd) = frame.number, frame.head
            # It got lost if this program has no descriptor left.
            pidfd = self._reader.fds.pop(0) if has_pidfd and self._reader.fds else None
            listener = self._answered(number, is_over=False)
            if listener is not None:
                listener.forked(pid, pidfd)
            elif pidfd is not None:
                os.close(pidfd)
        elif frame.kind is Kind.NOT_FORKED:
            if listener := self._answered(frame.number, is_over=True):
                listener.fork_failed(frame.head, [])
        elif frame.kind is Kind.EXITED:
            if listener := self._answered(frame.number, is_over=True):
                listener.process_exited(frame.head)
        else:
            self._on_message(frame)

    def _close_control(self) -> None:
        self._control.close()
        fds, self._reader.fds = self._reader.fds, []
        _close_all(fds)

    def _answered(self, number: int, *, is_over: bool) -> ForkListener | None:
        with self._lock:
            self._unanswered.discard(number)
            return self._listeners.pop(number, None) if is_over else self._listeners.get(number)

    def _look_later(self, number: int, when: float) -> None:
        with contextlib.suppress(ManagerClosed):
            self._dispatcher.call_at(when, lambda: self._check(number))

    def _check(self, number: int) -> None:
        with self._lock:
            is_waiting = number in self._unanswered
        if not is_waiting:
            return
        now, limit = time.monotonic(), self._heard_at + FORK_LIMIT_S
        if now < limit:  # it is at work for others
            self._look_later(number, limit)
        elif self._on_stuck():
            self._look_later(number, now + FORK_LIMIT_S)

    def _watch_writable(self, on: bool) -> None:
        self._dispatcher.watch_writable(self._control, self._sender.flush if on else None)


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
