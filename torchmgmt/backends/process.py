"""Workers as processes: forked by the torch-only process, spoken to through a socket, killed through a pidfd."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen

from torchmgmt.backends import Outcome, WorkerListener
from torchmgmt.backends.forkserver import ForkServer
from torchmgmt.backends.output import Output
from torchmgmt.channel import Buffer, Frame, FrameReader, FrameSender, Kind
from torchmgmt.dispatcher import Dispatcher
from torchmgmt.errors import ManagerClosed
from torchmgmt.records import Encoded, ModelSpec, WorkerExit, WorkerFault, WorkerRequest

if TYPE_CHECKING:
    import psutil

    _LoggerAdapter = logging.LoggerAdapter[logging.Logger]
else:
    _LoggerAdapter = logging.LoggerAdapter  # cannot be subscripted before Python 3.11

__all__ = ["ProcessBackend", "WorkerJob"]

log = logging.getLogger(__name__)
worker_log = logging.getLogger("torchmgmt.workers")

_MEMORY_PERIOD_S = 5.0
_FIRST_SAMPLE_S = 1.0
# A worker whose channel is closed can do nothing for us any more; it gets this long to end by itself.
_LINGER_S = 2.0
# What a hung worker's faulthandler gets to write down where it was, before it is killed.
_LAST_WORDS_S = 0.05


@frozen
class WorkerJob:
    """What the torch-only process tells a new worker."""

    spec: ModelSpec
    worker_id: str
    threads: int


class ProcessBackend:
    """Runs each worker in a process of its own (the default backend).

    One object serves any number of pools. It starts nothing before the first worker or :meth:`warm`: then one process
    that imports torch, and two threads. POSIX only: it needs fork and descriptors passed over sockets.
    """

    def __init__(self) -> None:
        self._dispatcher = Dispatcher("torchmgmt-dispatcher")
        # Lines go to the program's log handlers, which may be slow; answers must not wait for them.
        self._output_dispatcher = Dispatcher("torchmgmt-output")
        self._forkserver = ForkServer(self._dispatcher, self._output_dispatcher)
        self._close_lock = threading.Lock()
        self._lock = threading.Lock()
        # guarded by _lock
        self._workers: set[ProcessWorker] = set()
        self._sampling = False

    def __repr__(self) -> str:
        return f"<ProcessBackend: {len(self._workers)} workers, torch-only process {self._forkserver.pid}>"

    def warm(self) -> None:
        """Start the torch-only process in the background. Any thread; idempotent."""
        self._forkserver.warm()

    def call_at(self, when: float, callback: Callable[[], object]) -> object:
        """Run ``callback`` at a time of ``time.monotonic``, on the thread that reads answers; it must not block."""
        return self._dispatcher.call_at(when, callback)

    def on_own_thread(self) -> bool:
        """Return whether the caller runs on the thread that reads answers."""
        return self._dispatcher.on_thread()

    def worker(self, spec: ModelSpec, worker_id: str, threads: int, listener: WorkerListener) -> ProcessWorker:
        """Return a worker, not started yet; see :class:`torchmgmt.backends.Backend`."""
        return ProcessWorker(self, WorkerJob(spec, worker_id, threads), listener)

    def fork(self, worker: ProcessWorker, job: WorkerJob, fds: tuple[int, int]) -> None:
        """Have a process forked for ``worker``; for this backend's own workers."""
        self._forkserver.fork(job, fds, worker)
        with self._lock:
            self._workers.add(worker)
            if self._sampling:
                return
            self._sampling = True
        self._output_dispatcher.call_at(time.monotonic() + _FIRST_SAMPLE_S, self._sample_memory)

    def output(self, fd: int, job: WorkerJob) -> Output:
        """Read what a worker prints; for this backend's own workers."""
        return Output(fd, self._output_dispatcher, _WorkerLog(worker_log, job.spec, job.worker_id))

    def close(self) -> None:
        """End the torch-only process, every worker that is left, and the two threads. Blocks shortly; idempotent."""
        with self._close_lock:  # one after the other: the second must not close what the first still tells workers with
            self._forkserver.close()
            self._report_the_rest()
            self._dispatcher.close()
            self._output_dispatcher.close()

    def _report_the_rest(self) -> None:
        """Tell of the workers that ended with the torch-only process: nobody else does, and their pools wait for it."""
        with self._lock:
            workers = list(self._workers)
        if not workers:
            return
        told = threading.Event()
        try:
            for worker in workers:
                self._dispatcher.call_soon(functools.partial(worker.process_exited, None))
            self._dispatcher.call_soon(told.set)
        except ManagerClosed:
            return  # it was closed before, and they were told then
        if not self._dispatcher.on_thread():
            told.wait()

    def forget(self, worker: ProcessWorker) -> None:
        """Drop a worker that is gone."""
        with self._lock:
            self._workers.discard(worker)

    @property
    def dispatcher(self) -> Dispatcher:
        """The dispatcher that reads channels; for this backend's own workers."""
        return self._dispatcher

    def _sample_memory(self) -> None:
        with self._lock:
            workers = list(self._workers)
            self._sampling = bool(workers)
        for worker in workers:
            worker.sample_memory()
        if workers:
            self._output_dispatcher.call_at(time.monotonic() + _MEMORY_PERIOD_S, self._sample_memory)


class ProcessWorker:
    """The embedding process's handle on one worker process; see :class:`torchmgmt.backends.WorkerHandle`."""

    def __init__(self, backend: ProcessBackend, job: WorkerJob, listener: WorkerListener) -> None:
        self.pid: int | None = None
        self.memory_bytes = 0
        self._backend = backend
        self._dispatcher = backend.dispatcher
        self._job = job
        self._listener = listener
        self._reader = FrameReader()
        self._fault: WorkerFault | None = None
        self._lock = threading.Lock()
        # guarded by _lock
        self._pidfd: int | None = None
        self._signal: signal.Signals | None = None  # to be sent as soon as the process is known
        self._gone = False

    def start(self) -> None:
        """Have the process forked. What it is sent before it runs waits in the socket."""
        self._channel, theirs = socket.socketpair()
        self._channel.setblocking(False)
        self._sender = FrameSender(self._channel, self._watch_writable)
        output_reader, output_writer = os.pipe()
        self._output = self._backend.output(output_reader, self._job)
        try:
            self._backend.fork(self, self._job, (theirs.detach(), output_writer))
        except BaseException:
            self._channel.close()
            self._output.close()
            raise

    def last_lines(self) -> Sequence[str]:
        """Return the last lines that the worker printed."""
        return self._output.last_lines()

    def run(self, number: int, requests: Sequence[WorkerRequest]) -> None:
        """Send it a batch."""
        head = [(request.request_id, request.headers, len(request.row.segments)) for request in requests]
        segments = [segment for request in requests for segment in request.row.segments]
        self._sender.send(Frame(Kind.RUN, (number, head), segments))

    def describe(self, number: int) -> None:
        """Have it run its handler's ``describe_handle``."""
        self._sender.send(Frame(Kind.DESCRIBE, number))

    def stop(self) -> None:
        """Ask it to end after what it was sent."""
        self._sender.send(Frame(Kind.STOP))

    def terminate(self) -> None:
        """Send it SIGTERM."""
        self._send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Have it write down where it is, then send it SIGKILL."""
        if self._send_signal(signal.SIGUSR2):
            self._backend.call_at(time.monotonic() + _LAST_WORDS_S, lambda: self._send_signal(signal.SIGKILL))
            return
        # Not forked yet, perhaps because torch is being imported. Nobody shall wait for that; if the process still comes
        # to be, it is killed at once.
        self._send_signal(signal.SIGKILL)
        self._dispatcher.call_soon(self._give_up_if_not_forked)

    def sample_memory(self) -> None:
        """Read how much memory the worker uses. Takes milliseconds; not for a thread that carries answers."""
        if self.pid is None:
            return
        import psutil  # not needed before there is a worker

        with contextlib.suppress(psutil.Error):
            self.memory_bytes = _memory_bytes(psutil.Process(self.pid))

    # -- called by the torch-only process's side, on the dispatcher's thread -------------------------------------------

    def forked(self, pid: int, pidfd: int | None) -> None:
        """The process runs."""
        with self._lock:
            was_given_up, self._gone = self._gone, False
            self.pid, self._pidfd = pid, pidfd
            waiting = self._signal
        if not was_given_up:
            self._dispatcher.watch(self._channel, self._on_readable)
        if waiting is not None:
            self._send_signal(waiting)
        if was_given_up:
            self._forget_process()

    def fork_failed(self, reason: str, last_lines: list[str]) -> None:
        """There is no process."""
        self._finish(WorkerExit(0, None, reason, last_lines))

    def _give_up_if_not_forked(self) -> None:
        if self.pid is None:
            self._finish(WorkerExit(0, None, "it was not forked in time"))

    def process_exited(self, exitcode: int | None) -> None:
        """The process is gone; what it sent before is read first, so that no finished batch is lost with it."""
        if self._gone:
            return  # it was given up before it came to be
        self._read_the_rest()
        lines = self.last_lines()
        self._finish(WorkerExit(self.pid or 0, exitcode, _describe_exit(exitcode), lines, self._fault))

    def orphaned(self) -> None:
        """The process lives on without anybody who reports its end, so watch it ourselves."""
        with self._lock:
            pidfd = self._pidfd
        if pidfd is None:
            self.kill()
            self.process_exited(None)
            return
        watched = os.fdopen(os.dup(pidfd), "rb", buffering=0)

        def on_exit() -> None:
            self._dispatcher.unwatch(watched, watched.close)
            self.process_exited(None)

        self._dispatcher.watch(watched, on_exit)

    def _on_readable(self) -> None:
        try:
            frames = self._reader.read(self._channel)
        except BlockingIOError:
            return
        except OSError:
            frames = None
        if frames is None:
            self._on_channel_closed()
            return
        for frame in frames:
            self._on_frame(frame)

    def _on_channel_closed(self) -> None:
        self._sender.close()
        self._dispatcher.unwatch(self._channel, self._channel.close)
        # Its end is reported by whoever reaps it. A handler may have closed the descriptor and live on, though.
        self._backend.call_at(time.monotonic() + _LINGER_S, self._kill_if_alive)

    def _kill_if_alive(self) -> None:
        if not self._gone:
            self._send_signal(signal.SIGKILL)

    def _read_the_rest(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            while (frames := self._reader.read(self._channel)) is not None:
                for frame in frames:
                    self._on_frame(frame)

    def _on_frame(self, frame: Frame) -> None:
        if frame.kind is Kind.DONE:
            number, head = frame.head
            self._listener.done(number, _outcomes(head, frame.segments))
        elif frame.kind is Kind.READY:
            self._listener.ready()
        elif frame.kind is Kind.FAILED:
            self._fault = frame.head

    def _forget_process(self) -> None:
        """Signal it no more: its pid may soon be another's."""
        with self._lock:
            self._gone = True
            pidfd, self._pidfd = self._pidfd, None
        if pidfd is not None:
            os.close(pidfd)

    def _finish(self, exit: WorkerExit) -> None:
        if self._gone:
            return
        self._forget_process()
        self._sender.close()
        self._dispatcher.unwatch(self._channel, self._channel.close)
        self._output.close()
        self._backend.forget(self)
        self._listener.exited(exit)

    def _send_signal(self, number: signal.Signals) -> bool:
        """Signal the process and no other that got its pid since; False if it is not there (any more)."""
        with self._lock:
            if self._gone:
                return False
            if self.pid is None:
                self._signal = number
                return False
            with contextlib.suppress(ProcessLookupError):
                if self._pidfd is not None:
                    signal.pidfd_send_signal(self._pidfd, number)
                else:
                    os.kill(self.pid, number)
        return True

    def _watch_writable(self, on: bool) -> None:
        self._dispatcher.watch_writable(self._channel, self._sender.flush if on else None)


class _WorkerLog(_LoggerAdapter):
    """Says which worker a line is from, in the text and as fields of the record."""

    def __init__(self, logger: logging.Logger, spec: ModelSpec, worker_id: str) -> None:
        super().__init__(logger, {"model": spec.key.name, "version": spec.key.version, "worker": worker_id})
        self._prefix = f"{spec.key} worker {worker_id}: "

    def process(self, msg: str, kwargs: MutableMapping[str, Any]) -> tuple[str, MutableMapping[str, Any]]:
        return self._prefix.replace("%", "%%") + msg, {**kwargs, "extra": self.extra}


def _outcomes(head: Sequence[int | WorkerFault], segments: Sequence[Buffer]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    start = 0
    for answer in head:
        if isinstance(answer, WorkerFault):
            outcomes.append(answer)
        else:
            outcomes.append(Encoded(segments[start : start + answer]))
            start += answer
    return outcomes


def _memory_bytes(process: psutil.Process) -> int:
    """Return the proportional set size, which counts a page that n processes share as one nth; where only Linux tells
    that, the resident set size.
    """
    full = process.memory_full_info()
    return int(getattr(full, "pss", 0) or full.rss)


_LIKELY_CAUSES = {
    signal.SIGKILL: "probably the system's out-of-memory killer, or somebody's kill -9",
    signal.SIGSEGV: "a crash in native code; the stack is in its last lines",
    signal.SIGABRT: "native code gave up; its last lines may say why",
    signal.SIGBUS: "a mapped file shrank or memory ran out",
    signal.SIGILL: "native code built for another processor",
    signal.SIGTERM: "somebody told it to end",
}


def _describe_exit(exitcode: int | None) -> str:
    if exitcode is None:
        return "its exit status is not known"
    if exitcode >= 0:
        return f"it exited with status {exitcode}"
    try:
        number = signal.Signals(-exitcode)
    except ValueError:
        return f"it was ended by signal {-exitcode}"
    cause = _LIKELY_CAUSES.get(number)
    return f"it was ended by {number.name}" + (f" ({cause})" if cause else "")
