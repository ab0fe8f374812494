"""ModelManager: the facade. What it holds, makes and takes is each a room of its own, and none of them knows it."""

from __future__ import annotations

import _thread
import atexit
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torchmgmt.announcer import Announcer, check_listeners
from torchmgmt.answer_future import AnswerFuture
from torchmgmt.backends import Backend
from torchmgmt.backends.backend_set import BackendSet
from torchmgmt.catalogue import Catalogue
from torchmgmt.checks import check_number, check_truth
from torchmgmt.closing import Closing
from torchmgmt.errors import InvalidArgument
from torchmgmt.events import DefaultVersionSet, Listener
from torchmgmt.intake import Intake, tracing_for
from torchmgmt.management_call import ManagementThreads
from torchmgmt.model import Model
from torchmgmt.records import CancelRunning, CloseReport, ModelInfo, ModelKey, Scale, ShareWeights
from torchmgmt.registrar import Registrar
from torchmgmt.registration import Wishes, is_default_version, sources_of
from torchmgmt.served import ServedVersion
from torchmgmt.settings import Settings
from torchmgmt.state import from_torchserve
from torchmgmt.streams import AnswerStream

if TYPE_CHECKING:
    import asyncio

__all__ = ["ModelManager"]

T = TypeVar("T")

CLOSE_TIMEOUT_S = 30.0
"""So long requests may take that run or wait when a manager is closed, or the program ends."""


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
    workers are forked, and a few threads. Leaving ``with``, :meth:`close`, and the end of the program end all of that; so
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
        self._threads = ManagementThreads()
        self._announcer = Announcer(check_listeners(listeners), self._threads.post)
        tracing = tracing_for(self.settings.tracing)
        if tracing is not None:
            self._announcer.add(tracing.listen)
        self._sources = sources_of(model_store, self.settings, self._announcer.tell)
        self._backends = BackendSet(backend, self.settings.blacklist_env_vars)
        self._catalogue = Catalogue(state_file)
        self._registrar = Registrar(
            self._catalogue,
            sources=self._sources,
            backends=self._backends,
            announcer=self._announcer,
            settings=self.settings,
        )
        self._intake = Intake(self._catalogue, self._announcer, tracing)
        # Nothing of this knows the manager, or nobody could ever lose it.
        self._closing = Closing(self._catalogue, self._backends, self._sources, self._announcer)
        _open_managers.add(self)
        self._finalizer = weakref.finalize(self, _abandon, self._closing)
        self._finalizer.atexit = False  # _close_open_managers is for that, and lets requests finish
        if restore and self._catalogue.has_stored:
            self._restore_or_close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self._catalogue)} model versions"
        return f"<ModelManager: {state}>"

    def __enter__(self) -> ModelManager:
        self._catalogue.check_usable()
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
        return Model(self, self._catalogue.get(name).spec.key)

    def __contains__(self, name: object) -> bool:
        self._catalogue.check_usable()
        return name in self._catalogue

    def __iter__(self) -> Iterator[str]:
        """The names of all models, sorted."""
        return iter(self._names())

    def __len__(self) -> int:
        """The number of models, whatever number of versions each has."""
        return len(self._names())

    @property
    def closed(self) -> bool:
        """Whether it was closed, or belongs to the process that this one was forked from."""
        return self._catalogue.is_closed

    @property
    def model_store(self) -> Path | None:
        """The folder in which names are looked up, absolute; None if there is none."""
        return self._sources.model_store

    def warm(self) -> None:
        """Start the process that imports torch, so that a first worker need not wait for it. Does not block."""
        self._catalogue.check_usable()
        self._call(self._backends.warm)

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
        self._catalogue.check_usable()
        return self._backends.get("process").dispatcher.run_on(loop)

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
        cancel_running: CancelRunning | str | None = None,
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
                1; default 4. Further ones are handed over early only as far as they take no longer than 50 ms in all; when
                one takes longer than usual, those behind it wait with all others again from 0.1 s on.
            max_requests: a worker that has answered so many requests is replaced, at least 1; default: no limit.
            max_memory: a worker that has more private memory, in bytes, is replaced, at least 1; default: no limit. Memory
                that workers share is not counted. Looked at every 5 s, where there are dozens of processes more seldom.
                While a worker is replaced there may be one more than ``max_workers``.
            isolate_errors: whether a batch that raised as a whole is run again, request by request, once and as far as
                ``response_timeout`` has time for it; default: False. The arrays in requests are then copied for the handler.
            cancel_running: what becomes of a batch that a worker runs and for which nobody waits any more, as its callers
                have gone or their limits are over: "when_needed" (default): its worker is ended once others have waited for
                one for longer than a new one takes to start; "now": at once; "never": it is run to its end. Closing and
                unregistering do not wait for it. Workers that are threads cannot be ended.
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
        self._catalogue.check_usable()
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
            cancel_running=cancel_running,
            scale_down_delay=scale_down_delay,
            template_idle_timeout=template_idle_timeout,
            default_workers=default_workers,
            trusted=trusted,
            may_fetch=may_fetch,
            loaded_at_startup=loaded_at_startup,
        )
        if synchronous:
            self._backends.check_may_wait("register")
        model, _ = self._call(lambda: self._register(url, wishes), lambda done: self._registrar.take_back(done[1]))
        return model

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
        self._catalogue.check_usable()
        self._backends.check_may_wait("restore")
        if model_snapshot is not None and not self._catalogue.has_stored:
            self._catalogue.want(from_torchserve(model_snapshot))
        return self._call(self._registrar.restore, take_back=bool)  # what is there stays, and nothing more is begun

    def items_to_load(self, items: Iterable[str], *, over_state: bool) -> list[str]:
        """Return which items of ``load_models`` (``a.mar`` or ``name=a.mar``) are left to load after :meth:`restore`.

        Those are not that have brought a version that is registered, or, unless ``over_state``, one that was unregistered
        by a call: the file keeps which ones were loaded before. Does not block.
        """
        self._catalogue.check_usable()
        return self._catalogue.left_to_load(items, over_state=over_state)

    def models(self, *, start: int = 0, limit: int | None = None) -> tuple[ModelInfo, ...]:
        """Return the default version of every model, sorted by name. Does not block.

        A model of which nothing is registered because it could not be loaded at the start is there, too.

        Args:
            start: how many models to leave out at the beginning, at least 0.
            limit: the most to return, at least 0; None: all. What a few cost does not depend on how many there are.
        """
        self._catalogue.check_usable()
        check_number("start", start, minimum=0)
        if limit is not None:
            check_number("limit", limit, minimum=0)
        return self._catalogue.models(start, limit)

    def wanted(self) -> tuple[ModelInfo, ...]:
        """Return every version that shall have workers at all times, or has failed, in no order. Does not block.

        Its cost depends little on how many others there are, so that it may be asked each second whether all is well.
        """
        self._catalogue.check_usable()
        return self._catalogue.wanted()

    def versions(self, name: str) -> tuple[ModelInfo, ...]:
        """Return all versions of a model, oldest first; raise ModelNotFound. Does not block.

        Those that could not be loaded at the start come last.
        """
        self._catalogue.check_usable(name)
        return self._catalogue.versions(name)

    def describe(self, name: str, version: str | None = None, *, customized: bool = False) -> ModelInfo:
        """Return what is known of a version (the default one unless given). Does not block, unless ``customized``.

        ``customized`` has a worker run the handler's ``describe_handle``, and waits for it at most response_timeout.

        Raises:
            ModelNotFound, ModelVersionNotFound: it is not registered.
            NoWorker, HandlerFailed, WorkerDied, DeadlineExceeded: ``customized``, and the handler could not be asked.
        """
        failed = self._catalogue.find_failed(name, version)
        if failed is not None and not customized:
            return failed
        served = self._catalogue.get(name, version)
        if customized:
            self._backends.check_may_wait("describe(customized=True)")
        with self._catalogue.gone_is_not_found(served):
            metadata = served.customized_metadata() if customized else None
        return served.info(is_default=self._catalogue.is_default(served.spec.key), metadata=metadata)

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
            self._backends.check_may_wait("scale")
        served = self._catalogue.get(name, version)
        wanted = Scale(min_worker, min_worker if max_worker is None else max_worker)
        with self._catalogue.gone_is_not_found(served):
            self._call(lambda: self._scale(served, wanted, timeout), take_back=bool)
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
        self._backends.check_may_wait("wait_ready")
        served = self._catalogue.get(name, version)
        with self._catalogue.gone_is_not_found(served):
            served.pool.wait_ready(timeout)

    def set_default(self, name: str, version: str) -> None:
        """Have requests that name no version go to this one from now on. Does not block, but for the state file.

        Raises:
            ModelNotFound, ModelVersionNotFound: it is not registered.
        """
        self._catalogue.check_usable(name, version)
        self._call(lambda: self._set_default(name, version), take_back=bool)

    def unregister(self, name: str, version: str | None = None, *, timeout: float | None = None) -> CloseReport:
        """Remove a version (the default one unless given); return once it is gone and its name is free again.

        New requests are refused at once; running and queued ones may finish within ``timeout`` seconds (default:
        ``unregister_model_timeout`` of the settings), the rest fails.

        Raises:
            ModelNotFound, ModelVersionNotFound: it is not registered.
            DefaultVersionInUse: it is the default, and there are other versions.
            InvalidArgument: ``timeout`` is no number of seconds, at least 0.
        """
        self._catalogue.check_usable(name, version)
        self._backends.check_may_wait("unregister")
        limit = self.settings.unregister_model_timeout if timeout is None else timeout
        check_number("timeout", limit, minimum=0, unit="seconds", whole=False)
        return self._call(lambda: self._registrar.unregister(name, version, limit))

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
        self._backends.check_may_wait("predict")
        request = self._intake.request(data, fields, headers)
        future = self._intake.submit(
            AnswerFuture, self, name, version, request, timeout, wait_timeout, priority, is_urgent=True
        )
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
        request = self._intake.request(data, fields, headers)
        return await self._intake.submit(AnswerFuture, self, name, version, request, timeout, wait_timeout, priority)

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

        Callbacks of the future run on the thread that reads all answers (of one that has ended, on the thread that adds
        them), so they must not wait for another one: ``predict`` and other calls that wait raise WouldWaitForever there.
        What they raise is logged. ``await`` takes the future, too.

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
        request = self._intake.request(data, fields, headers, request_id)
        return self._intake.submit(AnswerFuture, self, name, version, request, timeout, wait_timeout, priority)

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
        request = self._intake.request(data, fields, headers, request_id)
        return self._intake.submit(AnswerStream, self, name, version, request, timeout, wait_timeout, priority)

    def add_listener(self, listener: Listener) -> None:
        """Have ``listener`` called with each event from now on; see :mod:`torchmgmt.events`. Does not block; any thread.

        Raises InvalidArgument if it is not callable.
        """
        self._announcer.add(*check_listeners([listener]))

    def remove_listener(self, listener: Listener) -> None:
        """Call ``listener`` no more, but for the events that are being told at this moment. Any thread; idempotent."""
        self._announcer.remove(listener)

    def close(self, timeout: float = CLOSE_TIMEOUT_S) -> CloseReport:
        """End everything within about ``timeout`` seconds and return what had to be done for it. Blocks; idempotent.

        In this order: refuse new requests, let accepted ones finish for which anybody waits, tell the workers to end, kill
        those that do not, remove what was unpacked. A further call waits for the same end, and brings it forward if its own
        ``timeout`` is over earlier. In a forked copy it does nothing.
        """
        check_number("timeout", timeout, minimum=0, unit="seconds", whole=False)
        if self._catalogue.is_inherited:
            return CloseReport(0.0)
        self._backends.check_may_wait("close")
        self._closing.hurry(timeout)
        report = self._call(self._closing.run)
        self._finalizer.detach()
        return report

    def _call(self, act: Callable[[], T], take_back: Callable[[T], object] | None = None) -> T:
        """Have a thread of the library do something; on those that nothing interrupts, or that must not wait, at once.

        ``take_back`` is as of :meth:`torchmgmt.management_call.ManagementThreads.call`; ``bool``: what is done stays, and what
        was not begun is not.
        """
        dispatcher = self._backends.dispatcher_here()
        if dispatcher is not None:
            return dispatcher.act_here(act)
        return self._threads.call(act, take_back)

    def _register(self, url: object, wishes: Wishes) -> tuple[Model, ServedVersion]:
        served = self._registrar.register(url, wishes)
        key = served.spec.key
        if is_default_version(key, self.settings):
            self._set_default(key.name, key.version)
        return Model(self, key), served

    def _scale(self, served: ServedVersion, wanted: Scale, timeout: float) -> None:
        served.pool.scale(wanted, timeout=timeout)
        self._catalogue.keep_scale(served)

    def _set_default(self, name: str, version: str) -> None:
        key = self._catalogue.set_default(name, version)
        self._announcer.tell(DefaultVersionSet(key))

    def _names(self) -> tuple[str, ...]:
        self._catalogue.check_usable()
        return self._catalogue.names()

    def _restore_or_close(self) -> None:
        try:
            self.restore()
        except BaseException:
            self.close(0)
            raise


_open_managers: weakref.WeakSet[ModelManager] = weakref.WeakSet()
_abandoned: weakref.WeakSet[Closing] = weakref.WeakSet()
_ABANDONED_S = 10.0
"""How long the end of the program waits for the end of a manager that nobody closed: that finishes no requests."""


@atexit.register
def _close_open_managers() -> None:
    """Leaving the program closes what is open: requests finish, workers end in good order."""
    failure: BaseException | None = None
    # Whom Ctrl-C has ended does not wait for the answers any more that it did wait for.
    was_interrupted = issubclass(getattr(sys, "last_type", None) or object, KeyboardInterrupt)
    for manager in list(_open_managers):
        try:
            manager.close(0 if was_interrupted else CLOSE_TIMEOUT_S)
        except BaseException as error:  # the others are closed all the same
            failure = failure or error
    for closing in list(_abandoned):  # or the files of its models were left behind
        closing.wait(_ABANDONED_S)
    if failure is not None:
        raise failure


def _abandon(closing: Closing) -> None:
    """End what a manager ran that nobody can reach any more."""
    # Not here: a garbage collection may run anywhere, also while this thread holds one of the locks that this needs.
    if not closing.is_inherited:
        closing.hurry(0)
        _abandoned.add(closing)
        try:
            _thread.start_new_thread(closing.run_on_thread, ())
        except RuntimeError:  # the system gives us no more threads
            _abandoned.discard(closing)
