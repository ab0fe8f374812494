"""Tells whoever listens to a manager what happens in it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from attrs import define

from torchmgmt.errors import InvalidArgument
from torchmgmt.events import Event, Listener

__all__ = ["Announcer", "check_listeners"]

log = logging.getLogger(__name__)


@define(eq=False)
class Announcer:
    """Tells the listeners. Apart from the manager, so that pools that run do not keep a forgotten manager alive."""

    listeners: Sequence[Listener]

    def tell(self, event: Event) -> None:
        """Call each listener, with no lock held; what one raises is logged."""
        for listener in self.listeners:
            try:
                listener(event)
            except Exception:
                log.exception("A listener failed at %r", event)


def check_listeners(listeners: object) -> tuple[Listener, ...]:
    """Return the listeners, or raise InvalidArgument for what is no sequence of callables."""
    found = tuple(listeners) if isinstance(listeners, Iterable) else (None,)
    if not all(callable(listener) for listener in found):
        raise InvalidArgument("listeners", listeners, "a sequence of callables that take an event")
    return found
