"""Tells whoever listens to a manager what happens in it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence

from attrs import define, field

from torchmgmt.errors import InvalidArgument
from torchmgmt.events import Event, Listener, RequestsDropped
from torchmgmt.records import ModelKey

__all__ = ["Announcer", "check_listeners"]

log = logging.getLogger(__name__)


@define(eq=False)
class Announcer:
    """Tells the listeners. Apart from the manager, so that pools that run do not keep a forgotten manager alive."""

    listeners: Sequence[Listener]
    """Never changed, but replaced: it may be read at any time."""
    _lock: threading.Lock = field(factory=threading.Lock)

    def __bool__(self) -> bool:
        """Whether anybody listens: if not, an event need not be made."""
        return bool(self.listeners)

    def add(self, listener: Listener) -> None:
        """Have ``listener`` told of what happens from now on. Any thread; does not block."""
        with self._lock:
            self.listeners = (*self.listeners, listener)

    def remove(self, listener: Listener) -> None:
        """Tell ``listener`` nothing more, but for what is being told at this moment. Any thread; idempotent."""
        with self._lock:
            self.listeners = tuple(each for each in self.listeners if each != listener)

    def tell(self, event: Event) -> None:
        """Call each listener, with no lock held; what one raises is logged."""
        for listener in self.listeners:
            try:
                listener(event)
            except Exception:
                log.exception("A listener failed at %r", event)

    def tell_dropped(self, key: ModelKey, error: str, count: int = 1) -> None:
        """Tell that so many requests ended with ``error`` without having been run."""
        if self:
            self.tell(RequestsDropped(key, error, count))

    __call__ = tell
    """An announcer is a listener itself."""


def check_listeners(listeners: object) -> tuple[Listener, ...]:
    """Return the listeners, or raise InvalidArgument for what is no sequence of callables."""
    found = tuple(listeners) if isinstance(listeners, Iterable) else (None,)
    if not all(callable(listener) for listener in found):
        raise InvalidArgument("listeners", listeners, "a sequence of callables that take an event")
    return found
