"""The desired state of a manager: which versions it shall have, from where, and how they are to be run. Pure.

It is what a state file holds, and what a restart brings back: JSON that says its format, and after it a line of JSON for
each change since that was written, so that a change among thousands of versions need not write them all. It holds what was asked for,
not what came of it: what a registration left open is filled in anew, from the archive and the settings, when it is
restored; the numbers of workers are stored as they are. TorchServe's snapshots are read into the same.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import field, frozen

from torchmgmt.errors import InvalidArgument, TorchmgmtError
from torchmgmt.records import ModelKey, Scale

__all__ = [
    "FORMAT",
    "Change",
    "DesiredState",
    "StoredModel",
    "StoredVersion",
    "change_to_json",
    "from_json",
    "from_torchserve",
    "to_json",
]

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

    def change_to(self, new: DesiredState) -> Change | None:
        """Return what makes ``new`` of this; None if no change can, because the models stand in another order.

        Quick where most of the models are the very same objects.
        """
        same = _length_of_same(self.models, new.models)
        old_rest, new_rest = self.models[same:], new.models[same:]
        same_end = _length_of_same(old_rest[::-1], new_rest[::-1])
        old = DesiredState(old_rest[: len(old_rest) - same_end], self.seen)
        wanted = DesiredState(new_rest[: len(new_rest) - same_end], new.seen)
        before = {model.name: model for model in old.models}
        put = tuple(model for model in wanted.models if before.get(model.name) != model)
        removed = tuple(before.keys() - {model.name for model in wanted.models})
        change = Change(put, removed, None if new.seen == self.seen else new.seen)
        comes_last = not same_end or all(model.name in before for model in put)
        return change if comes_last and old.changed(change) == wanted else None

    def changed(self, change: Change) -> DesiredState:
        """Return what a change makes of this."""
        models = {model.name: model for model in self.models}
        for name in change.removed:
            models.pop(name, None)
        models.update({model.name: model for model in change.models})
        return DesiredState(tuple(models.values()), self.seen if change.seen is None else change.seen)


@frozen
class Change:
    """What has changed of a desired state."""

    models: Sequence[StoredModel] = ()
    """Those that are new, which come last, or not what they were."""
    removed: Sequence[str] = ()
    """The names of those that are no more."""
    seen: Sequence[str] | None = None
    """What ``seen`` is now; None: what it was."""


def _length_of_same(some: Sequence[StoredModel], others: Sequence[StoredModel]) -> int:
    """Return with how many of the same models both begin."""
    # Whole pieces are compared, which goes ten times as fast as one by one: an object is the same as itself.
    least, most = 0, min(len(some), len(others))
    while least < most:
        middle = (least + most + 1) // 2
        if some[least:middle] == others[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def to_json(state: DesiredState) -> bytes:
    """Return the text of a state file without changes: a line for each model, for who looks at it."""
    models = ",\n".join(json.dumps(_model_to_json(model)) for model in state.models)
    text = f'{{"format": {FORMAT}, "seen": {json.dumps(list(state.seen))}, "models": [\n{models}\n]}}\n'
    return text.encode("ascii")


def change_to_json(change: Change) -> bytes:
    """Return the line that is to be added to the text of a state file."""
    item: dict[str, Any] = {"models": [_model_to_json(model) for model in change.models], "removed": [*change.removed]}
    if change.seen is not None:
        item["seen"] = [*change.seen]
    return json.dumps(item).encode("ascii") + b"\n"


def from_json(text: bytes) -> DesiredState:
    """Return what :func:`to_json` wrote, with the changes after it. The last one may be cut off, and does not count then.

    Raises:
        ValueError: it is something else, or of a format that a later release writes. The text says what is wrong where.
    """
    try:
        whole = text.decode()
        document, end = json.JSONDecoder().raw_decode(whole)
    except ValueError as error:
        raise ValueError(f"it is no JSON ({error})") from None
    state = _state_from_json(document)
    lines = whole[end:].removeprefix("\n").split("\n")
    lines.pop()  # who was killed while writing a line, or met a full disk, has told nobody that it is written
    for number, line in enumerate(lines, 1):
        try:
            item = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"change {number} after it is no JSON ({error})") from None
        state = state.changed(_change_from_json(item, f"change {number}"))
    return state


def _state_from_json(document: object) -> DesiredState:
    if not isinstance(document, dict) or not isinstance(document.get("format"), int):
        raise ValueError('it is no state file of torchmgmt: it has no "format"')
    if document["format"] != FORMAT:
        raise ValueError(f"its format is {document['format']}, but this release knows only {FORMAT}")
    reader = _Reader(document, "it")
    reader.take("format", int)
    models = [_model_from_json(model, n) for n, model in enumerate(reader.take("models", list))]
    seen = _texts("seen", "it", reader.take("seen", list))
    reader.end()
    _check_once("models", [model.name for model in models])
    return DesiredState(tuple(models), seen)


def _change_from_json(item: object, where: str) -> Change:
    reader = _Reader(item, where)
    models = [_model_from_json(model, n) for n, model in enumerate(reader.take("models", list))]
    removed = _texts("removed", where, reader.take("removed", list))
    seen = reader.take("seen", list, None)
    reader.end()
    return Change(tuple(models), removed, None if seen is None else _texts("seen", where, seen))


def _texts(key: str, where: str, items: Sequence[object]) -> tuple[str, ...]:
    texts = tuple(item for item in items if isinstance(item, str))
    if len(texts) != len(items):
        raise ValueError(f"{key!r} of {where} is {items!r:.100}, but must be a list of texts")
    return texts


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


def _model_to_json(model: StoredModel) -> dict[str, Any]:
    versions = [_version_to_json(version) for version in model.versions]
    return {"name": model.name, "default": model.default, "versions": versions}


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
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"it has {what} twice: {', '.join(map(repr, twice))}")
