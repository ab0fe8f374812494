"""The main loop of a process that forks others: the torch-only process, and the template of each model version.

Such a process has one thread for ever: a child of a process that ran a multi-threaded operation hangs in its own first
one. It ends when the embedding process does, reports how each child ended, and as a subreaper also inherits, and ends,
what the handlers' own children leave behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import selectors
import signal
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn, Protocol

import psutil
import torch.multiprocessing
from attrs import define

from torchmgmt.channel import Frame, FrameReader, Kind, send
from torchmgmt.records import TemplateJob, WorkerJob
from torchmgmt.system_calls import open_pidfd, set_death_signal
from torchmgmt.worker.shutdown import exit_functions_kept, keep_exit_functions
from torchmgmt.worker.stop_signals import ignore_stops, own_fork

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess

__all__ = ["WORKER_VARIABLE", "Body", "Forker", "dying_with"]

WORKER_VARIABLE = "TORCHMGMT_WORKER_PID"
"""Set in every worker to its own pid, so that what its handler starts can be told from what another one's does."""

_READ = selectors.EVENT_READ
_MAX_FDS = 16
# So often, a second apart, what is left is killed once more; what lives on then cannot be killed by us.
_MOST_ROUNDS = 10

log = logging.getLogger(__name__)


class Body(Protocol):
    """What a child is to be."""

    def run(self) -> NoReturn:
        """Be it, until the process ends."""


@define(eq=False)
class _Child:
    """A child that was asked for. One that another process had forked, and that came here when it died, has no object."""

    number: int
    is_template: bool
    process: ForkProcess | None = None


class Forker:
    """Waits for commands, for children that end, and for the end of the embedding process.

    Args:
        control: the socket to the embedding process.
        root_pidfd: the embedding process; -1 where there are no pidfds.
        make_body: returns what a child is to be, from its job and its descriptors.
    """

    def __init__(
        self,
        control: socket.socket,
        root_pidfd: int,
        make_body: Callable[[WorkerJob | TemplateJob, Sequence[int]], Body],
    ) -> None:
        self.environment: Mapping[str, str | None] = {}
        self._control = control
        self._root_pidfd = root_pidfd
        self._parent_pid = os.getppid()
        self._make_body = make_body
        self._reader = FrameReader(max_fds=_MAX_FDS)
        self._context = torch.multiprocessing.get_context("fork")
        self._children: dict[int, _Child] = {}  # by pid
        # Templates that ended, until the embedding process has said which of their workers, ours now, it knows.
        self._bereaved: set[int] = set()
        # How orphans ended that nobody has asked for yet, by pid.
        self._ended_orphans: dict[int, int | None] = {}
        self._successor: Body | None = None
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()

    def run(self) -> Body | None:
        """Serve until the embedding process closes the channel or is gone; then leave no child behind.

        Returns what this process itself is to be from now on, if it was told so.
        """
        self._listen()
        try:
            while self._successor is None and self._serve(self._selector.select(timeout=self._poll_period_s())):
                pass
        finally:
            signal.set_wakeup_fd(-1)
            if self._successor is None:
                _kill_descendants()
        self._close()
        return self._successor

    def _listen(self) -> None:
        for sock in (self._wake_reader, self._wake_writer):
            sock.setblocking(False)
        # A handler that does nothing: what matters is the byte that the wake-up descriptor gets.
        signal.signal(signal.SIGCHLD, lambda *_: None)
        ignore_stops()
        # The program, or the model's handler, may have blocked it; then no end of a child would be noticed.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        self._selector.register(self._control, _READ)
        self._selector.register(self._wake_reader, _READ)
        if self._root_pidfd >= 0:
            self._selector.register(self._root_pidfd, _READ)

    def _close(self) -> None:
        for thing in (self._control, self._wake_reader, self._wake_writer, self._selector):
            thing.close()

    def _poll_period_s(self) -> float | None:
        """Without pidfds (macOS), look once a second whether our parent is still the same."""
        return None if self._root_pidfd >= 0 else 1.0

    def _serve(self, ready: list[tuple[selectors.SelectorKey, int]]) -> bool:
        """Handle what is ready; False when it is time to end."""
        if self._root_pidfd < 0 and os.getppid() != self._parent_pid:
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
                self.environment = frame.head
            elif frame.kind is Kind.FORK:
                self._on_fork(frame.number, *frame.head)
            elif frame.kind is Kind.ADOPT:
                self._adopt(*frame.head)
        return frames is not None

    def _on_fork(self, number: int, pickled: bytes, count: int) -> None:
        """Fork what is asked for, with ``count`` descriptors; what cannot be read of it is said, and harms nobody else."""
        fds, self._reader.fds[:count] = self._reader.fds[:count], []
        try:
            if len(fds) < count:  # what this process has no room for gets lost on its way
                raise OSError("too many files are open in the one that forks it")
            job, in_place = pickle.loads(pickled)
        except Exception as error:
            _close_all(fds)
            self._refuse(number, str(error))
            return
        body = self._make_body(job, fds)
        if in_place:
            self._successor = body
            return
        try:
            self._fork(number, body, is_template=isinstance(job, TemplateJob))
        finally:
            _close_all(fds)

    def _fork(self, number: int, body: Body, *, is_template: bool) -> None:
        process = self._context.Process(target=self._run_child, args=(body,), daemon=False)
        try:
            with exit_functions_kept(), own_fork():
                process.start()
        except Exception as error:  # no memory, no process
            self._refuse(number, str(error))
            return
        pid = process.pid or 0
        self._children[pid] = _Child(number, is_template, process)
        self._report_fork(number, pid)

    def _refuse(self, number: int, reason: str) -> None:
        send(self._control, Frame(Kind.NOT_FORKED, f"no process could be forked: {reason}", number=number))

    def _report_fork(self, number: int, pid: int) -> None:
        # Opened by the parent, before it reaps, this can be no other process that got the same pid. None: the system has
        # none, or this process has no room for one more.
        pidfd = None
        with contextlib.suppress(OSError):
            pidfd = open_pidfd(pid)
        fds = [] if pidfd is None else [pidfd]
        try:
            send(self._control, Frame(Kind.FORKED, (pid, bool(fds)), number=number), fds)
        finally:
            _close_all(fds)

    def _run_child(self, body: Body) -> NoReturn:
        """Give up, in the child, what belongs to this process; then be what it is to be."""
        keep_exit_functions()
        signal.set_wakeup_fd(-1)
        self._close()
        body.run()

    def _adopt(self, template: int, orphans: Mapping[int, int]) -> None:
        """Report from now on the ends of a dead template's workers, by pid the numbers that they were asked for under."""
        self._bereaved.discard(template)
        for pid, number in orphans.items():
            if _is_child(pid):
                self._children[pid] = _Child(number, is_template=False)
            else:
                send(self._control, Frame(Kind.EXITED, self._ended_orphans.pop(pid, None), number=number))
        if not self._bereaved:
            self._ended_orphans.clear()
            self._kill_strays()

    def _reap(self) -> None:
        """Report every child that ended; end the orphans that a worker left behind."""
        with contextlib.suppress(BlockingIOError):
            self._wake_reader.recv(4096)
        # Asked one by one, because starting a process makes multiprocessing reap those that have ended, without a word.
        ended = {pid for pid, child in self._children.items() if child.process and child.process.exitcode is not None}
        statuses = {pid: self._reap_one(pid) for pid in ended}
        while (pid := _ended_child()) is not None:
            statuses[pid] = self._reap_one(pid)
        found = bool(statuses)
        for pid in statuses.keys() & self._children.keys():
            self._report_exit(self._children.pop(pid), statuses.pop(pid))
        if self._bereaved:  # a template's workers may have been seen to end before it was
            self._ended_orphans.update(statuses)
        if found:
            self._kill_strays()  # an orphan that is ended may leave children of its own, which come here in turn

    def _reap_one(self, pid: int) -> int | None:
        """Reap a child that ended; return its exit code."""
        child = self._children.get(pid)
        if child is not None and child.process is not None:
            child.process.join()
            return child.process.exitcode
        with contextlib.suppress(ChildProcessError):
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return None

    def _report_exit(self, child: _Child, exitcode: int | None) -> None:
        if child.process is not None:
            child.process.close()
        if child.is_template:
            self._bereaved.add(child.number)
        send(self._control, Frame(Kind.EXITED, exitcode, number=child.number))

    def _kill_strays(self) -> None:
        """Kill what dead workers' handlers had started: it belongs to no model any more."""
        if self._bereaved:
            return  # among the orphans are workers that live; who is who will be said soon
        for child in psutil.Process().children():
            if child.pid not in self._children:
                with contextlib.suppress(psutil.Error, ProcessLookupError):
                    if not self._may_stay(child):
                        child.kill()

    def _may_stay(self, orphan: psutil.Process) -> bool:
        """Whether an orphan belongs to a worker that lives: by its session, or by the variable that workers set.

        One that left both behind cannot be told from another's; it stays while there is any worker.
        """
        session = os.getsid(orphan.pid)
        if session in self._children:
            return True
        owner = _owner_of(orphan)
        if owner is not None:
            return owner in self._children
        return bool(self._children) and psutil.pid_exists(session)


@contextlib.contextmanager
def dying_with(parent_pid: int) -> Iterator[None]:
    """Have this process killed if its parent, which has one thread, dies meanwhile (Linux only).

    For a time in which it cannot look for itself whether the embedding process is still there.
    """
    set_death_signal(signal.SIGKILL)
    if os.getppid() != parent_pid:  # it was quicker
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        yield
    finally:
        set_death_signal(0)


def _kill_descendants() -> None:
    for _ in range(_MOST_ROUNDS):
        if not (children := psutil.Process().children(recursive=True)):
            return
        _kill(children)


def _kill(processes: Iterable[psutil.Process]) -> None:
    killed = list(processes)
    for process in killed:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(killed, timeout=1)


def _owner_of(process: psutil.Process) -> int | None:
    """Return the pid of the worker that started it, by the variable; None if that is not there, or no number any more."""
    with contextlib.suppress(psutil.AccessDenied, ValueError):  # it runs as another user
        owner = process.environ().get(WORKER_VARIABLE)
        return None if owner is None else int(owner)
    return None


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _is_child(pid: int) -> bool:
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _ended_child() -> int | None:
    try:
        result = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return result.si_pid if result is not None else None
