"""Desired: what a manager shall have, as its calls change that. Pure bookkeeping; the caller holds the lock."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import attrs

from torchmgmt.records import ModelKey, Scale
from torchmgmt.state import DesiredState, StoredModel, StoredVersion

__all__ = ["Desired"]


class Desired:
    """The versions that were registered and not unregistered since, whether they could be brought back or not.

    Not thread-safe; nothing blocks.
    """

    def __init__(self) -> None:
        self._models: dict[str, dict[str, StoredVersion]] = {}
        self._defaults: dict[str, str] = {}
        self._seen: set[str] = set()
        self._of_item: dict[str, dict[ModelKey, StoredVersion]] = {}
        # In the order of the models, so that a state of thousands is made in microseconds; those that have changed since
        # it was last made are made anew.
        self._stored: dict[str, StoredModel | None] = {}
        self._changed: set[str] = set()

    def __repr__(self) -> str:
        return f"<Desired: {sum(map(len, self._models.values()))} model versions>"

    def load(self, state: DesiredState) -> None:
        """Take over what is stored; what is known already stays."""
        self._seen |= set(state.seen)
        for model in state.models:
            self._models.setdefault(model.name, {})
            for version in model.versions:
                if self.find(version.key) is None:
                    self._set(version)
            self._defaults.setdefault(model.name, model.default)
            self._note_change(model.name)

    def state(self) -> DesiredState:
        """Return what is to be stored."""
        for name in self._changed:
            self._stored[name] = StoredModel(self._defaults[name], tuple(self._models[name].values()))
        self._changed.clear()
        return DesiredState(tuple(cast("Iterable[StoredModel]", self._stored.values())), tuple(sorted(self._seen)))

    def find(self, key: ModelKey) -> StoredVersion | None:
        """Return a version; None if it is not wanted."""
        return self._models.get(key.name, {}).get(key.version)

    def versions(self, name: str) -> list[str]:
        """Return the versions of a model, oldest first."""
        return list(self._models.get(name, {}))

    def default(self, name: str) -> str | None:
        """Return the default version of a model; None if none of it is wanted."""
        return self._defaults.get(name)

    def from_item(self, item: str) -> list[StoredVersion]:
        """Return the versions that an item of ``load_models`` brought."""
        return list(self._of_item.get(item, {}).values())

    def same_place(self, version: StoredVersion) -> list[ModelKey]:
        """Return what came at the start, once, from where ``version`` has come from now; itself may be among it."""
        if not version.loaded_at_startup:
            return []
        asked = version.parameters.get("version")
        return [each.key for each in self.from_item(version.item) if each.parameters.get("version") == asked]

    def has_seen(self, item: str) -> bool:
        """Whether an item of ``load_models`` was loaded once, also if what it brought was unregistered since."""
        return item in self._seen

    def put(self, version: StoredVersion) -> None:
        """Want a version, in place of an earlier one of the same key; the first one of a model is its default."""
        key = version.key
        self._models.setdefault(key.name, {})
        self._set(version)
        self._defaults.setdefault(key.name, key.version)
        if version.loaded_at_startup:
            self._seen.add(version.item)

    def set_scale(self, key: ModelKey, scale: Scale) -> None:
        """Want other numbers of workers for a version, if it is wanted at all."""
        version = self.find(key)
        if version is not None:
            self._set(attrs.evolve(version, scale=scale))

    def set_default(self, key: ModelKey) -> None:
        """Make a version the default, if it is wanted at all."""
        if self.find(key) is not None:
            self._defaults[key.name] = key.version
            self._note_change(key.name)

    def remove(self, key: ModelKey) -> None:
        """Want a version no more; the oldest one that is left becomes the default if this one was. Idempotent."""
        found = self._models.get(key.name, {})
        version = found.pop(key.version, None)
        if version is None:
            return
        self._forget(version)
        if not found:
            del self._models[key.name], self._defaults[key.name], self._stored[key.name]
            self._changed.discard(key.name)
        elif self._defaults[key.name] == key.version:
            self._defaults[key.name] = next(iter(found))

    def _note_change(self, name: str) -> None:
        self._stored.setdefault(name, None)
        self._changed.add(name)

    def _set(self, version: StoredVersion) -> None:
        key = version.key
        before = self._models[key.name].get(key.version)
        if before is not None:
            self._forget(before)
        self._models[key.name][key.version] = version
        self._of_item.setdefault(version.item, {})[key] = version
        self._note_change(key.name)

    def _forget(self, version: StoredVersion) -> None:
        of_item = self._of_item[version.item]
        del of_item[version.key]
        if not of_item:
            del self._of_item[version.item]
        self._note_change(version.key.name)
