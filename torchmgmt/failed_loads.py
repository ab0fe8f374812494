"""FailedLoads: versions that were to be there from the start but could not be loaded. Pure; who changes it holds the lock."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum

from attrs import frozen

from torchmgmt.errors import InvalidArgument, NoWorker
from torchmgmt.lifecycle import VersionState
from torchmgmt.records import ModelInfo, ModelKey, ModelSpec, Scale

__all__ = ["Certainty", "FailedLoads", "failed_load"]

_SUFFIX = re.compile(r"\.(mar|tgz|tar\.gz|zip)$", re.IGNORECASE)


class Certainty(Enum):
    """How much of a version's key was known when it failed."""

    NOTHING = "nothing"
    """Its archive could not be read, and nobody had given it a name: it is called after the archive."""
    NAME = "name"
    """It was given a name; its version is a guess."""
    KEY = "key"
    """Both are what its archive says."""


@frozen
class _Failed:
    info: ModelInfo
    certainty: Certainty

    def is_settled_by(self, key: ModelKey, url: str) -> bool:
        """Whether this is the version that is registered now as ``key`` from ``url``."""
        if self.certainty is Certainty.KEY:
            return key == self.info.spec.key
        is_same_archive = self.certainty is Certainty.NOTHING and url == self.info.spec.url
        return key.name == self.info.name or is_same_archive


class FailedLoads:
    """Remembers each with its reason, so that it can be shown beside what is registered.

    Any thread may read; one at a time may change it.
    """

    def __init__(self) -> None:
        self._all: dict[str, dict[str, _Failed]] = {}  # by name and version

    def __repr__(self) -> str:
        return f"<FailedLoads: {sum(map(len, self._all.values()))}>"

    def __iter__(self) -> Iterator[ModelInfo]:
        """Every one of them."""
        return (failed.info for failed in self._failed())

    def add(self, info: ModelInfo, certainty: Certainty) -> None:
        """Remember one, in place of an earlier failure of the same version."""
        self._all.setdefault(info.name, {})[info.version] = _Failed(info, certainty)

    def names(self) -> set[str]:
        """Return the names of the models."""
        return set(self._all)

    def versions(self, name: str) -> list[ModelInfo]:
        """Return those of one model, oldest first."""
        return [failed.info for failed in list(self._all.get(name, {}).values())]

    def find(self, name: str, version: str | None) -> ModelInfo | None:
        """Return a version, the oldest one if none is given; None if there is no such failure."""
        found = [info for info in self.versions(name) if version in {None, info.version}]
        return found[0] if found else None

    def settle(self, key: ModelKey, url: str) -> None:
        """Forget what failed before and is registered now."""
        for info in [failed.info for failed in self._failed() if failed.is_settled_by(key, url)]:
            self.remove(info.name, info.version)

    def remove(self, name: str, version: str | None) -> list[ModelKey]:
        """Forget a version, all of the model if none is given; return what that were."""
        found = self._all.get(name, {})
        removed = [failed.info.spec.key for failed in found.values() if version in {None, failed.info.version}]
        for key in removed:
            del found[key.version]
        if not found:
            self._all.pop(name, None)
        return removed

    def check(self, name: str, version: str | None) -> None:
        """Raise :class:`NoWorker` with the reason for a version that is here."""
        info = self.find(name, version)
        if info is not None:
            why = info.last_error.partition("\n")[0]
            reason = f"it could not be loaded at the start ({why}); register it again"
            raise NoWorker(info.name, info.version, reason)

    def _failed(self) -> Iterator[_Failed]:
        return (failed for found in list(self._all.values()) for failed in list(found.values()))


def failed_load(
    url: str, error: Exception, *, spec: ModelSpec | None, name: str | None, version: str | None, workers: int
) -> ModelInfo:
    """Return what is to be shown of a version that could not be loaded from ``url``.

    ``spec`` is what was found out before it failed; without one, the model is called after the archive's name.
    """
    if spec is None:
        key = _key(url, name, version)
        spec = ModelSpec(key=key, model_dir="", handler="unknown", url=url, loaded_at_startup=True)
    return ModelInfo(
        spec=spec,
        state=VersionState.FAILED,
        is_default=False,
        scale=Scale(workers, workers),
        queue_capacity=spec.job_queue_size,
        last_error=str(error),
    )


def _key(url: str, name: str | None, version: str | None) -> ModelKey:
    from urllib.parse import unquote, urlsplit  # with what it imports in turn, for what fails alone

    path = unquote(urlsplit(url).path) if "://" in url else url
    stem = _SUFFIX.sub("", path.rstrip("/").rpartition("/")[2])
    try:
        return ModelKey(name or stem, version or "1.0")
    except InvalidArgument:  # no name can be made of it
        return ModelKey("unknown", version or "1.0")
