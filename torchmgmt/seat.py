"""Seat: a place beside an idle worker, for the first caller that comes, who hands the worker its request itself.

A request that goes by way of the dispatcher's thread waits until that is awake. So one idle worker is offered to callers.
What takes a seat may be interrupted at every call that it makes, by whatever its thread is interrupted with. But one call of
C code that makes others is one step: to find the seat free, to say by whom it is taken and to send the request happens
together or not at all. All else is left to the owner, who looks at what happened.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

__all__ = ["Seat"]

_FREE = 1
_FLAGS = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_NOSIGNAL", 0)


class Seat:
    """A place beside an idle worker.

    Args:
        number: that of the batch which is sent.
        written: returns what is to be sent for an item; None if that is too much.
        send: a socket's method, which sends without blocking what is small.
    """

    __slots__ = ("_free", "_send", "_sent", "_taken_by", "_written", "has_spare_core", "number")

    def __init__(self, number: int, written: Callable[[Any], bytes | None], send: Callable[[bytes, int], int]) -> None:
        self.number = number
        self.has_spare_core = _cores() > 1
        """Whether its owner can look at what happened while the worker computes; else that would hold up the worker."""
        self._written = written
        self._send = send
        self._free = [_FREE]
        self._taken_by: list[Any] = []
        self._sent: list[tuple[object, object, int, int]] = []  # of the third and the fourth: how much, and of how much

    # -- for callers, on any thread --------------------------------------------------------------------------------------

    def take(self, entry: object, item: object) -> bool:
        """Take it for ``entry`` and send ``item``, if it is free, and that can be; return whether. Does not block.

        Raises what interrupts the caller, whatever class that is of.
        """
        data = self._written(item)
        if data is None:
            return False
        steps = zip(
            map(self._free.remove, (_FREE,)),
            map(self._taken_by.append, (entry,)),
            map(self._send, (data,), (_FLAGS,)),
            (len(data),),
            strict=False,
        )
        try:
            self._sent.extend(steps)
        except ValueError:
            if self._free or entry in self._taken_by:
                raise  # nothing of this: it interrupts the caller
            return False  # another one has it
        except OSError as error:
            if error.errno is None:
                raise  # not the system's: it interrupts the caller, such as a TimeoutError
            return False  # its worker is gone, which whoever has the seat to give finds out, too
        return True

    # -- for its owner -----------------------------------------------------------------------------------------------------

    def close(self) -> Any:
        """Let nobody take it any more; return who has taken it, or None."""
        try:
            self._free.remove(_FREE)
        except ValueError:
            return self._taken_by[0] if self._taken_by else None
        return None

    def was_sent(self) -> bool:
        """Whether the request of who has taken it was sent, all of it. That may be so a moment after it was taken."""
        return bool(self._sent) and self._sent[0][2] == self._sent[0][3]


def _cores() -> int:
    """Return how many cores this program may use now."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # another system
        return os.cpu_count() or 1
