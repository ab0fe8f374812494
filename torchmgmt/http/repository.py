"""The model repository extension of the Open Inference Protocol: what can be loaded, is loaded, and why not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torchmgmt import VersionState
from torchmgmt.errors import InvalidArgument, ModelNotFound, SourceNotFound
from torchmgmt.redaction import redacted_text

if TYPE_CHECKING:
    from torchmgmt import ModelManager
    from torchmgmt.records import ModelInfo

__all__ = ["index_of", "load", "unload"]

ARCHIVE = ".mar"
# What clients of the protocol know of states.
STATES = {
    VersionState.READY: "READY",
    VersionState.LOADING: "LOADING",
    VersionState.RETIRING: "UNLOADING",
}


def index_of(manager: ModelManager, *, only_ready: bool) -> list[dict[str, Any]]:
    """Return an item for each version that is registered, and for each archive in the model store that is not."""
    infos = [info for model in manager.models() for info in manager.versions(model.name)]
    items = [_item(info) for info in infos]
    if only_ready:
        return [item for item in items if item["state"] == "READY"]
    registered = {info.name for info in infos}
    return items + [
        {"name": name, "version": "", "state": "UNAVAILABLE", "reason": "not loaded"}
        for name in _archives(manager)
        if name not in registered
    ]


def _item(info: ModelInfo) -> dict[str, Any]:
    reason = redacted_text(info.last_error.partition("\n")[0])
    if not reason and info.state is VersionState.REGISTERED:
        reason = "it has no worker"
    return {
        "name": info.name,
        "version": info.version,
        "state": STATES.get(info.state, "UNAVAILABLE"),
        "reason": reason,
    }


def _archives(manager: ModelManager) -> Iterator[str]:
    store = manager.model_store
    if store is not None:
        yield from sorted(path.stem for path in store.glob(f"*{ARCHIVE}"))


def load(manager: ModelManager, name: str, *, workers: int, may_fetch: bool) -> None:
    """Have a model serve. Blocks until it does.

    ``workers`` is how many it gets, at least 1, where its archive does not say.

    Raises:
        ModelNotFound: it is not registered, and the model store has no archive ``NAME.mar``.
        WorkerStartFailed: a worker could not be started; a model that was not registered is not, then.
        InvalidArgument: there can be no such name.
    """
    try:
        info = manager.describe(name)
    except ModelNotFound:
        _register(manager, name, workers, may_fetch)
        return
    if info.scale.min_workers == 0 or info.state is VersionState.FAILED:
        low = max(1, info.scale.min_workers)
        manager.scale(name, low, max(low, info.scale.max_workers), version=info.version, synchronous=True)


def _register(manager: ModelManager, name: str, workers: int, may_fetch: bool) -> None:
    if name in {".", ".."} or "/" in name or "\\" in name or ":" in name:
        raise InvalidArgument("model_name", name, "the name of an archive in the model store, without its ending")
    try:
        manager.register(
            f"{name}{ARCHIVE}",
            model_name=name,
            default_workers=max(1, workers),
            synchronous=True,
            trusted=False,
            may_fetch=may_fetch,
        )
    except SourceNotFound:
        raise ModelNotFound(f"{name}; the model store has no {name}{ARCHIVE} either") from None


def unload(manager: ModelManager, name: str) -> None:
    """Unregister all versions of a model, the default one last. Blocks until their requests are done.

    Raises:
        ModelNotFound: it is not registered.
    """
    infos = sorted(manager.versions(name), key=lambda info: info.is_default)
    for info in infos:
        manager.unregister(name, info.version)
