"""Registry: names to versions to the default version. Pure bookkeeping; who changes it holds the lock.

The rules are TorchServe's: the first version of a model becomes its default, and the default cannot be removed while
other versions exist.

Readers need no lock: what is known of a model is one immutable entry, which a change replaces in one step.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from attrs import evolve, frozen

from torchmgmt.errors import AlreadyRegistered, DefaultVersionInUse, ModelNotFound, ModelVersionNotFound
from torchmgmt.records import ModelKey

__all__ = ["Registry", "Withdrawal"]

V = TypeVar("V")


@frozen
class _Entry(Generic[V]):
    """One model: its versions in the order in which they came, and which of them is the default. Never changed."""

    default: str
    versions: Mapping[str, V]


@frozen
class Withdrawal:
    """What taking a version back has come to."""

    was_there: bool
    new_default: str | None = None
    """The version that has become its model's default by that, if one has."""


class Registry(Generic[V]):
    """Holds a value for each model version. Any thread may read; one at a time may change it. Nothing blocks."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry[V]] = {}
        self._names: list[str] = []  # sorted at all times: to sort thousands for each page of a list would take longer
        self._size = 0
        self._reserved: set[ModelKey] = set()

    def __repr__(self) -> str:
        return f"<Registry of {len(self)} model versions>"

    def __len__(self) -> int:
        """The number of model versions."""
        return self._size

    def __iter__(self) -> Iterator[V]:
        """Every version of every model."""
        return iter([value for entry in list(self._entries.values()) for value in entry.versions.values()])

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def reserve(self, key: ModelKey) -> None:
        """Claim ``key`` for one caller, who is to :meth:`add` or :meth:`release` it.

        Raises:
            AlreadyRegistered: it is registered, or claimed by another caller.
        """
        entry = self._entries.get(key.name)
        if key in self._reserved or (entry is not None and key.version in entry.versions):
            raise AlreadyRegistered(key.name, key.version)
        self._reserved.add(key)

    def release(self, key: ModelKey) -> None:
        """Give up a claim. Idempotent."""
        self._reserved.discard(key)

    def add(self, key: ModelKey, value: V) -> bool:
        """Add a version that was reserved; return whether it became the default."""
        self._reserved.discard(key)
        before = self._entries.get(key.name)
        if before is None:
            entry = _Entry(key.version, {key.version: value})
            bisect.insort(self._names, key.name)
        else:
            entry = evolve(before, versions={**before.versions, key.version: value})
        self._entries[key.name] = entry
        self._size += 1
        return entry.default == key.version

    def get(self, name: str, version: str | None = None) -> V:
        """Return a version; the default one unless ``version`` is given.

        Raises:
            ModelNotFound: no version of the model is registered.
            ModelVersionNotFound: others are, this one is not.
        """
        entry = self._entry(name)
        wanted = entry.default if version is None else version
        if wanted not in entry.versions:
            raise ModelVersionNotFound(name, wanted)
        return entry.versions[wanted]

    def find(self, name: str, version: str | None = None) -> V | None:
        """Return a version, the default one unless given; None if it is not registered."""
        entry = self._entries.get(name)
        return None if entry is None else entry.versions.get(entry.default if version is None else version)

    def default(self, name: str) -> str:
        """Return the default version of a model; raise ModelNotFound if it is not registered."""
        return self._entry(name).default

    def is_default(self, key: ModelKey) -> bool:
        """Whether a version is its model's default one."""
        entry = self._entries.get(key.name)
        return entry is not None and entry.default == key.version

    def names(self) -> Sequence[str]:
        """Return the names of all models, sorted: what is kept of them, not a copy."""
        return self._names

    def versions(self, name: str) -> list[V]:
        """Return all versions of a model, oldest first; raise ModelNotFound if it is not registered."""
        return list(self._entry(name).versions.values())

    def set_default(self, name: str, version: str) -> None:
        """Make ``version`` the default; raise as :meth:`get` does."""
        self.get(name, version)
        self._entries[name] = evolve(self._entry(name), default=version)

    def arrange(self, name: str, order: Sequence[str]) -> None:
        """Have the versions of a model in this order, which is their age, and those not in it last."""
        entry = self._entries.get(name)
        if entry is not None:
            places = {version: place for place, version in enumerate(order)}
            found = sorted(entry.versions.items(), key=lambda item: places.get(item[0], len(places)))
            self._entries[name] = evolve(entry, versions=dict(found))

    def remove(self, name: str, version: str | None = None) -> V:
        """Remove a version (the default one unless given) and return it.

        Raises:
            ModelNotFound: no version of the model is registered.
            ModelVersionNotFound: others are, this one is not.
            DefaultVersionInUse: it is the default, and others exist.
        """
        value = self.get(name, version)
        entry = self._entry(name)
        removed = entry.default if version is None else version
        if removed == entry.default and len(entry.versions) > 1:
            raise DefaultVersionInUse(name, removed)
        self._drop(name, entry, removed)
        return value

    def withdraw(self, key: ModelKey, value: V) -> Withdrawal:
        """Remove a version whose registration has failed, if ``value`` is what is there.

        The oldest version that is left becomes the default if this one was.
        """
        entry = self._entries.get(key.name)
        if entry is None or entry.versions.get(key.version) is not value:
            return Withdrawal(was_there=False)
        self._drop(key.name, entry, key.version)
        left = self._entries.get(key.name)
        new_default = left.default if left is not None and left.default != entry.default else None
        return Withdrawal(was_there=True, new_default=new_default)

    def _drop(self, name: str, entry: _Entry[V], version: str) -> None:
        left = {each: value for each, value in entry.versions.items() if each != version}
        if left:
            self._entries[name] = _Entry(next(iter(left)) if entry.default == version else entry.default, left)
        else:
            del self._entries[name]
            del self._names[bisect.bisect_left(self._names, name)]
        self._size -= 1

    def _entry(self, name: str) -> _Entry[V]:
        entry = self._entries.get(name)
        if entry is None:
            raise ModelNotFound(name)
        return entry
