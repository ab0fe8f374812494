"""What a manager has and shall have: registered versions, failed loads, the desired state.

Each method is one whole operation. Those that change something take the one lock, on threads of the library; what follows
from that and may take its time, such as to start, to tell or to close something, is done by the caller, outside of it. Those
that only read take none, so that a caller may be interrupted in them, and a signal handler may read, too.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from attrs import evolve

from torchmgmt import forks
from torchmgmt.desired import Desired
from torchmgmt.errors import InvalidArgument, ManagerClosed, ModelNotFound, ModelVersionNotFound, TorchmgmtError
from torchmgmt.failed_loads import Certainty, FailedLoads
from torchmgmt.listing import default_versions, infos_of, versions_of, wanted_versions
from torchmgmt.records import ModelInfo, ModelKey
from torchmgmt.registry import Registry, Withdrawal
from torchmgmt.served import ServedVersion
from torchmgmt.state import DesiredState, StoredVersion

if TYPE_CHECKING:
    from torchmgmt.state_file import StateKeeper

__all__ = ["Catalogue"]


class Catalogue:
    """The model versions of one manager, and its memory of what they shall be. Thread-safe.

    What shall be is on the disk, if there is a state file, when an operation returns that changes it; those that wait for
    the disk say so. No other blocks. Before what gives no name, callers call :meth:`check_usable`: a copy in a forked
    process must touch no lock.

    Args:
        state_file: the file that holds the desired state, whose content is wanted from now on; None: there is none.

    Raises:
        InvalidArgument, StateFileInUse, InvalidStateFile, OSError: ``state_file`` cannot be used.
    """

    def __init__(self, state_file: str | os.PathLike[str] | None = None) -> None:
        self._depth = forks.depth()
        self._lock = threading.Lock()
        # guarded by _lock
        self._registry: Registry[ServedVersion] = Registry()
        self._failed_loads = FailedLoads()
        self._desired = Desired()
        self._leaving: set[ServedVersion] = set()  # no longer registered, but not finished yet
        self._is_closed = False
        self._keeper: StateKeeper | None = None
        self.has_stored = False
        """Whether there was a state file."""
        if state_file is not None:
            from torchmgmt.state_file import StateKeeper  # most programs keep no state

            self._keeper, stored = StateKeeper.open(state_file)
            if stored is not None:
                self.has_stored = True
                self._desired.load(stored)

    def __repr__(self) -> str:
        return f"<Catalogue of {len(self)} model versions>"

    def __len__(self) -> int:
        """The number of model versions that are registered. Takes no lock."""
        return len(self._registry)

    def __contains__(self, name: object) -> bool:
        """Whether any version of a model is registered."""
        return isinstance(name, str) and name in self._registry

    @property
    def is_inherited(self) -> bool:
        """Whether it belongs to the process that this one was forked from."""
        return forks.depth() != self._depth

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, or is inherited."""
        return self._is_closed or self.is_inherited

    def check_usable(self, name: object = "", version: object = None) -> None:
        """Raise ManagerClosed, or InvalidArgument for a name or version that can be none. Takes no lock."""
        if forks.depth() != self._depth:
            why = "belongs to the process that this one was forked from; make a new one after the fork"
            raise ManagerClosed("This ModelManager", why)
        if self._is_closed:
            raise ManagerClosed
        if not isinstance(name, str):
            raise InvalidArgument("name", name, "text")
        if version is not None and not isinstance(version, str):
            raise InvalidArgument("version", version, "text, or None for the default version")

    def names(self) -> tuple[str, ...]:
        """Return the names of all models, sorted."""
        return tuple(self._registry.names())

    def get(self, name: str, version: str | None = None) -> ServedVersion:
        """Return a version, the default one unless given.

        Raises:
            ManagerClosed, InvalidArgument: as :meth:`check_usable`.
            NoWorker: it could not be loaded at the start.
            ModelNotFound, ModelVersionNotFound: it is not registered.
        """
        self.check_usable(name, version)
        try:
            return self._registry.get(name, version)
        except LookupError:
            self._failed_loads.check(name, version)
            raise

    def find_failed(self, name: str, version: str | None) -> ModelInfo | None:
        """Return what is known of a version that is not registered because it could not be loaded; None for others.

        Raises as :meth:`check_usable` does.
        """
        self.check_usable(name, version)
        return self._failed_loads.find(name, version) if self._registry.find(name, version) is None else None

    def is_default(self, key: ModelKey) -> bool:
        """Whether a version is its model's default one."""
        return self._registry.is_default(key)

    def models(self, start: int, limit: int | None) -> tuple[ModelInfo, ...]:
        """Return the default versions, also of models that could only fail; see :meth:`torchmgmt.ModelManager.models`."""
        return infos_of(default_versions(self._registry, self._failed_loads, start, limit))

    def wanted(self) -> tuple[ModelInfo, ...]:
        """Return what shall have workers at all times, or has failed; see :meth:`torchmgmt.ModelManager.wanted`."""
        return infos_of(wanted_versions(self._registry, self._failed_loads))

    def versions(self, name: str) -> tuple[ModelInfo, ...]:
        """Return all versions of a model, oldest first, and last those that failed; raise ModelNotFound."""
        return infos_of(versions_of(self._registry, self._failed_loads, name))

    @contextlib.contextmanager
    def gone_is_not_found(self, served: ServedVersion) -> Iterator[None]:
        """A version that was unregistered meanwhile is one that does not exist, whichever of its parts noticed first."""
        try:
            yield
        except (ManagerClosed, ModelNotFound):
            raise self.not_found(served) from None

    def not_found(self, served: ServedVersion) -> TorchmgmtError:
        """Return what is to be said of a version that has gone; raise ManagerClosed or ModelNotFound if that is so now."""
        key = served.spec.key
        self.get(key.name, key.version)
        return ModelVersionNotFound(key.name, key.version)

    def add(self, served: ServedVersion) -> bool:
        """Register a version; return whether it became its model's default. It is :meth:`keep` that has it stay wanted.

        Raises:
            ManagerClosed: nothing is registered any more.
            AlreadyRegistered: another one is there by its name and version, or leaving.
        """
        key = served.spec.key
        with self._lock:
            if self._is_closed:
                raise ManagerClosed
            self._registry.reserve(key)
            return self._registry.add(key, served)

    @contextlib.contextmanager
    def withdrawing(self, served: ServedVersion, *, is_kept: bool) -> Iterator[Withdrawal]:
        """Take back what :meth:`add` has registered; it is leaving until the block's end. Gives what that has come to.

        ``is_kept``: :meth:`keep` was called, too, and is taken back; then it blocks for the disk.
        """
        with self._lock:
            withdrawal = self._registry.withdraw(served.spec.key, served)
            self._leaving.add(served)
            is_kept = is_kept and withdrawal.was_there
            if is_kept:
                self._desired.remove(served.spec.key)
        try:
            if is_kept:
                self._record()
            yield withdrawal
        finally:
            with self._lock:
                self._leaving.discard(served)

    @contextlib.contextmanager
    def removing(self, name: str, version: str | None) -> Iterator[ServedVersion]:
        """Remove a version, the default one unless given, and give it; its name is free at the block's end, not before.

        Blocks for the disk.

        Raises:
            ModelNotFound, ModelVersionNotFound: it is not registered.
            DefaultVersionInUse: it is the default, and there are other versions.
        """
        with self._lock:
            served = self._registry.remove(name, version)
            if version is None:
                self._forget_failed_locked(name, None)
            key = served.spec.key
            self._desired.remove(key)
            self._registry.reserve(key)
            self._leaving.add(served)
        try:
            self._record()
            yield served
        finally:
            with self._lock:
                self._leaving.discard(served)
                self._registry.release(key)

    def add_failed(self, info: ModelInfo, certainty: Certainty, item: str | None = None) -> None:
        """Remember that a version could not be loaded, unless ``item`` of ``load_models`` is shown as what it once was."""
        with self._lock:
            if item is None or not self._desired.from_item(item):
                self._failed_loads.add(info, certainty)

    def forget_failed(self, name: str, version: str | None) -> list[ModelKey]:
        """Want a version no more that could not be loaded, all of the model if none is given; return what that were.

        A version that is registered stays. Blocks for the disk.
        """
        with self._lock:
            is_there = self._registry.find(name, version) is not None
            forgotten = [] if is_there else self._forget_failed_locked(name, version)
        if forgotten:
            self._record()
        return forgotten

    def close(self) -> list[ServedVersion]:
        """Register nothing any more, and be of no use; return all that is to be closed. Idempotent."""
        with self._lock:
            self._is_closed = True
            return [*self._registry, *self._leaving]

    def let_go(self) -> None:
        """Let others use the state file. Blocks while it is written; idempotent."""
        if self._keeper is not None:
            self._keeper.close()

    def set_default(self, name: str, version: str) -> ModelKey:
        """Make a version its model's default, and return its key; raise as :meth:`get` does. Blocks for the disk."""
        key = self.get(name, version).spec.key
        with self._lock:
            self._registry.set_default(key.name, key.version)
            self._desired.set_default(key)
        self._record()
        return key

    def keep_scale(self, served: ServedVersion) -> None:
        """Want as many workers of a version as its pool does now. Blocks for the disk."""
        key = served.spec.key
        with self._lock:
            if self._registry.find(key.name, key.version) is served:
                self._desired.set_scale(key, served.pool.wanted)
        self._record()

    def keep(self, served: ServedVersion, stored: StoredVersion, url: str) -> bool:
        """Want a version that was added; return whether it has become its model's default again. Blocks for the disk.

        What failed before, and is it by its key or its ``url``, is forgotten.
        """
        with self._lock:
            self._failed_loads.settle(stored.key, url)
            is_default_again = self._keep_locked(served, stored)
        self._record()
        return is_default_again

    def want(self, state: DesiredState) -> None:
        """Want what ``state`` holds, too; what is known already stays."""
        with self._lock:
            self._desired.load(state)

    def missing(self) -> tuple[DesiredState, list[StoredVersion]]:
        """Return what shall be there, and what of that is not registered."""
        with self._lock:
            state = self._desired.state()
            return state, [each for each in state.versions() if not self._has_locked(each.key)]

    def arrange(self, names: Iterable[str], keys: Sequence[ModelKey]) -> tuple[ModelKey, ...]:
        """Have the versions of some models in the order in which they are wanted; return which of ``keys`` are there.

        Blocks for the disk.
        """
        with self._lock:
            for name in names:
                self._registry.arrange(name, self._desired.versions(name))
            present = tuple(key for key in keys if self._has_locked(key))
        self._record()
        return present

    def left_to_load(self, items: Iterable[str], *, over_state: bool) -> list[str]:
        """Return which items of ``load_models`` are to be loaded; see :meth:`torchmgmt.ModelManager.items_to_load`."""
        with self._lock:
            return [item for item in items if self._is_to_load_locked(item, over_state=over_state)]

    def _record(self) -> None:
        """Return when what is wanted now is on the disk, if there is a state file."""
        if self._keeper is not None:
            self._keeper.record(self._state)

    def _state(self) -> DesiredState:
        with self._lock:
            return self._desired.state()

    def _has_locked(self, key: ModelKey) -> bool:
        return self._registry.find(key.name, key.version) is not None

    def _keep_locked(self, served: ServedVersion, stored: StoredVersion) -> bool:
        """Want a version that is registered from now on; return whether it has become its model's default again."""
        key = stored.key
        if self._registry.find(key.name, key.version) is not served:
            return False  # somebody has unregistered it already
        if served.spec.live is not None and not served.spec.live.is_restorable:
            self._desired.remove(key)  # the program that made the object makes it again
            return False
        was_wanted = self._desired.find(key) is not None
        self._desired.put(evolve(stored, scale=served.pool.wanted))
        for outdated in self._desired.same_place(stored):
            if not self._has_locked(outdated):  # it could not be restored since this one is there now
                self._desired.remove(outdated)
                self._failed_loads.remove(outdated.name, outdated.version)
        wanted, default = self._desired.default(key.name), self._registry.default(key.name)
        if wanted == key.version != default and was_wanted:
            self._registry.set_default(key.name, key.version)
            return True
        if self._registry.find(key.name, wanted) is not None:
            self._desired.set_default(ModelKey(key.name, default))
        return False

    def _is_to_load_locked(self, item: str, *, over_state: bool) -> bool:
        wanted = self._desired.from_item(item)
        if any(self._has_locked(each.key) for each in wanted):
            return False
        return over_state or bool(wanted) or not self._desired.has_seen(item)

    def _forget_failed_locked(self, name: str, version: str | None) -> list[ModelKey]:
        removed = self._failed_loads.remove(name, version)
        for key in removed:
            self._desired.remove(key)
        return removed
