"""The body of a worker process: cleans up after the fork, loads the handler, runs batches until told to stop."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from torchmgmt.channel import Frame, FrameReader, Kind, send
from torchmgmt.compat import install_ts
from torchmgmt.handlers.context import Context
from torchmgmt.records import Encoded, WorkerFault
from torchmgmt.worker.batch import attempt, fault_of, run_batch
from torchmgmt.worker.loader import Handler, load_handler

if TYPE_CHECKING:
    from torchmgmt.records import ModelSpec

__all__ = ["WORKER_VARIABLE", "WorkerProcess"]

WORKER_VARIABLE = "TORCHMGMT_WORKER_PID"
"""Set in every worker to its own pid, so that what its handler starts can be told from what another one's does."""

EXIT_STOPPED = 0
EXIT_NOT_LOADED = 1


class WorkerProcess:
    """One worker, from just after the fork to its end.

    Args:
        job: the ``WorkerJob`` of the embedding process: ``spec``, ``worker_id``, ``threads``.
        channel_fd: the socket to the embedding process.
        output_fd: where stdout and stderr go.
        root_pidfd: the embedding process; -1 where there are no pidfds.
        environment: variables that the torch-only process needed otherwise than the program had them.
    """

    def __init__(
        self, job: Any, channel_fd: int, output_fd: int, root_pidfd: int, environment: Mapping[str, str | None]
    ) -> None:
        self._spec: ModelSpec = job.spec
        self._threads: int = job.threads
        self._channel_fd = channel_fd
        self._output_fd = output_fd
        self._root_pidfd = root_pidfd
        self._environment = environment

    def run(self) -> NoReturn:
        """Be the worker. Never returns: the interpreter's own shutdown belongs to the process that was forked."""
        status = EXIT_NOT_LOADED
        try:
            status = self._run()
        except SystemExit as error:
            status = _status_of(error)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(status)

    def _run(self) -> int:
        self._take_over_process()
        channel = socket.socket(fileno=self._channel_fd)
        # A child that the handler forks must not keep our channel open when we are gone.
        os.register_at_fork(after_in_child=channel.close)
        try:
            handler = self._load()
        except SystemExit:
            traceback.print_exc()  # where it was called is worth as much as the status
            raise
        except Exception as error:
            send(channel, Frame(Kind.FAILED, fault_of(error)))
            return EXIT_NOT_LOADED
        send(channel, Frame(Kind.READY))
        with contextlib.suppress(ConnectionError):
            _serve(channel, handler)
        return EXIT_STOPPED

    def _take_over_process(self) -> None:
        os.dup2(self._output_fd, 1)
        os.dup2(self._output_fd, 2)
        os.close(self._output_fd)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        # SIGINT from a terminal does not reach this session; a stray one is not to end a batch.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True)
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR2, all_threads=True)
        _log_to_stderr()
        self._restore_environment()
        os.setsid()
        os.environ[WORKER_VARIABLE] = str(os.getpid())
        _reseed()
        torch.set_num_threads(self._threads)
        _die_with(self._root_pidfd)

    def _restore_environment(self) -> None:
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def _load(self) -> Handler:
        install_ts()
        os.chdir(self._spec.model_dir)
        sys.path.insert(0, self._spec.model_dir)
        return load_handler(self._spec, Context.for_model(self._spec))


def _serve(channel: socket.socket, handler: Handler) -> None:
    """Run what comes in, one after the other, until told to stop or the embedding process is gone."""
    reader = FrameReader()
    while (frames := reader.read(channel)) is not None:
        for frame in frames:
            if frame.kind is Kind.RUN:
                number, requests = frame.head
                _answer(channel, number, run_batch(handler, requests, frame.segments))
            elif frame.kind is Kind.DESCRIBE:
                _answer(channel, frame.head, [attempt(handler.describe)])
            elif frame.kind is Kind.STOP:
                return


def _answer(channel: socket.socket, number: int, outcomes: Sequence[Encoded | WorkerFault]) -> None:
    head = [outcome if isinstance(outcome, WorkerFault) else len(outcome.segments) for outcome in outcomes]
    segments = [segment for outcome in outcomes if isinstance(outcome, Encoded) for segment in outcome.segments]
    send(channel, Frame(Kind.DONE, (number, head), segments))


def _status_of(error: SystemExit) -> int:
    """Return the exit status that Python gives ``error``, and print its text, if it has one, as Python does."""
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    sys.stderr.write(f"{error.code}\n")
    return 1


def _log_to_stderr() -> None:
    """Send what handlers log to stderr, each line with the priority from which the embedding process takes its level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PriorityFormatter("%(name)s: %(message)s"))
    # Handlers log at INFO and expect to see it, as under TorchServe.
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)


class _PriorityFormatter(logging.Formatter):
    """Begins each line with its syslog priority, as in sd-daemon(3)."""

    def format(self, record: logging.LogRecord) -> str:
        mark = f"<{_priority(record.levelno)}>"
        return "\n".join(mark + line for line in super().format(record).splitlines() or [""])


def _priority(level: int) -> int:
    for least, priority in ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6)):
        if level >= least:
            return priority
    return 7


def _reseed() -> None:
    """Give this worker random numbers of its own: torch's and numpy's global generators are copies after a fork."""
    torch.seed()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()


def _die_with(root_pidfd: int) -> None:
    """End this process at once when the embedding process is gone, whatever the handler is doing.

    A closed channel does not tell: a child of the handler may hold it open, and a busy worker does not read.
    """

    def watch() -> None:
        poller = select.poll()
        poller.register(root_pidfd, select.POLLIN)
        poller.poll()
        os._exit(EXIT_STOPPED)

    if root_pidfd >= 0:
        threading.Thread(target=watch, name="torchmgmt-parent-watch", daemon=True).start()
