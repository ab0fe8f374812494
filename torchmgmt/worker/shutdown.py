"""How a worker ends in good order: its handler's hooks, what was registered with ``atexit``, and what open files still hold.

The embedding process waits for 5 s for a worker that it told to end, and for less when it is in a hurry itself; then it sends
HURRY, and SIGKILL 2 s later. So each step has its time, in which it is interrupted where Python code runs or waits, and what
can be written at all is written before SIGKILL comes: after HURRY at once, and by a second thread where the first one hangs
in what nobody can interrupt.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing.util
import os
import select
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NoReturn

from torchmgmt.process_signals import HURRY
from torchmgmt.worker.open_files import Descriptor, descriptors, open_files

__all__ = ["ShutDown", "disown_finalizers", "exit_functions_kept", "inherit_no_exit_functions", "keep_exit_functions"]

log = logging.getLogger(__name__)

# Until then, in s from the beginning, what comes before is over.
_HOOKS_S, _EXIT_FUNCTIONS_S, _LOGGING_S, _FILES_S = 2.5, 3.25, 3.5, 4.0
_SECOND_THREAD_S = 4.3
# What each step gets at least, whatever those before it took; and what is left to the first thread after HURRY.
_LEAST_S = 0.2
_HURRIED_S = 0.5
# A step that goes on after it was interrupted is interrupted again so often.
_AGAIN_S = 0.1


class _TimeIsUp(BaseException):
    """Raised in a step whose time is over."""


class ShutDown:
    """One worker's end in good order. For the main thread of a process that does nothing else any more.

    Args:
        endings: the hooks to call, by names for the log, in order.
        ours: descriptors that are of the worker's own making, and no files of the handler's.
    """

    def __init__(self, endings: Sequence[tuple[str, Callable[[], object]]], ours: Collection[Descriptor] = ()) -> None:
        self._endings = endings
        self._ours = set(ours)
        self._is_armed = False
        self._is_hurried = False

    def run(self) -> None:
        """Do it all; what raises, or takes too long, is logged and keeps nothing else from being done.

        Takes a little over 4 s at most; where something hangs that cannot be interrupted, the process ends by then.
        """
        began = time.monotonic()
        self._take_signals(began)
        for name, call in self._endings:
            self._step(name, call, began + _HOOKS_S)
        self._step("a function registered with atexit", atexit._run_exitfuncs, began + _EXIT_FUNCTIONS_S)
        self._step("logging.shutdown()", logging.shutdown, began + _LOGGING_S)
        self._is_hurried = False  # what comes now is what all hurry is for
        files: list[Any] = []
        self._step("looking for open files", lambda: files.extend(open_files(self._ours)), began + _FILES_S)
        for file in files:
            self._step(f"writing what {file!r} still holds", file.flush, began + _FILES_S)

    def _take_signals(self, began: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._on_signal)
        try:
            self._start_second_thread(began + _SECOND_THREAD_S)
        except (OSError, RuntimeError):  # no descriptor is left, or no thread
            log.warning("Nothing will end this worker should a hook hang in native code", exc_info=True)
        signal.signal(HURRY, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM, HURRY])

    def _start_second_thread(self, until: float) -> None:
        reader, writer = os.pipe()
        self._ours |= {each for each in descriptors() if each[0] in {reader, writer}}
        os.set_blocking(writer, False)
        # Written to by the system's own signal handler: the Python one waits until the first thread runs Python code.
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._end_after, args=(reader, until), name="torchmgmt-end", daemon=True).start()

    def _end_after(self, signals: int, until: float) -> NoReturn:
        """End the process at ``until``, or soon after HURRY, unless the first thread has done it."""
        poller = select.poll()
        poller.register(signals, select.POLLIN)
        while (left := until - time.monotonic()) > 0:
            if poller.poll(left * 1000) and HURRY in os.read(signals, 4096):
                until = min(until, time.monotonic() + _HURRIED_S)
        with contextlib.suppress(BaseException):
            log.error("The worker ends although something hangs in it that cannot be interrupted")
        for file in [*open_files(self._ours), sys.stdout, sys.stderr]:
            with contextlib.suppress(BaseException):
                file.flush()
        os._exit(0)

    def _on_signal(self, number: int, _frame: object) -> None:
        if number == HURRY:
            self._is_hurried = True
        if self._is_armed:
            raise _TimeIsUp

    def _step(self, name: str, call: Callable[[], object], until: float) -> None:
        if self._is_hurried:
            log.warning("%s is left out: there is no time for it", name)
            return
        limit_s = max(_LEAST_S, until - time.monotonic())
        try:
            self._limited(call, limit_s)
        except _TimeIsUp:
            log.exception("%s was interrupted, after %.1f s at most", name, limit_s)
        except BaseException:
            log.exception("%s failed", name)

    def _limited(self, call: Callable[[], object], limit_s: float) -> None:
        self._is_armed = True
        try:
            signal.setitimer(signal.ITIMER_REAL, limit_s, _AGAIN_S)
            call()
        finally:
            self._is_armed = False  # before all else: no alarm that comes later raises
            signal.setitimer(signal.ITIMER_REAL, 0)


_forget_exit_functions = atexit._clear


@contextlib.contextmanager
def exit_functions_kept() -> Iterator[None]:
    """Have what multiprocessing forks meanwhile keep what was registered with ``atexit``: as of Python 3.13 it forgets that.

    The child never comes back here; it is to call :func:`keep_exit_functions`.
    """
    atexit._clear = lambda: None
    try:
        yield
    finally:
        atexit._clear = _forget_exit_functions


def keep_exit_functions() -> None:
    """In a process that was forked meanwhile, have all as it was before, but for what multiprocessing has registered.

    That would wait for the handler's own children, which are ended with the worker.
    """
    atexit._clear = _forget_exit_functions
    atexit.unregister(multiprocessing.util._exit_function)  # type: ignore[attr-defined]


def inherit_no_exit_functions() -> None:
    """Forget what was registered with ``atexit`` before the fork: it belongs to the process that was forked."""
    atexit._clear()
    disown_finalizers()
    # It registers with the first finalizer, and has that done, as it believes.
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]


def disown_finalizers() -> None:
    """Leave what objects do at the end of the process to the process that made them.

    A folder that was made once, before the fork, must not be removed by the first of several workers that ends.
    """
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False
