"""ModelManager: the facade, and the only room that knows registry, pools and batchers together."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve

from torchmgmt import forks
from torchmgmt.announcer import Announcer, check_listeners
from torchmgmt.answer_future import AnswerFuture
from torchmgmt.archive import ModelFolder, ModelSources
from torchmgmt.backends import Backend
from torchmgmt.backends.process import ProcessBackend
from torchmgmt.batcher import Batcher
from torchmgmt.desired import Desired
from torchmgmt.errors import (
    AlreadyRegistered,
    DeadlineExceeded,
    InvalidArgument,
    ManagerClosed,
    ModelNotFound,
    ModelVersionNotFound,
    NoWorker,
    QueueFull,
    TorchmgmtError,
    WouldWaitForever,
)
from torchmgmt.events import DefaultVersionSet, Listener, ModelRegistered, ModelUnregistered, RequestsDropped
from torchmgmt.failed_loads import Certainty, FailedLoads, failed_load
from torchmgmt.model import Model
from torchmgmt.pool import FIRST_WORKER_ID, WorkerPool
from torchmgmt.records import (
    CloseReport,
    Encoded,
    ModelInfo,
    ModelKey,
    ModelSpec,
    Scale,
    ShareWeights,
    WorkerRequest,
    check_number,
    check_truth,
)
from torchmgmt.registration import Wishes, is_default_version, open_source, scale_of, shown, sources_of, spec_of
from torchmgmt.registry import Registry
from torchmgmt.request import new_request
from torchmgmt.restoring import RESTORED_AT_ONCE, check_is_same, failed_restore, in_parallel, stored_of, wishes_of
from torchmgmt.served import ServedVersion, total_of
from torchmgmt.settings import Settings
from torchmgmt.state import DesiredState, StoredVersion, from_torchserve
from torchmgmt.streams import AnswerStream

if TYPE_CHECKING:
    import asyncio

    from torchmgmt.state_file import StateKeeper
    from torchmgmt.tracing import Tracing

__all__ = ["ModelManager"]

log = logging.getLogger(__name__)


class ModelManager:
    """Registers models, runs their workers, answers predictions; all of it inside the program that makes one.

    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> code = "def handle(data, context): return data and [len(row['body']) for row in data]"
    >>> _ = (folder / "length.py").write_text(code)
    >>> with ModelManager() as manager:
    ...     model = manager.register(folder, model_name="length", handler="length.py")
    ...     model.predict("four")
    4

    Thread-safe throughout. Making one starts nothing: the first worker starts one process that imports torch, from which
    workers are forked, and two threads. Leaving ``with``, :meth:`close`, and the end of the program end all of that; so
    does dropping the last reference to the manager, its models and their futures. The library prints nothing, sets no
    signal handler, and needs no ``if __name__ == "__main__"``. A copy in a forked process raises ManagerClosed.

    With ``state_file`` it remembers which versions it shall have, across restarts of the program: see :meth:`restore`.
    When ``register``, ``scale``, ``set_default`` or ``unregister`` returns, its change is on the disk (where that fails,
    it is logged once, and the next change tries again); so these calls wait for the disk. Closing changes nothing of it.
    Without ``state_file`` nothing is written.

    Args:
        model_store: the folder in which :meth:`register` looks names up first. None: that of ``settings``.
        settings: the defaults for what neither a call nor an archive says. None: as documented there.
        state_file: the file that holds the desired state; it and its folder are made if need be. None: none.
        restore: whether to call :meth:`restore` at once, which takes as long as the models take to load.
        backend: how workers are run; to be shared between managers, and not closed with any. None: one of its own.
        listeners: called with each event; see :mod:`torchmgmt.events`.

    Raises:
        InvalidArgument: an argument has the wrong type.
        StateFileInUse: another manager, here or in another process, uses ``state_file``.
        InvalidStateFile: it holds no state that this release can read; it is not touched.
        OSError: ``state_file`` cannot be read, or locked.
    """

    def __init__(
        self,
        model_store: str | os.PathLike[str] | None = None,
        *,
        settings: Settings | None = None,
        state_file: str | os.PathLike[str] | None = None,
        restore: bool = True,
        backend: Backend | None = None,
        listeners: Sequence[Listener] = (),
    ) -> None:
        check_truth("restore", restore)
        if settings is not None and not isinstance(settings, Settings):
            raise InvalidArgument("settings", settings, "an instance of torchmgmt.Settings, or None")
        self.settings = Settings() if settings is None else settings
        self._announcer = Announcer(check_listeners(listeners))
        self._tracing = self._make_tracing()
        self._sources = sources_of(model_store, self.settings, self._announcer.tell)
        self._backend: Backend = ProcessBackend(self.settings.blacklist_env_vars) if backend is None else backend
        self._backends: dict[str, Backend] = {"process": self._backend}
        self._owned_backends: list[Backend] = [self._backend] if backend is None else []
        self._worker_ids = itertools.count(FIRST_WORKER_ID)
        self._depth = forks.depth()
        # 32 hexadecimal digits that no other request of this or another manager has: its own, and a number.
        self._request_prefix = os.urandom(8).hex()
        self._request_numbers = itertools.count()
        self._lock = threading.Lock()
        # guarded by _lock
        self._registry: Registry[ServedVersion] = Registry()
        self._failed_loads = FailedLoads()
        self._leaving: set[ServedVersion] = set()  # no longer registered, but not finished yet
        self._closed = False
        self._report: CloseReport | None = None
        self._close_lock = threading.Lock()
        self._desired = Desired()  # guarded by _lock
        self._has_stored = False  # whether there was a state file
        self._keeper = None if state_file is None else self._open_state(state_file)
        _open_managers.add(self)
        self._finalizer = weakref.finalize(
            self, _abandon, self._registry, self._sources, self._owned_backends, self._keeper, self._depth
        )
        self._finalizer.atexit = False  # _close_open_managers is for that, and lets requests finish
        if restore and self._has_stored:
            self._restore_or_close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._registry)} model versions"
        return f"<ModelManager: {state}>"

    def __enter__(self) -> ModelManager:
        self._check_usable()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    async def __aenter__(self) -> ModelManager:
        return self.__enter__()

    async def __aexit__(self, *_exc: object) -> None:
        import asyncio  # 30 ms that a program without an event loop need not pay

        await asyncio.to_thread(self.close)

    def __getitem__(self, name: str) -> Model:
        """Return the default version of a model; raise ModelNotFound if it is not registered."""
        return Model(self, self._get(name).spec.key)

    def __contains__(self, name: object) -> bool:
        self._check_usable()
        with self._lock:
            return isinstance(name, str) and name in self._registry

    def __iter__(self) -> Iterator[str]:
        """The names of all models, sorted."""
        self._check_usable()
        with self._lock:
            return iter(tuple(self._registry.names()))

    def __len__(self) -> int:
        """The number of models, whatever number of versions each has."""
        self._check_usable()
        with self._lock:
            return len(self._registry.names())

    @property
    def closed(self) -> bool:
        """Whether it was closed, or belongs to the process that this one was forked from."""
        return self._closed or forks.depth() != self._depth

    @property
    def model_store(self) -> Path | None:
        """The folder in which names are looked up, absolute; None if there is none."""
        return self._sources.model_store

    def warm(self) -> None:
        """Start the process that imports torch, so that a first worker need not wait for it. Does not block."""
        self._check_usable()
        self._backend.warm()

    def run_on(self, loop: asyncio.AbstractEventLoop) -> Callable[[], object]:
        """Have an event loop read the answers of worker processes, which a thread of the library does otherwise.

        Then no thread is woken between an answer and the task on that loop that waits for it: for a server whose requests
        come in on one loop. Returns what undoes it, which must be called before the loop is closed; both are to be called
        on the loop's thread. Until then the loop must not be kept waiting by anything: all answers go through it, those for
        other threads, too. Calls that wait (``predict``, ``close``) raise WouldWaitForever there. Changes nothing if another
        loop does it already.

        Raises:
            ManagerClosed: the manager was closed.
        """
        self._check_usable()
        return self._backend.run_on(loop)

    def register(
        self,
        url: object,
        *,
        model_name: str | None = None,
        version: str | None = None,
        handler: str | None = None,
        model_class: object = None,
        batching: str | None = None,
        runtime: str | None = None,
        batch_size: int | None = None,
        max_batch_delay: int | None = None,
        initial_workers: int | None = None,
        max_workers: int | None = None,
        synchronous: bool = True,
        response_timeout: float | None = None,
        startup_timeout: float | None = None,
        backend: str | None = None,
        share_weights: ShareWeights | str | None = None,
        threads_per_worker: int | None = None,
        batches_in_flight: int | None = None,
        max_requests: int | None = None,
        max_memory: int | None = None,
        isolate_errors: bool | None = None,
        scale_down_delay: float | None = None,
        template_idle_timeout: float | None = None,
        default_workers: int = 1,
        trusted: bool = True,
        may_fetch: bool = False,
        loaded_at_startup: bool = False,
    ) -> Model:
        """Register a model version and start its workers; return it.

        What is None is taken from the archive's model-config.yaml, then from the settings, then the default. Blocks
        while the source is unpacked and, if ``synchronous``, until the workers are ready. After an error nothing is
        registered and nothing is left over.

        Args:
            url: an archive (``.mar``, ``.tgz``) or a folder with the same content: a name in the model store, a path, or
                a URL, ``file://`` or ``http(s)://``, or with the extra ``remote`` ``s3://`` and the like. ``#sha256=``
                and its digest after it: no other archive will do. Or a live object, as it is now: a ``torch.nn.Module``,
                a function, an exported program, a handler or a class of handlers; or a model file (``.pt``, ``.pth``,
                ``.pt2``, ``.safetensors``). ``docs/live.md`` says what becomes of them.
            model_name: the name, without ``/``; default: the manifest's. Live objects and model files need one.
            version: the version, without ``/``; default: the manifest's, else "1.0".
            handler: ``module``, ``module.py``, ``module:function``, or a shipped handler; default: the manifest's.
            model_class: what makes the module that the weights in a model file belong to: a class, or another callable.
            batching: what a module or function is called with: "stack" (default for modules): the tensors of the requests,
                stacked along a new dimension 0; "list" (default for functions): the list of what the requests brought.
            runtime: python, python3 or LSP, in any case; default: the manifest's.
            batch_size: the most requests in a batch, at least 1; default 1.
            max_batch_delay: the longest that a request waits for others, in ms, at least 0; default 100.
            initial_workers: how many workers it shall have at least, at least 0; default 1.
            max_workers: how many it may have at most; default: ``initial_workers``.
            synchronous: whether to wait until the workers are ready.
            response_timeout: how long a batch may run, in s, above 0; default 120.
            startup_timeout: how long a worker may take to load the model, in s, above 0; default 120.
            backend: how its workers are run: "process" (default), or "thread" for threads of this process, which is for
                models that release the GIL; see :class:`torchmgmt.backends.thread.ThreadBackend` for its limits.
            share_weights: "auto" (default): workers are forked from a process that has loaded the model once, unless
                loading it left something behind that they must not share; "always": even then; "never": each worker
                loads the model by itself. ``describe`` says which way was taken, and why.
            threads_per_worker: threads that one operation of a worker may use, at least 1; default: the cores divided by
                ``max_workers``. What a handler sets itself counts more.
            batches_in_flight: how many batches may be with a worker at once, the one that it computes included, at least
                1; default 4. Further ones are handed over early only as far as they take no longer than 50 ms in all.
            max_requests: a worker that has answered so many requests is replaced, at least 1; default: no limit.
            max_memory: a worker that has more private memory, in bytes, is replaced, at least 1; default: no limit. Memory
                that workers share is not counted. Looked at every 5 s. While a worker is replaced there may be one more
                than ``max_workers``.
            isolate_errors: whether a batch that raised as a whole is run again, request by request, once and as far as
                ``response_timeout`` has time for it; default: False. The arrays in requests are then copied for the handler.
            scale_down_delay: for how long, in s, a worker above ``initial_workers`` must not have been needed before it
                goes, at least 0; default 60.
            template_idle_timeout: for how long, in s, there may be no worker before the process that has loaded the model
                for the next one is given up, at least 0; default 600.
            default_workers: ``initial_workers`` where neither the call nor the archive nor the settings say it.
            trusted: False if ``url`` came from outside the program: then only the model store is looked into, and what
                the setting ``allowed_urls`` allows.
            may_fetch: whether such a caller, on this machine or with a key, may name any host if that is not set.
            loaded_at_startup: what ``describe`` says of it. If it fails, :meth:`models` and :meth:`describe` show the
                version as FAILED with the reason, until it is registered again or unregistered.

        Raises:
            InvalidArgument: an argument has the wrong type or range.
            SourceNotFound, SourceNotAllowed, DownloadFailed, InvalidArchive: the source cannot be used.
            AlreadyRegistered: this version is registered, or is being registered by another caller.
            WorkerStartFailed: ``synchronous``, and a worker could not be started.
            ManagerClosed: the manager was closed.
        """
        self._check_usable()
        wishes = Wishes(
            model_name=model_name,
            version=version,
            handler=handler,
            model_class=model_class,
            batching=batching,
            runtime=runtime,
            batch_size=batch_size,
            max_batch_delay=max_batch_delay,
            initial_workers=initial_workers,
            max_workers=max_workers,
            synchronous=synchronous,
            response_timeout=response_timeout,
            startup_timeout=startup_timeout,
            backend=backend,
            share_weights=share_weights,
            threads_per_worker=threads_per_worker,
            batches_in_flight=batches_in_flight,
            max_requests=max_requests,
            max_memory=max_memory,
            isolate_errors=isolate_errors,
            scale_down_delay=scale_down_delay,
            template_idle_timeout=template_idle_timeout,
            default_workers=default_workers,
            trusted=trusted,
            may_fetch=may_fetch,
            loaded_at_startup=loaded_at_startup,
        )
        if synchronous:
            self._check_may_wait("register")
        key = self._register(url, wishes)
        if is_default_version(key, self.settings):
            self.set_default(key.name, key.version)
        return Model(self, key)

    def restore(self, model_snapshot: Mapping[str, Any] | None = None) -> tuple[ModelKey, ...]:
        """Register what the state file holds and is not registered; return what that is. Blocks until all is ready.

        A few at once, default versions first. What cannot be restored stops no other: it is logged, stays stored, and
        :meth:`models` and :meth:`describe` show it as FAILED with the reason until it is registered again or
        unregistered. Until its turn comes, a version is not found. The archives are opened anew where they came from; one
        that holds another model or version now is not restored, one with another content is, with a warning.

        Args:
            model_snapshot: what a snapshot of TorchServe says; restored if there was no state file.

        Raises:
            InvalidArgument: ``model_snapshot`` is none that TorchServe wrote.
            ManagerClosed: the manager was closed.
        """
        self._check_usable()
        self._check_may_wait("restore")
        if model_snapshot is not None and not self._has_stored:
            self._desire(from_torchserve(model_snapshot))
        with self._lock:
            state = self._desired.state()
            missing = [
                each for each in state.versions() if not self._is_registered_locked(each.key.name, each.key.version)
            ]
            defaults = {(model.name, model.default) for model in state.models}
        # A request that names no version must not meet another one for the only reason that it was ready earlier.
        for is_default in (True, False):
            turn = [each for each in missing if ((each.key.name, each.key.version) in defaults) is is_default]
            in_parallel(self._bring_back, turn, limit=RESTORED_AT_ONCE)
        with self._lock:
            for model in state.models:
                self._registry.arrange(model.name, self._desired.versions(model.name))
            restored = tuple(
                each.key for each in missing if self._is_registered_locked(each.key.name, each.key.version)
            )
        self._record()
        return restored

    def items_to_load(self, items: Iterable[str], *, over_state: bool) -> list[str]:
        """Return which items of ``load_models`` (``a.mar`` or ``name=a.mar``) are left to load after :meth:`restore`.

        Those are not that have brought a version that is registered, or, unless ``over_state``, one that was unregistered
        by a call: the file keeps which ones were loaded before. Does not block.
        """
        self._check_usable()
        with self._lock:
            return [item for item in items if self._is_to_load_locked(item, over_state=over_state)]

    def models(self, *, start: int = 0, limit: int | None = None) -> tuple[ModelInfo, ...]:
        """Return the default version of every model, sorted by name. Does not block.

        A model of which nothing is registered because it could not be loaded at the start is there, too.

        Args:
            start: how many models to leave out at the beginning, at least 0.
            limit: the most to return, at least 0; None: all. What a few cost does not depend on how many there are.
        """
        self._check_usable()
        check_number("start", start, minimum=0)
        if limit is not None:
            check_number("limit", limit, minimum=0)
        end = None if limit is None else start + limit
        with self._lock:
            names = self._registry.names()
            missing = self._failed_loads.names() - self._registry.keys()
            page = (sorted([*names, *missing]) if missing else names)[start:end]
            found = [
                self._failed_loads.versions(name)[0] if name in missing else self._registry.get(name) for name in page
            ]
        return tuple(each if isinstance(each, ModelInfo) else each.info(is_default=True) for each in found)

    def wanted(self) -> tuple[ModelInfo, ...]:
        """Return every version that shall have workers at all times, or has failed, in no order. Does not block.

        Its cost depends little on how many others there are, so that it may be asked each second whether all is well.
        """
        self._check_usable()
        with self._lock:
            served = [each for each in self._registry if each.is_wanted]
            defaults = {each.spec.key.name: self._registry.default(each.spec.key.name) for each in served}
            failed = [
                info
                for info in self._failed_loads
                if not self._is_registered_locked(info.name, info.version)  # a further attempt may be under way
            ]
        infos = [each.info(is_default=defaults[each.spec.key.name] == each.spec.key.version) for each in served]
        return (*infos, *failed)

    def versions(self, name: str) -> tuple[ModelInfo, ...]:
        """Return all versions of a model, oldest first; raise ModelNotFound. Does not block.

        Those that could not be loaded at the start come last.
        """
        self._check_usable(name)
        with self._lock:
            failed = self._failed_loads.versions(name)
            if failed and name not in self._registry:
                return tuple(failed)
            default, versions = self._registry.default(name), self._registry.versions(name)
        registered = {each.spec.key for each in versions}
        failed = [info for info in failed if info.spec.key not in registered]  # a further attempt may be under way
        return (*(each.info(is_default=each.spec.key.version == default) for each in versions), *failed)

    def describe(self, name: str, version: str | None = None, *, customized: bool = False) -> ModelInfo:
        """Return what is known of a version (the default one unless given). Does not block, unless ``customized``.

        ``customized`` has a worker run the handler's ``describe_handle``, and waits for it at most response_timeout.

        Raises:
            ModelNotFound, ModelVersionNotFound: it is not registered.
            NoWorker, HandlerFailed, WorkerDied, DeadlineExceeded: ``customized``, and the handler could not be asked.
        """
        failed = self._failed_load(name, version)
        if failed is not None and not customized:
            return failed
        served = self._get(name, version)
        if customized:
            self._check_may_wait("describe(customized=True)")
        with self._gone_is_not_found(served):
            metadata = served.customized_metadata() if customized else None
        with self._lock:
            default = self._registry.default(name) if name in self._registry else ""
        return served.info(is_default=served.spec.key.version == default, metadata=metadata)

    def scale(
        self,
        name: str,
        min_worker: int = 1,
        max_worker: int | None = None,
        *,
        version: str | None = None,
        synchronous: bool = True,
        timeout: float = -1,
    ) -> ModelInfo:
        """Set how many workers a version (the default one unless given) has; return what is so then.

        What was wanted stays wanted, also if a worker fails to start.

        Args:
            name: the model.
            min_worker: how many workers at least, at least 0.
            max_worker: how many at most; default: ``min_worker``.
            version: the version.
            synchronous: whether to block until the new workers are ready and the old ones gone.
            timeout: how many seconds a worker that is to go may take to finish its batch; -1: as long as it takes.

        Raises:
            InvalidArgument: a number is out of its range, or max_worker less than min_worker.
            ModelNotFound, ModelVersionNotFound: it is not registered.
            WorkerStartFailed: ``synchronous``, and a worker could not be started.
        """
        check_truth("synchronous", synchronous)
        if synchronous:
            self._check_may_wait("scale")
        served = self._get(name, version)
        wanted = Scale(min_worker, min_worker if max_worker is None else max_worker)
        with self._gone_is_not_found(served):
            served.pool.scale(wanted, timeout=timeout)
            self._keep_scale(served)
            if synchronous:
                served.pool.wait_ready()
        return self.describe(name, served.spec.key.version)

    def wait_ready(self, name: str, version: str | None = None, *, timeout: float | None = None) -> None:
        """Block until as many workers of a version (the default one unless given) are ready as are wanted at least.

        Raises:
            ModelNotFound, ModelVersionNotFound: it is not registered.
            WorkerStartFailed: a worker could not be started meanwhile.
            DeadlineExceeded: ``timeout`` seconds, at least 0, were not enough; None: no limit.
            InvalidArgument: ``timeout`` is no such number.
        """
        if timeout is not None:
            check_number("timeout", timeout, minimum=0, unit="seconds", whole=False)
        self._check_may_wait("wait_ready")
        served = self._get(name, version)
        with self._gone_is_not_found(served):
            served.pool.wait_ready(timeout)

    def set_default(self, name: str, version: str) -> None:
        """Have requests that name no version go to this one from now on. Does not block, but for the state file.

        Raises:
            ModelNotFound, ModelVersionNotFound: it is not registered.
        """
        self._get(name, version)
        with self._lock:
            self._registry.set_default(name, version)
            self._desired.set_default(ModelKey(name, version))
        self._record()
        self._announcer.tell(DefaultVersionSet(ModelKey(name, version)))

    def unregister(self, name: str, version: str | None = None, *, timeout: float | None = None) -> CloseReport:
        """Remove a version (the default one unless given); return once it is gone and its name is free again.

        New requests are refused at once; running and queued ones may finish within ``timeout`` seconds (default:
        ``unregister_model_timeout`` of the settings), the rest fails.

        Raises:
            ModelNotFound, ModelVersionNotFound: it is not registered.
            DefaultVersionInUse: it is the default, and there are other versions.
            InvalidArgument: ``timeout`` is no number of seconds, at least 0.
        """
        self._check_usable(name, version)
        self._check_may_wait("unregister")
        limit = self.settings.unregister_model_timeout if timeout is None else timeout
        check_number("timeout", limit, minimum=0, unit="seconds", whole=False)
        with self._lock:
            failed = [] if self._is_registered_locked(name, version) else self._forget_failed_locked(name, version)
        if failed:
            self._record()
        for key in failed:
            self._announcer.tell(ModelUnregistered(key))
        if failed:
            return CloseReport(0.0)
        with self._lock:
            served = self._registry.remove(name, version)
            if version is None:
                self._forget_failed_locked(name, None)
            key = served.spec.key
            self._desired.remove(key)
            self._registry.reserve(key)  # its name is free when this is over, not before
            self._leaving.add(served)
        try:
            self._record()
            self._announcer.tell(ModelUnregistered(key))
            return served.close(limit)
        finally:
            with self._lock:
                self._leaving.discard(served)
                self._registry.release(key)

    def predict(
        self,
        name: str,
        data: object = None,
        *,
        fields: Mapping[str, Any] | None = None,
        version: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        wait_timeout: float | None = None,
        priority: int = 0,
    ) -> Any:
        """Run one request and return what the handler answered to it. Blocks until then; arguments as in :meth:`submit`.

        Raises:
            ModelNotFound, ModelVersionNotFound, NoWorker, QueueFull, InvalidArgument, ManagerClosed: as :meth:`submit`.
            HandlerFailed: the handler raised, or answered wrongly; has its traceback and the worker's last lines.
            WorkerDied: the worker ended while it ran the request.
            DeadlineExceeded: there was no answer within ``timeout``, or it was not begun within ``wait_timeout``.
        """
        self._check_may_wait("predict")
        request = self._request(data, fields, headers)
        future = self._submit(name, version, request, timeout, wait_timeout, priority)
        try:
            return future.result()
        except BaseException:
            future.abandon()  # the caller was interrupted, so nobody waits for it any more
            raise

    async def apredict(
        self,
        name: str,
        data: object = None,
        *,
        fields: Mapping[str, Any] | None = None,
        version: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        wait_timeout: float | None = None,
        priority: int = 0,
    ) -> Any:
        """Run one request and return what the handler answered to it, on the event loop that runs; never blocks it.

        Arguments and errors are those of :meth:`predict`. A task that is cancelled takes its request back.
        """
        request = self._request(data, fields, headers)
        return await self._submit(name, version, request, timeout, wait_timeout, priority)

    def submit(
        self,
        name: str,
        data: object = None,
        *,
        fields: Mapping[str, Any] | None = None,
        version: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        wait_timeout: float | None = None,
        priority: int = 0,
        request_id: str | None = None,
    ) -> AnswerFuture:
        """Queue one request and return the future of its answer. Does not block; any thread.

        Callbacks of the future run on the thread that reads all answers, so they must not wait for another one:
        ``predict`` and other calls that wait raise WouldWaitForever there. ``await`` takes the future, too.

        Args:
            name: the model.
            data: what the handler gets as ``{"body": data}``; must be picklable. Of an :class:`~torchmgmt.HttpBody` the
                worker makes the row, and writes the answer as the future's ``response()``.
            fields: the whole row that the handler gets, in place of that.
            version: the version; default: the default one.
            headers: what the handler finds through ``context.get_request_header``.
            timeout: seconds until the request fails with DeadlineExceeded, at least 0; None: what the archive says
                (``clientTimeoutInMills``), else no limit. One that was not started by then never runs.
                ``Future.cancel`` takes a request back that was not started, ``abandon`` any.
            wait_timeout: the same for one that was not started by then. None: what the archive says
                (``queueTimeoutInMills``), else no limit but ``timeout``.
            priority: from -10 to 10. A request goes before those that have waited for fewer seconds more than it has less
                priority than they, so what has little waits longer, but not for ever.
            request_id: what the handler finds as ``context.get_request_id``; None: one that no other request has.

        Raises:
            ModelNotFound, ModelVersionNotFound: it is not registered.
            NoWorker: it is scaled to zero, or its workers could not be started.
            QueueFull: ``job_queue_size`` requests wait already.
            InvalidArgument: the data cannot be pickled, or an argument has the wrong type or range.
        """
        request = self._request(data, fields, headers, request_id)
        return self._submit(name, version, request, timeout, wait_timeout, priority)

    def stream(
        self,
        name: str,
        data: object = None,
        *,
        fields: Mapping[str, Any] | None = None,
        version: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        wait_timeout: float | None = None,
        priority: int = 0,
        request_id: str | None = None,
    ) -> AnswerStream:
        """Queue one request and return the parts of its answer, as they come. Does not block; any thread.

        Arguments and errors are those of :meth:`submit`. The handler's time for the batch (``response_timeout``) begins
        anew with each part.
        """
        stream = AnswerStream()
        request = self._request(data, fields, headers, request_id)
        request.on_part = stream.take_part
        self._submit(name, version, request, timeout, wait_timeout, priority, stream.bind)
        return stream

    def add_listener(self, listener: Listener) -> None:
        """Have ``listener`` called with each event from now on; see :mod:`torchmgmt.events`. Does not block; any thread.

        Raises InvalidArgument if it is not callable.
        """
        self._announcer.add(*check_listeners([listener]))

    def remove_listener(self, listener: Listener) -> None:
        """Call ``listener`` no more, but for the events that are being told at this moment. Any thread; idempotent."""
        self._announcer.remove(listener)

    def close(self, timeout: float = 30) -> CloseReport:
        """End everything within about ``timeout`` seconds and return what had to be done for it. Blocks; idempotent.

        In this order: refuse new requests, let accepted ones finish, tell the workers to end, kill those that do not,
        remove what was unpacked. In a forked copy it does nothing.
        """
        check_number("timeout", timeout, minimum=0, unit="seconds", whole=False)
        if forks.depth() != self._depth:
            return CloseReport(0.0)
        self._check_may_wait("close")
        with self._close_lock:
            if self._report is None:
                self._report = self._close(timeout)
            return self._report

    # -- the rest is for this file -------------------------------------------------------------------------------------

    def _note_refused(self, served: ServedVersion, request: WorkerRequest, error: TorchmgmtError) -> None:
        if isinstance(error, (NoWorker, QueueFull)):  # else the version is gone, and what was counted of it, too
            _tell_dropped(self._announcer, served.spec.key, type(error).__name__)
        if self._tracing is not None:
            self._tracing.refuse(request, error)

    def _make_tracing(self) -> Tracing | None:
        if self.settings.tracing == "off" or (self.settings.tracing == "auto" and "opentelemetry" not in sys.modules):
            return None
        try:
            from torchmgmt.tracing import tracing_of  # most programs have no OpenTelemetry
        except ImportError as error:
            if self.settings.tracing == "auto":
                return None
            allowed = f"auto or off without {error.name}: pip install 'torchmgmt[otel]'"
            raise InvalidArgument("tracing", self.settings.tracing, allowed) from error
        tracing = tracing_of(self.settings.tracing)
        if tracing is not None:
            self._announcer.add(tracing.listen)
        return tracing

    def _request(
        self,
        data: object,
        fields: Mapping[str, Any] | None,
        headers: Mapping[str, str] | None,
        request_id: str | None = None,
    ) -> WorkerRequest:
        if request_id is None:
            request_id = f"{self._request_prefix}{next(self._request_numbers):016x}"
        return new_request(data, fields, headers, request_id)

    def _submit(
        self,
        name: str,
        version: str | None,
        request: WorkerRequest,
        timeout: float | None,
        wait_timeout: float | None,
        priority: int,
        on_future: Callable[[AnswerFuture], object] | None = None,
    ) -> AnswerFuture:
        served = self._get(name, version)
        # A caller may hold nothing but the future, so it keeps all alive.
        future = AnswerFuture(served.spec.key, self, served.pool.abandon_unwanted, served.on_cancelled)
        if on_future is not None:
            on_future(future)
        if self._tracing is not None:
            self._tracing.begin(served.spec.key, request, future)
        try:
            served.submit(request, future, timeout, wait_timeout, priority)
        except TorchmgmtError as error:
            self._note_refused(served, request, error)
            if isinstance(error, (ManagerClosed, ModelNotFound)):
                raise self._not_found(served) from None
            raise
        return future

    def _check_usable(self, name: object = "", version: object = None) -> None:
        """Raise ManagerClosed, or InvalidArgument for a name or version that can be none. Takes no lock."""
        if forks.depth() != self._depth:
            why = "belongs to the process that this one was forked from; make a new one after the fork"
            raise ManagerClosed("This ModelManager", why)
        if self._closed:
            raise ManagerClosed
        if not isinstance(name, str):
            raise InvalidArgument("name", name, "text")
        if version is not None and not isinstance(version, str):
            raise InvalidArgument("version", version, "text, or None for the default version")

    def _check_may_wait(self, call: str) -> None:
        for backend in tuple(self._backends.values()):
            if backend.on_own_thread():
                raise WouldWaitForever(call)

    def _get(self, name: str, version: str | None = None) -> ServedVersion:
        self._check_usable(name, version)
        with self._lock:
            try:
                return self._registry.get(name, version)
            except LookupError:
                self._failed_loads.check(name, version)
                raise

    def _failed_load(self, name: str, version: str | None) -> ModelInfo | None:
        """Return what is known of a version that is not registered because it could not be loaded at the start."""
        self._check_usable(name, version)
        with self._lock:
            return None if self._is_registered_locked(name, version) else self._failed_loads.find(name, version)

    def _is_registered_locked(self, name: str, version: str | None) -> bool:
        try:
            self._registry.get(name, version)
        except LookupError:
            return False
        return True

    def _register(self, url: object, wishes: Wishes, stored: StoredVersion | None = None) -> ModelKey:
        """Register a version, as ``stored`` if it was before; remember what failed if it was to be there from the start."""
        self._warm_for(wishes)
        spec: ModelSpec | None = None
        try:
            with contextlib.ExitStack() as undo:
                folder = undo.enter_context(open_source(self._sources, url, wishes))
                if stored is None:
                    stored = stored_of(folder, wishes, scale_of(folder, wishes, self.settings), self.model_store)
                else:
                    folder = evolve(folder, url=stored.url)
                    check_is_same(folder, wishes, stored)
                spec = spec_of(folder, wishes, self.settings)
                if spec.live is not None:
                    spec.live.prepare(spec.backend, isolates_errors=spec.isolate_errors)
                served = self._add(spec, folder, stored.scale)
                undo.pop_all()  # from here on the version owns the folder
            if wishes.synchronous:
                self._wait_or_withdraw(spec.key)
        except (AlreadyRegistered, ManagerClosed):
            raise
        except Exception as error:
            if wishes.loaded_at_startup:
                self._remember(shown(url), error, spec, wishes)
            raise
        with self._lock:
            self._failed_loads.settle(spec.key, shown(url))
            is_default_again = self._keep_locked(served, evolve(stored, digest=folder.digest))
        self._record()
        if is_default_again:
            self._announcer.tell(DefaultVersionSet(spec.key))
        return spec.key

    def _remember(self, url: str, error: Exception, spec: ModelSpec | None, wishes: Wishes) -> None:
        workers = wishes.default_workers if wishes.initial_workers is None else wishes.initial_workers
        name, version = wishes.model_name, wishes.version
        info = failed_load(url, error, spec=spec, name=name, version=version, workers=workers)
        certainty = Certainty.KEY if spec else Certainty.NAME if name else Certainty.NOTHING
        with self._lock:
            if not self._desired.from_item(f"{name}={url}" if name else url):  # that is shown as what it was
                self._failed_loads.add(info, certainty)

    def _restore_or_close(self) -> None:
        try:
            self.restore()
        except BaseException:
            self.close(0)
            raise

    def _bring_back(self, stored: StoredVersion) -> None:
        """Restore a version and wait for its workers; what goes wrong is remembered and logged, and stops no other."""
        try:
            self._register(stored.place or stored.url, wishes_of(stored), stored)
        except AlreadyRegistered:
            log.info("%s is not restored: it has been registered meanwhile", stored.key)
        except ManagerClosed:
            raise
        except Exception as error:
            log.error("%s could not be restored: %s", stored.key, str(error).partition("\n")[0])
            with self._lock:
                self._failed_loads.add(failed_restore(stored, error), Certainty.KEY)

    def _open_state(self, path: str | os.PathLike[str]) -> StateKeeper:
        """Take hold of the state file, and want what it holds."""
        from torchmgmt.state_file import StateFile, StateKeeper  # most programs keep no state

        keeper = StateKeeper(StateFile(path))
        try:
            state = keeper.load()
        except BaseException:
            keeper.close()
            raise
        self._has_stored = state is not None
        self._desire(state or DesiredState())
        return keeper

    def _desire(self, state: DesiredState) -> None:
        with self._lock:
            self._desired.load(state)

    def _record(self) -> None:
        """Return when what is wanted now is on the disk, if there is a state file."""
        if self._keeper is not None:
            self._keeper.record(self._desired_state)

    def _desired_state(self) -> DesiredState:
        with self._lock:
            return self._desired.state()

    def _keep_locked(self, served: ServedVersion, stored: StoredVersion) -> bool:
        """Want a version that is registered from now on; return whether it has become its model's default again."""
        key = stored.key
        if not self._is_current_locked(served):
            return False  # somebody has unregistered it already
        if served.spec.live is not None and not served.spec.live.is_restorable:
            self._desired.remove(key)  # the program that made the object makes it again
            return False
        was_wanted = self._desired.find(key) is not None
        self._desired.put(evolve(stored, scale=served.pool.wanted))
        for outdated in self._outdated_locked(stored):
            self._desired.remove(outdated)
            self._failed_loads.remove(outdated.name, outdated.version)
        wanted, default = self._desired.default(key.name), self._registry.default(key.name)
        if wanted == key.version != default and was_wanted:
            self._registry.set_default(key.name, key.version)
            return True
        if self._is_registered_locked(key.name, wanted):
            self._desired.set_default(ModelKey(key.name, default))
        return False

    def _outdated_locked(self, stored: StoredVersion) -> list[ModelKey]:
        """Return what could not be restored since another version, this one, is at the place now where it came from."""
        if not stored.loaded_at_startup:
            return []
        same = [
            each
            for each in self._desired.from_item(stored.item)
            if each.parameters.get("version") == stored.parameters.get("version")
        ]
        return [each.key for each in same if not self._is_registered_locked(each.key.name, each.key.version)]

    def _is_to_load_locked(self, item: str, *, over_state: bool) -> bool:
        wanted = self._desired.from_item(item)
        if any(self._is_registered_locked(each.key.name, each.key.version) for each in wanted):
            return False
        return over_state or bool(wanted) or not self._desired.has_seen(item)

    def _forget_failed_locked(self, name: str, version: str | None) -> list[ModelKey]:
        removed = self._failed_loads.remove(name, version)
        for key in removed:
            self._desired.remove(key)
        return removed

    def _keep_scale(self, served: ServedVersion) -> None:
        with self._lock:
            if self._is_current_locked(served):
                self._desired.set_scale(served.spec.key, served.pool.wanted)
        self._record()

    def _is_current_locked(self, served: ServedVersion) -> bool:
        """Whether it is still what is registered by its name and version."""
        try:
            return self._registry.get(served.spec.key.name, served.spec.key.version) is served
        except LookupError:
            return False

    def _warm_for(self, wishes: Wishes) -> None:
        """Have torch imported while the source is unpacked, if there are going to be worker processes."""
        workers = wishes.default_workers if wishes.initial_workers is None else wishes.initial_workers
        if workers and wishes.backend != "thread":
            with contextlib.suppress(OSError):  # the start of the first worker meets it again, and tells of it
                self._backend.warm()

    def _add(self, spec: ModelSpec, folder: ModelFolder, scale: Scale) -> ServedVersion:
        key = spec.key
        backend = self._backend_of(spec)
        pool = WorkerPool(
            spec,
            backend=backend,
            worker_ids=self._worker_ids,
            listener=self._announcer,
        )
        batcher: Batcher[WorkerRequest, Encoded] = Batcher(
            batch_size=spec.batch_size,
            max_batch_delay=spec.max_batch_delay_ms,
            capacity=spec.job_queue_size,
            name=f"model {key.name} version {key.version}",
            on_ready=pool.pump,
            call_at=backend.call_at,
            on_expired=functools.partial(_tell_dropped, self._announcer, key, DeadlineExceeded.__name__),
        )
        pool.feed_from(batcher)
        with self._lock:
            if self._closed:
                raise ManagerClosed
            self._registry.reserve(key)
            on_cancelled = functools.partial(_tell_dropped, self._announcer, key, "Cancelled", 1)
            served = ServedVersion(spec, folder, batcher, pool, on_cancelled)
            is_default = self._registry.add(key, served)
        self._announcer.tell(ModelRegistered(key))
        if is_default:
            self._announcer.tell(DefaultVersionSet(key))
        if scale.max_workers:
            pool.scale(scale)
        return served

    def _backend_of(self, spec: ModelSpec) -> Backend:
        with self._lock:
            if self._closed:
                raise ManagerClosed
            if spec.backend not in self._backends:
                from torchmgmt.backends.thread import ThreadBackend  # most programs use none

                self._backends[spec.backend] = ThreadBackend()
                self._owned_backends.append(self._backends[spec.backend])
            return self._backends[spec.backend]

    def _wait_or_withdraw(self, key: ModelKey) -> None:
        """Wait until a new version's workers are ready; if they cannot be, leave nothing registered."""
        served = self._get(key.name, key.version)
        try:
            with self._gone_is_not_found(served):
                served.pool.wait_ready()
        except BaseException:
            with self._lock:
                is_ours = self._registry.withdraw(key, served)
                self._leaving.add(served)
            if is_ours:
                self._announcer.tell(ModelUnregistered(key))
            try:
                served.close(0)
            finally:
                with self._lock:
                    self._leaving.discard(served)
            raise

    @contextlib.contextmanager
    def _gone_is_not_found(self, served: ServedVersion) -> Iterator[None]:
        """A version that was unregistered meanwhile is one that does not exist, whichever of its parts noticed first."""
        try:
            yield
        except (ManagerClosed, ModelNotFound):
            raise self._not_found(served) from None

    def _not_found(self, served: ServedVersion) -> TorchmgmtError:
        """Return what is to be said of a version that has gone; raise ManagerClosed or ModelNotFound if that is so now."""
        key = served.spec.key
        self._get(key.name, key.version)
        return ModelVersionNotFound(key.name, key.version)

    def _close(self, timeout: float) -> CloseReport:
        started = time.monotonic()
        with self._lock:
            self._closed = True
            versions = [*self._registry, *self._leaving]
        # Each phase for all of them before the next one: their workers finish and end side by side.
        for version in versions:
            version.refuse()
        for version in versions:
            version.pool.wait_quiet(started + timeout - time.monotonic())
        for version in versions:
            version.pool.end(started + timeout)
        reports = [version.pool.join(started) for version in versions]
        for version in versions:
            version.folder.release()
        for backend in self._owned_backends:
            backend.close()
        self._sources.close()
        if self._keeper is not None:
            self._keeper.close()
        self._finalizer.detach()
        return total_of(time.monotonic() - started, reports)


def _tell_dropped(announcer: Announcer, key: ModelKey, error: str, count: int = 1) -> None:
    if announcer:
        announcer.tell(RequestsDropped(key, error, count))


_open_managers: weakref.WeakSet[ModelManager] = weakref.WeakSet()


@atexit.register
def _close_open_managers() -> None:
    """Leaving the program closes what is open: requests finish, workers end in good order."""
    for manager in list(_open_managers):
        manager.close()


def _abandon(
    registry: Registry[ServedVersion],
    sources: ModelSources,
    backends: Sequence[Backend],
    keeper: StateKeeper | None,
    depth: int,
) -> None:
    """End what a manager ran that nobody can reach any more."""
    if forks.depth() != depth:
        return

    def end() -> None:
        for version in registry:
            version.close(0)
        for backend in backends:
            backend.close()
        sources.close()
        if keeper is not None:
            keeper.close()

    # Not here: a garbage collection may run anywhere, also while this thread holds one of the locks that this needs.
    threading.Thread(target=end, name="torchmgmt-abandoned", daemon=True).start()
