"""Warm-up: inputs out of model-config.yaml that a worker runs before it is ready, so that no caller waits for first times."""

from __future__ import annotations

import copy
import json
import mimetypes
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from torchmgmt.handlers.faults import NO_FAULT

if TYPE_CHECKING:
    from torchmgmt.records import ModelSpec
    from torchmgmt.worker.loader import Handler

__all__ = ["WarmUpFailed", "has_warm_up", "warm_up"]

_KEY = "warmup"
_FORM = (
    "a list of inputs: the name of a file of the archive, a row such as {body: [1.0, 2.0]} or {data: {file: cat.jpg}}, or a"
    " list of these, which are run as one batch"
)


class WarmUpFailed(Exception):
    """A warm-up input cannot be read, or the handler failed on it."""


@frozen
class _Batch:
    """What is run together, and what errors call it."""

    name: str
    rows: Sequence[Any]


def has_warm_up(spec: ModelSpec) -> bool:
    """Whether the model's configuration declares any warm-up."""
    return bool(spec.config.get(_KEY))


def warm_up(handler: Handler, spec: ModelSpec) -> None:
    """Run the warm-up inputs of ``spec`` in order, if there are any; their answers and metrics are dropped.

    Raises:
        WarmUpFailed: the configuration, a file or the handler is at fault.
    """
    if not has_warm_up(spec):
        return
    with handler.without_metrics():
        for batch in _batches(spec.config[_KEY], Path(spec.model_dir)):
            ids = [f"warmup-{number}" for number in range(len(batch.rows))]
            try:
                answers = handler.run(list(batch.rows), ids, [{} for _ in ids])
                errors = [answer for answer in answers if isinstance(answer, BaseException)]
                if errors:
                    raise errors[0]
            except NO_FAULT:
                raise
            except BaseException as error:
                raise WarmUpFailed(f"{batch.name} failed: {type(error).__name__}: {error}") from error


def _batches(inputs: object, folder: Path) -> Iterator[_Batch]:
    if not isinstance(inputs, list):
        raise WarmUpFailed(f"{_KEY} in model-config.yaml must be {_FORM}; it is {inputs!r}")
    for number, each in enumerate(inputs, 1):
        name = f"warm-up input {number}" + (f" ({each})" if isinstance(each, str) else "")
        try:
            rows = [_row(item, folder) for item in (each if isinstance(each, list) else [each])]
        except (OSError, ValueError) as error:
            raise WarmUpFailed(f"{name} cannot be used: {error}") from error
        if not rows:
            raise WarmUpFailed(f"{name} is an empty batch")
        yield _Batch(name, rows)


def _row(item: object, folder: Path) -> dict[str, Any]:
    if isinstance(item, str):
        return {"body": _content(item, folder)}
    if not isinstance(item, Mapping):
        raise ValueError(f"{_KEY} in model-config.yaml must be {_FORM}; it has {item!r}")
    return {field: _value(value, folder) for field, value in item.items()}


def _value(value: object, folder: Path) -> Any:
    if isinstance(value, Mapping) and set(value) == {"file"} and isinstance(value["file"], str):
        return _content(value["file"], folder)
    return copy.deepcopy(value)  # the handler may do with it what it likes


def _content(name: str, folder: Path) -> Any:
    """Return a file as a handler gets a request's body of its type: JSON parsed, text as text, all else as bytes."""
    file = (folder / name).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} is outside the model's folder")
    content = file.read_bytes()
    kind, _ = mimetypes.guess_type(name)
    if kind == "application/json":
        return json.loads(content)
    return content.decode("utf-8") if kind and kind.startswith("text/") else bytearray(content)
