"""System calls that a system may not have, or may deny: they are tried, and there is another way in their place.

That ``os`` has a name only says that it was there where Python was built. The kernel may be older, a container's seccomp
profile may refuse it (EPERM, ENOSYS), and a sandbox may know half of it (EINVAL).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal

__all__ = [
    "become_subreaper",
    "fix_size",
    "has_ended",
    "has_fixed_size",
    "memory_file",
    "nameless_file",
    "open_pidfd",
    "send_signal",
    "set_death_signal",
]

_DENIED = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EINVAL})
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_MFD_NOEXEC_SEAL = 8
"""Linux 6.3; without it a system with ``vm.memfd_noexec=2`` refuses a memory file. Older ones know no such flag."""


def open_pidfd(pid: int) -> int | None:
    """Return a descriptor of a process, the caller's own; None where the system has none, or denies it. Any thread.

    Raises:
        OSError: there is no such process, or no descriptor left.
    """
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in _DENIED:
            return None
        raise


def send_signal(pid: int, pidfd: int | None, number: int) -> None:
    """Send a signal to a process by its pidfd; by its pid where there is none, or the system denies it. Any thread.

    Raises:
        ProcessLookupError: it has ended.
        PermissionError: it is somebody else's by now.
    """
    if pidfd is not None:
        try:
            signal.pidfd_send_signal(pidfd, number)
            return
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _DENIED:
                raise
        if has_ended(pidfd):  # its pid may be another's
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    os.kill(pid, number)


def has_ended(pidfd: int) -> bool:
    """Return whether the process of a pidfd has ended. Any thread; does not block."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def set_death_signal(number: int) -> None:
    """Have this process sent a signal when the thread ends that has started it; 0: none. Linux only; for the main thread."""
    _prctl(_PR_SET_PDEATHSIG, number)


def become_subreaper() -> None:
    """Have orphaned descendants come to this process instead of init, so that they can be ended. Linux only."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, argument: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # another system
        ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0)


def memory_file(name: str) -> int | None:
    """Return a descriptor of an empty file in memory, without a name, that can be sealed; None where there is none.

    ``name`` is what the system shows of it. Any thread.

    Raises:
        OSError: there is no descriptor left, or no memory.
    """
    if not hasattr(os, "memfd_create"):
        return None
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    for more in (_MFD_NOEXEC_SEAL, 0):
        try:
            return os.memfd_create(name, flags | more)
        except OSError as error:
            if error.errno not in _DENIED:
                raise
    return None


def nameless_file(name: str) -> int:
    """Return a descriptor of an empty file that is gone with its last descriptor: in memory, or on disk where that is denied.

    One on disk can be truncated by whoever has it: it is not to be mapped by a process that outlives that. Any thread.

    Raises:
        OSError: there is no descriptor left, no memory, or no folder for temporary files.
    """
    fd = memory_file(name)
    if fd is not None:
        return fd
    import tempfile  # which most systems do not need

    with tempfile.TemporaryFile(prefix=name, buffering=0) as file:
        return os.dup(file.fileno())


def fix_size(fd: int, *, and_content: bool = False) -> bool:
    """Have nobody change the size of a memory file, or what is in it, by whatever mistake; return whether that is so now.

    Of a mapped file that shrinks, the system kills whoever touches what is gone (SIGBUS). Holes can be made in it as before,
    unless its content is fixed, too; that can be done as long as nobody has mapped it to write to it.
    """
    if not hasattr(fcntl, "F_ADD_SEALS"):
        return False
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | (fcntl.F_SEAL_WRITE if and_content else 0)
    with contextlib.suppress(OSError):  # a file on a disk has no seals
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return has_fixed_size(fd)


def has_fixed_size(fd: int) -> bool:
    """Return whether ``fd`` is of a memory file that nobody can make smaller: it can be mapped, whoever made it."""
    if not hasattr(fcntl, "F_GET_SEALS"):
        return False
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:  # it is no memory file
        return False
