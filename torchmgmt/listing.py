"""What is shown of a manager's versions: those that are registered, and those that could not be loaded, in one list.

Which ones belong into a list is decided here; :func:`infos_of` looks into them after that. What is registered or
unregistered meanwhile is in it, or not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from torchmgmt.errors import ModelNotFound
from torchmgmt.failed_loads import FailedLoads
from torchmgmt.records import ModelInfo
from torchmgmt.registry import Registry
from torchmgmt.served import ServedVersion

__all__ = ["Listed", "default_versions", "infos_of", "versions_of", "wanted_versions"]

Listed: TypeAlias = "tuple[ServedVersion, bool] | ModelInfo"
"""A version and whether it is its model's default one; or what is known of one that failed."""


def default_versions(
    registry: Registry[ServedVersion], failed: FailedLoads, start: int, limit: int | None
) -> list[Listed]:
    """Return the default version of every model, sorted by name, or one that failed where nothing is registered."""
    end = None if limit is None else start + limit
    names = registry.names()
    missing = {name for name in failed.names() if name not in registry}  # a set minus all keys looks at each of them
    page = (sorted({*list(names), *missing}) if missing else names)[start:end]
    listed = (_default_version(registry, failed, name) for name in page)
    return [each for each in listed if each is not None]


def _default_version(registry: Registry[ServedVersion], failed: FailedLoads, name: str) -> Listed | None:
    found = registry.find(name)
    if found is not None:
        return found, True
    failures = failed.versions(name)
    return failures[0] if failures else None  # it was unregistered at this moment


def versions_of(registry: Registry[ServedVersion], failed: FailedLoads, name: str) -> list[Listed]:
    """Return all versions of a model, oldest first, and last those that failed; raise ModelNotFound."""
    absent = _absent(registry, failed.versions(name))
    try:
        served = registry.versions(name)
    except ModelNotFound:
        if not absent:
            raise
        served = []
    return [*((each, registry.is_default(each.spec.key)) for each in served), *absent]


def wanted_versions(registry: Registry[ServedVersion], failed: FailedLoads) -> list[Listed]:
    """Return, in no order, what shall have workers at all times, or has failed."""
    served = [(each, registry.is_default(each.spec.key)) for each in registry if each.is_wanted]
    return [*served, *_absent(registry, failed)]


def infos_of(listed: Iterable[Listed]) -> tuple[ModelInfo, ...]:
    """Return what is to be shown of each. Needs no lock."""
    return tuple(each if isinstance(each, ModelInfo) else each[0].info(is_default=each[1]) for each in listed)


def _absent(registry: Registry[ServedVersion], failed: Iterable[ModelInfo]) -> list[ModelInfo]:
    """Return those that are not registered: a further attempt may be under way."""
    return [info for info in failed if registry.find(info.name, info.version) is None]
