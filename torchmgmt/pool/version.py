"""The model version as its pool sees it: its state, which follows what its workers are."""

from __future__ import annotations

from collections.abc import Mapping

from torchmgmt.events import VersionStateChanged
from torchmgmt.lifecycle import VERSION_TRANSITIONS, VersionEvent, VersionState, advance_version
from torchmgmt.pool.actions import Actions
from torchmgmt.records import ModelKey

__all__ = ["PoolVersion"]

_OVER = frozenset({VersionState.RETIRING, VersionState.GONE})
_EVENTS: Mapping[tuple[VersionState, VersionState], VersionEvent] = {
    (before, after): event for before, events in VERSION_TRANSITIONS.items() for event, after in events.items()
}
"""What has happened where a version has gone from one state to another."""


class PoolVersion:
    """The state of one model version. Changed on the dispatcher's thread; each change is told to the listener, once."""

    def __init__(self, key: ModelKey, actions: Actions) -> None:
        self._key = key
        self._actions = actions
        self.state = VersionState.REGISTERED
        """May be read on any thread."""

    @property
    def is_over(self) -> bool:
        """Whether it takes nothing more, for good. May be read on any thread."""
        return self.state in _OVER

    def follow(self, *, serving: bool, promising: bool, gave_up: bool) -> None:
        """Bring the state in line with the workers, unless it is over.

        Args:
            serving: whether one of them takes batches.
            promising: whether one does, or will.
            gave_up: whether none is to be started.
        """
        if serving:
            target = VersionState.READY
        elif promising:
            target = VersionState.LOADING
        else:
            target = VersionState.FAILED if gave_up else VersionState.REGISTERED
        if target is not self.state and not self.is_over:
            self.advance(_EVENTS[self.state, target])

    def advance(self, event: VersionEvent) -> None:
        """Go to the next state; raise IllegalTransition if there is none."""
        before, self.state = self.state, advance_version(self.state, event)
        self._actions.tell(VersionStateChanged(self._key, before, self.state))
