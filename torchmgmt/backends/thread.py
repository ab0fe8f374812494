"""Workers as threads of the embedding process, for models that release the GIL while they compute.

Nothing is forked and nothing travels, but all share one process with the program: its working directory, ``sys.path``,
memory and life. A handler that crashes natively takes the program with it, and one that hangs can only be abandoned.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import logging
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Sequence
from enum import Enum, auto
from types import ModuleType
from typing import TYPE_CHECKING

from attrs import frozen

from torchmgmt.backends import Outcome, WorkerListener
from torchmgmt.dispatcher import Dispatcher
from torchmgmt.errors import ManagerClosed
from torchmgmt.exchange import Encoded, WorkerRequest
from torchmgmt.records import ModelSpec, Sharing, WorkerExit, WorkerFault
from torchmgmt.seat import Seat

if TYPE_CHECKING:
    from torchmgmt.worker.thread import ThreadModel

__all__ = ["ThreadBackend", "ThreadHost", "ThreadWorker"]

log = logging.getLogger(__name__)

_BODY = "torchmgmt.worker.thread"
"""What runs in a worker, by its dotted name: it imports torch, and this module does not."""

_MEMORY_PERIOD_S = 5.0
# What threads get to end by themselves when the backend is closed.
_CLOSE_GRACE_S = 0.5
# The innermost frames of a hung thread that are kept; an endless recursion has thousands.
_STACK_FRAMES = 40

_ABANDONED = (
    "it hangs, and a thread cannot be killed: {name} was abandoned, and no other is started in its place;"
    ' with backend="process" it could be ended'
)
_SHARING = Sharing(False, "its workers are threads of this process, and each loads an instance of its own")


class ThreadBackend:
    """Runs each worker in a thread of this process.

    One object serves any number of pools. It starts nothing before the first worker or :meth:`warm`. torch is imported
    by what loads first, which takes seconds; then each worker is a daemon thread, and one more thread calls listeners.

    What it cannot do: end a worker that hangs (it is abandoned, its end is final, and its thread, its model and its
    memory stay until the handler returns); tell apart what threads print, or their memory; give a handler its model's
    folder as working directory, a second file from there, or the ``ts`` modules.
    """

    can_kill = False

    def __init__(self) -> None:
        self.memory_bytes = 0
        self.dispatcher = Dispatcher("torchmgmt-threads")
        """Calls listeners, and has pools decide."""
        self._lock = threading.Lock()
        # guarded by _lock
        self._workers: list[ThreadWorker] = []  # whose threads live, or did when last looked at
        self._is_sampling = False
        self._is_closed = False
        self._warming: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"<ThreadBackend: {sum(worker.is_alive() for worker in list(self._workers))} threads>"

    def host(self, spec: ModelSpec) -> ThreadHost:
        """Return what will run the workers of ``spec``. Starts nothing."""
        return ThreadHost(self, spec)

    def warm(self) -> None:
        """Import torch into this process, on a thread of its own. Any thread; does not block; idempotent.

        To be called by a program that is going to use this backend: the import costs 200 MB as well as seconds.
        """
        with self._lock:
            if self._is_closed or self._warming is not None or _BODY in sys.modules:
                return
            self._warming = threading.Thread(target=_import_in_advance, name="torchmgmt-import", daemon=True)
            try:
                self._warming.start()
            except RuntimeError:
                self._warming = None
                log.warning("torch is not imported in advance: no thread can be started")

    def close(self) -> None:
        """End every worker that is left, and the thread that calls listeners. Blocks shortly; idempotent.

        A worker that has not ended by itself after half a second is killed, that is abandoned.
        """
        with self._lock:
            self._is_closed = True
            workers, warming = list(self._workers), self._warming
        deadline = time.monotonic() + _CLOSE_GRACE_S
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(deadline - time.monotonic())
        for worker in workers:
            worker.kill()
        if warming is not None:
            warming.join(max(0.0, deadline - time.monotonic()))
        self.dispatcher.close()  # after it has told what was noted until now

    # -- for this backend's own workers --------------------------------------------------------------------------------

    def launch(self, worker: ThreadWorker, begin: Callable[[], None]) -> None:
        """Have ``begin`` start the thread of ``worker``, unless this was closed. Raises as ``WorkerHandle.start``."""
        with self._lock:
            if self._is_closed:
                raise ManagerClosed("The thread backend")
            try:
                if (
                    not self._is_sampling
                ):  # which also makes sure that there is a thread that can tell what becomes of it
                    self.dispatcher.call_at(time.monotonic() + _MEMORY_PERIOD_S, self._sample)
                    self._is_sampling = True
                begin()
            except RuntimeError as error:
                raise OSError(errno.EAGAIN, str(error)) from error
            self._workers.append(worker)

    def tell(self, callback: Callable[[], object]) -> None:
        """Run ``callback`` on the thread that calls listeners, after those that were given before."""
        with contextlib.suppress(ManagerClosed):  # no worker has anything to tell then: each was killed before
            self.dispatcher.call_soon(callback)

    def sample_memory(self) -> None:
        """Read how much memory this process uses: its resident set size, in bytes."""
        import psutil  # not needed before there is a worker

        with contextlib.suppress(psutil.Error):
            self.memory_bytes = psutil.Process().memory_info().rss

    def _sample(self) -> None:
        with self._lock:
            self._workers = [worker for worker in self._workers if worker.is_alive()]
            self._is_sampling = bool(self._workers) and not self._is_closed
            if self._is_sampling:
                self.dispatcher.call_at(time.monotonic() + _MEMORY_PERIOD_S, self._sample)
        self.sample_memory()


class ThreadHost:
    """Runs the workers of one model version as threads; see :class:`torchmgmt.backends.ModelHost`."""

    def __init__(self, backend: ThreadBackend, spec: ModelSpec) -> None:
        self._backend = backend
        self._spec = spec

    @property
    def sharing(self) -> Sharing:
        """Each worker loads the model by itself."""
        return _SHARING

    def worker(self, worker_id: str, threads: int, listener: WorkerListener) -> ThreadWorker:
        """Return a worker, not started yet, whose operations will use ``threads`` threads each, at least 1."""
        return ThreadWorker(self._backend, self._spec, worker_id, threads, listener)

    def rest(self) -> None:
        """Do nothing: nothing is kept for further workers."""

    def close(self) -> None:
        """Do nothing: there is nothing but the workers."""


class _Doing(Enum):
    """What a worker's thread does; nothing of this is told to anybody."""

    NOTHING_YET = auto()
    LOADING = auto()
    WAITING = auto()
    COMPUTING = auto()
    NOTHING_ANY_MORE = auto()


@frozen
class _Task:
    """A batch, or (``requests`` is None) the wish to have the model described."""

    number: int
    requests: Sequence[WorkerRequest] | None

    def run(
        self, model: ThreadModel, send: Callable[[int, Encoded], object], is_abandoned: Callable[[], bool]
    ) -> Sequence[Outcome]:
        return [model.describe()] if self.requests is None else model.run(self.requests, send, is_abandoned)


class ThreadWorker:
    """A worker that is a thread; see :class:`torchmgmt.backends.WorkerHandle`.

    Its end has no exit status. All that it tells is put in line with its lock held, so that nothing follows its end.
    """

    private_bytes = 0
    """Nothing that could be told: a limit of memory does not replace a thread, which would free none for certain."""

    def __init__(
        self, backend: ThreadBackend, spec: ModelSpec, worker_id: str, threads: int, listener: WorkerListener
    ) -> None:
        self.pid: int | None = None
        self._backend = backend
        self._spec = spec
        self._id = worker_id
        self._threads = threads
        self._listener = listener
        self._thread = threading.Thread(target=self._run, name=f"torchmgmt-worker-{worker_id}", daemon=True)
        self._changed = threading.Condition()
        # guarded by _changed
        self._doing = _Doing.NOTHING_YET
        self._tasks: deque[_Task] = deque()
        self._last_started = 0
        self._abandoned = 0  # the number of the batch that nobody waits for
        self._last_lines: Sequence[str] = ()
        self._is_stopping = False  # it takes nothing more, and ends after what it has
        self._is_terminated = False  # it begins nothing more

    def __repr__(self) -> str:
        return f"<ThreadWorker {self._id} of {self._spec.key}: {self._doing.name}>"

    # -- for any thread ------------------------------------------------------------------------------------------------

    @property
    def memory_bytes(self) -> int:
        """The resident set size of the whole process: what a thread uses of it cannot be told. 0 before it is loaded."""
        return self._backend.memory_bytes

    def start(self) -> None:
        """Start its thread, which loads the model; see :class:`torchmgmt.backends.WorkerHandle`."""
        self._backend.launch(self, self._begin)

    def last_lines(self) -> Sequence[str]:
        """Return nothing before its end, then the stack that it ended in, or hangs in, if it did not end well.

        What it prints goes where the program prints, and what it logs to the program's own handlers.
        """
        return self._last_lines

    def run(self, number: int, requests: Sequence[WorkerRequest]) -> None:
        """Give it a batch; see :class:`torchmgmt.backends.WorkerHandle`."""
        self._put(_Task(number, requests))

    def seat(self, _number: int) -> None:
        """There is none: to hand it a batch is no more than to wake it."""

    def see_to_seat(self, _seat: Seat) -> None:
        """Do nothing."""

    def abandon(self, number: int) -> None:
        """Let it know that nobody waits for a batch any more."""
        self._abandoned = number

    def recall(self, numbers: Collection[int], *, but: int) -> None:
        """Have it begin none of these batches that it has not begun."""
        with self._changed:
            recalled = [task for task in self._tasks if task.number in numbers]
            for task in recalled:
                self._tasks.remove(task)
                self._backend.tell(functools.partial(self._listener.skipped, task.number))

    def describe(self, number: int) -> None:
        """Have it run its handler's ``describe_handle``."""
        self._put(_Task(number, None))

    def stop(self) -> None:
        """Have it end after what it was given."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()

    def terminate(self) -> None:
        """Have it begin nothing more: it ends at once, or after the batch that it computes.

        One that is still loading counts as ended; its thread goes when it has loaded.
        """
        with self._changed:
            self._is_terminated = True
            self._changed.notify()
            if self._doing is _Doing.LOADING:
                self._end_locked("it was told to end while it loaded its model")

    def kill(self) -> None:
        """Have it end now. While it runs code of its handler it cannot: it is abandoned, and whatever it does is void."""
        stack = self._stack()
        with self._changed:
            self._is_terminated = True
            self._changed.notify()
            if self._doing in {_Doing.LOADING, _Doing.COMPUTING}:
                self._end_locked(_ABANDONED.format(name=self._thread.name), stack, is_final=True)
            elif self._doing is _Doing.WAITING:
                self._end_locked("it was told to end")

    def join(self, timeout: float) -> None:
        """Block until its thread has ended, at most ``timeout`` seconds; not at all when called on that."""
        if self._thread is not threading.current_thread():
            self._thread.join(max(0.0, timeout))

    def is_alive(self) -> bool:
        """Return whether its thread runs."""
        return self._thread.is_alive()

    def _begin(self) -> None:
        with self._changed:
            self._thread.start()
            self._doing = _Doing.LOADING
            self.pid = os.getpid()

    def _put(self, task: _Task) -> None:
        with self._changed:
            if not self._is_stopping and self._doing is not _Doing.NOTHING_ANY_MORE:
                self._tasks.append(task)
                self._changed.notify()

    def _stack(self) -> list[str]:
        """Return where its thread is, innermost frame last."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame, _STACK_FRAMES)).splitlines() if frame is not None else []

    def _end_locked(
        self, reason: str, lines: Sequence[str] = (), *, fault: WorkerFault | None = None, is_final: bool = False
    ) -> None:
        """Tell of its end, unless that was told before."""
        if self._doing is _Doing.NOTHING_ANY_MORE:
            return
        self._doing = _Doing.NOTHING_ANY_MORE
        self._tasks.clear()
        self._last_lines = lines
        exit = WorkerExit(
            os.getpid(), None, reason, lines, fault=fault, last_started=self._last_started, is_final=is_final
        )
        self._backend.tell(functools.partial(self._listener.exited, exit))

    # -- on its own thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            model: ThreadModel = _import_body().ThreadModel(self._spec, self._threads)
        except BaseException as error:
            self._end(f"torch could not be imported into this process: {_text_of(error)}", _lines_of(error))
            return
        try:
            self._serve(model)
        except BaseException as error:  # sys.exit() in a handler: a thread that just ended would be waited for for ever
            self._end(f"its handler raised {_text_of(error)}", _lines_of(error))
        finally:
            model.unload()

    def _serve(self, model: ThreadModel) -> None:
        if (fault := model.load()) is not None:
            self._end("it could not load its model", fault=fault)
            return
        self._backend.sample_memory()
        self._tell_ready()
        self._tell_metrics(model)
        while (task := self._next_task()) is not None:
            began = time.perf_counter()
            outcomes = task.run(
                model, functools.partial(self._send, task.number), functools.partial(self._is_abandoned, task.number)
            )
            self._tell(functools.partial(self._listener.done, task.number, outcomes, time.perf_counter() - began))
            self._tell_metrics(model)
        if self._ends_in_good_order():
            model.end()
        self._end("it was told to end")

    def _next_task(self) -> _Task | None:
        """Block until there is something to do, and mark that as begun; None if it shall end."""
        with self._changed:
            if self._doing is _Doing.NOTHING_ANY_MORE:
                return None
            self._doing = _Doing.WAITING
            self._changed.wait_for(lambda: self._tasks or self._is_stopping or self._is_terminated)
            if self._is_terminated or not self._tasks:
                return None
            task = self._tasks.popleft()
            self._doing, self._last_started = _Doing.COMPUTING, task.number
            return task

    def _ends_in_good_order(self) -> bool:
        """Return whether it was told to stop and no more; what its hooks then do counts as a computation."""
        with self._changed:
            if self._is_terminated or self._doing is not _Doing.WAITING:
                return False
            self._doing = _Doing.COMPUTING
            return True

    def _send(self, number: int, index: int, part: Encoded) -> None:
        self._tell(functools.partial(self._listener.part, number, index, part))

    def _is_abandoned(self, number: int) -> bool:
        return self._abandoned == number

    def _tell_ready(self) -> None:
        with self._changed:
            if self._doing is _Doing.LOADING:
                self._doing = _Doing.WAITING  # before anybody hears of it, and has it end
                self._backend.tell(self._listener.ready)

    def _tell_metrics(self, model: ThreadModel) -> None:
        if metrics := model.take_metrics():
            self._tell(functools.partial(self._listener.measured, metrics))

    def _tell(self, callback: Callable[[], object]) -> None:
        with self._changed:
            if self._doing is not _Doing.NOTHING_ANY_MORE:
                self._backend.tell(callback)

    def _end(self, reason: str, lines: Sequence[str] = (), fault: WorkerFault | None = None) -> None:
        with self._changed:
            self._end_locked(reason, lines, fault=fault)


def _import_body() -> ModuleType:
    return importlib.import_module(_BODY)


def _import_in_advance() -> None:
    try:
        _import_body()
    except Exception:
        log.warning("torch could not be imported in advance; the first worker tries again", exc_info=True)


def _text_of(error: BaseException) -> str:
    """Return the class and the message; unlike ``str`` it raises nothing."""
    return "".join(traceback.format_exception_only(type(error), error)).strip()


def _lines_of(error: BaseException) -> list[str]:
    return "".join(traceback.format_exception(type(error), error, error.__traceback__)).splitlines()
