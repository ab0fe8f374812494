"""Interrupts a call as Ctrl-C does, at each point at which Python looks for signals: one run of the call for each point."""

from __future__ import annotations

import dis
import itertools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

__all__ = ["Interruption", "Nuisance", "interruptions"]

# Python looks when a function begins, when a call into C has returned, and when a loop goes back. What waits in C is woken.
_WAITS = frozenset({"acquire", "get", "join", "select", "sleep", "wait"})
_BACK = frozenset(
    number for name, number in dis.opmap.items() if "JUMP_BACKWARD" in name or name == "JUMP_ABSOLUTE"
) - {dis.opmap.get("JUMP_BACKWARD_NO_INTERRUPT")}
_MISSES = 3  # the number of points differs from run to run


class Interruption:
    """Raises KeyboardInterrupt, or another error, once, at the point with a number, in what :meth:`of` calls."""

    def __init__(self, point: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.where = ""
        """Where that was: the last calls, the innermost first; empty: there are not so many points."""
        self._left = point
        self._error = error
        self._last_opcode: dict[FrameType, int] = {}

    def of(self, call: Callable[[], object]) -> bool:
        """Run ``call``; return whether it was interrupted, and the interruption has come out of it."""
        before = sys.gettrace()
        trace, profile = (
            self._trace,
            self._profile,
        )  # kept: they are unset as they run, and Python 3.11 does not keep them
        sys.settrace(trace)
        sys.setprofile(profile)
        try:
            call()
        except self._error:
            return True
        finally:
            sys.setprofile(None)
            sys.settrace(before)
            self._last_opcode.clear()
        return False

    def _profile(self, frame: FrameType, event: str, arg: Any) -> None:
        name = getattr(arg, "__name__", "")
        if event == "call":
            self._point(frame, "entering it")
        elif event == "c_return" and name not in {"setprofile", "settrace"}:
            self._point(frame, f"after {name}")
        elif event == "c_call" and name in _WAITS:
            self._point(frame, f"in {name}")

    def _trace(self, frame: FrameType, event: str, _arg: object) -> Any:
        if event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            before, self._last_opcode[frame] = self._last_opcode.get(frame), frame.f_code.co_code[frame.f_lasti]
            if before in _BACK:
                self._point(frame, "going back")
        return self._trace

    def _point(self, frame: FrameType, how: str) -> None:
        self._left -= 1
        if self._left:
            return
        sys.setprofile(None)
        sys.settrace(None)
        inner: FrameType | None = frame
        calls = []
        while inner is not None and len(calls) < 6:
            calls.append(f"{inner.f_code.co_filename.rpartition('/')[2]}:{inner.f_lineno} {inner.f_code.co_name}")
            inner = inner.f_back
        self.where = f"{how}: {' < '.join(calls)}"
        raise self._error


def interruptions(step: int = 1, error: type[BaseException] = KeyboardInterrupt) -> Iterator[Interruption]:
    """Give an interruption at the first point, at the second, and so on, until what is called has no more of them.

    ``step``: leave points out between, where there is no time for all.
    """
    misses = 0
    for point in itertools.count(1, step):
        interruption = Interruption(point, error)
        yield interruption
        misses = 0 if interruption.where else misses + 1
        if misses == _MISSES:
            return


class Nuisance:
    """Sends this process a signal a moment after each :meth:`again`."""

    def __init__(self, number: signal.Signals, seed: int, most_s: float = 0.01) -> None:
        self._number = number
        self._random = random.Random(seed)
        self._most_s = most_s
        self._go = threading.Semaphore(0)
        self._is_over = False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Nuisance:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._is_over = True
        self._go.release()
        self._thread.join()

    def again(self) -> None:
        self._go.release()

    def _run(self) -> None:
        while self._go.acquire() and not self._is_over:
            time.sleep(self._random.uniform(self._most_s / 20, self._most_s))
            os.kill(os.getpid(), self._number)
