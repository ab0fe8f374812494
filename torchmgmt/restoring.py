"""From a registration to what is stored of it, and back. Pure, but for :func:`in_parallel`."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from torchmgmt.errors import InvalidArchive, InvalidArgument
from torchmgmt.failed_loads import failed_load
from torchmgmt.records import ModelInfo, Scale
from torchmgmt.registration import Wishes, key_of
from torchmgmt.state import StoredVersion

if TYPE_CHECKING:
    from torchmgmt.archive import ModelFolder

__all__ = ["RESTORED_AT_ONCE", "check_is_same", "failed_restore", "in_parallel", "stored_of", "wishes_of"]

log = logging.getLogger(__name__)

T = TypeVar("T")

RESTORED_AT_ONCE = 4
"""Versions that are opened and loaded at once: more would compete for the same disk and cores."""
STORED_APART = frozenset(
    {
        "initial_workers",
        "max_workers",
        "default_workers",
        "synchronous",
        "trusted",
        "loaded_at_startup",
        "model_class",
    }
)
"""Arguments that are no parameters of the version, or that are stored in another form."""
PARAMETERS = frozenset(attribute.name for attribute in attrs.fields(Wishes)) - STORED_APART


def stored_of(folder: ModelFolder, wishes: Wishes, scale: Scale, model_store: Path | None) -> StoredVersion:
    """Return what is stored of a registration."""
    return StoredVersion(
        key=key_of(folder, wishes),
        url=folder.url,
        place=_place(folder.url, model_store) if wishes.trusted else "",
        digest=folder.digest,
        trusted=wishes.trusted,
        loaded_at_startup=wishes.loaded_at_startup,
        scale=scale,
        parameters=_parameters(wishes),
    )


def wishes_of(stored: StoredVersion) -> Wishes:
    """Return what a registration that was stored said; raise InvalidArgument for what this release does not know."""
    unknown = sorted(stored.parameters.keys() - PARAMETERS)
    if unknown:
        known = "one that ModelManager.register of this release has"
        raise InvalidArgument(f"a stored parameter of {stored.key}", unknown[0], known)
    said: dict[str, Any] = dict(stored.parameters)
    return Wishes(
        **said,
        trusted=stored.trusted,
        loaded_at_startup=stored.loaded_at_startup,
        default_workers=stored.scale.min_workers,
    )


def failed_restore(stored: StoredVersion, error: Exception) -> ModelInfo:
    """Return what is to be shown of a version that could not be restored."""
    key = stored.key
    info = failed_load(stored.url, error, spec=None, name=key.name, version=key.version, workers=0)
    spec = attrs.evolve(info.spec, loaded_at_startup=stored.loaded_at_startup)
    return attrs.evolve(info, spec=spec, scale=stored.scale)


def check_is_same(folder: ModelFolder, wishes: Wishes, stored: StoredVersion) -> None:
    """Raise InvalidArchive if another model or version is at the place now; log if the same one has another content."""
    found = key_of(folder, wishes)
    if found != stored.key:
        raise InvalidArchive(
            folder.url,
            f"it holds {found} now, and {stored.key} is to be restored from it; put the archive of that back, or"
            f" register {found} and unregister {stored.key}",
        )
    if stored.digest != folder.digest and stored.digest is not None:
        log.warning(
            "%s has changed since %s was registered from it; it is restored from what is there", folder.url, found
        )


def in_parallel(act: Callable[[T], object], items: Iterable[T], *, limit: int) -> None:
    """Call ``act`` with each item, at most ``limit`` at once; return when all are done, raise what the first raised.

    If this is interrupted, no further one is begun, and those under way are left to end.
    """
    from concurrent.futures import ThreadPoolExecutor  # only those who restore need it

    executor = ThreadPoolExecutor(limit, "torchmgmt-restore")
    try:
        for done in [executor.submit(act, item) for item in items]:
            done.result()
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    executor.shutdown()


def _parameters(wishes: Wishes) -> Mapping[str, Any]:
    said = {name: getattr(wishes, name) for name in sorted(PARAMETERS)}
    plain = {name: value.value if isinstance(value, Enum) else value for name, value in said.items()}
    return {name: value for name, value in plain.items() if value is not None}


def _place(url: str, model_store: Path | None) -> str:
    """Return a relative path as an absolute one; empty for what does not depend on the working directory."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url) or Path(url).is_absolute():
        return ""
    is_bare = Path(url).name == url and url not in {".", ".."}
    if is_bare and model_store is not None and (model_store / url).exists():
        return ""
    return str(Path(url).absolute())
