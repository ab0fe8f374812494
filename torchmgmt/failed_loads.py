"""FailedLoads: versions that were to be there from the start but could not be loaded. Pure; the caller holds the lock."""

from __future__ import annotations

import re

from torchmgmt.errors import InvalidArgument, NoWorker
from torchmgmt.lifecycle import VersionState
from torchmgmt.records import ModelInfo, ModelKey, ModelSpec, Scale

__all__ = ["FailedLoads", "failed_load"]

_SUFFIX = re.compile(r"\.(mar|tgz|tar\.gz|zip)$", re.IGNORECASE)


class FailedLoads:
    """Remembers each with its reason, so that it can be shown beside what is registered. Not thread-safe."""

    def __init__(self) -> None:
        self._infos: dict[ModelKey, ModelInfo] = {}

    def __repr__(self) -> str:
        return f"<FailedLoads: {len(self._infos)}>"

    def add(self, info: ModelInfo) -> None:
        """Remember one, in place of an earlier failure of the same version."""
        self._infos[info.spec.key] = info

    def names(self) -> set[str]:
        """Return the names of the models."""
        return {key.name for key in self._infos}

    def versions(self, name: str) -> list[ModelInfo]:
        """Return those of one model, oldest first."""
        return [info for key, info in self._infos.items() if key.name == name]

    def find(self, name: str, version: str | None) -> ModelInfo | None:
        """Return a version, the oldest one if none is given; None if there is no such failure."""
        found = [info for info in self.versions(name) if version in {None, info.version}]
        return found[0] if found else None

    def forget(self, key: ModelKey) -> None:
        """Forget one: it is registered now, or nobody wants it any more. Idempotent."""
        self._infos.pop(key, None)

    def check(self, name: str, version: str | None) -> None:
        """Raise :class:`NoWorker` with the reason for a version that is here."""
        info = self.find(name, version)
        if info is not None:
            why = info.last_error.partition("\n")[0]
            reason = f"it could not be loaded at the start ({why}); register it again"
            raise NoWorker(info.name, info.version, reason)


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
