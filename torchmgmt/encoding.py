"""Values as what travels between processes: a pickle, and the large buffers that it leaves out (:pep:`574`)."""

from __future__ import annotations

import gc
import io
import os
import pickle
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torchmgmt.exchange import Encoded
from torchmgmt.tensors import reducers

__all__ = ["decode", "encode", "encode_answer", "encode_with_code"]

_Table: TypeAlias = Mapping[type, Callable[[Any], Any]]

# Where pickling bytes begins to cost more than a segment of its own does.
_DETACHED_FROM = 1 << 16
# From here on a pickle may hold so many objects that collecting garbage among them takes its time.
_MANY_OBJECTS_FROM = 1 << 14
# A row has some fields; the answer that is a large dictionary is of numbers, and not worth looking through.
_FEW = 16
# To look at so many numbers in a list takes half of what pickling as always would take more.
_SOME = 64
# In these there is no tensor, and to pickle them as always takes a quarter of the time.
_PLAIN = frozenset({bytes, bytearray, str, int, float, bool, type(None)})
# What a pickle has for a class or function that it names; and before that, the end of the main module's name, __main__, or
# __mp_main__ in a program that multiprocessing has spawned.
_GLOBAL = pickle.STACK_GLOBAL
_MAIN = b"_main__" + pickle.MEMOIZE


def encode(value: object, *, frozen: bool = False) -> Encoded:
    """Pickle ``value``, leaving large buffers (arrays, tensors, PickleBuffer, large bytes) out of the pickle. Any thread.

    Bytes are left out where ``value`` is a bytes object, or a dictionary of a few entries, as a request's row is.
    What was left out still belongs to whoever made it; ``frozen`` copies what could be written to in the meantime.
    """
    buffers: list[pickle.PickleBuffer] = []
    data = _pickled(value, None if _has_no_tensor(value) else reducers(), buffers.append)
    return _with_buffers(data, buffers, frozen=frozen) if buffers else Encoded([data])


def encode_with_code(value: object, *, frozen: bool = False) -> tuple[Encoded, str]:
    """Pickle ``value`` as :func:`encode` does; what another process would not find by its name goes along by its code.

    Returns the name of a class or function that does, too; "" if none does. Such are those of ``__main__``, which is a notebook,
    too, and of modules that were registered for it (:mod:`torchmgmt.by_value`). Raises whatever pickling raises.
    """
    buffers: list[pickle.PickleBuffer] = []
    is_plain = _has_no_tensor(value)
    table = None if is_plain else reducers()
    data, code = b"", ""
    try:
        data = _pickled(value, table, buffers.append)
    except Exception:  # a name that leads nowhere; perhaps something that cannot be pickled at all
        code = "a part of it"
    if code or (not is_plain and _GLOBAL in data and _may_name_own(data)):
        from torchmgmt.by_value import dumps_with_code  # it imports cloudpickle, which most programs do not need

        buffers = []
        data, named = dumps_with_code(_detach_bytes(value), table, buffers.append)
        code = named or code
    return (_with_buffers(data, buffers, frozen=frozen) if buffers else Encoded([data])), code


def encode_answer(value: object) -> Encoded:
    """Pickle ``value`` in a worker of a model that the program registered itself: classes of the program's own go along.

    Here they are nowhere to be found by their names, so that nothing is looked for if they are not there. Raises whatever
    pickling raises.
    """
    try:
        return encode(value)
    except Exception:  # perhaps it cannot be pickled at all
        return encode_with_code(value)[0]


def _may_name_own(data: bytes) -> bool:
    """Whether a pickle may name something that other processes have something else for by that name, or nothing.

    It is looked for in the bytes: to have each object asked takes a tenth of the time that pickling a tensor takes.
    """
    if _MAIN in data:
        return True
    registered = getattr(sys.modules.get("cloudpickle"), "list_registry_pickle_by_value", None)
    return registered is not None and any(name.encode() in data for name in registered())


def _with_buffers(data: bytes, buffers: Sequence[pickle.PickleBuffer], *, frozen: bool) -> Encoded:
    raw = [buffer.raw() for buffer in buffers]
    return Encoded([data, *(bytes(view) if frozen and not view.readonly else view for view in raw)])


def _pickled(value: object, table: _Table | None, take: Callable[[pickle.PickleBuffer], object]) -> bytes:
    """Pickle ``value``; ``table`` has what pickles kinds otherwise than they do themselves."""
    if table is None:
        return pickle.dumps(_detach_bytes(value), protocol=5, buffer_callback=take)
    file = io.BytesIO()
    pickler = pickle.Pickler(file, 5, buffer_callback=take)
    pickler.dispatch_table = table
    pickler.dump(_detach_bytes(value))
    return file.getvalue()


def _has_no_tensor(value: Any) -> bool:
    """Whether a quick look is enough to say so."""
    if type(value) in _PLAIN:
        return True
    if type(value) is dict and len(value) <= _FEW:
        items = value.values()
        return _PLAIN.issuperset(map(type, items)) or all(
            type(each) in _PLAIN or _is_plain_list(each) for each in items
        )
    return _is_plain_list(value)


def _is_plain_list(value: Any) -> bool:
    return type(value) is list and len(value) <= _SOME and _PLAIN.issuperset(map(type, value))


class _LargeBytes:
    """Bytes that stay out of the pickle: pickling them costs 0.4 ms per MB, twenty times as much as copying them."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __reduce__(self) -> tuple[type[bytes], tuple[pickle.PickleBuffer]]:
        return bytes, (pickle.PickleBuffer(self._data),)


def _detach_bytes(value: object) -> object:
    """Return what is pickled instead of ``value``. Only exact types are looked into: others may be pickled their own way."""
    if type(value) is bytes:
        return _detached(value)
    if type(value) is dict and len(value) <= _FEW and bytes in map(type, value.values()):
        return {key: _detached(item) for key, item in value.items()}
    return value


def _detached(item: object) -> object:
    return _LargeBytes(item) if type(item) is bytes and len(item) >= _DETACHED_FROM else item


def decode(encoded: Encoded) -> Any:
    """Return the value that :func:`encode` was given. Runs whatever code its pickle names.

    Meanwhile, if that is much, the garbage collector rests: a pickle of many small objects, none of which is garbage, would have
    it go through all objects of the program again and again, which takes longer than the unpickling.
    """
    data, *buffers = encoded.segments
    if len(data) < _MANY_OBJECTS_FROM:
        return pickle.loads(data, buffers=buffers)
    use = _Use()
    try:
        _rest.begin(use)
        return pickle.loads(data, buffers=buffers)
    finally:
        try:
            _rest.end(use)
        except BaseException:  # interrupted: by Ctrl-C, or a signal handler that raises
            _rest.end(use)
            raise


class _Use:
    """One who may need the rest."""

    is_counted = False
    was_counted = False


class _Rest:
    """The rest of the garbage collector, for as long as any thread needs it. Thread-safe; nothing blocks.

    A caller may be interrupted at every call that it makes, so the lock is held only while none is made.
    """

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._users = 0  # guarded by _gate

    def begin(self, use: _Use) -> None:
        """Have it rest until :meth:`end`, unless it does not run anyway."""
        if not (self._users or gc.isenabled()):
            return
        with self._gate:
            use.is_counted = use.was_counted = True
            self._users += 1
        gc.disable()

    def end(self, use: _Use) -> None:
        """Have it go on, if nobody else needs its rest. Idempotent."""
        with self._gate:
            if use.is_counted:
                use.is_counted = False
                self._users -= 1
            is_last = self._users == 0
        if use.was_counted and is_last:
            gc.enable()

    def end_in_child(self) -> None:
        """Have it go on in a process that was just forked: there nobody else ends the rest that other threads needed."""
        if self._users:
            gc.enable()
        self.__init__()  # type: ignore[misc]  # the lock may have been held by a thread that is not there


_rest = _Rest()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_rest.end_in_child)
