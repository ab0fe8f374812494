"""Classes and functions that another process would not find by their names: their code goes along, as cloudpickle writes it.

Those are of ``__main__``, which is a notebook, too, of the main module of a program that multiprocessing has spawned, and of
modules that were registered for it (``cloudpickle.register_pickle_by_value``).

A class has one identity in all processes, its key. Whoever knows the key takes the class that it has, and leaves that as it
is: an instance that comes back is of the program's own class. cloudpickle itself would find that class, too, but set all
its attributes anew, to copies made over there.
"""

from __future__ import annotations

import contextlib
import functools
import io
import pickle
import sys
import threading
from collections import ChainMap, deque
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import cloudpickle  # type: ignore[import-untyped]

__all__ = ["CodePickler", "CodeUnpickler", "dumps_with_code", "known_class"]

_CLOUDPICKLE = "cloudpickle.cloudpickle"
_SPAWNED_MAIN = "__mp_main__"
_MAINS = frozenset({"__main__", _SPAWNED_MAIN})
_MOST_KEPT = 64

_classes: WeakValueDictionary[str, type[Any]] = WeakValueDictionary()
"""Those that this process has whole, by their keys: it made them, or was told how to."""
_came_along: WeakSet[Any] = WeakSet()
"""Those of them that came from another process."""
_codes: WeakKeyDictionary[type[Any], tuple[str, bytes]] = WeakKeyDictionary()
"""Their keys and code, once they have travelled as the class of a value."""
_kept: deque[type[Any]] = deque(maxlen=_MOST_KEPT)
"""Made last of what came with a value. They would be made anew for each value otherwise, as nobody else has them."""


class CodePickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """Pickles as cloudpickle does, and what is of a spawned program's main module like what is of ``__main__``."""

    def __init__(self, file: io.BytesIO, **options: Any) -> None:
        super().__init__(file, **options)
        self.code_files: set[str] = set()
        """Where the code is from of the functions that went along by it."""

    def dump(self, obj: object) -> None:
        """Write ``obj``."""
        with _spawned_main.by_value():
            super().dump(obj)

    def reducer_override(self, obj: Any) -> Any:
        """Return how a class or function is pickled; NotImplemented if as always. Called with nearly every object."""
        reduced = super().reducer_override(obj)
        if _is_code(reduced):
            if isinstance(obj, type):
                _classes[_key_of(reduced)] = obj
            elif isinstance(obj, FunctionType):
                self.code_files.add(obj.__code__.co_filename)
        return reduced


def _is_code(reduced: Any) -> bool:
    """Whether it is how cloudpickle makes a class or function of its code: what sets its state is the sixth part of that."""
    return type(reduced) is tuple and len(reduced) == 6


def _key_of(reduced: tuple[Any, ...]) -> str:
    """Return what cloudpickle knows a class by. The last but one of what it makes a class of, be it an enumeration or not."""
    key: str = reduced[1][-2]
    return key


class _SpawnedMain:
    """The main module of a program that multiprocessing has spawned, which cloudpickle takes for one that can be imported."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0  # guarded by _lock

    @contextlib.contextmanager
    def by_value(self) -> Iterator[None]:
        """Have cloudpickle take its code along meanwhile."""
        main = sys.modules.get(_SPAWNED_MAIN)
        if main is None or main.__name__ != _SPAWNED_MAIN:  # else it is another name of __main__
            yield
            return
        with self._lock:
            is_ours = self._users > 0 or _SPAWNED_MAIN not in cloudpickle.list_registry_pickle_by_value()
            if is_ours:
                self._users += 1
                cloudpickle.register_pickle_by_value(main)
        try:
            yield
        finally:
            with self._lock:
                self._users -= is_ours
                if is_ours and not self._users:
                    cloudpickle.unregister_pickle_by_value(main)


_spawned_main = _SpawnedMain()


class CodeUnpickler(pickle.Unpickler):
    """Reads what a :class:`CodePickler` wrote, and leaves classes that this process has as they are."""

    def __init__(self, file: io.BytesIO, **options: Any) -> None:
        super().__init__(file, **options)
        self._unfinished: dict[int, str] = {}  # the keys of classes that are made here, by their identities

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name in the pickle stands for."""
        found = super().find_class(module, name)
        if module != _CLOUDPICKLE:
            return found
        if name in {"_make_skeleton_class", "_make_skeleton_enum"}:
            return functools.partial(self._make_class, found)
        return functools.partial(self._fill_class, found) if name == "_class_setstate" else found

    def _make_class(self, make: Callable[..., type[Any]], *arguments: Any) -> type[Any]:
        key = arguments[-2]
        made = _classes.get(key)
        if made is None:
            made = make(*arguments)
            self._unfinished[id(made)] = key
        return made

    def _fill_class(self, fill: Callable[[type[Any], Any], object], made: type[Any], state: Any) -> type[Any]:
        key = self._unfinished.pop(id(made), None)
        if key is not None:
            fill(made, state)
            _classes[key] = made
            _came_along.add(made)
        return made


def dumps_with_code(
    value: object,
    reducers: Mapping[type, Callable[[Any], Any]] | None,
    take: Callable[[pickle.PickleBuffer], object],
) -> tuple[bytes, str]:
    """Pickle ``value``, leaving buffers to ``take``; return what :func:`pickle.loads` reads, and what went by its code.

    That is the name of one such class or function; "" if there was none. ``reducers`` are of kinds that are pickled otherwise
    than they say themselves. Raises whatever pickling raises.
    """
    file = io.BytesIO()
    pickler = _ValuePickler(file, reducers or {}, take)
    pickler.dump(value)
    return file.getvalue(), pickler.code


class _ValuePickler(CodePickler):
    """Pickles a value: classes by their keys, with their code for whoever does not know them, which is made once."""

    def __init__(
        self,
        file: io.BytesIO,
        reducers: Mapping[type, Callable[[Any], Any]],
        take: Callable[[pickle.PickleBuffer], object],
    ) -> None:
        self.dispatch_table = ChainMap(dict(reducers), cloudpickle.Pickler.dispatch_table)  # before it is looked for
        super().__init__(file, protocol=5, buffer_callback=take)
        self.code = ""

    def reducer_override(self, obj: Any) -> Any:
        """Return how a class or function is pickled; NotImplemented if as always. Called with nearly every object."""
        is_class = isinstance(obj, type)
        if is_class and obj in _codes:
            reduced = known_class, _codes[obj]
        else:
            reduced = super().reducer_override(obj)
            if not _is_code(reduced):
                return reduced
            _check_goes_along(obj)
            if is_class:
                _codes[obj] = _key_of(reduced), _code_of(obj)
                reduced = known_class, _codes[obj]
        self.code = f"{obj.__module__}.{obj.__qualname__}"
        return reduced


def _check_goes_along(obj: Any) -> None:
    """Raise PicklingError for what is of a module that others import, but has no name there: a lambda is mostly a mistake."""
    module = obj.__module__
    if module in sys.modules and module not in _MAINS and not (_is_registered(module) or obj in _came_along):
        raise pickle.PicklingError(
            f"{obj.__qualname__} has no name in {module} by which others could find it, and only what is of __main__, of a"
            " notebook or of a module registered by cloudpickle.register_pickle_by_value goes along by its code"
        )


def _is_registered(module: str) -> bool:
    registered = cloudpickle.list_registry_pickle_by_value()
    return any(f"{module}.".startswith(f"{name}.") for name in registered)


def _code_of(kind: type[Any]) -> bytes:
    file = io.BytesIO()
    try:
        CodePickler(file, protocol=5).dump(kind)
    except Exception as error:  # whatever a __reduce__ raises
        raise pickle.PicklingError(
            f"{kind.__qualname__} of {kind.__module__} goes along by its code, with all that its methods refer to, and that"
            f" cannot be pickled ({error}); have it in a module that workers can import"
        ) from error
    return file.getvalue()


def known_class(key: str, code: bytes) -> type[Any]:
    """Return the class that is known by ``key``; where it is not, make it of its code. What a value's pickle names."""
    known = _classes.get(key)
    if known is None:
        known = CodeUnpickler(io.BytesIO(code)).load()
        _codes[known] = key, code
        _kept.append(known)
    return known
