"""Finds the handler that an archive names and makes one callable of whichever form it has."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import sys
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import GeneratorType, MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from attrs import frozen

from torchmgmt.handlers import SHIPPED
from torchmgmt.handlers.context import Context
from torchmgmt.handlers.envelopes import enveloped
from torchmgmt.handlers.hooks import BEGIN, ENDINGS, hook_in, hook_of, hooks_found
from torchmgmt.worker.declarations import declare_metrics
from torchmgmt.worker.parts import NO_MORE

if TYPE_CHECKING:
    from torchmgmt.exchange import ResponseProperties
    from torchmgmt.handlers.hooks import Hook
    from torchmgmt.records import ModelSpec, RawMetric

__all__ = ["Handler", "HandlerError", "ImportFile", "load_file", "load_handler", "load_module"]

ImportFile: TypeAlias = Callable[[str, Path], ModuleType]
"""Imports a file of the model's folder: the name that the module has there, and the file."""


_NO_MODULE = ModuleType("")


class HandlerError(Exception):
    """The handler does not have a form that can be run, or did not keep to its side of the protocol."""


def _drop(_parts: Sequence[Any]) -> None:
    """Take parts that nobody waits for."""


@frozen
class ServedAs:
    """What a handler's model is called where it is served, and how the archive wants requests to be unwrapped."""

    name: str = ""
    version: str = ""
    envelope: str = ""


class Handler:
    """A loaded handler: its entry point, the context it is given, and the object that it belongs to, if any.

    Args:
        entry_point: what is called with the rows of a batch and the context.
        context: the context that it is given.
        service: the object that it belongs to, if any.
        module: the module that it was found in.
        hooks: its hooks, by their names.
        isolates_errors: whether a batch that raised is to be run again, request by request.
        limit_s: for how long a batch may run, in s, with all that is run again of it.
        served_as: what its model is called.
        is_trusted: whether what it answers may take its code along.
    """

    def __init__(
        self,
        entry_point: Callable[[Any, Context], Any],
        context: Context,
        service: object = None,
        *,
        module: ModuleType = _NO_MODULE,
        hooks: Mapping[str, Hook] = MappingProxyType({}),
        isolates_errors: bool = False,
        limit_s: float = math.inf,
        served_as: ServedAs | None = None,
        is_trusted: bool = False,
    ) -> None:
        self.entry_point = entry_point
        self.module = module
        self._context = context
        self._service = service
        self._hooks = hooks
        self.isolates_errors = isolates_errors
        self.limit_s = limit_s
        self.served_as = served_as or ServedAs()
        self.is_trusted = is_trusted
        self._recorder = context.recorder
        self.take_metrics: Callable[[], Sequence[RawMetric]] = context.recorder.take
        """Returns what the handler has measured since the last call; empty if nothing. Not wrapped: every batch asks."""

    @property
    def owner(self) -> object:
        """What holds what it has: the object that it belongs to, or the function that it is."""
        return self.entry_point if self._service is None else self._service

    @property
    def has_begin(self) -> bool:
        """Whether it has something to do in each worker before that is ready."""
        return BEGIN in self._hooks

    def begin(self, threads: int | None = None) -> None:
        """Have it make what each worker has for itself. To be called once in each; raises whatever the hook raises.

        ``threads`` is how many threads an operation may use here; None: as many as were told when it was loaded.
        """
        if threads is not None:
            self._context.system_properties["threads"] = threads
        if self.has_begin:
            self._hooks[BEGIN](self._context)

    def endings(self) -> list[tuple[str, Callable[[], None]]]:
        """Return what is to be called when its worker ends in good order, by names and in that order; often nothing."""
        names = [name for name in ENDINGS if name in self._hooks]
        return [(f"{name}()", functools.partial(self._hooks[name], self._context)) for name in names]

    def run(
        self,
        rows: list[Any],
        ids: Sequence[str],
        headers: Sequence[Mapping[str, str]],
        send_parts: Callable[[Sequence[Any]], None] = _drop,
    ) -> Sequence[Any]:
        """Return one answer for each row, where ``send_parts`` has not taken it. Raises HandlerError for a wrong answer.

        And whatever the handler raises. ``send_parts`` takes a part of the answer to each row.
        """
        self._context.begin_batch(ids, headers)
        self._context.send_partial = send_parts
        answers = self.entry_point(rows, self._context)
        if isinstance(answers, GeneratorType):
            answers = _drained(answers, send_parts, len(rows))
        return _checked(answers, len(rows))

    def response_properties(self) -> Sequence[ResponseProperties | None] | None:
        """Return what was set for each answer of the last batch beside its body; None if nothing for any."""
        return self._context.response_properties()

    def without_metrics(self) -> AbstractContextManager[None]:
        """Meanwhile, have nothing that the handler measures recorded."""
        return self._recorder.muted()

    def describe(self) -> Any:
        """Return what the handler's ``describe_handle`` says of the model; {} if it has none."""
        describe = getattr(self._service, "describe_handle", None)
        return {} if describe is None else describe()


def _drained(parts: Generator[Any, Any, Any], send: Callable[[Sequence[Any]], None], rows: int) -> Any:
    """Send what a handler yields for all of its rows at a time, and return what it returns, if anything."""
    try:
        while True:
            send(_checked(next(parts), rows))
    except StopIteration as end:
        return [NO_MORE] * rows if end.value is None else end.value
    finally:
        parts.close()


def _checked(answers: Any, rows: int) -> Sequence[Any]:
    if not isinstance(answers, (list, tuple)):
        raise HandlerError(
            f"the handler returned {_kind(answers)}, but must return a list with one answer for each request"
        )
    if len(answers) != rows:
        raise HandlerError(
            f"the handler returned {len(answers)} answers for a batch of {rows} requests;"
            " it must return a list with one answer for each, in order"
        )
    return answers


def load_handler(spec: ModelSpec, context: Context, import_file: ImportFile | None = None) -> Handler:
    """Import the handler of ``spec`` and initialise it. Raises whatever importing and initialising it raise.

    The working directory must be the model's folder already, and on ``sys.path``, if the handler is to find more there
    than itself. ``import_file`` imports its file; None: :func:`load_file`.
    """
    declare_metrics(context.metrics, spec)
    name, _, function = spec.handler.partition(":")
    module = load_module(name, Path(spec.model_dir), import_file)
    function = function or "handle"
    served_as = ServedAs(spec.key.name, spec.key.version, spec.envelope or "")
    limits: dict[str, Any] = {
        "isolates_errors": spec.isolate_errors,
        "limit_s": spec.response_timeout_s,
        "served_as": served_as,
        "is_trusted": spec.is_trusted,
    }
    if callable(entry_point := getattr(module, function, None)):
        # The protocol of a function: the first call has no data and is the time to load.
        started = entry_point(None, context)
        if isinstance(started, GeneratorType):  # one that answers in parts runs only when they are asked for
            deque(started, maxlen=0)
        hooks = hooks_found(functools.partial(hook_in, module))
        return Handler(enveloped(spec.envelope, entry_point), context, module=module, hooks=hooks, **limits)
    if function != "handle":
        raise HandlerError(f"module {name} has no function {function}, which handler {spec.handler!r} names")
    service = _handler_class(module, spec.handler)()
    if callable(initialize := getattr(service, "initialize", None)):
        initialize(context)
    hooks = hooks_found(service.hook if spec.live is not None else functools.partial(hook_of, service))
    return Handler(enveloped(spec.envelope, service.handle), context, service, module=module, hooks=hooks, **limits)


def load_module(name: str, folder: Path, import_file: ImportFile | None = None) -> ModuleType:
    """Import ``name`` (a module, or a file with or without ``.py``) from ``folder``, else what is shipped or installed.

    A file in the folder is what the archive means, even when a module of the same name is imported already.
    """
    stem = name.removesuffix(".py")
    file = folder / f"{stem}.py"
    if file.is_file():
        return (import_file or load_file)(stem.replace("/", "."), file)
    if stem in SHIPPED:
        return importlib.import_module(SHIPPED[stem])
    try:
        return importlib.import_module(stem.replace("/", "."))
    except ModuleNotFoundError as error:
        if error.name is None or not stem.replace("/", ".").startswith(error.name):
            raise
        raise HandlerError(
            f"handler {name!r} is neither {file.name} in the model's folder, nor one of the shipped handlers"
            f" ({', '.join(sorted(SHIPPED))}), nor a module that can be imported"
        ) from error


def load_file(name: str, file: Path) -> ModuleType:
    """Import ``file`` as the module ``name``, whatever had that name before. Raises whatever importing it raises."""
    loader = importlib.util.spec_from_file_location(name, file)
    if loader is None or loader.loader is None:
        raise HandlerError(f"{file.name} cannot be imported as a module")
    module = importlib.util.module_from_spec(loader)
    sys.modules.pop(name, None)  # one that is displaced comes back later: see worker.modules
    sys.modules[name] = module
    try:
        loader.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _handler_class(module: ModuleType, handler: str) -> type[Any]:
    """Return the one class of ``module`` that can be a handler."""
    own = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == module.__name__ and callable(getattr(value, "handle", None))
    ]
    # A class that another one builds on is not the handler itself.
    leaves = [each for each in own if not any(other is not each and issubclass(other, each) for other in own)]
    if len(leaves) == 1:
        return leaves[0]
    found = ", ".join(each.__name__ for each in leaves) or "none"
    raise HandlerError(
        f"handler {handler!r} must have a function handle(data, context), or exactly one class with"
        f" initialize(context) and handle(data, context); classes found: {found}"
    )


def _kind(value: object) -> str:
    return "None" if value is None else f"an object of type {type(value).__qualname__}"
