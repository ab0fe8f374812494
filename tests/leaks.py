"""A pytest plugin that fails the test which left something behind.

Looked for are processes, threads, temporary files and folders of ours, and open sockets, pipes and memory files. A test
is compared with the moment just before its own fixtures; fixtures of a wider scope are up by then, so what they own is
not held against it. What is still there when the last fixture of the session is down fails the session.

Processes are found in two ways: as descendants of this process, and, because workers live in sessions of their own and
orphans change their parent, by a mark in the environment that every program started from here inherits.

A module- or class-scoped fixture that owns something which *grows inside this process* while tests use it (a manager
that starts a thread with its first model) takes the check on itself:

    @pytest.fixture(scope="module")
    def manager(leak_guard):
        with leak_guard.shared(), ModelManager() as manager:
            yield manager

A server in a process of its own needs no such thing: what descends from an older process belongs to that one.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import attrs
import psutil
import pytest

MARK = "TORCHMGMT_TEST_RUN"
GRACE_S = 2.0
TEMPORARY_PREFIX = "torchmgmt"

_PROC = Path("/proc")
_IS_LINUX = sys.platform == "linux"
# Regular files are left out: they are closed by the garbage collector, and pytest keeps some of its own.
_COUNTED_DESCRIPTOR = re.compile(r"socket:|pipe:|anon_inode:|/memfd:")


@attrs.frozen
class ProcessKey:
    """A process, told apart from a later one that was given the same pid."""

    pid: int
    started: float


@attrs.frozen
class Snapshot:
    """Everything of ours that exists at one moment."""

    processes: dict[ProcessKey, int]  # -> pid of the parent
    threads: frozenset[threading.Thread]
    temporary: frozenset[str]
    descriptors: frozenset[tuple[int, str]]

    def since(self, before: Snapshot) -> Snapshot:
        """What is here and neither was there before nor belongs to a process that was."""
        older = {key.pid for key in before.processes}
        parents = {key.pid: parent for key, parent in self.processes.items()}
        return Snapshot(
            processes={
                key: parent
                for key, parent in self.processes.items()
                if key not in before.processes and not _has_ancestor(key.pid, older, parents)
            },
            threads=self.threads - before.threads,
            temporary=self.temporary - before.temporary,
            descriptors=self.descriptors - before.descriptors,
        )

    def __bool__(self) -> bool:
        return bool(self.processes or self.threads or self.temporary or self.descriptors)


@attrs.define
class LeakGuard:
    """Takes snapshots, compares them, and names what was left. One for the session."""

    run: str
    temporary_root: Path
    grace_s: float = GRACE_S
    _shared: int = 0
    _blamed_threads: set[threading.Thread] = attrs.field(factory=set)
    _blamed_descriptors: set[tuple[int, str]] = attrs.field(factory=set)

    @property
    def is_shared(self) -> bool:
        """Whether a wider fixture has taken the check on itself."""
        return self._shared > 0

    def snapshot(self) -> Snapshot:
        return Snapshot(
            processes=_our_processes(self.run),
            threads=frozenset(threading.enumerate()) - self._blamed_threads,
            temporary=frozenset(
                name
                for name in os.listdir(self.temporary_root)  # noqa: PTH208 - strings are quicker, and this runs twice per test
                if name.startswith(TEMPORARY_PREFIX)
            ),
            descriptors=our_descriptors() - self._blamed_descriptors,
        )

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Check what is inside the block as a whole, not after each test that runs within it."""
        before = self.snapshot()
        self._shared += 1
        try:
            yield
        finally:
            self._shared -= 1
        if not self.is_shared:  # an outer block began earlier and covers this one
            self.check(before, "a shared fixture")

    def check(self, before: Snapshot, owner: str) -> None:
        """Fail, naming what `owner` left behind, after giving it `grace_s` to wind down."""
        left = self._left_after_grace(before)
        if not left:
            return
        message = _describe(left, owner, self.temporary_root)  # before the evidence is removed
        self._clean_up(left)
        pytest.fail(message, pytrace=False)

    def _left_after_grace(self, before: Snapshot) -> Snapshot:
        left = self.snapshot().since(before)
        deadline = time.monotonic() + self.grace_s
        pause_s = 0.002
        while left and time.monotonic() < deadline:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.1)
            if pause_s == 0.1:
                gc.collect()  # an object that only a cycle keeps is on its way out
            left = self.snapshot().since(before)
        return left

    def _clean_up(self, left: Snapshot) -> None:
        """Leave a clean floor to the next test; what cannot be removed is not blamed twice."""
        _kill(left.processes)
        for name in left.temporary:
            path = self.temporary_root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self._blamed_threads |= left.threads
        self._blamed_descriptors |= left.descriptors


def _our_processes(run: str) -> dict[ProcessKey, int]:
    if not _IS_LINUX:
        with contextlib.suppress(psutil.Error):
            children = psutil.Process().children(recursive=True)
            return {ProcessKey(p.pid, p.create_time()): p.ppid() for p in children}
        return {}
    table = dict(filter(None, map(_read_stat, os.listdir(_PROC))))  # noqa: PTH208 - see above
    me = {os.getpid()}
    parents = {pid: parent for pid, (parent, _) in table.items()}
    return {
        ProcessKey(pid, started): parent
        for pid, (parent, started) in table.items()
        if pid not in me and (_has_ancestor(pid, me, parents) or carries(pid, run))
    }


def _read_stat(name: str) -> tuple[int, tuple[int, float]] | None:
    """(pid, (pid of the parent, clock ticks at start)), or None for what is no process any more."""
    if not name.isdigit():
        return None
    try:
        with open(f"/proc/{name}/stat", "rb", buffering=0) as file:  # noqa: PTH123 - see above
            fields = file.read().rpartition(b")")[2].split()  # the name before may hold anything
    except OSError:
        return None
    return int(name), (int(fields[1]), float(fields[19]))


def carries(pid: int, run: str) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:  # noqa: PTH123 - see above
            return run.encode() in file.read()
    except OSError:
        return False


def _has_ancestor(pid: int, wanted: set[int], parents: dict[int, int]) -> bool:
    while (pid := parents.get(pid, 0)) > 0:
        if pid in wanted:
            return True
    return False


def our_descriptors() -> frozenset[tuple[int, str]]:
    if not _IS_LINUX:
        return frozenset()
    found = set()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - see above
        try:
            target = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115 - see above
        except OSError:  # the one that listdir itself had open
            continue
        if _COUNTED_DESCRIPTOR.match(target):
            found.add((int(name), target))
    return frozenset(found)


def _describe(left: Snapshot, owner: str, temporary_root: Path) -> str:
    lines = [f"{owner} left behind:"]
    lines += [f"  process {_title(key.pid, parent)}" for key, parent in left.processes.items()]
    lines += [f"  thread {thread.name!r} (daemon={thread.daemon}, {type(thread).__name__})" for thread in left.threads]
    lines += [f"  temporary path {temporary_root / name}" for name in sorted(left.temporary)]
    lines += [f"  descriptor {fd} -> {target}" for fd, target in sorted(left.descriptors)]
    return "\n".join(lines)


def _title(pid: int, parent: int) -> str:
    try:
        process = psutil.Process(pid)
        status = process.status()
        if status == psutil.STATUS_ZOMBIE:
            name = process.name()  # a zombie has no command line any more
            return f"{pid} (ended, but its parent {parent} never waited for it): {name}"
        command = " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return f"{pid} (ended just now)"
    return f"{pid} ({status}, parent {parent}): {command}"


def _kill(processes: dict[ProcessKey, int]) -> None:
    """Kill and reap exactly these, none that got the same pid since."""
    for key in processes:
        with contextlib.suppress(OSError):
            if not _IS_LINUX:
                os.kill(key.pid, signal.SIGKILL)
                continue
            descriptor = os.pidfd_open(key.pid)
            try:
                now = _read_stat(str(key.pid))
                if now is not None and now[1][1] == key.started:
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            finally:
                os.close(descriptor)
    deadline = time.monotonic() + GRACE_S
    waiting = [key.pid for key, parent in processes.items() if parent == os.getpid()]
    while waiting and time.monotonic() < deadline:
        waiting = [pid for pid in waiting if not _reaped(pid)]
        time.sleep(0.002)


def _reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


_GUARD = pytest.StashKey[LeakGuard]()
_SAVED = pytest.StashKey[dict[str, str | None]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("leak_grace_s", "Seconds a test's leftovers have to wind down.", default="2")


def pytest_configure(config: pytest.Config) -> None:
    """Mark this run in the environment and give it a temporary folder of its own."""
    ordinary = tempfile.gettempdir()
    root = Path(tempfile.mkdtemp(prefix="torchmgmt-tests-"))
    run = uuid.uuid4().hex
    outer = os.environ.get(MARK)
    changed = {
        # A run inside a run carries both marks: the outer one finds it, too.
        MARK: f"{outer}/{run}" if outer else run,
        "TMPDIR": str(root),
        # tmp_path stays where pytest keeps its last three runs.
        "PYTEST_DEBUG_TEMPROOT": os.environ.get("PYTEST_DEBUG_TEMPROOT", ordinary),
    }
    config.stash[_SAVED] = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    tempfile.tempdir = None
    grace_s = float(config.getini("leak_grace_s"))
    config.stash[_GUARD] = LeakGuard(run=run, temporary_root=root, grace_s=grace_s)


def pytest_unconfigure(config: pytest.Config) -> None:
    for name, value in config.stash.get(_SAVED, {}).items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    tempfile.tempdir = None
    guard = config.stash.get(_GUARD, None)
    if guard is not None:
        shutil.rmtree(guard.temporary_root, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def leak_guard(pytestconfig: pytest.Config) -> Iterator[LeakGuard]:
    """The guard of this session. Set up first and taken down last, so it sees all others end."""
    guard = pytestconfig.stash[_GUARD]
    before = guard.snapshot()
    yield guard
    guard.check(before, "the session")


@pytest.fixture(autouse=True)
def no_leaks(leak_guard: LeakGuard, request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves a process, thread, temporary folder, socket or pipe behind."""
    if leak_guard.is_shared:
        yield
        return
    before = leak_guard.snapshot()
    yield
    leak_guard.check(before, request.node.nodeid)
