"""Tells whoever listens to a manager what happens in it: one event after the other, in the order in which they happened."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from torchmgmt.errors import InvalidArgument
from torchmgmt.events import Event, Listener, RequestsDropped
from torchmgmt.log_relay import LogRelay
from torchmgmt.records import ModelKey

__all__ = ["Announcer", "check_listeners"]

log = logging.getLogger(__name__)


class Announcer:
    """Tells the listeners. Apart from the manager, so that pools that run do not keep a forgotten manager alive.

    One thread at a time tells; what happens meanwhile, on another or in a listener, it tells next. Nothing waits for it.

    Args:
        listeners: called with each event; what one raises, whatever it is, is logged.
        post: runs a function soon, on a thread of the library.
    """

    def __init__(self, listeners: Sequence[Listener], post: Callable[[Callable[[], object]], object]) -> None:
        self.listeners = tuple(listeners)
        """Never changed, but replaced: it may be read at any time."""
        self._post = post
        self._relay = LogRelay()
        self._events: deque[Event] = deque()
        self._telling = threading.Lock()  # held by who tells; nobody waits for it
        self._gate = threading.Lock()  # nothing is called while it is held

    def __bool__(self) -> bool:
        """Whether anybody listens: if not, an event need not be made."""
        return bool(self.listeners)

    def add(self, listener: Listener) -> None:
        """Have ``listener`` told of what happens from now on. Any thread; does not block."""
        with self._gate:
            self.listeners = (*self.listeners, listener)

    def remove(self, listener: Listener) -> None:
        """Tell ``listener`` nothing more, but for what is being told at this moment. Any thread; idempotent."""
        while True:
            seen = self.listeners
            left = tuple(each for each in seen if each != listener)
            with self._gate:
                is_same = self.listeners is seen
                if is_same:
                    self.listeners = left
            if is_same:
                return

    def tell(self, event: Event) -> None:
        """Tell of ``event``, after what happened before it. On threads of the library, which nothing interrupts."""
        self._events.append(event)
        self._tell_all()

    __call__ = tell
    """An announcer is a listener itself."""

    def note(self, event: Event) -> None:
        """Have ``event`` told of soon. Any thread; does not block, and calls no listener."""
        self._events.append(event)
        self._post(self._tell_all)

    def note_dropped(self, key: ModelKey, error: str, count: int = 1) -> None:
        """Have it told that so many requests ended with ``error`` without having been run. Any thread."""
        if self:
            self.note(RequestsDropped(key, error, count))

    def tell_dropped(self, key: ModelKey, error: str, count: int = 1) -> None:
        """The same, at once; on threads of the library."""
        if self:
            self.tell(RequestsDropped(key, error, count))

    def close(self) -> None:
        """End what it has started to log what listeners raised. Blocks shortly; idempotent."""
        self._relay.close()

    def _tell_all(self) -> None:
        # Who comes while another one tells leaves it to that one: it looks again after it has let go.
        while self._events and self._telling.acquire(blocking=False):
            try:
                while self._events:
                    self._tell_one(self._events.popleft())
            finally:
                self._telling.release()

    def _tell_one(self, event: Event) -> None:
        for listener in self.listeners:
            try:
                listener(event)
            except BaseException as error:  # sys.exit() in one of them must not keep the others from being told
                self._relay.log(log, logging.ERROR, "A listener failed at %s", repr(event), exc_info=error)


def check_listeners(listeners: object) -> tuple[Listener, ...]:
    """Return the listeners, or raise InvalidArgument for what is no sequence of callables."""
    found = tuple(listeners) if isinstance(listeners, Iterable) else (None,)
    if not all(callable(listener) for listener in found):
        raise InvalidArgument("listeners", listeners, "a sequence of callables that take an event")
    return found
