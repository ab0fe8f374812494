"""Starting that goes wrong half-way: an error that says so, nothing left behind, and all is well when the cause is gone."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.handlers import ECHO, EVAL, TOOLS, Deployer, is_gone, run_program, until, write_folder
from torchmgmt import Model, ModelManager, ProcessBackend
from torchmgmt.dispatcher import Dispatcher
from torchmgmt.errors import ManagerClosed, NoWorker, TorchmgmtError, WorkerStartFailed
from torchmgmt.lifecycle import VersionState

LOADS_BY_ITSELF = {"share_weights": "never"}
FROM_TEMPLATE = {"share_weights": "auto"}


@contextlib.contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Let this process open ``count`` descriptors more, and then none."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    try:
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208
        # Room for `count` above all that are open, for a process whose numbers have no gaps; the gaps are taken below.
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + count, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@pytest.mark.parametrize("options", [LOADS_BY_ITSELF, FROM_TEMPLATE], ids=["by itself", "from a template"])
@pytest.mark.parametrize("left", range(9))
def test_a_start_without_descriptors_leaves_none(deploy: Deployer, options: dict[str, str], left: int) -> None:
    """Wherever a start runs out of descriptors, it is told as a start that failed, and none of them stays open."""
    deploy(ECHO, model_name="first")  # whatever is made once is made
    model = deploy(ECHO, initial_workers=0, max_workers=1, config="maxRetryTimeoutInSec: 0\n", **options)
    before = descriptors()
    with descriptors_left(left), contextlib.suppress(TorchmgmtError):
        model.scale(1)
    model.scale(0)
    until(lambda: descriptors() <= before, f"{descriptors()} descriptors have become {before} again", 5)
    model.scale(1)
    assert model.predict("x", timeout=20) == "x"


@pytest.mark.usefixtures("light_torch")
@pytest.mark.parametrize("left", range(12))
def test_a_first_start_without_descriptors_leaves_nothing(tmp_path: Path, left: int) -> None:
    """The same for the torch-only process and the threads, which the first worker needs: no process and no thread stays."""
    threads = set(threading.enumerate())
    before = descriptors()
    backend = ProcessBackend()
    with contextlib.closing(backend), ModelManager(backend=backend) as manager:
        model = Deployer(tmp_path, manager)(ECHO, initial_workers=0, max_workers=1)
        with descriptors_left(left), contextlib.suppress(TorchmgmtError, OSError):
            model.scale(1, synchronous=False)
        model.scale(1)
        assert model.predict("x", timeout=20) == "x"
    assert descriptors() <= before
    until(lambda: set(threading.enumerate()) <= threads, "no thread is left", 5)


@pytest.mark.parametrize("options", [LOADS_BY_ITSELF, FROM_TEMPLATE], ids=["by itself", "from a template"])
@pytest.mark.usefixtures("light_torch")
def test_a_worker_for_a_closed_backend_is_refused(tmp_path: Path, options: dict[str, str]) -> None:
    """Who closes a shared backend too early is told by the next start, for good; nothing is left open by it."""
    backend = ProcessBackend()
    with ModelManager(backend=backend) as manager:
        model = Deployer(tmp_path, manager)(ECHO, **options)
        backend.close()
        until(lambda: model.state is VersionState.FAILED, "the pool has noticed")
        before = descriptors()
        with pytest.raises((NoWorker, WorkerStartFailed)):
            model.scale(2)
        assert model.describe().workers == ()
        assert descriptors() == before


SLOW_TORCH = """
import os, time
while not os.path.exists({gate!r}):
    time.sleep(0.01)
"""


@pytest.fixture
def slow_torch(light_torch: Path, tmp_path: Path) -> Path:
    """Have torch take as long to be imported as a gate is closed; return the gate's path."""
    gate = tmp_path / "torch gate"
    package = light_torch / "torch" / "__init__.py"
    package.write_text(SLOW_TORCH.format(gate=str(gate)) + package.read_text())
    return gate


@pytest.mark.parametrize("options", [LOADS_BY_ITSELF, FROM_TEMPLATE], ids=["by itself", "from a template"])
def test_a_start_does_not_wait_for_torch_past_its_limit(
    tmp_path: Path, slow_torch: Path, options: dict[str, str]
) -> None:
    """A worker is not ready in time, also where the reason is that torch is still being imported; that is told in time."""
    backend = ProcessBackend()
    with contextlib.closing(backend), ModelManager(backend=backend) as manager:
        with pytest.raises(WorkerStartFailed, match="startup_timeout"):
            Deployer(tmp_path, manager)(ECHO, startup_timeout=0.3, **options)
        assert not slow_torch.exists(), "it was waited for"
        slow_torch.touch()
        assert Deployer(tmp_path / "again", manager)(ECHO, **options).predict("x", timeout=20) == "x"


@pytest.mark.parametrize("options", [LOADS_BY_ITSELF, FROM_TEMPLATE], ids=["by itself", "from a template"])
@pytest.mark.parametrize("end", ["unregister", "scale"])
def test_what_is_not_wanted_any_more_does_not_wait_for_torch(
    tmp_path: Path, slow_torch: Path, options: dict[str, str], end: str
) -> None:
    """Unregistering and scaling to zero while torch is still being imported are done at once; what comes late is ended."""
    backend = ProcessBackend()
    marks = tmp_path / "marks"
    with contextlib.closing(backend), ModelManager(backend=backend) as manager:
        source = f"{TOOLS}\nnote({str(marks)!r}, os.getpid())\n{ECHO}"
        deploy = Deployer(tmp_path, manager)
        model = deploy(source, synchronous=False, initial_workers=2, **options)
        if end == "unregister":
            model.unregister(timeout=10)
            assert len(manager) == 0
        else:
            # A worker that is loading is told to end, and killed when it does not heed that.
            model.scale(0, timeout=0)
        assert not slow_torch.exists(), "it was waited for"
        slow_torch.touch()
        assert deploy(ECHO, model_name="other").predict("x", timeout=20) == "x"
        (root,) = [child for child in psutil.Process().children() if child.pid == backend.forkserver.pid]
        until(lambda: len(root.children(recursive=True)) <= 2, "only the other model's two processes are left")


BLOCKED = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
from torchmgmt import ModelManager
if __name__ == "__main__":
    with ModelManager() as manager:
        model = manager.register(sys.argv[1], model_name="m", handler="handler.py", share_weights=sys.argv[2])
        old = model.predict("os.getpid()")
        os.kill(old, signal.SIGKILL)
        while model.predict("os.getpid()", timeout=20) == old:
            pass
        stubborn = model.submit("threading.Event().wait()")
        report = manager.close(0.2)
    print("replaced", report.seconds < 20)
"""


@pytest.mark.parametrize("way", ["auto", "never"])
@pytest.mark.usefixtures("light_torch")
def test_a_program_that_has_blocked_signals_is_served(tmp_path: Path, way: str) -> None:
    """Signals that a program blocks, to wait for them, are not blocked in its workers: deaths are noticed, ends heeded."""
    done = run_program(BLOCKED, write_folder(tmp_path / "m", EVAL), way)
    assert done.stdout.split() == ["replaced", "True"], done.stderr


def test_killing_before_starting_is_not_forgotten(deploy: Deployer, backend: ProcessBackend) -> None:
    """A startup_timeout so short that it is over before the start returns ends in an error, every time."""
    for _ in range(10):
        with pytest.raises(WorkerStartFailed):
            deploy(ECHO, startup_timeout=0.001)


def test_starts_and_ends_that_meet_leave_nothing(deploy: Deployer) -> None:
    """Scaling to and fro from two threads while workers are being forked ends in what was asked for last."""
    model: Model = deploy(ECHO)
    until_s = time.monotonic() + 2
    errors: list[BaseException] = []

    def turn(wanted: int) -> None:
        try:
            while time.monotonic() < until_s:
                model.scale(wanted, synchronous=False, timeout=0)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=turn, args=(wanted,)) for wanted in (0, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    model.scale(2)
    assert errors == []
    assert len(model.describe().workers) == 2
    assert model.predict("x", timeout=20) == "x"
    old = [worker.pid or 0 for worker in model.describe().workers]
    model.unregister()
    assert all(map(is_gone, old))
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL


def test_a_later_thread_is_not_taken_for_its_own() -> None:
    """After it was closed every thread is refused, also one that was given the number that its own thread had."""
    closed = Dispatcher()
    closed.call_soon(int)
    closed.close()
    accepted: list[int] = []

    def call() -> None:
        with contextlib.suppress(ManagerClosed):
            closed.call_soon(int)
            accepted.append(threading.get_ident())

    for _ in range(10):  # of which some have the same number
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert accepted == []


@pytest.mark.parametrize(
    "what", ["_thread.start_new_thread", "threading.Thread.start", "selectors.DefaultSelector", "os.pipe"]
)
def test_one_that_cannot_be_started_says_so(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Without a thread or a descriptor for it the call raises OSError, leaves nothing, and works when there is one."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread") if "thread" in what else OSError(errno.EMFILE, "none left")

    dispatcher = Dispatcher()
    with monkeypatch.context() as patch:
        patch.setattr(what, fail)
        patch.delattr("os.eventfd", raising=False)
        with pytest.raises(OSError, match="new thread" if "thread" in what else "none left"):
            dispatcher.call_soon(int)
    done = threading.Event()
    dispatcher.call_soon(done.set)
    assert done.wait(10)
    dispatcher.close()
