"""The model version as its pool sees it: its state, which follows what its workers are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchmgmt.agenda import Agenda
from torchmgmt.events import VersionStateChanged
from torchmgmt.lifecycle import VersionEvent, VersionState, advance_version
from torchmgmt.pool_worker import PoolWorkers
from torchmgmt.records import ModelKey

__all__ = ["PoolVersion"]

_OVER = (VersionState.RETIRING, VersionState.GONE)
# The steps of a version from where it stands to where its workers say it is.
_ROUTES: Mapping[tuple[VersionState, VersionState], Sequence[VersionEvent]] = {
    **{(state, state): () for state in VersionState},
    (VersionState.REGISTERED, VersionState.LOADING): (VersionEvent.WANT,),
    (VersionState.REGISTERED, VersionState.READY): (VersionEvent.WANT, VersionEvent.SERVE),
    (VersionState.REGISTERED, VersionState.FAILED): (VersionEvent.WANT, VersionEvent.GIVE_UP),
    (VersionState.LOADING, VersionState.REGISTERED): (VersionEvent.UNWANT,),
    (VersionState.LOADING, VersionState.READY): (VersionEvent.SERVE,),
    (VersionState.LOADING, VersionState.FAILED): (VersionEvent.GIVE_UP,),
    (VersionState.READY, VersionState.REGISTERED): (VersionEvent.UNWANT,),
    (VersionState.READY, VersionState.LOADING): (VersionEvent.LOSE,),
    (VersionState.READY, VersionState.FAILED): (VersionEvent.LOSE, VersionEvent.GIVE_UP),
    (VersionState.FAILED, VersionState.REGISTERED): (VersionEvent.UNWANT,),
    (VersionState.FAILED, VersionState.LOADING): (VersionEvent.WANT,),
    (VersionState.FAILED, VersionState.READY): (VersionEvent.SERVE,),
}


class PoolVersion:
    """The state of one model version. Changed only with the pool's lock; each change is told to the listener.

    Whoever holds the lock also wakes those who wait for another state.
    """

    def __init__(self, key: ModelKey, agenda: Agenda) -> None:
        self._key = key
        self._agenda = agenda
        self.state = VersionState.REGISTERED
        """May be read without the lock."""

    @property
    def is_over(self) -> bool:
        """Whether it takes nothing more, for good. May be read without the lock."""
        return self.state in _OVER

    def follow(self, workers: PoolWorkers, *, gave_up: bool) -> None:
        """Bring the state in line with what the workers are, unless it is over."""
        if self.is_over:
            return
        if workers.serving():
            target = VersionState.READY
        elif workers.any_promising():
            target = VersionState.LOADING
        else:
            target = VersionState.FAILED if gave_up else VersionState.REGISTERED
        for event in _ROUTES[self.state, target]:
            self.advance(event)

    def advance(self, event: VersionEvent) -> None:
        """Go to the next state; raise IllegalTransition if there is none."""
        before, self.state = self.state, advance_version(self.state, event)
        self._agenda.tell(VersionStateChanged(self._key, before, self.state))
