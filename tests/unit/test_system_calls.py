"""System calls that a system has, has not, or denies: what is done is the same, in one way or another."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.denied import deny, needs_seccomp
from tests.handlers import run_program
from torchmgmt.system_calls import (
    fix_size,
    has_fixed_size,
    memory_file,
    nameless_file,
    open_pidfd,
    send_signal,
)

needs_memory_files = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="there are memory files on Linux only")
needs_pidfds = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="there are pidfds on Linux only")
DENIED = [errno.EPERM, errno.ENOSYS]


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits to be ended."""
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as process:
        yield process
        process.kill()


@pytest.fixture
def file() -> Iterator[int]:
    """A page of a file in memory."""
    fd = memory_file("torchmgmt-test")
    assert fd is not None
    os.ftruncate(fd, mmap.PAGESIZE)
    yield fd
    os.close(fd)


def programmed(calls: list[str], error: int, source: str) -> str:
    """Run a program that is denied these calls; return what it says."""
    imports = "import os, signal, subprocess, sys\nfrom torchmgmt import system_calls\n"
    done = run_program(deny(calls, error) + imports + source)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


# -- processes ---------------------------------------------------------------------------------------------------------


@needs_pidfds
def test_a_signal_goes_by_the_pidfd(process: subprocess.Popen[bytes]) -> None:
    """And to nobody once the process is gone."""
    pidfd = open_pidfd(process.pid)
    assert pidfd is not None
    try:
        send_signal(process.pid, pidfd, signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            send_signal(process.pid, pidfd, signal.SIGTERM)
    finally:
        os.close(pidfd)


def test_a_signal_goes_by_the_pid_where_there_is_no_pidfd(process: subprocess.Popen[bytes]) -> None:
    """As on a system that has none."""
    send_signal(process.pid, None, signal.SIGTERM)
    assert process.wait(20) == -signal.SIGTERM


@needs_pidfds
def test_a_process_that_is_not_there_has_no_pidfd(process: subprocess.Popen[bytes]) -> None:
    """That is said, and not taken for a system that denies them."""
    process.kill()
    process.wait(20)
    with pytest.raises(ProcessLookupError):
        open_pidfd(process.pid)


@needs_seccomp
@pytest.mark.parametrize("error", DENIED)
def test_where_pidfds_are_denied_there_are_none(error: int) -> None:
    """Though Python has the name."""
    assert programmed(["pidfd_open"], error, "print(system_calls.open_pidfd(os.getpid()))") == "None"


@needs_seccomp
@pytest.mark.parametrize("error", DENIED)
def test_where_signals_by_pidfd_are_denied_they_go_by_pid(error: int) -> None:
    """To a process that is there, and to no other one that may have got its pid since."""
    told = programmed(
        ["pidfd_send_signal"],
        error,
        """
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
pidfd = system_calls.open_pidfd(child.pid)
system_calls.send_signal(child.pid, pidfd, signal.SIGTERM)
print(child.wait(20))
try:
    system_calls.send_signal(os.getpid(), pidfd, signal.SIGTERM)
except ProcessLookupError:
    print("gone")
""",
    )
    assert told.split() == [str(-signal.SIGTERM), "gone"]


# -- files in memory ---------------------------------------------------------------------------------------------------


@needs_memory_files
def test_a_file_of_fixed_size_cannot_be_made_smaller_or_larger(file: int) -> None:
    """By nobody, whatever descriptor of it he has; what is in it can be written and given back."""
    assert not has_fixed_size(file)
    assert fix_size(file)
    assert has_fixed_size(file)
    with pytest.raises(PermissionError):
        os.ftruncate(file, 0)
    with pytest.raises(PermissionError):
        os.truncate(f"/proc/self/fd/{file}", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(file, 2 * mmap.PAGESIZE)
    with mmap.mmap(file, mmap.PAGESIZE) as memory:
        memory[:4] = b"here"
        memory.madvise(mmap.MADV_REMOVE, 0, mmap.PAGESIZE)
        assert memory[:4] == bytes(4)


@needs_memory_files
def test_a_file_of_fixed_content_cannot_be_written_to(file: int) -> None:
    """Not after it was fixed."""
    os.pwrite(file, b"here", 0)
    assert fix_size(file, and_content=True)
    with pytest.raises(PermissionError):
        os.pwrite(file, b"gone", 0)
    assert os.pread(file, 4, 0) == b"here"


def test_a_file_on_a_disk_has_no_fixed_size(tmp_path: object) -> None:
    """And neither has a pipe, or what is no descriptor."""
    fd = os.open(f"{tmp_path}/file", os.O_RDWR | os.O_CREAT)
    try:
        assert not fix_size(fd)
        assert not has_fixed_size(fd)
    finally:
        os.close(fd)
    assert not has_fixed_size(fd)


def test_a_nameless_file_is_gone_with_its_descriptor() -> None:
    """No name leads to it."""
    fd = nameless_file("torchmgmt-test")
    try:
        assert os.fstat(fd).st_nlink == 0
        assert os.fstat(fd).st_size == 0
    finally:
        os.close(fd)


@needs_seccomp
@pytest.mark.parametrize("error", DENIED)
def test_where_files_in_memory_are_denied_a_nameless_file_is_on_a_disk(error: int) -> None:
    """It can be written to as any other, and does not count as fixed."""
    told = programmed(
        ["memfd_create"],
        error,
        """
fd = system_calls.nameless_file("torchmgmt-test")
os.write(fd, b"x")
print(system_calls.memory_file("torchmgmt-test"), os.fstat(fd).st_nlink, system_calls.fix_size(fd), os.pread(fd, 1, 0))
""",
    )
    assert told == "None 0 False b'x'"


def test_other_errors_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is out of descriptors learns that, and gets nothing else in their place."""

    def none_left(*_arguments: object) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(os, "memfd_create", none_left, raising=False)
    monkeypatch.setattr(os, "pidfd_open", none_left, raising=False)
    for name, arguments in (
        (memory_file, ("torchmgmt-test",)),
        (nameless_file, ("torchmgmt-test",)),
        (open_pidfd, (1,)),
    ):
        with pytest.raises(OSError, match="too many open files"):
            name(*arguments)  # type: ignore[operator]
