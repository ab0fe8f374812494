"""What a worker that is a thread runs: a model inside the embedding process, under module names of its own."""

from __future__ import annotations

import ast
import itertools
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from attrs import evolve

from torchmgmt.exchange import Encoded, WorkerRequest
from torchmgmt.handlers.context import Context
from torchmgmt.records import ModelSpec, RawMetric, WorkerFault
from torchmgmt.worker.batch import attempt, fault_of, own_buffers, run_batch
from torchmgmt.worker.loader import Handler, HandlerError, load_file, load_handler
from torchmgmt.worker.parts import PartSender
from torchmgmt.worker.warmup import warm_up

__all__ = ["ThreadModel"]

log = logging.getLogger(__name__)

_numbers = itertools.count(1)
_threads_lock = threading.Lock()
# Python counts the depth of trees for all threads together, and takes what several make at a time for an error.
_parsing_lock = threading.Lock()


class ThreadModel:
    """One worker's own instance of a handler. For the thread that made it alone, as are its methods.

    The working directory and ``sys.path`` are the program's and stay as they are, so a handler opens the model's files
    by ``context.system_properties["model_dir"]``, and cannot import a second file from there. In ``sys.modules`` it has
    a name that no other module has, from :meth:`load` to :meth:`unload`. A handler that is an installed module is
    imported as such: once for the whole process.

    Args:
        spec: what to load.
        threads: how many threads one operation may use (intra-op), at least 1.
    """

    def __init__(self, spec: ModelSpec, threads: int) -> None:
        self._spec = evolve(spec, manifest=_own_tree(spec.manifest), config=_own_tree(spec.config))
        self._threads = threads
        self._folder = Path(spec.model_dir)
        self._prefix = f"_torchmgmt_thread_{next(_numbers)}_"
        self._handler: Handler | None = None

    def load(self) -> WorkerFault | None:
        """Import and initialise the handler, and have it begin; return what it raised, ``SystemExit`` included, or None."""
        context = Context.for_model(self._spec)
        # For a handler that imports files by itself, as the shipped one does: what to put before a module's name.
        context.system_properties["module_prefix"] = self._prefix
        try:
            _compute_with(self._threads)
            self._handler = load_handler(self._spec, context, self._import_file)
            self._handler.begin(self._threads)
            warm_up(self._handler, self._spec)
        except BaseException as error:
            return self._with_plain_names(fault_of(self._explained(error)))
        return None

    def run(
        self,
        requests: Sequence[WorkerRequest],
        send: Callable[[int, Encoded], object],
        is_abandoned: Callable[[], bool],
    ) -> list[Encoded | WorkerFault]:
        """Run one batch; return an answer or a fault for each request, in order.

        What comes of an answer before the rest goes to ``send``, with the request's place in the batch; ``is_abandoned``
        says whether nobody waits for the batch any more. Of what a handler raises, raises SystemExit and KeyboardInterrupt
        alone.
        """
        heads = [each.head() for each in requests]
        segments = [segment for request in requests for segment in _copy(request.row).segments]
        sender = _ThreadSender(send, is_abandoned)
        return [self._own(outcome) for outcome in run_batch(self._loaded(), heads, segments, sender)]

    def describe(self) -> Encoded | WorkerFault:
        """Return what the handler's ``describe_handle`` says, or the fault that it ended in."""
        return self._own(attempt(self._loaded().describe))

    def take_metrics(self) -> Sequence[RawMetric]:
        """Return what the handler has measured since the last call."""
        return self._loaded().take_metrics()

    def end(self) -> None:
        """Call the handler's hooks for the end in good order. What they raise, SystemExit included, is logged."""
        for name, call in self._loaded().endings():
            try:
                call()
            except BaseException:
                log.exception("%s of %s failed", name, self._spec.key)

    def unload(self) -> None:
        """Forget the handler, and what was imported for it alone."""
        self._handler = None
        for name in [name for name in list(sys.modules) if name.startswith(self._prefix)]:
            del sys.modules[name]

    def _loaded(self) -> Handler:
        if self._handler is None:
            raise RuntimeError("the handler is not loaded")
        return self._handler

    def _import_file(self, name: str, file: Path) -> ModuleType:
        # To leave this to the import itself is not enough: the program may have another module of the same name.
        for imported in _imported_names(file):
            if (self._folder / f"{imported}.py").is_file() or (self._folder / imported / "__init__.py").is_file():
                raise self._import_error(imported)
        return load_file(self._prefix + name, file)

    def _explained(self, error: BaseException) -> BaseException:
        """Return ``error``, or one with it as its cause that tells of the limit of threads which it met."""
        if not isinstance(error, ModuleNotFoundError) or error.name is None:
            return error
        top = error.name.partition(".")[0]
        if top != "ts" and not top.startswith(self._prefix) and not _holds(self._folder, top):
            return error
        explained = self._import_error(error.name.removeprefix(self._prefix))
        explained.__cause__ = error
        return explained

    def _import_error(self, name: str) -> HandlerError:
        what = "TorchServe's module" if name.partition(".")[0] == "ts" else "the model's own file"
        return HandlerError(
            f"handler {self._spec.handler!r} imports {what} {name!r}, which a worker of the thread backend cannot do:"
            ' sys.path and sys.modules belong to the whole program; register the model with backend="process"'
        )

    def _own(self, outcome: Encoded | WorkerFault) -> Encoded | WorkerFault:
        return self._with_plain_names(outcome) if isinstance(outcome, WorkerFault) else _copy(outcome)

    def _with_plain_names(self, fault: WorkerFault) -> WorkerFault:
        """Call the handler's classes as any backend does: whoever tells errors apart by type needs one name for one."""
        return evolve(
            fault,
            error_type=fault.error_type.replace(self._prefix, ""),
            reason=fault.reason.replace(self._prefix, ""),
            traceback=fault.traceback.replace(self._prefix, ""),
        )


class _ThreadSender(PartSender):
    """Hands the parts of one batch to who takes them."""

    def __init__(self, take: Callable[[int, Encoded], object], is_abandoned: Callable[[], bool]) -> None:
        self._take = take
        self._asks = is_abandoned

    def send(self, index: int, part: Encoded) -> None:
        self._take(index, _copy(part))

    def is_abandoned(self) -> bool:
        return self._asks()


def _copy(encoded: Encoded) -> Encoded:
    """Return it with buffers of its own: as if it had travelled, it can be written to and changes nothing elsewhere."""
    if encoded.content_type is not None:
        return Encoded([bytes(each) for each in encoded.segments], encoded.properties, encoded.content_type)
    return Encoded(own_buffers(encoded.segments), encoded.properties)


def _own_tree(value: Any) -> Any:
    """Copy mappings and lists, so that a handler that writes into them writes into no other's; keep live objects."""
    if isinstance(value, Mapping):
        return {key: _own_tree(each) for key, each in value.items()}
    return [_own_tree(each) for each in value] if isinstance(value, list) else value


def _imported_names(file: Path) -> Iterator[str]:
    """Give the first part of each name that ``file`` imports anywhere, its functions included."""
    with _parsing_lock:
        tree = ast.parse(file.read_bytes(), str(file))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _holds(folder: Path, module: str) -> bool:
    return (folder / f"{module}.py").is_file() or (folder / module).is_dir()


def _compute_with(threads: int) -> None:
    """Have operations of the calling thread use ``threads`` threads, and those of no other thread.

    In torch's OpenMP builds ``set_num_threads`` sets two numbers: the calling thread's, and the one with which threads
    begin that have not used torch yet. The second is the program's and is set back, by a thread that ends with that.
    Other builds have one pool of threads for all, whose size is then left to the program.
    """
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return
    with _threads_lock:
        default = torch.get_num_threads()
        torch.set_num_threads(threads)
        restoring = threading.Thread(target=torch.set_num_threads, args=(default,), name="torchmgmt-threads-default")
        restoring.start()
        restoring.join()
