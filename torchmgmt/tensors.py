"""Tensors as what travels between processes: their memory stays out of the pickle, and is not copied on the way.

torch itself pickles a tensor through ``torch.save``, which takes a hundred times as long for a small one. It is not
imported here: who has a tensor has torch, and who takes one back gets it.
"""

from __future__ import annotations

import copyreg
import ctypes
import importlib
import pickle
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["memory_at", "rebuild", "reducers"]

_TORCH = "torch"


def reducers() -> Mapping[type, Callable[[Any], Any]] | None:
    """Return the dispatch table of a pickler that is to leave tensors' memory out; None if this process has no torch."""
    kind = getattr(sys.modules.get(_TORCH), "Tensor", None)  # it may be on its way in
    return None if kind is None else {**copyreg.dispatch_table, kind: _reduce}


def memory_at(address: int, size: int, owner: object) -> memoryview:
    """Return the ``size`` bytes (at least 1) at ``address``, to be written to as well; ``owner`` lives as long as the view."""
    array = (ctypes.c_char * size).from_address(address)
    vars(array)["owner"] = owner
    return memoryview(array).cast("B")


def rebuild(memory: Any, dtype: Any, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor over ``memory``, which is copied if it cannot be written to or has no place for such numbers."""
    torch = importlib.import_module(_TORCH)
    view = memoryview(memory)
    tensor = torch.frombuffer(bytearray(view) if view.readonly else view, dtype=dtype)
    if tensor.data_ptr() % dtype.itemsize:
        tensor = tensor.clone()
    return tensor.reshape(shape)  # type: ignore[no-any-return]


def _reduce(tensor: Tensor) -> Any:
    if not _is_plain(tensor):
        return tensor.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    dense = tensor.contiguous()
    memory = memory_at(dense.data_ptr(), dense.nbytes, dense)
    return rebuild, (pickle.PickleBuffer(memory), dense.dtype, tuple(dense.shape))


def _is_plain(tensor: Tensor) -> bool:
    """Whether its numbers, their type and its shape are all there is to it."""
    return (
        tensor.device.type == "cpu"
        and str(tensor.layout) == "torch.strided"
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        and not vars(tensor)
        and tensor.nbytes > 0
    )
