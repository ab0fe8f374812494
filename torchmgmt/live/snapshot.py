"""Writes a live object down: a pickle, and apart from it, each once, the memory of its tensors and arrays.

The classes and functions of ``__main__``, lambdas and closures go into the pickle by their code (cloudpickle). What the
numbers are in goes into the memory as it is, so that a process that maps it has the tensors without a copy.

The memory begins with where the header is (:data:`PLACE`), itself a pickle of a :class:`Header`.
"""

from __future__ import annotations

import importlib
import io
import linecache
import mmap
import os
import pickle
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from attrs import field, frozen

from torchmgmt.by_value import CodePickler
from torchmgmt.errors import InvalidArgument
from torchmgmt.live.blame import why_not
from torchmgmt.live.parametrized import original_class, reduce_parametrized
from torchmgmt.system_calls import fix_size, nameless_file
from torchmgmt.tensors import memory_at

__all__ = ["PLACE", "PROGRAM", "SCRIPT", "STORAGE", "Header", "write_snapshot"]

PLACE = struct.Struct("<QQ")
"""At the beginning: where the header is, and its length."""
STORAGE, SCRIPT, PROGRAM = "storage", "script", "program"
"""What a persistent id begins with; the number of its memory follows, of a storage the type of its numbers before that."""
_ALIGNMENT = 64
_MOST_AT_ONCE = 1 << 30

Part: TypeAlias = tuple[int, int]
"""Where something is, and its length."""


@frozen
class Header:
    """What is where."""

    pickle: Part
    memory: Sequence[Part]
    """Of storages, scripts and programs, by their numbers."""
    buffers: Sequence[tuple[int, int, bool]]
    """Of the buffers that the pickle left out: place, length, and whether they may not be written to."""
    sys_path: Sequence[str] = field(factory=lambda: [entry or str(Path.cwd()) for entry in sys.path])
    """Where modules are found that the pickle names."""
    sources: Mapping[str, str] = field(factory=dict)
    """The source, by its file's name, of code that is in no file, such as a notebook's: for tracebacks, and for torch.jit."""


def write_snapshot(target: object, shown: str) -> int:
    """Return the descriptor of memory that holds ``target``; nothing changes it any more. Blocks; any thread.

    Errors call it ``shown``.

    Raises:
        InvalidArgument: it cannot be pickled; says which part of it, and what to do.
        OSError: there is no memory.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    try:
        pickler.dump(target)
    except Exception as error:  # whatever a __reduce__ raises
        raise InvalidArgument("url", shown, why_not(target, error, dumps)) from error
    return _write(file.getbuffer(), pickler.memory, pickler.buffers, _sources_of(pickler.code_files))


def dumps(target: object) -> None:
    """Pickle ``target``, and drop what comes of it. Raises whatever that raises."""
    _Pickler(io.BytesIO()).dump(target)


class _Pickler(CodePickler):
    """Leaves memory out of the pickle, and keeps it until it is written."""

    def __init__(self, file: io.BytesIO) -> None:
        self.buffers: list[pickle.PickleBuffer] = []
        super().__init__(file, protocol=5, buffer_callback=self.buffers.append)
        self.memory: list[memoryview] = []
        self._numbers: dict[int, int] = {}  # by the identity of what is there
        self._kept: list[object] = []  # so that no other one gets that identity
        self._storage = _kinds("torch.storage", "TypedStorage")
        self._script = _kinds("torch.jit", "ScriptModule", "ScriptFunction")
        self._program = _kinds("torch.export", "ExportedProgram")

    def persistent_id(self, obj: object) -> Any:
        """Return what stands in the pickle for what is left out; None for all else. Called with every object."""
        kind = type(obj)
        if issubclass(kind, self._storage):
            return STORAGE, obj.dtype, self._number_of_storage(obj._untyped_storage)  # type: ignore[attr-defined]
        if issubclass(kind, self._script):
            return SCRIPT, self._number_of_saved(obj, "torch.jit")
        if issubclass(kind, self._program):
            return PROGRAM, self._number_of_saved(obj, "torch.export")
        return None

    def reducer_override(self, obj: Any) -> Any:
        """Return how an object is pickled of a kind that cannot pickle itself; as cloudpickle does it for all else."""
        original = original_class(type(obj))
        return super().reducer_override(obj) if original is None else reduce_parametrized(obj, original)

    def _number_of_storage(self, storage: Any) -> int:
        if storage._cdata in self._numbers:
            return self._numbers[storage._cdata]
        on_cpu = storage if storage.device.type == "cpu" else storage.cpu()
        size = on_cpu.nbytes()
        memory = memory_at(on_cpu.data_ptr(), size, on_cpu) if size else memoryview(b"")
        return self._keep(storage._cdata, storage, memory)

    def _number_of_saved(self, obj: object, module: str) -> int:
        """Keep what torch has a way of its own to save."""
        if id(obj) in self._numbers:
            return self._numbers[id(obj)]
        file = io.BytesIO()
        importlib.import_module(module).save(obj, file)
        return self._keep(id(obj), obj, file.getbuffer())

    def _keep(self, identity: int, obj: object, memory: memoryview) -> int:
        self._kept.append(obj)
        self.memory.append(memory)
        self._numbers[identity] = len(self.memory) - 1
        return self._numbers[identity]


def _kinds(module: str, *names: str) -> tuple[type[Any], ...]:
    """Return classes of torch; none of them if that is not imported, as there are no objects of them then."""
    found = (getattr(sys.modules.get(module), name, None) for name in names)
    return tuple(each for each in found if isinstance(each, type))


def _sources_of(files: Iterable[str]) -> Mapping[str, str]:
    """Return the text of those that are no files: Python and IPython keep it by such a name."""
    found = {name: "".join(linecache.getlines(name)) for name in files if not Path(name).is_file()}
    return {name: text for name, text in found.items() if text}


def _write(
    pickled: memoryview,
    memory: Sequence[memoryview],
    buffers: Sequence[pickle.PickleBuffer],
    sources: Mapping[str, str],
) -> int:
    raw = [buffer.raw() for buffer in buffers]
    end = PLACE.size
    parts: list[tuple[int, memoryview]] = []
    for each in (pickled, *memory, *raw):
        # A tensor begins where torch's own allocator could put it.
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        parts.append((start, each))
        end = start + each.nbytes
    places = [(start, each.nbytes) for start, each in parts]
    first_buffer = 1 + len(memory)
    kept = [(*place, view.readonly) for place, view in zip(places[first_buffer:], raw, strict=True)]
    header = pickle.dumps(Header(places[0], places[1:first_buffer], kept, sources=sources))
    parts += [(end, memoryview(header)), (0, memoryview(PLACE.pack(end, len(header))))]
    return _filled(parts, end + len(header))


def _filled(parts: Iterable[tuple[int, memoryview]], size: int) -> int:
    fd = nameless_file("torchmgmt-live")
    try:
        # A whole number of pages: what maps it maps all of it.
        os.ftruncate(fd, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        for start, view in parts:
            _write_at(fd, start, view.cast("B") if view.nbytes else view)
        # A file on a disk can still be written to. This process never maps it, and the workers do nothing of the kind.
        fix_size(fd, and_content=True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _write_at(fd: int, start: int, view: memoryview) -> None:
    done = 0
    while done < view.nbytes:
        done += os.pwrite(fd, view[done : done + _MOST_AT_ONCE], start + done)
