"""What a model's folder says of itself: ``MAR-INF/MANIFEST.json`` and ``model-config.yaml``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from torchmgmt.archive.names import Refused, parts_inside, quote, refusing
from torchmgmt.records import ENVELOPES

if TYPE_CHECKING:
    import yaml

__all__ = ["Manifest", "read_config", "read_manifest"]

MANIFEST_FILE = "MAR-INF/MANIFEST.json"
CONFIG_FILE = "model-config.yaml"
MAX_MANIFEST_BYTES = 1 << 20
# PyYAML reads 200 KB a second, of what was written to be slow 30; real configurations have 1 or 2 KB.
MAX_CONFIG_BYTES = 128 << 10
# Values in a configuration, each alias counted as often as what it stands for.
MAX_CONFIG_NODES = 100_000

_RUNTIMES = {"python": "python", "python3": "python3", "lsp": "LSP"}


@frozen(kw_only=True)
class Manifest:
    """``MAR-INF/MANIFEST.json``, as torch-model-archiver writes it, checked.

    A name of a file is relative to the model's folder and stays inside it; whether the file exists
    is not checked. None is what the manifest does not say.
    """

    model_name: str | None = None
    """None only where the caller must name the model."""
    version: str = "1.0"
    handler: str | None = None
    """``module``, ``module.py``, ``module:function``, or the name of a shipped handler."""
    model_file: str | None = None
    """The Python file with the one ``nn.Module`` class of an eager model."""
    serialized_file: str | None = None
    """The weights, the TorchScript module, or whatever the handler loads."""
    runtime: str = "python"
    """``python``, ``python3`` or ``LSP``."""
    requirements_file: str | None = None
    config_file: str | None = None
    """The configuration's file, where it is not ``model-config.yaml``."""
    envelope: str | None = None
    """What unwraps its requests: one of :data:`torchmgmt.records.ENVELOPES`."""
    raw: Mapping[str, Any] = field(factory=dict, repr=False)
    """The whole JSON object as found; what handlers get as ``context.manifest``."""


def read_manifest(folder: Path, source: str) -> Manifest | None:
    """Read the manifest of a model's folder; None if it has none.

    Blocks for a small file; any thread. Raises :class:`InvalidArchive` of ``source`` for one that
    is too large, no JSON object, or has a value of the wrong type or range, which it names.
    """
    path = folder / MANIFEST_FILE
    if not os.path.lexists(path):
        return None
    with refusing(source):
        text = _read_text(path, MAX_MANIFEST_BYTES)
        return _manifest(text, _json_object(text))


def read_config(folder: Path, manifest: Manifest | None, source: str) -> Mapping[str, Any]:
    """Read the configuration of a model's folder: the file that the manifest names, else
    ``model-config.yaml``; empty if there is none.

    Blocks for a small file; any thread. Raises :class:`InvalidArchive` of ``source`` for one that
    the manifest names and is missing, is too large, no plain YAML (tags that make Python objects
    are refused) or no mapping, or whose aliases multiply into more than 100,000 values.
    """
    named = manifest.config_file if manifest is not None else None
    path = folder / (named or CONFIG_FILE)
    if named is None and not os.path.lexists(path):
        return {}
    with refusing(source):
        return _yaml_mapping(_read_text(path, MAX_CONFIG_BYTES), path.name)


def _read_text(path: Path, most_bytes: int) -> str:
    if not path.is_file():  # a pipe would block, and a folder has no text
        raise Refused(f"{path.name} is missing or no file")
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
        if len(data) > most_bytes:
            raise Refused(f"{path.name} is larger than the allowed {most_bytes} bytes")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise Refused(f"{path.name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Refused(f"{path.name} is not UTF-8 text: {error}") from error


# ----------------------------------------------------------------------------------- manifest


def _json_object(text: str) -> dict[str, Any]:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(f"its manifest is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise Refused(f"its manifest is {quote(raw)}, but must be a JSON object")
    return raw


def _manifest(text: str, raw: dict[str, Any]) -> Manifest:
    model = raw.get("model")
    if not isinstance(model, dict):
        raise Refused(f'"model" in its manifest is {quote(model)}, but must be a JSON object')
    return Manifest(
        model_name=_label(model, "modelName"),
        version=_version(model, text),
        handler=_handler(model),
        model_file=_file(model, "modelFile"),
        serialized_file=_file(model, "serializedFile"),
        runtime=_runtime(raw),
        requirements_file=_file(model, "requirementsFile"),
        config_file=_file(model, "configFile"),
        envelope=_envelope(model),
        raw=raw,
    )


def _text(found: Mapping[str, Any], key: str) -> str | None:
    value = found.get(key)
    if value is not None and not isinstance(value, str):
        raise Refused(f'"{key}" in its manifest is {quote(value)}, but must be text')
    return value if value and value.strip() else None


def _label(model: Mapping[str, Any], key: str) -> str | None:
    value = _text(model, key)
    if value and ("/" in value or "\0" in value):
        raise Refused(f'"{key}" in its manifest is {quote(value)}, but must not have "/" or NUL')
    return value


def _version(model: Mapping[str, Any], text: str) -> str:
    # Written by hand it may be a number, which TorchServe takes as it is written: 1.10 is not 1.1.
    if isinstance(model.get("modelVersion"), int | float):
        model = json.loads(text, parse_float=str, parse_int=str)["model"]
    return _label(model, "modelVersion") or "1.0"


def _file(model: Mapping[str, Any], key: str) -> str | None:
    value = _text(model, key)
    return _inside(value, value, key) if value else None


def _handler(model: Mapping[str, Any]) -> str | None:
    value = _text(model, "handler")
    return _inside(value, value.partition(":")[0], "handler") if value else None


def _envelope(model: Mapping[str, Any]) -> str | None:
    value = _text(model, "envelope")
    if value is not None and value not in ENVELOPES:
        raise Refused(f'"envelope" in its manifest is {quote(value)}, but must be one of {", ".join(ENVELOPES)}')
    return value


def _inside(value: str, name: str, key: str) -> str:
    try:
        parts = parts_inside(name)
    except Refused as refused:
        raise Refused(f'"{key}" in its manifest: {refused}') from None
    if not parts:
        raise Refused(f'"{key}" in its manifest is {quote(value)}, which names no file')
    return value


def _runtime(raw: Mapping[str, Any]) -> str:
    given = _text(raw, "runtime") or "python"
    runtime = _RUNTIMES.get(given.lower())
    if runtime is None:
        allowed = ", ".join(_RUNTIMES.values())
        raise Refused(f'"runtime" in its manifest is {quote(given)}, but must be one of {allowed}')
    return runtime


# -------------------------------------------------------------------------------------- config


def _yaml_mapping(text: str, name: str) -> Mapping[str, Any]:
    try:
        value = _safe_yaml(text)
    except (Refused, MemoryError):
        raise
    except Exception as error:  # dates that are none raise ValueError, depth RecursionError, ...
        raise Refused(f"{name} is not plain YAML: {str(error) or type(error).__name__}") from error
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise Refused(f"{name} is {quote(value)}, but must be a mapping whose keys are text")
    return value


def _safe_yaml(text: str) -> Any:
    import yaml  # 15 ms, and many models have no configuration

    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded_size(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _expanded_size(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Count what a node and all below it stand for, without visiting a shared one twice.

    Merge keys (``<<``) of merge keys multiply while the document is constructed, plain aliases
    when somebody writes it out as JSON.
    """
    if id(node) in sizes:
        known = sizes[id(node)]
        if known is None:
            raise Refused("its configuration has an alias that contains itself")
        return known
    sizes[id(node)] = None
    size = 1 + sum(_expanded_size(child, sizes) for child in _children(node))
    if size > MAX_CONFIG_NODES:
        raise Refused(f"its configuration has over {MAX_CONFIG_NODES} values, aliases written out")
    sizes[id(node)] = size
    return size


def _children(node: yaml.Node) -> list[yaml.Node]:
    import yaml

    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
