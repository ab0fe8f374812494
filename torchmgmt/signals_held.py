"""Keeps the handlers of signals away from what must not be interrupted on the main thread."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal makes enums of all that it is given, which takes 10 times as long
import signal
import threading
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import TypeAlias

__all__ = ["SignalsHeld"]

Handler: TypeAlias = "Callable[[int, FrameType | None], object]"

# Those for which programs have handlers that raise, such as Python's own one for SIGINT. To look at all costs too much.
_NUMBERS = tuple(
    getattr(signal, name)
    for name in (
        "SIGINT",
        "SIGTERM",
        "SIGHUP",
        "SIGQUIT",
        "SIGALRM",
        "SIGVTALRM",
        "SIGPROF",
        "SIGUSR1",
        "SIGUSR2",
        "SIGXCPU",
    )
    if hasattr(signal, name)
)


class SignalsHeld:
    """A block in which no handler of a signal runs; those whose signal came run when it is over, and may raise there.

    Python runs such handlers on the main thread alone, between any two steps of what it does. On other threads this does
    nothing. Blocks may lie in one another.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._held: dict[int, Handler] = {}
        self._came: deque[int] = deque()

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if not self._depth:
            try:
                self._hold()
            except BaseException:  # a handler that came before its turn to be held
                self._let_go()
                raise
        self._depth += 1

    def __exit__(self, *_exc: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._depth -= 1
        if not self._depth:
            try:
                self._let_go()
            except BaseException:
                self._let_go()
                raise

    def _hold(self) -> None:
        for number in _NUMBERS:
            handler = _signal.getsignal(number)
            if callable(handler):
                self._held[number] = handler  # first: to put it back changes nothing
                _signal.signal(number, self._note)

    def _let_go(self) -> None:
        """Put the handlers back, and call those whose signal came. What is interrupted is to be done again."""
        for number, handler in list(self._held.items()):
            if _signal.getsignal(number) == self._note:  # else somebody has set another one
                _signal.signal(number, handler)
        while self._came:
            number = self._came.popleft()
            self._held[number](number, None)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._came.append(number)
