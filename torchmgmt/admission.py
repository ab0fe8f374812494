"""Admission: who may wait in a bounded queue, and who has come since its owner looked.

A caller may be interrupted at every call that it makes, so it makes none here: to count it in and to put it into the chain
is one step, whatever becomes of the caller.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from enum import Enum
from typing import Any, Protocol

__all__ = ["Admission", "Admitted", "Entrant"]


class Entrant(Protocol):
    """What is admitted; these are for :class:`Admission` alone."""

    next: Any
    is_counted: bool


class Admitted(Enum):
    """Whether something was admitted."""

    YES = "yes"
    FULL = "full"
    CLOSED = "closed"


class Admission:
    """A counter with a limit, and a chain of those who were counted in. Thread-safe; nothing blocks.

    Args:
        capacity: how many may be counted in at once, at least 1.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._gate = threading.Lock()
        # guarded by _gate
        self.waiting = 0
        """How many are counted in; may be read without a lock."""
        self._is_closed = False
        self._head: Entrant = _Head()
        self._newest: Entrant = self._head

    def enter(self, entrant: Entrant) -> Admitted:
        """Count one in and put it into the chain, unless the limit is reached or it was closed."""
        with self._gate:
            is_closed = self._is_closed
            has_room = self.waiting < self.capacity
            if has_room and not is_closed:
                self.waiting += 1
                entrant.is_counted = True
                self._newest.next = entrant
                self._newest = entrant
        if is_closed:
            return Admitted.CLOSED
        return Admitted.YES if has_room else Admitted.FULL

    def leave(self, entrant: Entrant) -> None:
        """Count one out; nothing if it is not counted in."""
        with self._gate:
            if entrant.is_counted:
                entrant.is_counted = False
                self.waiting -= 1

    def reenter(self, entrant: Entrant) -> None:
        """Count one in again that was counted out, whatever the limit is."""
        with self._gate:
            if not entrant.is_counted:
                entrant.is_counted = True
                self.waiting += 1

    def close(self) -> None:
        """Admit nobody any more."""
        with self._gate:
            self._is_closed = True

    def has_new(self) -> bool:
        """Whether the chain has something. Takes no lock."""
        return self._head.next is not None

    def take_new(self) -> Iterator[Any]:
        """Take the chain away, and give those who were in it, in their order. For the owner of the queue."""
        with self._gate:
            entrant, self._head.next, self._newest = self._head.next, None, self._head
        while entrant is not None:
            entrant, taken = entrant.next, entrant
            taken.next = None  # or who waits longest would keep all that came after it
            yield taken


class _Head:
    """The beginning of the chain."""

    next: Any = None
    is_counted = False
