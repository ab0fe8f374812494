"""The torch-only process as the embedding process sees it: started when first needed, and again if it died.

The embedding process neither imports torch nor forks: it starts one interpreter that does (``worker/forkserver.py``),
and asks that one to fork whatever is needed.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import define

from torchmgmt.backends.child import Child
from torchmgmt.backends.forker import Forker, ForkListener
from torchmgmt.backends.output import Output
from torchmgmt.channel import Frame, Kind
from torchmgmt.dispatcher import Dispatcher
from torchmgmt.errors import ManagerClosed, TorchmgmtError
from torchmgmt.interpreter import STARTED, interpreter, is_frozen
from torchmgmt.records import TemplateJob, WorkerJob
from torchmgmt.system_calls import open_pidfd
from torchmgmt.variables import without_matching

__all__ = ["ForkServer"]

log = logging.getLogger(__name__)

# The path is set before anything is imported, so that a file in the working directory cannot stand in for a module.
# Without collections meanwhile, importing torch takes a tenth less.
_BOOTSTRAP = (
    "import gc, sys; gc.disable(); sys.path[:] = {path}; "
    "from torchmgmt.worker.beginning import begin; begin(); "
    "from torchmgmt.worker.forkserver import main; main()"
)
_PROGRAMS_PATH = "sys.argv[3].split('\\n')"
# What a frozen program has on its path is for the interpreter in it.
_OWN_PATH_FIRST = f"[*filter(None, sys.path), *{_PROGRAMS_PATH}]"
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
_IMPORT_LIMIT_S = 120.0


@define(eq=False)
class _Server:
    """One torch-only process that runs."""

    process: subprocess.Popen[bytes]
    child: Child
    output: Output
    started_at: float
    is_ready: bool = False
    """Whether it has imported torch and serves."""


class ForkServer:
    """Starts the torch-only process when first needed, and again if it died. Thread-safe; only :meth:`close` blocks."""

    def __init__(
        self, dispatcher: Dispatcher, output_dispatcher: Dispatcher, blacklist_env_vars: str | None = None
    ) -> None:
        self.numbers = itertools.count(1)
        self._blacklist = blacklist_env_vars
        self._dispatcher = dispatcher
        self._output_dispatcher = output_dispatcher
        # Held while the process is started, too: of two who need it at once, the second waits for those milliseconds.
        self._lock = threading.Lock()
        # guarded by _lock
        self._server: _Server | None = None
        self._forker: Forker | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The process id of the torch-only process; None while there is none."""
        with self._lock:
            return self._server.process.pid if self._server else None

    def warm(self) -> None:
        """Start the torch-only process soon, if it does not run. Returns at once; torch is imported over there."""
        self._dispatcher.call_soon(self._warm)

    def fork(self, job: WorkerJob | TemplateJob, fds: Sequence[int], listener: ForkListener) -> tuple[Forker, int]:
        """Fork a child that does ``job``; the descriptors are its own and are closed here.

        Returns who forks it and the number that the child has there.

        Raises:
            ManagerClosed: it was closed.
            OSError: the torch-only process could not be started.
        """
        try:
            with self._lock:
                forker = self._ensure_running_locked()
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return forker, forker.fork(job, fds, listener)

    def is_served_by(self, forker: Forker) -> bool:
        """Whether the torch-only process that runs now is the one behind ``forker``."""
        with self._lock:
            return self._forker is forker

    def end_if_stopped(self) -> None:
        """Kill the torch-only process if somebody has stopped it for too long; the next fork starts another."""
        with self._lock:
            server = self._server
        if server is not None and server.child.is_stopped_for_long():
            self._log("Killing the torch-only process %d: it was stopped (SIGSTOP)", server.process.pid)
            server.process.kill()

    def close(self) -> None:
        """End the torch-only process and, with it, every child that is left. Blocks until it is gone; idempotent."""
        with self._lock:
            self._closed = True
            server, self._server = self._server, None
            forker, self._forker = self._forker, None
        if server is not None and forker is not None:
            forker.hang_up()
            _reap(server.process, _CLOSE_TIMEOUT_S)
            forker.close()
            server.output.close()

    def _log(self, message: str, *args: object) -> None:
        self._dispatcher.log(log, logging.ERROR, message, *args)

    def _ensure_running_locked(self) -> Forker:
        if self._closed:
            raise ManagerClosed("The backend")
        if self._forker is None:
            self._server, self._forker = self._start()
        return self._forker

    def _start(self) -> tuple[_Server, Forker]:
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as undo, theirs:
            undo.callback(ours.close)
            output_reader, output_writer = os.pipe()
            with os.fdopen(output_writer, "wb", buffering=0):
                output = Output(output_reader, self._output_dispatcher, log)
                undo.callback(output.close)
                environment = without_matching(os.environ, self._blacklist)
                process = _popen(theirs, output_writer, environment, is_tied=self._is_on_lasting_thread())
            undo.callback(_reap, process, 0)
            child = Child(self._dispatcher.call_at)
            child.forked(process.pid, None)
            server = _Server(process, child, output, time.monotonic())
            forker = Forker(
                ours,
                self._dispatcher,
                self.numbers,
                on_message=lambda frame: self._on_message(server, frame),
                on_end=lambda: self._on_death(server, forker),
                on_stuck=lambda: self._is_importing_still(server),
            )
            forker.send(Frame(Kind.HELLO, _environment_to_restore(without_matching(os.environ, self._blacklist))))
            forker.listen()
            undo.pop_all()
        return server, forker

    def _is_on_lasting_thread(self) -> bool:
        """Whether the calling thread is there as long as this is needed: not a loop's that has the dispatcher's rounds now."""
        is_own = self._dispatcher.on_thread() and self._dispatcher.owner.host is None
        return is_own or threading.current_thread() is threading.main_thread()

    # -- all below runs on the dispatcher's thread ---------------------------------------------------------------------

    def _warm(self) -> None:
        try:
            with self._lock:
                self._ensure_running_locked()
        except ManagerClosed:
            pass
        except (OSError, TorchmgmtError) as error:  # the first worker tries again, and tells who asked for it
            self._dispatcher.log(log, logging.WARNING, "torch is not imported in advance: %s", str(error))

    def _on_message(self, server: _Server, frame: Frame) -> None:
        if frame.kind is Kind.READY:
            server.is_ready = True

    def _is_importing_still(self, server: _Server) -> bool:
        """Whether to wait on for a torch-only process; one that hangs is killed. Its children live on."""
        if not server.is_ready and time.monotonic() < server.started_at + _IMPORT_LIMIT_S:
            return True  # it may well be importing torch still, on a slow disk
        self._log("Killing the torch-only process %d: it did not fork a process in time", server.process.pid)
        server.process.kill()
        return False

    def _on_death(self, server: _Server, forker: Forker) -> None:
        with self._lock:
            if self._server is not server:
                return  # it was closed on purpose
            self._server = self._forker = None
        forker.close()
        exitcode = _reap(server.process, _EXIT_TIMEOUT_S)
        reason = f"the torch-only process {server.process.pid} ended with exit code {exitcode}"
        self._log("%s; the next worker starts another", reason)
        last_lines = server.output.last_lines()
        for listener in forker.take_listeners().values():
            if listener.child.pid is None:
                listener.fork_failed(reason, last_lines, is_retryable=server.is_ready)
            else:
                listener.orphaned()


def _popen(
    control: socket.socket, output_fd: int, environment: Mapping[str, str], *, is_tied: bool
) -> subprocess.Popen[bytes]:
    """Start an interpreter that becomes the torch-only process.

    ``is_tied``: until it has imported torch, it is killed if the calling thread ends, as it does not look for us yet.
    """
    python = interpreter()
    bootstrap = _BOOTSTRAP.format(path=_OWN_PATH_FIRST if is_frozen() else _PROGRAMS_PATH)
    pidfd = open_pidfd(os.getpid())
    passed = [control.fileno()] if pidfd is None else [control.fileno(), pidfd]
    entries: Sequence[object] = sys.path
    path = [entry or str(Path.cwd()) for entry in entries if isinstance(entry, str)]  # Python heeds no others
    fds = [str(control.fileno()), str(-1 if pidfd is None else pidfd)]
    # What is sent to all processes of a service is not to end it before it has seen to that itself.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    try:
        return subprocess.Popen(
            [python, "-c", bootstrap, *fds, "\n".join(path), "tied" if is_tied else "free"],
            stdin=subprocess.DEVNULL,
            stdout=output_fd,
            stderr=output_fd,
            pass_fds=passed,
            env={**environment, **_ENVIRONMENT, STARTED: "1"},
            # Ctrl-C in a terminal goes to a whole session; running batches are to be finished by us, not killed by it.
            start_new_session=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if pidfd is not None:
            os.close(pidfd)


def _environment_to_restore(environment: Mapping[str, str]) -> Mapping[str, str | None]:
    """Return what the variables that the torch-only process was given are to be again in the workers."""
    return {name: environment.get(name) for name in _ENVIRONMENT}


def _reap(process: subprocess.Popen[bytes], timeout_s: float) -> int:
    """Wait until the process is gone; kill it after ``timeout_s`` seconds."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
