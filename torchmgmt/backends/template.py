"""The template of a model version as the embedding process sees it: it loads the model once and is forked for workers."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from attrs import frozen

from torchmgmt.backends.child import Child, describe_exit
from torchmgmt.backends.forker import Forker, ForkListener
from torchmgmt.backends.forkserver import ForkServer
from torchmgmt.backends.output import Output
from torchmgmt.backends.process_worker import ProcessWorker, no_watch, watch_exit
from torchmgmt.channel import Frame, Kind
from torchmgmt.dispatcher import Dispatcher
from torchmgmt.errors import ManagerClosed
from torchmgmt.records import ModelSpec, TemplateJob, WorkerExit, WorkerFault, WorkerJob

__all__ = ["Template", "TemplateOwner"]

log = logging.getLogger(__name__)


class TemplateOwner(Protocol):
    """For whom a template works. Called on the dispatcher's thread, with no lock of the template's held."""

    def check_fitness(self, template: Template, objections: Sequence[str], *, is_impossible: bool) -> bool:
        """Decide whether a template may be forked that has loaded the model, given what speaks against it."""

    def fork_separately(self, worker: ProcessWorker, job: WorkerJob, fds: Sequence[int]) -> None:
        """Have a worker forked that loads the model by itself."""

    def ended(self, template: Template) -> None:
        """It is gone, or has become a worker and is nobody's template any more."""


@frozen
class _Waiting:
    """A worker that waits until the template has loaded the model."""

    worker: ProcessWorker
    job: WorkerJob
    fds: Sequence[int]

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


class Template:
    """One process that loads a model to be forked for each worker of it. Thread-safe; nothing blocks.

    Args:
        spec: what it loads.
        forkserver: forks it, and reports its workers' ends should it die.
        dispatcher: reads what it says.
    """

    def __init__(self, owner: TemplateOwner, spec: ModelSpec, forkserver: ForkServer, dispatcher: Dispatcher) -> None:
        self.child = Child(dispatcher.call_at)
        self._owner = owner
        self._spec = spec
        self._forkserver = forkserver
        self._dispatcher = dispatcher
        self._fault: WorkerFault | None = None
        self._end_reason = ""
        self._grandparent: Forker | None = None
        self._number = 0
        self._successor: ProcessWorker | None = None
        self._is_orphan = False
        self._stop_watching: Callable[[], object] = no_watch
        self._is_finished = False
        self._lock = threading.Lock()
        # guarded by _lock
        self._waiting: list[_Waiting] | None = []  # None: it waits for nothing, so workers are forked at once
        self._is_over = False

    @property
    def pid(self) -> int | None:
        """Its process id; None until known."""
        return self.child.pid

    def start(self, open_output: Callable[[int], Output]) -> None:
        """Have it forked and load the model; ``open_output`` reads what it prints from a descriptor.

        Raises:
            OSError: the torch-only process could not be started.
            ManagerClosed: the backend was closed.
        """
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            undo.callback(theirs.close)
            reader, writer = os.pipe()
            undo.callback(os.close, writer)
            self._output = open_output(reader)
            undo.callback(self._output.close)
            snapshot = self._spec.live.descriptors() if self._spec.live is not None else ()
            undo.pop_all()
        self._forker = Forker(
            ours,
            self._dispatcher,
            self._forkserver.numbers,
            on_message=self._on_message,
            on_end=self._on_hang_up,
            on_stuck=self._on_stuck,
        )
        try:
            fds = (theirs.detach(), writer, *snapshot)
            self._grandparent, self._number = self._forkserver.fork(TemplateJob(self._spec), fds, self)
        except BaseException:
            self._forker.close()
            self._output.close()
            raise

    def fork(self, worker: ProcessWorker, job: WorkerJob, fds: Sequence[int]) -> bool:
        """Have a worker forked, as soon as the model is loaded; False if it is gone and nothing was done."""
        with self._lock:
            if self._is_over:
                return False
            worker.template = self.child
            if self._waiting is not None:
                self._waiting.append(_Waiting(worker, job, fds))
                return True
        self._forker.fork(job, fds, worker)
        return True

    def withdraw(self, worker: ProcessWorker) -> bool:
        """Forget a worker that waits; False if it does not."""
        with self._lock:
            for waiting in self._waiting or ():
                if waiting.worker is worker and self._waiting is not None:
                    self._waiting.remove(waiting)
                    waiting.close()
                    return True
        return False

    def end_loading(self, worker: ProcessWorker, reason: str) -> bool:
        """End it because a worker has waited for it for too long; False if that one does not wait."""
        with self._lock:
            if not any(waiting.worker is worker for waiting in self._waiting or ()):
                return False
        self.kill(reason)
        return True

    def kill(self, reason: str) -> None:
        """End it now, whatever it does. Its workers live on."""
        self._end_reason = self._end_reason or reason
        if not self.child.kill():
            self._give_up_unforked()

    def end(self) -> None:
        """End it at once: it is not needed any more, and has nothing to save."""
        self._end_reason = self._end_reason or "it was not needed any more"
        if not self.child.send(signal.SIGKILL):
            self._give_up_unforked()

    def end_if_stopped(self) -> None:
        """Kill it if somebody has stopped it for too long. Not for a thread that carries answers."""
        if self.child.is_stopped_for_long():
            self._log(logging.ERROR, "Killing the template %s of %s: it was stopped (SIGSTOP)")
            self.kill("it was stopped (SIGSTOP) for over a second")

    # -- called by who forks it, on the dispatcher's thread ------------------------------------------------------------

    def forked(self, pid: int, pidfd: int | None) -> None:
        """It runs, and loads the model."""
        self.child.forked(pid, pidfd)
        if not self._is_finished:
            self._forker.listen()

    def fork_failed(self, reason: str, last_lines: Sequence[str], *, is_retryable: bool = False) -> None:
        """There is no process."""
        self._finish(WorkerExit(0, None, reason, last_lines, is_retryable=is_retryable))

    def process_exited(self, exitcode: int | None) -> None:
        """It is gone. Its workers are not; from now on their grandparent reports how they end."""
        if self._successor is not None or self._is_finished:
            self._hand_over({})
            if self._successor is not None:
                self._successor.process_exited(exitcode)
            return
        self._forker.read_the_rest()
        reason = self._end_reason or describe_exit(exitcode)
        if not (self._end_reason or self._fault):
            self._log(logging.WARNING, "The template %s of %s ended: %s", reason)
        exit = WorkerExit(
            self.pid or 0,
            exitcode,
            f"its template: {reason}",
            self._output.last_lines(),
            self._fault,
            is_retryable=self._is_orphan and self._fault is None,
        )
        self._hand_over_workers(exit)
        self._finish(exit)

    def orphaned(self) -> None:
        """It lives on without anybody who reports its end, so watch it ourselves; one that still loads is killed."""
        if self._successor is not None:
            self._successor.orphaned()
        else:
            self._is_orphan = True
            self._stop_watching = watch_exit(self._dispatcher, self.child, self.process_exited)

    def _log(self, level: int, message: str, *args: object) -> None:
        self._dispatcher.log(log, level, message, self.pid, self._spec.key, *args)

    def _hand_over_workers(self, exit: WorkerExit) -> None:
        listeners = self._forker.take_listeners()
        orphans = {number: (pid, each) for number, each in listeners.items() if (pid := each.child.pid) is not None}
        self._hand_over(orphans)
        for number in listeners.keys() - orphans.keys():
            listeners[number].fork_failed(exit.reason, exit.last_lines, is_retryable=True)

    def _hand_over(self, orphans: Mapping[int, tuple[int, ForkListener]]) -> None:
        """Say whose ends are still to be reported. Also if there are none: it ends no stray before it knows."""
        grandparent = self._grandparent
        if grandparent is not None and self._forkserver.is_served_by(grandparent):
            grandparent.adopt(self._number, orphans)
            return
        for _, listener in orphans.values():
            listener.orphaned()

    def _give_up_unforked(self) -> None:
        """Wait no longer for a process that is not there, perhaps because torch is being imported.

        If it still comes to be, it is killed at once.
        """

        def finish() -> None:
            if self.child.pid is None:
                self._finish(WorkerExit(0, None, f"its template: {self._end_reason}"))

        with contextlib.suppress(ManagerClosed):  # then all are told of their end
            self._dispatcher.call_soon(finish)

    def _finish(self, exit: WorkerExit) -> None:
        if self._is_finished:
            return
        self._is_finished = True
        with self._lock:
            self._is_over = True
            waiting, self._waiting = self._waiting or [], None
        self._stop_watching()
        self.child.forget()
        self._forker.close()
        self._output.close()
        for each in waiting:
            each.close()
            each.worker.template_failed(exit)
        self._owner.ended(self)

    # -- what it says, on the dispatcher's thread ----------------------------------------------------------------------

    def _on_message(self, frame: Frame) -> None:
        if frame.kind is Kind.FAILED:
            self._fault = frame.head
        elif frame.kind is Kind.READY:
            objections, is_impossible = frame.head
            if self._owner.check_fitness(self, objections, is_impossible=is_impossible):
                self._fork_waiting()
            else:
                self._give_way()

    def _on_hang_up(self) -> None:
        # Whoever reaps it tells how it ended; a handler may have closed the descriptor and let it live on, though.
        if self._successor is None:
            self._dispatcher.call_at(time.monotonic() + 1.0, self._cut_off)

    def _cut_off(self) -> None:
        self.kill("it had closed the socket through which it is told what to do")

    def _on_stuck(self) -> bool:
        self._log(logging.ERROR, "Killing the template %s of %s: it did not fork a worker in time")
        self.kill("it did not fork a worker in time")
        return False

    def _fork_waiting(self) -> None:
        while True:
            with self._lock:
                waiting = self._waiting
                if not waiting:
                    self._waiting = None
                    return
                self._waiting = []
            for each in waiting:
                self._forker.fork(each.job, each.fds, each.worker)

    def _give_way(self) -> None:
        """Be the first worker, as the model is loaded already; the others load it by themselves."""
        with self._lock:
            self._is_over = True
            waiting, self._waiting = self._waiting or [], None
        if not waiting:
            self.end()
            return
        first, *others = waiting
        self._become(first)
        for each in others:
            each.worker.template = None
            self._owner.fork_separately(each.worker, each.job, each.fds)

    def _become(self, first: _Waiting) -> None:
        self._successor = first.worker
        self._forker.fork(first.job, first.fds, first.worker, in_place=True)
        first.worker.template = None  # it is not forked any more
        pid, pidfd = self.pid or 0, self.child.take_pidfd()
        first.worker.forked(pid, pidfd)
        self._forker.close_when_ended()
        self._owner.ended(self)
