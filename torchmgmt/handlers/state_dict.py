"""Loads a state dict into a new module without a second copy of the weights, and from a mapped file where that is safe.

A module is made as always, but for the large parameters: those that ``torch.empty`` makes, as the layers of torch do, are
put on the ``meta`` device, so that they take neither memory nor time to initialise, and get the loaded tensors assigned.
All else (small tensors, buffers, whatever is made with values) is made and copied into as always. The result is
that of ``module = make(); module.load_state_dict(state)``. Where that is not certain, this is what is done; the module is
then made a second time. One difference is left: what is not initialised takes no numbers from the random generator.
"""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import logging
import mmap
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

__all__ = ["MIN_DEFERRED_BYTES", "file_in_common", "make_and_load", "read_state_dict"]

log = logging.getLogger(__name__)

MIN_DEFERRED_BYTES = 1 << 16
"""Parameters from this size on are deferred. Smaller ones are a few pages; a small module is made and loaded as always."""

# Where torch's allocator puts tensors. Kernels may choose their way, and so their rounding, by this.
_ALIGNMENT_BYTES = 64

# What a constructor may do to a tensor without values and get what it would of a real one. What computes is left out: even
# if only the shape is asked for, that imports parts of torch for 1 to 2 s. What not every release of torch has is no loss.
_PROPERTIES = """
    data dtype grad grad_fn is_cuda is_leaf is_sparse itemsize layout mT nbytes ndim requires_grad shape T
"""
_METHODS = """
    __deepcopy__ __getitem__ __len__ __setitem__ add_ bfloat16 clone contiguous copy_ detach dim div_ double element_size
    fill_ flatten float half is_complex is_contiguous is_floating_point mul_ narrow nelement numel permute requires_grad_
    reshape size squeeze storage_offset stride sub_ t to transpose uniform_ unsqueeze view zero_
"""
_FUNCTIONS = "is_complex is_floating_point numel _has_compatible_shallow_copy_type"
_HARMLESS = frozenset(
    [getattr(Tensor, name).__get__ for name in _PROPERTIES.split() if hasattr(Tensor, name)]
    + [getattr(Tensor, name).__set__ for name in ("data", "grad", "requires_grad")]
    + [getattr(Tensor, name) for name in _METHODS.split() if hasattr(Tensor, name)]
    + [getattr(torch, name) for name in _FUNCTIONS.split() if hasattr(torch, name)]
    + [nn.init.constant_, nn.init.kaiming_uniform_, nn.init.uniform_]
)
# The same, of which torch would do the nothing that is to be done in that expensive way.
_FILLS = frozenset({Tensor.clamp_, Tensor.erfinv_, Tensor.normal_, nn.init.normal_})
_IS_META = Tensor.is_meta.__get__  # type: ignore[attr-defined]
# What a real tensor would answer.
_ANSWERS: Mapping[Any, object] = {
    Tensor.device.__get__: torch.device("cpu"),
    Tensor.is_cpu.__get__: True,  # type: ignore[attr-defined]
    _IS_META: False,
    Tensor.get_device: -1,
}


# How torch names what it refuses; since 2.4, the oldest that we go with.
_REFUSED = re.compile(r"Unsupported global: GLOBAL ([\w.]+)")


class _NotEquivalent(Exception):
    """Loading in this way might give another result than the plain way."""


def file_in_common(path: str, model_dir: str, pristine_dir: str | None) -> str:
    """Return where the content of a file of ``model_dir`` is to be mapped: where other versions map it, too, if it is the same.

    That takes memory once for all of them. Nobody writes to what is in ``pristine_dir``, and it is from before anybody
    could write to what is in ``model_dir``: that is the same for as long as it has the same time stamp.
    """
    if pristine_dir is None:
        return path
    try:
        common = Path(pristine_dir, Path(path).relative_to(model_dir))
        own_status, status = Path(path).stat(), common.stat()
    except (ValueError, OSError):  # it lies elsewhere, or is of the model's own making
        return path
    is_same = (own_status.st_mtime_ns, own_status.st_size) == (status.st_mtime_ns, status.st_size)
    return str(common) if is_same else path


def read_state_dict(path: str, *, map_location: Any, weights_only: bool, is_sealed: bool) -> Any:
    """Return what ``torch.load`` does; its tensors are views of the file if that is safe.

    They may be written to: that changes no file.

    Args:
        path: a file that ``torch.save`` wrote, in either of its formats.
        map_location: as for ``torch.load``. Only what stays on the CPU is mapped.
        weights_only: as for ``torch.load``.
        is_sealed: nobody rewrites the file while it is used; it may be removed. A mapped file that is written to changes
            the tensors, and one that is cut off kills the process.

    Raises:
        pickle.UnpicklingError: the file is none, or ``weights_only`` refuses what is in it.
        Exception: whatever else ``torch.load`` raises.
    """
    try:
        return _load(path, map_location, weights_only, is_sealed)
    except pickle.UnpicklingError as error:
        refused = _REFUSED.search(str(error)) if weights_only else None
        if refused is None:
            raise
        raise pickle.UnpicklingError(
            f"{Path(path).name} holds an object of {refused[1]}, and weights are loaded with weights_only=True: nothing but"
            " tensors and plain values, since making other objects can run any code. Save the weights alone, with"
            " torch.save(model.state_dict(), ...); or, if you trust the file, let a handler of your own allow the class"
            f" with torch.serialization.add_safe_globals([{refused[1]}]) before it loads"
        ) from None


def _load(path: str, map_location: Any, weights_only: bool, is_sealed: bool) -> Any:
    if is_sealed and str(map_location) == "cpu" and _can_be_mapped(path):
        try:
            return torch.load(path, map_location=map_location, weights_only=weights_only, mmap=True)
        except RuntimeError as error:  # some file systems map nothing; anything else is raised again below
            log.debug("%s is read, not mapped: %s", path, error)
    return torch.load(path, map_location=map_location, weights_only=weights_only, mmap=False)


def make_and_load(import_class: Callable[[], Callable[[], nn.Module]], read: Callable[[], Any]) -> nn.Module:
    """Return a module on the CPU, made by its class, with the state dict that ``read`` returns. Blocks; any thread.

    Args:
        import_class: imports the class. It is called again if what the class made first left tensors without values
            behind (in a cache of the class or of its file, say), and must give a fresh one then.
        read: reads the state dict; it is called once. Parameters of the module may be its very tensors.

    Raises:
        Exception: whatever importing, making, reading and ``load_state_dict`` raise.
    """
    make, deferral = import_class(), _Deferral()
    draft = deferral.run(make)
    if draft is None:
        module = _make_again(make, import_class, deferral)
        module.load_state_dict(read())
        return module
    state = read()
    if not deferral.is_used:
        draft.load_state_dict(state)
        return draft
    if _fill(draft, state) and not deferral.has_leftovers():
        return draft
    del draft
    module = _make_again(make, import_class, deferral)
    module.load_state_dict(state)
    return module


def _make_again(
    make: Callable[[], nn.Module], import_class: Callable[[], Callable[[], nn.Module]], deferral: _Deferral
) -> nn.Module:
    return (import_class() if deferral.has_leftovers() else make)()


class _Deferral(TorchFunctionMode):
    """While it is entered, large tensors that ``torch.empty`` makes are put on the meta device. For one thread, once."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: list[StorageWeakRef] = []
        self._is_refused = False

    @property
    def is_used(self) -> bool:
        """Whether any tensor was put there."""
        return bool(self._storages)

    def run(self, make: Callable[[], nn.Module]) -> nn.Module | None:
        """Return what ``make`` makes; None if it has to be made in the plain way."""
        try:
            with self:
                module = make()
        except Exception as error:
            if not self.is_used:
                raise
            log.debug("The module cannot be made without its weights: %s", error)
            return None
        return None if self._is_refused else module

    def has_leftovers(self) -> bool:
        """Whether anything still holds a tensor without values that was made in it. May collect garbage to find out."""
        if all(storage.expired() for storage in self._storages):
            return False
        gc.collect()
        return not all(storage.expired() for storage in self._storages)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            return self._empty(args, kwargs)
        if not self.is_used or not _has_meta(args, kwargs):
            return func(*args, **kwargs)
        try:
            result = _apply(func, args, kwargs)
        except Exception:
            self._is_refused = True  # whatever the constructor makes of the error
            raise
        self._note(result)
        return result

    def _empty(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        made = torch.empty(*args, **kwargs)  # of which the system gives no page before it is touched
        is_plain = kwargs.get("device") is None and kwargs.get("out") is None and not kwargs.get("pin_memory")
        on_cpu = made.device.type == "cpu" and made.layout is torch.strided
        if not is_plain or not on_cpu or made.nbytes < MIN_DEFERRED_BYTES:
            return made
        made = torch.empty(*args, **{**kwargs, "device": "meta"})
        self._note(made)
        return made

    def _note(self, result: object) -> None:
        if isinstance(result, Tensor) and result.is_meta:  # any other result of what is harmless holds no tensor
            self._storages.append(StorageWeakRef(result.untyped_storage()))


def _has_meta(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    for value in (*args, *kwargs.values()):
        if any(_is_meta(each) for each in (value if isinstance(value, (list, tuple)) else (value,))):
            return True
    return False


def _is_meta(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _apply(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call ``func`` with a meta tensor among its arguments; raise if it would do something else with a real one."""
    first, *others = (*args, *kwargs.values())
    if _is_meta(first) and func in _HARMLESS:
        return func(*args, **kwargs)
    if _is_meta(first) and func in _ANSWERS:
        # torch's initialisers are told the truth: they know that there is nothing for them to do.
        return True if func == _IS_META and _is_asked_by_initialiser() else _ANSWERS[func]
    if func in _FILLS and not any(isinstance(each, Tensor) and each is not first for each in others):
        nothing = torch.empty(0, dtype=first.dtype)
        stand_in = {id(first): nothing}  # wrong arguments are errors for it, too
        func(
            *(stand_in.get(id(each), each) for each in args),
            **{name: stand_in.get(id(each), each) for name, each in kwargs.items()},
        )
        return first
    raise _NotEquivalent(f"the constructor calls {getattr(func, '__qualname__', func)} of a parameter")


def _is_asked_by_initialiser() -> bool:
    """Whether what was called last was called in torch.nn.init."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals is globals():
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") == nn.init.__name__


def _can_be_mapped(path: str) -> bool:
    if os.name != "posix" or torch.serialization.get_default_mmap_options() != mmap.MAP_PRIVATE:
        return False  # elsewhere a mapped file could not be removed; shared, what is written would go to the file
    try:
        with zipfile.ZipFile(path) as archive:
            return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    except (OSError, zipfile.BadZipFile, NotImplementedError):
        return False


def _fill(module: nn.Module, state: object) -> bool:
    """Load ``state`` into a module with deferred parameters; False if that cannot be done as in the plain way.

    The module is of no use then; ``state`` is as before.
    """
    try:
        filled = _filled(module, state)
        module.load_state_dict(filled, assign=True)
        return all(filled[key] is tensor for key, tensor in _entries(module))
    except Exception as error:  # the plain way says what is wrong, if anything is
        log.debug("The module's weights are copied: %s", error)
        return False


def _filled(module: nn.Module, state: object) -> Any:
    """Return a state dict of the tensors that the module is to have: its own, filled, or those of ``state``."""
    if not isinstance(state, Mapping) or not all(_loads_as_usual(each) for each in module.modules()):
        raise _NotEquivalent("the module, or what is loaded into it, has its own way of loading")
    entries = dict(_entries(module))
    if entries.keys() != state.keys():
        raise _NotEquivalent("the names of the tensors differ")
    _check_aliases(entries.values())
    filled: Any = OrderedDict()
    # Loading with assign=True leaves a mark in it, by which a second loading would assign, too.
    filled._metadata = copy.deepcopy(getattr(state, "_metadata", OrderedDict()))
    by_own: dict[int, Tensor] = {}
    owner_by_storage: dict[int, int] = {}
    with torch.no_grad():
        for key, own in entries.items():
            given = state[key]
            if not isinstance(given, Tensor) or given.shape != own.shape:
                raise _NotEquivalent(f"{key} has another shape")
            # What the module holds under several names stays one tensor. As in the plain way, the last value counts.
            by_own[id(own)] = _value_of(own, given, owner_by_storage)
    for key, own in entries.items():
        filled[key] = by_own[id(own)]
    return filled


def _value_of(own: Tensor, given: Tensor, owner_by_storage: dict[int, int]) -> Tensor:
    if not own.is_meta:
        return own.copy_(given)
    _check_deferred(own)
    if not (
        isinstance(own, nn.Parameter)
        and _is_like(given, own)
        # Two parameters that are one tensor in the file only must not become one.
        and owner_by_storage.setdefault(given.untyped_storage().data_ptr(), id(own)) == id(own)
    ):
        copied = torch.empty_strided(own.size(), own.stride(), dtype=own.dtype)
        given = copied.copy_(given)
    value = nn.Parameter(given, requires_grad=own.requires_grad) if isinstance(own, nn.Parameter) else given
    vars(value).update(vars(own))
    return value


def _is_like(given: Tensor, own: Tensor) -> bool:
    """Whether ``given`` can take the place of a parameter with the dtype, shape and strides of ``own``."""
    return (
        type(given) in {Tensor, nn.Parameter}
        and given.device.type == "cpu"
        and given.layout is torch.strided
        and (given.dtype, given.stride()) == (own.dtype, own.stride())
        and not (given.is_conj() or given.is_neg())
        and given.untyped_storage().nbytes() == given.nbytes
        and given.data_ptr() % _ALIGNMENT_BYTES == 0
    )


def _check_deferred(own: Tensor) -> None:
    if type(own) not in {Tensor, nn.Parameter} or (own.requires_grad and type(own) is Tensor):
        raise _NotEquivalent("it is a special kind of tensor")


def _check_aliases(own: Iterable[Tensor]) -> None:
    """Raise unless deferred tensors are independent of each other: views of one another would fall apart."""
    deferred = {id(each): each for each in own if each.is_meta}.values()
    if len({StorageWeakRef(each.untyped_storage()) for each in deferred}) != len(deferred):
        raise _NotEquivalent("tensors share memory")


def _entries(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that ``load_state_dict`` fills, by their keys and in its order; shared ones under each of their keys."""
    for prefix, each in module.named_modules(remove_duplicate=False):
        own = itertools.chain(each._parameters.items(), each._buffers.items())
        for name, tensor in own:
            if tensor is not None and name not in each._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, tensor


def _loads_as_usual(module: nn.Module) -> bool:
    """Whether what is loaded into a module goes where it is told to, and nowhere else."""
    kind = type(module)
    methods = (kind.load_state_dict, kind._load_from_state_dict, kind.__setattr__)
    return (
        all(method.__module__.startswith("torch.nn.") for method in methods)
        and not vars(module).keys() & {"load_state_dict", "_load_from_state_dict"}
        and not module._load_state_dict_pre_hooks
        and not module._load_state_dict_post_hooks
    )
