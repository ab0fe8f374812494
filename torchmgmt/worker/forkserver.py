"""The torch-only process: imports torch once, then forks a worker for each FORK frame and reports how it ended.

It has one thread for ever (a child of a process that ran a multi-threaded operation hangs in its own first one), and
ends when the embedding process does. As a subreaper it also inherits what the handlers' own children leave behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import selectors
import signal
import socket
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn

import psutil
import torch
import torch.multiprocessing

from torchmgmt.channel import Frame, FrameReader, Kind, send
from torchmgmt.worker.main import WORKER_VARIABLE, WorkerProcess

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess

_PR_SET_CHILD_SUBREAPER = 36
_READ = selectors.EVENT_READ

log = logging.getLogger(__name__)


class ForkServer:
    """The main loop: waits for commands, for children that end, and for the end of the embedding process."""

    def __init__(self, control: socket.socket, root_pidfd: int) -> None:
        self._control = control
        self._root_pidfd = root_pidfd
        self._root_pid = os.getppid()
        self._reader = FrameReader(max_fds=16)
        self._environment: Mapping[str, str | None] = {}
        self._context = torch.multiprocessing.get_context("fork")
        # By pid: the number under which the embedding process asked for it, and the process.
        self._children: dict[int, tuple[int, ForkProcess]] = {}
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()

    def run(self) -> None:
        """Serve until the embedding process closes the channel or is gone; then leave no child behind."""
        self._listen()
        send(self._control, Frame(Kind.READY))
        try:
            while self._serve(self._selector.select(timeout=self._poll_period_s())):
                pass
        finally:
            self._kill_children()

    def _listen(self) -> None:
        for sock in (self._wake_reader, self._wake_writer):
            sock.setblocking(False)
        # A handler that does nothing: what matters is the byte that the wake-up descriptor gets.
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        self._selector.register(self._control, _READ)
        self._selector.register(self._wake_reader, _READ)
        if self._root_pidfd >= 0:
            self._selector.register(self._root_pidfd, _READ)

    def _poll_period_s(self) -> float | None:
        """Without pidfds (macOS), look once a second whether the embedding process is still our parent."""
        return None if self._root_pidfd >= 0 else 1.0

    def _serve(self, ready: list[tuple[selectors.SelectorKey, int]]) -> bool:
        """Handle what is ready; False when it is time to end."""
        if os.getppid() != self._root_pid:
            return False
        for key, _events in ready:
            if key.fileobj is self._wake_reader:
                self._reap()
            elif key.fileobj is not self._control:
                return False  # the embedding process is gone
            elif not self._read_commands():
                return False
        return True

    def _read_commands(self) -> bool:
        frames = self._reader.read(self._control)
        for frame in frames or ():
            if frame.kind is Kind.HELLO:
                self._environment = frame.head
            elif frame.kind is Kind.FORK:
                self._fork(*frame.head)
        return frames is not None

    def _fork(self, number: int, job: object) -> None:
        channel_fd, output_fd = self._reader.fds.pop(0), self._reader.fds.pop(0)
        body = WorkerProcess(job, channel_fd, output_fd, self._root_pidfd, self._environment)
        process = self._context.Process(target=self._run_child, args=(body,), daemon=False)
        try:
            process.start()
        except OSError as error:
            send(self._control, Frame(Kind.NOT_FORKED, (number, f"no process could be forked: {error}")))
            return
        finally:
            os.close(channel_fd)
            os.close(output_fd)
        pid = process.pid or 0
        self._children[pid] = (number, process)
        self._report_fork(number, pid)

    def _report_fork(self, number: int, pid: int) -> None:
        if not hasattr(os, "pidfd_open"):
            send(self._control, Frame(Kind.FORKED, (number, pid, False)))
            return
        # Opened by the parent, before it reaps, this can be no other process that got the same pid.
        pidfd = os.pidfd_open(pid)
        try:
            send(self._control, Frame(Kind.FORKED, (number, pid, True)), [pidfd])
        finally:
            os.close(pidfd)

    def _run_child(self, body: WorkerProcess) -> NoReturn:
        """Give up, in the child, what belongs to this process; then be the worker."""
        signal.set_wakeup_fd(-1)
        for thing in (self._control, self._wake_reader, self._wake_writer, self._selector):
            thing.close()
        body.run()

    def _reap(self) -> None:
        """Report every child that ended; end the orphans that a worker left behind."""
        with contextlib.suppress(BlockingIOError):
            self._wake_reader.recv(4096)
        # Asked one by one, because starting a process makes multiprocessing reap those that have ended, without a word.
        ended = {pid for pid, (_, process) in self._children.items() if process.exitcode is not None}
        while (pid := _ended_child()) is not None:
            ended.add(pid)
            if pid in self._children:  # it ended since
                self._children[pid][1].join()
            else:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
        for pid in ended & self._children.keys():
            self._report_exit(pid)
        if ended:
            self._kill_strays()  # an orphan that is ended may leave children of its own, which come here in turn

    def _report_exit(self, pid: int) -> None:
        number, process = self._children.pop(pid)
        process.join()
        send(self._control, Frame(Kind.EXITED, (number, process.exitcode)))
        process.close()

    def _kill_strays(self) -> None:
        """Kill what dead workers' handlers had started: it belongs to no model any more."""
        for child in psutil.Process().children():
            if child.pid not in self._children:
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                    if not self._may_stay(child):
                        child.kill()

    def _may_stay(self, orphan: psutil.Process) -> bool:
        """Whether an orphan belongs to a worker that lives: by its session, or by the variable that workers set.

        One that left both behind cannot be told from another's; it stays while there is any worker.
        """
        session = os.getsid(orphan.pid)
        owner = orphan.environ().get(WORKER_VARIABLE)
        if session in self._children:
            return True
        if owner is not None:
            return int(owner) in self._children
        return bool(self._children) and psutil.pid_exists(session)

    def _kill_children(self) -> None:
        signal.set_wakeup_fd(-1)
        while children := psutil.Process().children(recursive=True):
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            psutil.wait_procs(children, timeout=1)


def main() -> NoReturn:
    """Run the torch-only process. Its arguments: the control socket's and the parent's pidfd's descriptors, then sys.path."""
    logging.basicConfig(format="<4>%(name)s: %(message)s")
    control = socket.socket(fileno=int(sys.argv[1]))
    torch.set_num_threads(1)
    _become_subreaper()
    # A collection in a worker would otherwise touch, and so copy, every page of what was imported here. What is garbage of
    # it stays: to find it costs 0.1 s of every first start, and gains less than a megabyte.
    gc.freeze()
    gc.enable()
    try:
        ForkServer(control, int(sys.argv[2])).run()
    except OSError:
        # The embedding process went away while it was being told something.
        log.debug("The embedding process is gone", exc_info=True)
    # Taking torch down again in good order takes longer than all the rest of closing a manager, and is for nothing.
    os._exit(0)


def _become_subreaper() -> None:
    """Have orphaned descendants come to this process instead of init (Linux only), so that they can be ended."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _ended_child() -> int | None:
    try:
        result = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return result.si_pid if result is not None else None
