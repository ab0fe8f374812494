"""Tensors out of what a request sent as bytes: the formats of numpy and torch, and plain numbers. Runs no code in them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchmgmt.handlers.inputs import InputRefused
from torchmgmt.handlers.optional import needed

__all__ = ["read_tensor"]

_NPY = b"\x93NUMPY"
_TORCH = b"PK\x03\x04"  # torch.save writes a zip archive


def read_tensor(data: bytes | bytearray | memoryview, dtype: torch.dtype, shape: Sequence[int] | None) -> Tensor:
    """Return the tensor in ``data``, in memory of its own.

    Args:
        data: what ``numpy.save`` or ``torch.save`` wrote; else plain numbers of ``dtype``, in this machine's byte order.
        dtype: what plain numbers are.
        shape: what plain numbers are put into; one of it may be -1. None: plain numbers are refused.

    Raises:
        InputRefused: it is none of these, holds anything but one dense tensor, or does not fit ``shape``.
        ImportError: numpy is needed for it and not installed.
    """
    head = bytes(data[: len(_NPY)])
    if head == _NPY:
        return _from_npy(data)
    if head.startswith(_TORCH):
        return _from_torch(data)
    return _from_numbers(data, dtype, shape)


def _from_npy(data: bytes | bytearray | memoryview) -> Tensor:
    numpy = needed("numpy", "numpy", "reading a .npy file")
    try:
        array = numpy.load(io.BytesIO(data), allow_pickle=False)
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    except (ValueError, TypeError, EOFError, OSError, SyntaxError) as error:
        raise InputRefused(f"the .npy file cannot be used: {error}") from error


def _from_torch(data: bytes | bytearray | memoryview) -> Tensor:
    try:
        value: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever its parts raise: UnpicklingError, RuntimeError, EOFError, KeyError, ...
        raise InputRefused(f"the file of torch.save cannot be loaded with weights_only: {error}") from error
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.device.type != "cpu":
        raise InputRefused(
            f"the file of torch.save must hold one dense tensor, not an object of type {type(value).__qualname__}"
        )
    # A view that repeats one number is a few bytes here, and would be as large as it says once it is in a batch.
    if value.nbytes > len(data):
        raise InputRefused(
            f"the tensor is larger ({value.nbytes} bytes) than the file that holds it ({len(data)} bytes)"
        )
    return value.detach()


def _from_numbers(data: bytes | bytearray | memoryview, dtype: torch.dtype, shape: Sequence[int] | None) -> Tensor:
    if shape is None:
        raise InputRefused(
            f"the {len(data)} bytes are neither a file of numpy.save (.npy) nor one of torch.save; plain numbers need their"
            " shape: handler.input_shape in model-config.yaml"
        )
    known = math.prod(size for size in shape if size != -1) * dtype.itemsize
    fits = len(data) % known == 0 if -1 in shape else len(data) == known
    if not data or not fits:
        raise InputRefused(
            f"{len(data)} bytes are not the numbers of shape {list(shape)} and type {dtype} that the model takes"
        )
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(tuple(shape))
