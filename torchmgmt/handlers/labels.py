"""Names of classes: ``index_to_name.json``, and answers that carry the names in it.

The functions are those of TorchServe's ``ts.utils.util``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["load_label_mapping", "map_class_to_label"]

log = logging.getLogger(__name__)


def load_label_mapping(mapping_file_path: str | Path) -> dict[str, str] | None:
    """Return ``{"0": "cat", ...}`` of a file; None if there is none.

    The file holds that, or ``{"0": ["n01", "cat"]}`` (the last of the names counts), or a list of names in order, which may
    stand under ``object_type_names``.

    Raises:
        ValueError: it holds something else, or no JSON.
    """
    file = Path(mapping_file_path)
    if not file.is_file():
        log.debug("There is no %s; classes are answered by number", file.name)
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} is not JSON: {error}") from error
    if isinstance(content, Mapping) and isinstance(content.get("object_type_names"), list):
        content = content["object_type_names"]
    names = dict(enumerate(content)) if isinstance(content, list) else content
    if not isinstance(names, Mapping):
        raise ValueError(f"{file.name} must hold a list of names, or an object from class to name, not {content!r}")
    return {str(index): _name_of(name, file.name) for index, name in names.items()}


def map_class_to_label(
    probs: list[Any], mapping: Mapping[str, str] | None = None, lbl_classes: Sequence[Sequence[Any]] | None = None
) -> list[dict[str, Any]]:
    """Return ``{name: probability}`` for each row of a batch.

    Args:
        probs: a list of rows of probabilities.
        mapping: from class to name, as :func:`load_label_mapping` returns it; None: names are the classes' numbers. So is
            that of a class which has no name.
        lbl_classes: which class each probability is of; None: they are in order, from 0.

    Raises:
        ValueError: ``probs`` is not a list, or ``mapping`` neither a dictionary nor None.
    """
    if not isinstance(probs, list):
        raise ValueError(f"probs must be a list of rows, not {type(probs).__name__}: call tolist() first")
    if mapping is not None and not isinstance(mapping, Mapping):
        raise ValueError(f"mapping must be a dictionary from class to name, or None, not {type(mapping).__name__}")
    names = mapping or {}
    rows = lbl_classes if lbl_classes is not None else [range(len(row)) for row in probs]
    return [
        {names.get(str(label), str(label)): probability for label, probability in zip(labels, row, strict=False)}
        for labels, row in zip(rows, probs, strict=False)
    ]


def _name_of(name: Any, file: str) -> str:
    value = name[-1] if isinstance(name, list) and name else name
    if not isinstance(value, str):
        raise ValueError(f"{file} must name each class by a text or a list of texts, not {name!r}")
    return value
