"""A call that one thread makes for another, which waits for what comes of it and may be interrupted meanwhile."""

from __future__ import annotations

import _thread
import errno
from collections.abc import Callable
from typing import Any, Generic, TypeVar

__all__ = ["ThreadCall", "on_new_thread"]

T = TypeVar("T")

_BEGUN_S = 1.0
"""A thread that has not begun by then may never do so."""


class ThreadCall(Generic[T]):
    """A function to be called once, on another thread than that which waits in :meth:`result`.

    Args:
        act: the function.
    """

    def __init__(self, act: Callable[[], T]) -> None:
        self._act: Callable[[], T] | None = act
        self._result: T | None = None
        self._error: BaseException | None = None
        self._is_over = _thread.allocate_lock()  # held until it is
        self._is_over.acquire()

    def run(self) -> None:
        """Call the function, if that was not done. What it raises goes to who waits, whatever it is."""
        act, self._act = self._act, None
        if act is None:
            return
        try:
            self._result = act()
        except BaseException as error:
            self._error = error
        self._is_over.release()

    @property
    def has_begun(self) -> bool:
        """Whether somebody makes the call, or has made it."""
        return self._act is None

    def result(self) -> T:
        """Return what the function returned, or raise what it raised. Blocks until then; for one thread."""
        self._is_over.acquire()
        return self._outcome()

    def result_within(self, seconds: float) -> tuple[T] | None:
        """The same, but None if it took longer than ``seconds``."""
        return (self._outcome(),) if self._is_over.acquire(timeout=seconds) else None

    def _outcome(self) -> T:
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # its frames refer to this object
        return self._result  # type: ignore[return-value]  # it is what the function returned


def on_new_thread(act: Callable[[], T]) -> T:
    """Return what ``act`` returns, or raise what it raises; it runs on a thread that nothing interrupts. Blocks until then.

    For what takes more than one step, such as to start a thread that stays, where the caller may be interrupted at each.

    Raises:
        OSError: the system gives us no more threads.
    """
    call = ThreadCall(act)
    _start(call)
    while (result := call.result_within(_BEGUN_S)) is None:
        # An exception that another thread sets in the caller may hit the new one instead, before its first line: for a
        # moment CPython knows both by the same number.
        if not call.has_begun:
            _start(call)
    return result[0]


def _start(call: ThreadCall[Any]) -> None:
    try:
        _thread.start_new_thread(call.run, ())
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, str(error)) from error
