"""System calls that a container's profile denies: a seccomp filter, for a program that a test starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

import pytest

__all__ = ["deny", "needs_seccomp"]

_NUMBERS = {
    "x86_64": {"pidfd_open": 434, "pidfd_send_signal": 424, "memfd_create": 319},
    "aarch64": {"pidfd_open": 434, "pidfd_send_signal": 424, "memfd_create": 279},
}

needs_seccomp = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine not in _NUMBERS, reason="denies system calls by their numbers"
)

_FILTER = """
def _deny(numbers, error):
    import ctypes, struct
    load, equal, answer = 0x20, 0x15, 0x06
    rules = [struct.pack("HBBI", load, 0, 0, 0)]
    rules += [struct.pack("HBBI", equal, len(numbers) - at, 0, number) for at, number in enumerate(numbers)]
    rules += [struct.pack("HBBI", answer, 0, 0, 0x7FFF0000), struct.pack("HBBI", answer, 0, 0, 0x00050000 | error)]
    code = ctypes.create_string_buffer(b"".join(rules))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(38, 1, 0, 0, 0) == 0, ctypes.get_errno()  # PR_SET_NO_NEW_PRIVS
    assert prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
"""


def deny(calls: Iterable[str], error: int) -> str:
    """Return the source that has these calls fail with ``error`` from then on, in the process that runs it and its children."""
    numbers = [_NUMBERS[os.uname().machine][call] for call in calls]
    return f"{_FILTER}\n_deny({numbers}, {error})\n"
