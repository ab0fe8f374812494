"""Agenda: what a pool is going to do once its lock is released, and when it looks at its workers again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from torchmgmt.errors import ManagerClosed
from torchmgmt.events import Event, Listener
from torchmgmt.pool_worker import NEVER
from torchmgmt.records import ModelKey

__all__ = ["Agenda"]

log = logging.getLogger(__name__)


class Agenda:
    """What was decided under the pool's lock, in its order. Its methods are to be called with that lock, but for ``flush``.

    Args:
        key: the model version that the pool serves.
        lock: the pool's.
        listener: called with each event.
        call_at: ``call_at(when, callback)`` runs a callback at a time of the monotonic clock.
        on_look: called, without the lock, with the time for which :meth:`look_by` asked.
        on_closed: called, without the lock, when an action found the backend closed.
    """

    def __init__(
        self,
        key: ModelKey,
        lock: threading.Lock,
        listener: Listener | None,
        call_at: Callable[[float, Callable[[], object]], object],
        *,
        on_look: Callable[[float], object],
        on_closed: Callable[[], object],
    ) -> None:
        self._key = key
        self._lock = lock
        self._listener = listener
        self._call_at = call_at
        self._on_look = on_look
        self._on_closed = on_closed
        self._look_at = NEVER
        self.actions: list[Callable[[], object]] = []
        """What is to be done. Whether it is empty may be read without the lock."""

    def add(self, action: Callable[[], object]) -> None:
        """Have ``action`` done; whatever it raises is logged."""
        self.actions.append(action)

    def tell(self, event: Event) -> None:
        """Have the listener told of ``event``."""
        listener = self._listener
        if listener is not None:
            self.actions.append(lambda: listener(event))

    def look_by(self, when: float) -> None:
        """Have the pool look at its workers at ``when`` at the latest: one timer is enough, however many batches run."""
        if when < self._look_at:
            self._look_at = when
            self.actions.append(lambda: self._call_at(when, lambda: self._on_look(when)))

    def take_look(self, when: float) -> bool:
        """Return whether the look at ``when`` is the one to come; if so, the next has yet to be asked for.

        If not, an earlier one was asked for since, and sees to the next one.
        """
        if when != self._look_at:
            return False
        self._look_at = NEVER
        return True

    def flush(self) -> None:
        """Do all that is to be done, on this thread, which holds no lock."""
        while self.actions:
            with self._lock:
                actions, self.actions = self.actions, []
            for action in actions:
                try:
                    action()
                except ManagerClosed:
                    log.debug("The backend of %s is closed", self._key, exc_info=True)
                    self._on_closed()
                except Exception:
                    log.exception("Something that the pool of %s set off failed", self._key)
