"""The embedding process's side of the torch-only process: starts it, asks it for workers, hears of their ends.

The embedding process neither imports torch nor forks: it starts one interpreter that does (``worker/forkserver.py``),
and asks that one to fork whatever is needed.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from attrs import define, field

from torchmgmt.backends.output import Output
from torchmgmt.channel import Frame, FrameReader, FrameSender, Kind
from torchmgmt.dispatcher import Dispatcher
from torchmgmt.errors import ManagerClosed

__all__ = ["ForkListener", "ForkServer"]

log = logging.getLogger(__name__)

_MODULE = "torchmgmt.worker.forkserver"
# The path is set before anything is imported, so that a file in the working directory cannot stand in for a module.
# Without collections meanwhile, importing torch takes a tenth less.
_BOOTSTRAP = f"import gc, sys; gc.disable(); sys.path[:] = sys.argv[3].split('\\n'); from {_MODULE} import main; main()"
# One thread while the process may still be forked: a child of a process that ran a multi-threaded operation hangs in its
# own first one, and importing numpy starts a pool unless told not to. NVML only looks at the GPUs; CUDA must never be
# initialised before a fork.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
_CLOSE_TIMEOUT_S = 5.0
# What it gets to exit once its channel is closed. The thread that waits for it carries answers, too.
_EXIT_TIMEOUT_S = 0.5
# A fork takes milliseconds, importing torch seconds. One that takes longer than this hangs.
_FORK_LIMIT_S = 10.0
_IMPORT_LIMIT_S = 120.0


class ForkListener(Protocol):
    """Whom the torch-only process's side tells of one child. Called on the dispatcher's thread."""

    @property
    def pid(self) -> int | None:
        """The child's process id; None before ``forked``."""

    def forked(self, pid: int, pidfd: int | None) -> None:
        """The child runs. The descriptor is the listener's from now on; None where the system has none."""

    def fork_failed(self, reason: str, last_lines: list[str]) -> None:
        """There is no child and there will be none."""

    def process_exited(self, exitcode: int | None) -> None:
        """The child is gone; None if its status is not known."""

    def orphaned(self) -> None:
        """The torch-only process is gone, the child perhaps not: nobody will report its end."""


@define(eq=False)
class _Server:
    """One torch-only process that runs."""

    process: subprocess.Popen[bytes]
    sock: socket.socket
    sender: FrameSender
    reader: FrameReader
    output: Output
    started_at: float
    is_ready: bool = False
    """Whether it has imported torch and serves."""
    listeners: dict[int, ForkListener] = field(factory=dict)
    unanswered: set[int] = field(factory=set)
    """The numbers of the forks that it was asked for and said nothing of yet; noted before it is sent."""


class ForkServer:
    """Starts the torch-only process when first needed, and again if it died. Thread-safe; only :meth:`close` blocks."""

    def __init__(self, dispatcher: Dispatcher, output_dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._output_dispatcher = output_dispatcher
        self._numbers = itertools.count(1)
        # Held while the process is started, too: of two who need it at once, the second waits for those milliseconds.
        self._lock = threading.Lock()
        # guarded by _lock
        self._server: _Server | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The process id of the torch-only process; None while there is none."""
        with self._lock:
            return self._server.process.pid if self._server else None

    def warm(self) -> None:
        """Start the torch-only process if it does not run. Returns at once; torch is imported over there."""
        with self._lock:
            self._ensure_running_locked()

    def fork(self, job: object, fds: tuple[int, int], listener: ForkListener) -> None:
        """Fork a child that runs ``job``; the two descriptors (its channel, its output) are its own and are closed here.

        Raises:
            ManagerClosed: it was closed.
            OSError: the torch-only process could not be started.
        """
        try:
            with self._lock:
                server = self._ensure_running_locked()
                number = next(self._numbers)
                server.listeners[number] = listener
                server.unanswered.add(number)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        server.sender.send(Frame(Kind.FORK, (number, job)), fds)
        self._look_later(server, number)

    def close(self) -> None:
        """End the torch-only process and, with it, every child that is left. Blocks until it is gone; idempotent."""
        with self._lock:
            self._closed = True
            server, self._server = self._server, None
        if server is not None:
            self._dispatcher.unwatch(server.sock, server.sock.close)
            with contextlib.suppress(OSError):
                server.sock.shutdown(socket.SHUT_RDWR)
            _reap(server.process, _CLOSE_TIMEOUT_S)
            server.sender.close()
            server.output.close()

    def _ensure_running_locked(self) -> _Server:
        if self._closed:
            raise ManagerClosed("The backend")
        if self._server is None:
            self._server = self._start()
        return self._server

    def _start(self) -> _Server:
        ours, theirs = socket.socketpair()
        output_reader, output_writer = os.pipe()
        with theirs, contextlib.ExitStack() as stack:
            stack.callback(os.close, output_writer)
            try:
                process = _popen(theirs, output_writer)
            except BaseException:
                ours.close()
                os.close(output_reader)
                raise
        ours.setblocking(False)
        sender = FrameSender(ours, lambda on: self._dispatcher.watch_writable(ours, sender.flush if on else None))
        server = _Server(
            process=process,
            sock=ours,
            sender=sender,
            reader=FrameReader(max_fds=16),
            output=Output(output_reader, self._output_dispatcher, log),
            started_at=time.monotonic(),
        )
        sender.send(Frame(Kind.HELLO, _environment_to_restore()))
        self._dispatcher.watch(ours, lambda: self._on_readable(server))
        return server

    # -- all below runs on the dispatcher's thread ---------------------------------------------------------------------

    def _on_readable(self, server: _Server) -> None:
        try:
            frames = server.reader.read(server.sock)
        except BlockingIOError:
            return
        except OSError:
            frames = None
        if frames is None:
            self._on_death(server)
            return
        for frame in frames:
            self._on_frame(server, frame)

    def _look_later(self, server: _Server, number: int) -> None:
        with contextlib.suppress(ManagerClosed):
            self._dispatcher.call_at(time.monotonic() + _FORK_LIMIT_S, lambda: self._check_fork(server, number))

    def _check_fork(self, server: _Server, number: int) -> None:
        """Kill a torch-only process that does not answer: it hangs. Its children live on; the next fork starts another."""
        if number not in server.unanswered or self._server is not server:
            return
        if not server.is_ready and time.monotonic() < server.started_at + _IMPORT_LIMIT_S:
            self._look_later(server, number)  # it may well be importing torch still, on a slow disk
            return
        log.error("Killing the torch-only process %d: it did not fork a worker in time", server.process.pid)
        server.process.kill()

    def _on_frame(self, server: _Server, frame: Frame) -> None:
        if frame.kind is Kind.READY:
            server.is_ready = True
            return
        if frame.kind is Kind.FORKED:
            number, pid, has_pidfd = frame.head
            server.unanswered.discard(number)
            server.listeners[number].forked(pid, server.reader.fds.pop(0) if has_pidfd else None)
        elif frame.kind is Kind.NOT_FORKED:
            number, reason = frame.head
            server.unanswered.discard(number)
            server.listeners.pop(number).fork_failed(reason, server.output.last_lines())
        elif frame.kind is Kind.EXITED:
            number, exitcode = frame.head
            server.listeners.pop(number).process_exited(exitcode)

    def _on_death(self, server: _Server) -> None:
        with self._lock:
            if self._server is not server:
                return  # it was closed on purpose
            self._server = None
        self._dispatcher.unwatch(server.sock, server.sock.close)
        server.sender.close()
        exitcode = _reap(server.process, _EXIT_TIMEOUT_S)
        reason = f"the torch-only process {server.process.pid} ended with exit code {exitcode}"
        log.error("%s; the next worker starts another", reason)
        last_lines = server.output.last_lines()
        listeners, server.listeners = server.listeners, {}
        for listener in listeners.values():
            if listener.pid is None:
                listener.fork_failed(reason, last_lines)
            else:
                listener.orphaned()


def _popen(control: socket.socket, output_fd: int) -> subprocess.Popen[bytes]:
    if not sys.executable:
        raise OSError("sys.executable is empty, so no interpreter is known that could load a model")
    pidfd = os.pidfd_open(os.getpid()) if hasattr(os, "pidfd_open") else None
    passed = [control.fileno()] if pidfd is None else [control.fileno(), pidfd]
    path = [entry or str(Path.cwd()) for entry in sys.path]
    fds = [str(control.fileno()), str(-1 if pidfd is None else pidfd)]
    try:
        return subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP, *fds, "\n".join(path)],
            stdin=subprocess.DEVNULL,
            stdout=output_fd,
            stderr=output_fd,
            pass_fds=passed,
            env={**os.environ, **_ENVIRONMENT},
            # Ctrl-C in a terminal goes to a whole session; running batches are to be finished by us, not killed by it.
            start_new_session=True,
        )
    finally:
        if pidfd is not None:
            os.close(pidfd)


def _environment_to_restore() -> Mapping[str, str | None]:
    """Return what the variables that the torch-only process was given are to be again in the workers."""
    return {name: os.environ.get(name) for name in _ENVIRONMENT}


def _reap(process: subprocess.Popen[bytes], timeout_s: float) -> int:
    """Wait until the process is gone; kill it after ``timeout_s`` seconds."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
