"""SIGTERM and SIGINT, which are for the embedding process: what it has started goes on as long as that lets requests finish.

systemd's default sends them to every process of a service, and so do ``timeout`` and others that end a process group. They
are not ignored as by ``SIG_IGN``, which what a handler starts would inherit: programs have them as they have them
elsewhere, and what a handler forks has Python's defaults.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

__all__ = ["ignore_stops", "own_fork"]

_DEFAULTS: Mapping[signal.Signals, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}

_is_own_fork = False
_local = threading.local()


def ignore_stops() -> None:
    """Go on at SIGTERM and SIGINT, unless a handler of the model's own is set. On the main thread."""
    for number, default in _DEFAULTS.items():
        if signal.getsignal(number) in (signal.SIG_DFL, signal.SIG_IGN, default):
            signal.signal(number, _ignore)


@contextlib.contextmanager
def own_fork() -> Iterator[None]:
    """A block in which what is forked is one of our own processes, which ignores them, too."""
    global _is_own_fork  # noqa: PLW0603 - what runs in the child is given nothing
    _is_own_fork = True
    try:
        yield
    finally:
        _is_own_fork = False


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Do nothing."""


def _block() -> None:
    """Before a fork: what comes between it and :func:`_heed_in_child` is for the child to be ended by."""
    _local.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _DEFAULTS)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _local.blocked)


def _heed_in_child() -> None:
    global _is_own_fork  # the block that it is set in is never left here
    was_own_fork, _is_own_fork = _is_own_fork, False
    if not was_own_fork:
        for number, default in _DEFAULTS.items():
            if signal.getsignal(number) is _ignore:
                signal.signal(number, default)
    _unblock()


os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_heed_in_child)
