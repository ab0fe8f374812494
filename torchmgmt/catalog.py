"""The catalog: which versions a manager has. Thread-safe; everything is decided under one lock, nothing is done under it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator

from torchmgmt import forks
from torchmgmt.errors import InvalidArgument, ManagerClosed, ModelNotFound, ModelVersionNotFound, TorchmgmtError
from torchmgmt.records import ModelKey
from torchmgmt.registry import Registry
from torchmgmt.served import AbsentVersion, ServedVersion, Version
from torchmgmt.state import DesiredState, StoredModel

__all__ = ["Catalog"]


class Catalog:
    """The registered versions of one manager, and those that are on their way out.

    Looking up raises ManagerClosed after :meth:`shut` and in a forked copy, which must wait for no lock.
    """

    def __init__(self) -> None:
        self._depth = forks.depth()
        self.lock = threading.Lock()
        # guarded by lock
        self._registry: Registry[Version] = Registry()
        self._leaving: set[Version] = set()  # no longer registered, but not finished yet
        self._is_shut = False

    def __repr__(self) -> str:
        return "closed" if self._is_shut else f"{len(self._registry)} model versions"

    def __contains__(self, name: object) -> bool:
        self.check_usable()
        with self.lock:
            return isinstance(name, str) and name in self._registry

    @property
    def is_forked(self) -> bool:
        """Whether it belongs to the process that this one was forked from."""
        return forks.depth() != self._depth

    @property
    def is_shut(self) -> bool:
        """Whether nothing is to be found in it any more."""
        return self._is_shut or self.is_forked

    def check_usable(self, name: object = "", version: object = None) -> None:
        """Raise ManagerClosed, or InvalidArgument for a name or version that can be none. Takes no lock."""
        if forks.depth() != self._depth:
            why = "belongs to the process that this one was forked from; make a new one after the fork"
            raise ManagerClosed("This ModelManager", why)
        if self._is_shut:
            raise ManagerClosed
        if not isinstance(name, str):
            raise InvalidArgument("name", name, "text")
        if version is not None and not isinstance(version, str):
            raise InvalidArgument("version", version, "text, or None for the default version")

    def get(self, name: str, version: str | None = None) -> Version:
        """Return a version, the default one unless given; raise ModelNotFound, ModelVersionNotFound."""
        self.check_usable(name, version)
        with self.lock:
            return self._registry.get(name, version)

    def names(self) -> list[str]:
        """Return the names of all models, sorted."""
        self.check_usable()
        with self.lock:
            return self._registry.names()

    def defaults(self) -> list[Version]:
        """Return the default version of every model, sorted by name."""
        self.check_usable()
        with self.lock:
            return [self._registry.get(name) for name in self._registry.names()]

    def versions(self, name: str) -> tuple[list[Version], str]:
        """Return all versions of a model, oldest first, and the name of the default one; raise ModelNotFound."""
        self.check_usable(name)
        with self.lock:
            return self._registry.versions(name), self._registry.default(name)

    def is_default(self, key: ModelKey) -> bool:
        """Return whether a version is the default of its model."""
        with self.lock:
            return key.name in self._registry and self._registry.default(key.name) == key.version

    def absent(self) -> list[AbsentVersion]:
        """Return what is stored, but not served."""
        self.check_usable()
        with self.lock:
            return [version for version in self._registry if isinstance(version, AbsentVersion)]

    def desired(self) -> DesiredState:
        """Return what is to be stored. Also after :meth:`shut`, which does not change what is wanted."""
        with self.lock:
            models = [
                (self._registry.default(name), [each for each in self._registry.versions(name) if each.is_kept])
                for name in self._registry.names()
            ]
        return DesiredState(tuple(_stored_model(default, versions) for default, versions in models if versions))

    def add(self, version: ServedVersion, *, at_startup: bool = False) -> bool:
        """Add a version; return whether it is the default. ``at_startup``: one that is only stored gives way to it.

        That is the same version, and another one of the same model that came from the same URL, which can bring one only.

        Raises:
            AlreadyRegistered: it is there, or on its way out.
            ManagerClosed: it was shut meanwhile.
        """
        key = version.key
        with self.lock:
            if self._is_shut:
                raise ManagerClosed
            outdated = self._outdated_locked(version) if at_startup else []
            version.is_kept = version.is_kept or bool(outdated)
            was_default = any(self._registry.default(key.name) == each.key.version for each in outdated)
            if not any(self._registry.replace(key, each, version) for each in outdated):
                self._registry.reserve(key)
                self._registry.add(key, version)
            for each in outdated:
                self._registry.withdraw(each.key, each)
            if was_default:
                self._registry.set_default(key.name, key.version)
            is_default = self._registry.default(key.name) == key.version
        for each in outdated:
            each.give_way(version)
        return is_default

    def add_stored(self, model: StoredModel, versions: Iterable[AbsentVersion]) -> None:
        """Add versions that are stored; those that are there already stay as they are, and so does their default."""
        with self.lock:
            is_new = model.name not in self._registry
            for version in versions:
                if not self._has_locked(version.key):
                    self._registry.reserve(version.key)
                    self._registry.add(version.key, version)
            if is_new:
                self._registry.set_default(model.name, model.default)

    def replace(self, old: AbsentVersion, new: ServedVersion) -> bool:
        """Put what serves a version in place of what only stood for it; False if that is not there any more."""
        with self.lock:
            if self._is_shut or not self._registry.replace(old.key, old, new):
                return False
        old.give_way(new)
        return True

    def keep(self, version: ServedVersion) -> None:
        """Have a version belong to the desired state from now on."""
        with self.lock:
            version.is_kept = True

    def set_default(self, name: str, version: str) -> None:
        """Make a version the default; raise ModelNotFound, ModelVersionNotFound."""
        self.check_usable(name, version)
        with self.lock:
            self._registry.set_default(name, version)

    @contextlib.contextmanager
    def removing(self, name: str, version: str | None) -> Iterator[Version]:
        """Remove a version (the default one unless given); its name is free when the block is over, not before.

        Raises:
            ModelNotFound, ModelVersionNotFound, DefaultVersionInUse: as :meth:`Registry.remove`.
        """
        self.check_usable(name, version)
        with self.lock:
            removed = self._registry.remove(name, version)
            self._registry.reserve(removed.key)
            self._leaving.add(removed)
        try:
            yield removed
        finally:
            with self.lock:
                self._leaving.discard(removed)
                self._registry.release(removed.key)

    @contextlib.contextmanager
    def withdrawing(self, version: ServedVersion) -> Iterator[bool]:
        """Take back a version whose registration has failed; False if somebody has removed it already."""
        with self.lock:
            is_ours = self._registry.withdraw(version.key, version)
            self._leaving.add(version)
        try:
            yield is_ours
        finally:
            with self.lock:
                self._leaving.discard(version)

    def not_found(self, version: Version) -> TorchmgmtError:
        """Return what is to be said of a version that has gone; raise ManagerClosed or ModelNotFound if that is so now."""
        self.get(version.key.name, version.key.version)
        return ModelVersionNotFound(version.key.name, version.key.version)

    @contextlib.contextmanager
    def gone_is_not_found(self, version: Version) -> Iterator[None]:
        """A version that was unregistered meanwhile is one that does not exist, whichever of its parts noticed first."""
        try:
            yield
        except (ManagerClosed, ModelNotFound):
            raise self.not_found(version) from None

    def shut(self) -> list[Version]:
        """Have nothing be found or added any more; return all there was, what is on its way out included."""
        with self.lock:
            self._is_shut = True
            return [*self._registry, *self._leaving]

    def _has_locked(self, key: ModelKey) -> bool:
        if key.name not in self._registry:
            return False
        return any(each.key == key for each in self._registry.versions(key.name))

    def _outdated_locked(self, version: ServedVersion) -> list[AbsentVersion]:
        if version.key.name not in self._registry:
            return []
        return [
            each
            for each in self._registry.versions(version.key.name)
            if isinstance(each, AbsentVersion) and (each.key == version.key or each.stored.url == version.stored.url)
        ]


def _stored_model(default: str, versions: list[Version]) -> StoredModel:
    stored = tuple(version.desired() for version in versions)
    names = [version.key.version for version in stored]
    # The default may be one that is not known to start yet, and would be the oldest one's again if it did not.
    return StoredModel(default if default in names else names[0], stored)
