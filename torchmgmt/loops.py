"""From threads to event loops: an ``await`` for what other threads settle, with one wake-up of the loop for many of them."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from attrs import define

__all__ = ["LoopBridge", "Waiter", "bridge_to", "running_bridge", "settled"]


class LoopBridge:
    """Runs callbacks on one event loop that other threads ask for. Thread-safe; nothing blocks.

    To wake a loop costs a system call and, where it runs Python, a fight for the interpreter lock. So it is woken once
    for all that is posted until it gets to run: a batch of answers wakes it once.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        # It must not keep a loop alive that nobody runs any more: the loop is its key in what is kept of bridges.
        self.loop = weakref.ref(loop)
        self._posted: deque[Callable[[], object]] = deque()
        self._runs = 0  # that the loop has begun
        self._woken_after = -1  # so many of them it was woken for the next one

    def post(self, callback: Callable[[], object]) -> None:
        """Run ``callback`` on the loop: on its own thread at once, from another one soon, in the order in which they came.

        Does nothing once the loop is closed.
        """
        if not self._posted and asyncio._get_running_loop() is self.loop():
            callback()
            return
        self._posted.append(callback)
        runs = self._runs
        if self._woken_after == runs:
            return  # it has not begun to take what was posted, and this came before it does
        loop = self.loop()
        try:
            if loop is not None:
                loop.call_soon_threadsafe(self._run)
                self._woken_after = runs  # last: who comes in the midst of this, in a signal handler, wakes it as well
                return
        except RuntimeError:
            pass  # it is closed
        self._posted.clear()  # nobody waits there any more

    def _run(self) -> None:
        self._runs += 1  # before it takes anything: what comes after that wakes it again
        while self._posted:
            self._posted.popleft()()


@define
class _Bridges:
    lock: threading.Lock
    by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopBridge]
    last: Callable[[], LoopBridge | None] = lambda: None
    """Returns the one that was asked for last: most programs have one loop, and the dictionary is slow to look into.

    It does not keep that alive, nor what it was to run: the answers of a loop that was closed go with it.
    """


_bridges = _Bridges(threading.Lock(), weakref.WeakKeyDictionary())


def bridge_to(loop: asyncio.AbstractEventLoop) -> LoopBridge:
    """Return the one bridge to ``loop``. Any thread."""
    bridge = _bridges.last()
    if bridge is not None and bridge.loop() is loop:
        return bridge
    bridge = _bridges.by_loop.get(loop)
    if bridge is None:
        with _bridges.lock:
            bridge = _bridges.by_loop.setdefault(loop, LoopBridge(loop))
    _bridges.last = weakref.ref(bridge)
    return bridge


def running_bridge() -> LoopBridge:
    """Return the bridge to the event loop that runs now; raise RuntimeError if none does."""
    return bridge_to(asyncio.get_running_loop())


class Waiter:
    """What a task on the event loop that runs waits for: ``await waiter.future`` until anybody calls :meth:`wake`."""

    __slots__ = ("_bridge", "future")

    def __init__(self) -> None:
        self._bridge = running_bridge()
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def wake(self, _of: object = None) -> None:
        """End the waiting. Any thread; what it is given counts for nothing."""
        self._bridge.post(self._end)

    def _end(self) -> None:
        if not self.future.done():  # its task may have been cancelled
            self.future.set_result(None)


async def settled(future: Future[Any]) -> None:
    """Return when ``future`` is done, however it ended; for the loop that runs. Its callbacks may run on any thread."""
    if future.done():
        return
    waiter = Waiter()
    future.add_done_callback(waiter.wake)
    await waiter.future
