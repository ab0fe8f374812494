"""Makes a live object again, in the process of a template or worker: over the memory that it was written to."""

from __future__ import annotations

import importlib
import io
import linecache
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchmgmt.by_value import CodeUnpickler
from torchmgmt.handlers.model_files import FileKind, kind_of, load_aot_package, load_exported, read_safetensors
from torchmgmt.handlers.state_dict import make_and_load, read_state_dict
from torchmgmt.live import LiveObject, Role
from torchmgmt.live.snapshot import PLACE, PROGRAM, SCRIPT, STORAGE, Header
from torchmgmt.tensors import memory_at

__all__ = ["fixed_batch_of", "load_live", "read_snapshot"]

_CPU = torch.device("cpu")


def load_live(live: LiveObject) -> Any:
    """Return the object, ready to be called; a module in evaluation mode, unless it is the program's own.

    Raises:
        ModuleNotFoundError: a class or function of it is in a module that is not found here.
        Exception: whatever making it raises.
    """
    target = _target_of(live)
    if live.role is Role.FILE:
        return _load_file(_file_of(live))
    if live.role is Role.WEIGHTS:
        return _load_weights(_file_of(live), target)
    if live.role is Role.PROGRAM:
        return target.module()
    if live.role is Role.MODULE and live.target is None and isinstance(target, nn.Module):
        target.eval()
    return target


def fixed_batch_of(program: Any) -> int | None:
    """Return the only size of a batch that an exported program takes; None if it takes several, or it is no such program."""
    if not isinstance(program, fx.GraphModule):
        return None
    inputs = (node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder")
    sizes = [tensor.shape[0] for tensor in inputs if isinstance(tensor, Tensor) and tensor.ndim]
    is_fixed = bool(sizes) and all(
        type(size) is int and size == sizes[0] for size in sizes
    )  # else a symbol of the graph
    return sizes[0] if is_fixed else None


def _target_of(live: LiveObject) -> Any:
    fd = live.take()
    if fd is None:
        return live.target
    try:
        return read_snapshot(fd)
    finally:
        os.close(fd)


def read_snapshot(fd: int) -> Any:
    """Return what was written down. Its tensors are in the memory of ``fd`` until they are written to: then in a copy.

    Sets ``sys.path`` to what it was where it was written. ``fd`` stays the caller's, and may be closed.
    """
    header: Header = pickle.loads(_read(fd, *PLACE.unpack(_read(fd, 0, PLACE.size))))
    sys.path[:] = header.sys_path
    for name, text in header.sources.items():
        # Without a time: then linecache does not look whether the file is still what it was, as there is none.
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    try:
        return _Unpickler(fd, header).load()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}: a class or function of the live object is in a module that workers cannot import; put it on sys.path"
            " before it is registered, or have it sent along (cloudpickle.register_pickle_by_value)",
            name=error.name,
            path=error.path,
        ) from error


class _Unpickler(CodeUnpickler):
    def __init__(self, fd: int, header: Header) -> None:
        path = f"/proc/self/fd/{fd}" if sys.platform == "linux" else f"/dev/fd/{fd}"
        # Mapped privately: who writes to it gets a page of its own. What is made of it keeps the mapping.
        self._whole = torch.UntypedStorage.from_file(path, False, os.fstat(fd).st_size)
        self._header = header
        self._made: dict[int, Any] = {}
        buffers = (self._buffer(*each) for each in header.buffers)
        super().__init__(io.BytesIO(_read(fd, *header.pickle)), buffers=buffers)

    def persistent_load(self, pid: Any) -> Any:
        kind, *about, number = pid
        if number not in self._made:
            start, size = self._header.memory[number]
            self._made[number] = self._make(kind, start, size)
        made = self._made[number]
        return torch.TypedStorage(wrap_storage=made, dtype=about[0], _internal=True) if kind == STORAGE else made

    def _make(self, kind: str, start: int, size: int) -> Any:
        if kind == STORAGE:
            return self._whole[start : start + size] if size else torch.UntypedStorage(0)
        load = importlib.import_module({SCRIPT: "torch.jit", PROGRAM: "torch.export"}[kind]).load
        return load(io.BytesIO(self._buffer(start, size, True)))

    def _buffer(self, start: int, size: int, is_readonly: bool) -> memoryview:
        whole = self._whole
        view = memory_at(whole.data_ptr() + start, size, whole) if size else memoryview(bytearray())
        return view.toreadonly() if is_readonly else view


def _read(fd: int, start: int, size: int) -> bytes:
    parts = []
    while size and (part := os.pread(fd, min(size, 1 << 30), start)):
        parts.append(part)
        start, size = start + len(part), size - len(part)
    return b"".join(parts)


def _file_of(live: LiveObject) -> Path:
    if live.file is None or not live.file.is_file():
        raise FileNotFoundError(f"the model file {live.file} is not there any more")
    return live.file


def _load_weights(file: Path, model_class: Callable[[], Any]) -> nn.Module:
    def read() -> Any:
        if file.suffix.lower() == ".safetensors":
            return read_safetensors(str(file), _CPU)
        return read_state_dict(str(file), map_location="cpu", weights_only=True, is_sealed=False)

    def make() -> nn.Module:
        module = model_class()
        if not isinstance(module, nn.Module):
            raise TypeError(f"model_class made an object of type {type(module).__qualname__}, not a torch.nn.Module")
        return module

    return make_and_load(lambda: make, read).eval()


def _load_file(file: Path) -> Any:
    kind = kind_of(str(file))
    if kind is FileKind.EXPORTED:
        return load_exported(str(file), _CPU)
    if kind is FileKind.AOT_PACKAGE:
        return load_aot_package(str(file), _CPU)
    if not _is_script(file):
        raise ValueError(
            f"{file.name} is neither TorchScript nor what torch.export saves; if it holds weights (a state dict), register it"
            " with model_class=..., what makes the module that they belong to"
        )
    return torch.jit.load(str(file), map_location=_CPU).eval()


def _is_script(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name for name in archive.namelist())
