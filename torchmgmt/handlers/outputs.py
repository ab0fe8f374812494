"""What models return, as the shipped handlers make answers of it: one for each request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["label_of", "labelled", "main_tensor", "row_of"]

_MAIN = ("logits", "out")


def main_tensor(output: Any) -> Tensor:
    """Return the tensor that counts: the output, its ``logits`` or ``out``, or the first of several.

    Raises:
        TypeError: there is none.
    """
    value = output
    if isinstance(output, Mapping):
        value = next((output[name] for name in _MAIN if name in output), None)
    elif isinstance(output, (tuple, list)) and output:
        value = output[0]
    elif not isinstance(output, Tensor):
        value = getattr(output, "logits", None)
    if isinstance(value, Tensor):
        return value
    raise TypeError(
        f"the model returned {_described(output)}; this handler needs a tensor, a mapping or an object that has one as"
        " logits or out, or a sequence that begins with one"
    )


def row_of(output: Any, index: int, batch_size: int) -> Any:
    """Return what belongs to one request: row ``index`` of each tensor in ``output``, in the same containers.

    Raises:
        TypeError: there is something else than tensors in it, or a tensor that has not ``batch_size`` rows.
    """
    if isinstance(output, Tensor):
        if output.ndim == 0 or output.shape[0] != batch_size:
            raise TypeError(
                f"the model returned a tensor of shape {list(output.shape)} for a batch of {batch_size}; its first"
                " dimension must be the batch"
            )
        return output[index]
    if isinstance(output, Mapping):
        return {key: row_of(value, index, batch_size) for key, value in output.items()}
    if isinstance(output, (tuple, list)):
        return [row_of(value, index, batch_size) for value in output]
    raise TypeError(f"the model returned {_described(output)}; this handler needs tensors, or containers of them")


def label_of(mapping: Any, index: int) -> str:
    """Return the name of class ``index``; its number if ``mapping`` has no name for it.

    Args:
        mapping: the content of index_to_name.json: a list of names, ``{"0": "cat"}``, ``{"0": ["n01", "cat"]}``,
            ``{"object_type_names": ["cat"]}``, or None.
    """
    names = mapping
    if isinstance(names, Mapping):
        names = names.get("object_type_names", names)
    if isinstance(names, Mapping):
        name = names.get(str(index))
    else:
        name = names[index] if isinstance(names, Sequence) and index < len(names) else None
    if isinstance(name, (list, tuple)) and name:
        name = name[-1]
    return str(index) if name is None else str(name)


def labelled(scores: Sequence[float], mapping: Any, classes: Sequence[int]) -> dict[str, float]:
    """Return ``{name: score}`` in the order given. Of classes with one name the first one counts."""
    answer: dict[str, float] = {}
    for index, score in zip(classes, scores, strict=True):
        answer.setdefault(label_of(mapping, index), score)
    return answer


def _described(output: object) -> str:
    return "None" if output is None else f"an object of type {type(output).__qualname__}"
