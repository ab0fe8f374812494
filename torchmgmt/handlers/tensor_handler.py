"""tensor_handler: numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchmgmt.handlers.base_handler import BaseHandler
from torchmgmt.handlers.inputs import InputRefused, numbers_of, payload_of, read_each, stacked
from torchmgmt.handlers.options import Options
from torchmgmt.handlers.outputs import row_of
from torchmgmt.handlers.tensors import read_tensor
from torchmgmt.handlers.timing import timed

__all__ = ["TensorHandler"]

_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


class TensorHandler(BaseHandler):
    """Stacks what the requests of a batch sent, calls the model once, and answers each with its row of what that returned.

    A request sends numbers or (nested) lists of them as JSON, a tensor or an array from Python, the bytes of a file of
    ``numpy.save`` or ``torch.save``, or, where ``input_shape`` is set, the bytes of plain numbers. Requests that differ in
    shape are run one by one.

    In the ``handler`` section of model-config.yaml: ``dtype``, what the model takes (float32 unless set; whole numbers in
    files and tensors stay what they are unless set); ``input_shape``, that of one request; ``answer``: ``list`` (JSON) or
    ``tensor``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._dtype: torch.dtype | None = None
        self._shape: tuple[int, ...] | None = None
        self._as_tensor = False

    def initialize(self, context: Any) -> None:
        """Load the model and read the options. Raises whatever loading raises, and ValueError for a wrong option."""
        super().initialize(context)
        options = Options.of(self.model_yaml_config)
        name = options.choice("dtype", None, _DTYPES)
        self._dtype = None if name is None else getattr(torch, name)
        self._shape = options.sizes("input_shape")
        self._as_tensor = options.choice("answer", "list", ("list", "tensor")) == "tensor"

    @timed
    def preprocess(self, data: Sequence[Any]) -> Any:
        """Return a tensor with one row for each request; a list of tensors where they differ in shape or type.

        Raises:
            InputRefused: some of the batch sent no numbers, or not of the shape that the model takes.
        """
        return stacked(read_each(data, self._tensor_of), self.device)

    @timed
    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the model on the batch; on a list, on each by itself."""
        run = super().inference
        if isinstance(data, list):
            return [row_of(run(row[None], *args, **kwargs), 0, 1) for row in data]
        output = run(data, *args, **kwargs)
        return [row_of(output, index, len(data)) for index in range(len(data))]

    @timed
    def postprocess(self, data: Any) -> list[Any]:
        """Make an answer of each row."""
        return [_answer(row, self._as_tensor) for row in data]

    def _tensor_of(self, row: Any) -> Tensor:
        value = payload_of(row)
        dtype = self._dtype or torch.float32
        if isinstance(value, (bytes, bytearray, memoryview)):
            value = read_tensor(value, dtype, self._shape)
        elif isinstance(value, str):
            raise InputRefused(
                "text is not what this model takes: send numbers, or the bytes of a .npy or torch.save file"
            )
        elif isinstance(value, (int, float, list, tuple)):
            value = numbers_of(value, dtype)
        tensor = self._converted(value)
        if self._shape is not None and not _fits(tensor.shape, self._shape):
            raise InputRefused(
                f"a tensor of shape {list(tensor.shape)} is not one of shape {list(self._shape)}, which the model takes"
            )
        return tensor

    def _converted(self, value: Any) -> Tensor:
        if self._dtype is not None:
            return numbers_of(value, self._dtype)
        tensor = value if isinstance(value, Tensor) else _from_array(value)
        return tensor.float() if tensor.is_floating_point() else tensor


def _from_array(value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputRefused(f"an object of type {type(value).__qualname__} is no tensor: {error}") from error


def _fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    return len(shape) == len(wanted) and all(want in {-1, size} for size, want in zip(shape, wanted, strict=True))


def _answer(row: Any, as_tensor: bool) -> Any:
    if isinstance(row, Tensor):
        # With memory of its own: the pickle of a view holds all that it is a view of.
        return row.cpu().clone() if as_tensor else row.tolist()
    if isinstance(row, dict):
        return {key: _answer(value, as_tensor) for key, value in row.items()}
    return [_answer(value, as_tensor) for value in row]
