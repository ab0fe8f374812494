"""The desired state of a manager: which versions it shall have, from where, and how they are to be run. Pure.

It is what a state file holds, as JSON that says its format, and what a restart brings back. It holds what was asked for,
not what came of it: what a registration left open is filled in anew, from the archive and the settings, when it is
restored; the numbers of workers are stored as they are. TorchServe's snapshots are read into the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import field, frozen

from torchmgmt.errors import InvalidArgument, TorchmgmtError
from torchmgmt.records import ModelKey, Scale

__all__ = ["FORMAT", "DesiredState", "StoredModel", "StoredVersion", "from_json", "from_torchserve", "to_json"]

FORMAT = 1
"""The format that is written. To be raised with every key that is added: a release must not drop what it does not know."""

TORCHSERVE_PARAMETERS: Mapping[str, str] = {
    "batchSize": "batch_size",
    "maxBatchDelay": "max_batch_delay",
    "responseTimeout": "response_timeout",
    "startupTimeout": "startup_timeout",
    "runtimeType": "runtime",
}
"""From the keys of a TorchServe snapshot to our arguments. (TorchServe 0.12.0 writes these, the numbers of workers,
``defaultVersion``, ``marName`` and ``parallelLevel``; older ones write fewer.)"""


@frozen(kw_only=True)
class StoredVersion:
    """One version as it is to be registered again."""

    key: ModelKey
    url: str
    """Where it comes from, as the caller gave it."""
    place: str = ""
    """The same independently of the working directory, if ``url`` is not; else empty."""
    digest: str | None = None
    """SHA-256 of the archive, in hexadecimal; None for a folder."""
    trusted: bool = True
    """Whether its caller might name any place."""
    loaded_at_startup: bool = False
    scale: Scale
    parameters: Mapping[str, str | int | float | bool] = field(factory=dict)
    """What the registration said: arguments of ``ModelManager.register`` by their names. Not checked here."""

    @property
    def item(self) -> str:
        """It as an item of ``load_models``."""
        name = self.parameters.get("model_name")
        return f"{name}={self.url}" if name else self.url


@frozen
class StoredModel:
    """A model: its versions, oldest first, and which of them is the default."""

    default: str
    versions: Sequence[StoredVersion]

    @property
    def name(self) -> str:
        """The model's name."""
        return self.versions[0].key.name


@frozen
class DesiredState:
    """All that a manager shall have."""

    models: Sequence[StoredModel] = ()
    seen: Sequence[str] = ()
    """The items of ``load_models`` that were loaded once: whether they still are wanted is what ``models`` says."""

    def __len__(self) -> int:
        """The number of versions."""
        return sum(len(model.versions) for model in self.models)

    def versions(self) -> Iterator[StoredVersion]:
        """Every version of every model."""
        return (version for model in self.models for version in model.versions)


def to_json(state: DesiredState) -> bytes:
    """Return the text of a state file."""
    document = {
        "format": FORMAT,
        "models": [
            {
                "name": model.name,
                "default": model.default,
                "versions": [_version_to_json(version) for version in model.versions],
            }
            for model in state.models
        ],
        "seen": list(state.seen),
    }
    return json.dumps(document, indent=1).encode("ascii") + b"\n"


def from_json(text: bytes) -> DesiredState:
    """Return what :func:`to_json` wrote.

    Raises:
        ValueError: it is something else, or of a format that a later release writes. The text says what is wrong where.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ValueError(f"it is no JSON ({error})") from None
    if not isinstance(document, dict) or not isinstance(document.get("format"), int):
        raise ValueError('it is no state file of torchmgmt: it has no "format"')
    if document["format"] != FORMAT:
        raise ValueError(f"its format is {document['format']}, but this release knows only {FORMAT}")
    reader = _Reader(document, "it")
    reader.take("format", int)
    models = [_model_from_json(model, n) for n, model in enumerate(reader.take("models", list))]
    seen = reader.take("seen", list)
    reader.end()
    if not all(isinstance(item, str) for item in seen):
        raise ValueError(f"'seen' of it is {seen!r:.100}, but must be a list of texts")
    _check_once("models", [model.name for model in models])
    return DesiredState(tuple(models), tuple(seen))


def from_torchserve(snapshot: Mapping[str, Any]) -> DesiredState:
    """Return what a snapshot of TorchServe (``model_snapshot`` in its configuration files) asks for.

    As with TorchServe, the archives are looked up by their names in the model store. ``parallelLevel`` is not heeded.

    Raises:
        InvalidArgument: it is no such snapshot; says where.
    """
    try:
        models = _Reader(snapshot, "the snapshot").take("models", dict)
        return DesiredState(tuple(_torchserve_model(name, versions) for name, versions in models.items() if versions))
    except (ValueError, TorchmgmtError) as error:
        raise InvalidArgument("model_snapshot", snapshot, f"what TorchServe writes ({error})") from error


class _Reader:
    """Takes the values of a JSON object one by one, and says where one is missing or wrong."""

    def __init__(self, item: object, where: str) -> None:
        if not isinstance(item, Mapping):
            raise ValueError(f"{where} is {item!r:.100}, but must be an object")
        self._item = dict(item)
        self._where = where

    def take(self, key: str, kind: type | tuple[type, ...], default: object = ...) -> Any:
        """Take a value; ``default`` if it is not there and need not be."""
        value = self._item.pop(key, default)
        if value is ...:
            raise ValueError(f"{self._where} has no {key!r}")
        if value is not default and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            allowed = " or ".join(each.__name__ for each in kinds)
            raise ValueError(f"{key!r} of {self._where} is {value!r:.100}, but must be {allowed}")
        return value

    def end(self) -> None:
        """Refuse what is left: it would be lost at the next write."""
        if self._item:
            raise ValueError(f"{self._where} has {', '.join(map(repr, self._item))}, which this release does not know")


def _version_to_json(version: StoredVersion) -> dict[str, Any]:
    item: dict[str, Any] = {"version": version.key.version, "url": version.url}
    if version.place:
        item["place"] = version.place
    return {
        **item,
        "sha256": version.digest,
        "trusted": version.trusted,
        "loaded_at_startup": version.loaded_at_startup,
        "min_workers": version.scale.min_workers,
        "max_workers": version.scale.max_workers,
        "parameters": dict(version.parameters),
    }


def _model_from_json(item: object, number: int) -> StoredModel:
    reader = _Reader(item, f"model {number + 1}")
    name = reader.take("name", str)
    default = reader.take("default", str)
    versions = [_version_from_json(version, name) for version in reader.take("versions", list)]
    reader.end()
    names = [version.key.version for version in versions]
    _check_once(f"versions of model {name!r}", names)
    if default not in names:
        raise ValueError(f"the default of model {name!r} is {default!r}, which is none of its versions")
    return StoredModel(default, tuple(versions))


def _version_from_json(item: object, name: str) -> StoredVersion:
    reader = _Reader(item, f"a version of model {name!r}")
    version = StoredVersion(
        key=ModelKey(name, reader.take("version", str)),
        url=reader.take("url", str),
        place=reader.take("place", str, ""),
        digest=reader.take("sha256", (str, type(None))),
        trusted=reader.take("trusted", bool),
        loaded_at_startup=reader.take("loaded_at_startup", bool),
        scale=Scale(reader.take("min_workers", int), reader.take("max_workers", int)),
        parameters=reader.take("parameters", dict),
    )
    reader.end()
    return version


def _torchserve_model(name: str, item: object) -> StoredModel:
    if not isinstance(item, Mapping):
        raise ValueError(f"model {name!r} is {item!r:.100}, but must be an object of versions")
    versions = tuple(_torchserve_version(ModelKey(name, version), value) for version, value in item.items())
    defaults = [version for version, value in item.items() if value.get("defaultVersion") is True]
    return StoredModel(defaults[0] if defaults else versions[0].key.version, versions)


def _torchserve_version(key: ModelKey, item: object) -> StoredVersion:
    reader = _Reader(item, f"version {key.version!r} of model {key.name!r}")
    least = reader.take("minWorkers", int, 0)
    given = {ours: reader.take(theirs, (str, int), None) for theirs, ours in TORCHSERVE_PARAMETERS.items()}
    return StoredVersion(
        key=key,
        url=reader.take("marName", str),
        trusted=False,  # which is: from the model store only
        scale=Scale(least, max(least, reader.take("maxWorkers", int, least))),
        parameters={"model_name": key.name, **{name: value for name, value in given.items() if value is not None}},
    )


def _check_once(what: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"it has {what} twice: {', '.join(map(repr, twice))}")
