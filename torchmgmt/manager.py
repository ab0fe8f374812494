"""ModelManager: the facade, which puts catalog, sources, pools, batchers and the stored state together."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, evolve

from torchmgmt import forks
from torchmgmt.archive import ModelFolder, ModelSources
from torchmgmt.backends import Backend
from torchmgmt.backends.process import ProcessBackend
from torchmgmt.batcher import Batcher
from torchmgmt.catalog import Catalog
from torchmgmt.channel import AnswerFuture
from torchmgmt.errors import (
    InvalidArgument,
    ManagerClosed,
    ModelNotFound,
    ModelVersionNotFound,
    TorchmgmtError,
    WouldWaitForever,
)
from torchmgmt.events import (
    DefaultVersionSet,
    Event,
    Listener,
    ModelNotRestored,
    ModelRegistered,
    ModelUnregistered,
    StateNotWritten,
)
from torchmgmt.model import Model
from torchmgmt.pool import FIRST_WORKER_ID, WorkerPool
from torchmgmt.records import (
    CloseReport,
    Encoded,
    ModelInfo,
    ModelKey,
    ModelSpec,
    ShareWeights,
    Scale,
    WorkerRequest,
    check_number,
    check_truth,
)
from torchmgmt.registration import Wishes, key_of, scale_of, spec_of
from torchmgmt.request import request_of
from torchmgmt.restoring import (
    RESTORED_AT_ONCE,
    check_is_same,
    complete,
    in_parallel,
    stand_in_of,
    stored_of,
    wishes_of,
)
from torchmgmt.served import AbsentVersion, ServedVersion, Version
from torchmgmt.settings import Settings
from torchmgmt.state import DesiredState, StoredVersion, from_torchserve

if TYPE_CHECKING:
    from torchmgmt.state_file import StateKeeper

__all__ = ["ModelManager"]

log = logging.getLogger(__name__)


@define(eq=False)
class _Announcer:
    """Tells the listeners. Apart from the manager, so that pools that run do not keep a forgotten manager alive."""

    listeners: Sequence[Listener]

    def tell(self, event: Event) -> None:
        for listener in self.listeners:
            try:
                listener(event)
            except Exception:
                log.exception("A listener failed at %r", event)

    def state_not_written(self, path: str, reason: str) -> None:
        """Tell that the state file could not be written."""
        self.tell(StateNotWritten(path, reason))


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
    it is logged once, listeners are told, and the next change tries again); so these calls wait for the disk. Closing
    changes nothing of it. Without ``state_file`` nothing is written.

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
        OSError: ``state_file`` cannot be read, or locked beside.
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
        self._sources = ModelSources(self.settings.model_store if model_store is None else model_store)
        self._backend: Backend = ProcessBackend() if backend is None else backend
        self._backends: dict[str, Backend] = {"process": self._backend}
        self._owned_backends: list[Backend] = [self._backend] if backend is None else []
        self._announcer = _Announcer(_check_listeners(listeners))
        self._worker_ids = itertools.count(FIRST_WORKER_ID)
        # 32 hexadecimal digits that no other request of this or another manager has: its own, and a number.
        self._request_prefix = os.urandom(8).hex()
        self._request_numbers = itertools.count()
        self._catalog = Catalog()
        self._backends_lock = threading.Lock()  # guards _backends and _owned_backends
        self._report: CloseReport | None = None
        self._close_lock = threading.Lock()
        self._keeper = None if state_file is None else self._open_state(state_file)
        _open_managers.add(self)
        self._finalizer = weakref.finalize(
            self, _abandon, self._catalog, self._sources, self._owned_backends, self._keeper
        )
        self._finalizer.atexit = False  # _close_open_managers is for that, and lets requests finish
        if restore and self._catalog.absent():
            try:
                self.restore()
            except BaseException:
                self.close(0)
                raise

    def __repr__(self) -> str:
        return f"<ModelManager: {self._catalog!r}>"

    def __enter__(self) -> ModelManager:
        self._catalog.check_usable()
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
        return Model(self, self._catalog.get(name).key)

    def __contains__(self, name: object) -> bool:
        return name in self._catalog

    def __iter__(self) -> Iterator[str]:
        """The names of all models, sorted."""
        return iter(self._catalog.names())

    def __len__(self) -> int:
        """The number of models, whatever number of versions each has."""
        return len(self._catalog.names())

    @property
    def closed(self) -> bool:
        """Whether it was closed, or belongs to the process that this one was forked from."""
        return self._catalog.is_shut

    @property
    def model_store(self) -> Path | None:
        """The folder in which names are looked up, absolute; None if there is none."""
        return self._sources.model_store

    def warm(self) -> None:
        """Start the process that imports torch, so that a first worker need not wait for it. Does not block."""
        self._catalog.check_usable()
        self._backend.warm()

    def register(
        self,
        url: str | os.PathLike[str],
        *,
        model_name: str | None = None,
        version: str | None = None,
        handler: str | None = None,
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
        scale_down_delay: float | None = None,
        template_idle_timeout: float | None = None,
        default_workers: int = 1,
        trusted: bool = True,
        loaded_at_startup: bool = False,
    ) -> Model:
        """Register a model version and start its workers; return it.

        What is None is taken from the archive's model-config.yaml, then from the settings, then the default. Blocks
        while the source is unpacked and, if ``synchronous``, until the workers are ready. After an error nothing is
        registered and nothing is left over.

        Args:
            url: an archive (``.mar``, ``.tgz``) or a folder with the same content: a name in the model store, a path,
                or a ``file://`` URL.
            model_name: the name, without ``/``; default: the manifest's.
            version: the version, without ``/``; default: the manifest's, else "1.0".
            handler: ``module``, ``module.py``, ``module:function``, or a shipped handler; default: the manifest's.
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
            scale_down_delay: for how long, in s, a worker above ``initial_workers`` must not have been needed before it
                goes, at least 0; default 60.
            template_idle_timeout: for how long, in s, there may be no worker before the process that has loaded the model
                for the next one is given up, at least 0; default 600.
            default_workers: ``initial_workers`` where neither the call nor the archive nor the settings say it.
            trusted: False if ``url`` came from outside the program: then only the model store is looked into.
            loaded_at_startup: what ``describe`` says of it. If True, it takes the place of what is stored but not restored
                yet: of the same version, and of another version that came from the same ``url``; then it stays
                registered also if its workers cannot start. What the call leaves open, the numbers of workers included,
                is taken from what is stored, if that is the same version from the same ``url``.

        Raises:
            InvalidArgument: an argument has the wrong type or range.
            SourceNotFound, SourceNotAllowed, DownloadFailed, InvalidArchive: the source cannot be used.
            AlreadyRegistered: this version is registered, or is being registered by another caller.
            WorkerStartFailed: ``synchronous``, and a worker could not be started.
            ManagerClosed: the manager was closed.
        """
        self._catalog.check_usable()
        wishes = Wishes(
            model_name=model_name,
            version=version,
            handler=handler,
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
            scale_down_delay=scale_down_delay,
            template_idle_timeout=template_idle_timeout,
            default_workers=default_workers,
            trusted=trusted,
            loaded_at_startup=loaded_at_startup,
        )
        if synchronous:
            self._check_may_wait("register")
        self._warm_for(wishes)
        with contextlib.ExitStack() as undo:
            folder = undo.enter_context(self._sources.open(url, trusted=trusted))
            version, scale = self._prepare(folder, wishes)
            self._announce(version, is_default=self._catalog.add(version, at_startup=loaded_at_startup))
            undo.pop_all()  # from here on the version owns the folder
        version.start(scale)
        if synchronous:
            self._wait_or_withdraw(version)
        self._record()
        return Model(self, version.key)

    def restore(self, snapshot: Mapping[str, Any] | None = None) -> tuple[ModelInfo, ...]:
        """Bring back what is stored and not served, some versions at once; return what is known of each then.

        Blocks until the sources are opened and the workers ready. Everything is as it was asked for: versions in their
        order, defaults, numbers of workers as scaled last, and what the registrations said; what they left open is taken
        from the archive and the settings as these are now. An archive that has changed meanwhile is taken as it is, with
        a warning, unless it holds another model or version. What cannot be brought back is FAILED with its reason as
        last error, is logged and told (``ModelNotRestored``), and stays stored; it stops no other. Calling this or
        :meth:`scale` tries it again, and :meth:`unregister` gives it up.

        Before its turn a version is LOADING, and requests for it raise NoWorker.

        Args:
            snapshot: what TorchServe wrote as ``model_snapshot``: its versions are stored and brought back, too, but for
                those that are registered or stored already. Archives are looked up in the model store.

        Raises:
            InvalidArgument: ``snapshot`` is no such thing.
            ManagerClosed: the manager was closed, perhaps meanwhile.
        """
        self._catalog.check_usable()
        self._check_may_wait("restore")
        if snapshot is not None:
            self._add_stored(from_torchserve(snapshot))
            self._record()
        absent = self._catalog.absent()
        in_parallel(self._bring_back, absent, limit=RESTORED_AT_ONCE)
        self._record()
        infos = []
        for version in absent:
            with contextlib.suppress(ModelNotFound, ModelVersionNotFound):  # unregistered meanwhile
                infos.append(self.describe(version.key.name, version.key.version))
        return tuple(infos)

    def models(self) -> tuple[ModelInfo, ...]:
        """Return the default version of every model, sorted by name. Does not block."""
        return tuple(version.info(is_default=True) for version in self._catalog.defaults())

    def versions(self, name: str) -> tuple[ModelInfo, ...]:
        """Return all versions of a model, oldest first; raise ModelNotFound. Does not block."""
        versions, default = self._catalog.versions(name)
        return tuple(each.info(is_default=each.key.version == default) for each in versions)

    def describe(self, name: str, version: str | None = None, *, customized: bool = False) -> ModelInfo:
        """Return what is known of a version (the default one unless given). Does not block, unless ``customized``.

        ``customized`` has a worker run the handler's ``describe_handle``, and waits for it at most response_timeout.

        Raises:
            ModelNotFound, ModelVersionNotFound: it is not registered.
            NoWorker, HandlerFailed, WorkerDied, DeadlineExceeded: ``customized``, and the handler could not be asked.
        """
        found = self._catalog.get(name, version)
        if customized:
            self._check_may_wait("describe(customized=True)")
        with self._catalog.gone_is_not_found(found):
            metadata = found.customized() if customized else None
        return found.info(is_default=self._catalog.is_default(found.key), metadata=metadata)

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

        What was wanted stays wanted, also if a worker fails to start. A version that could not be restored is tried again:
        that blocks while its source is unpacked.

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
        found = self._catalog.get(name, version)
        wanted = Scale(min_worker, min_worker if max_worker is None else max_worker)
        with self._catalog.gone_is_not_found(found):
            found.scale(wanted, timeout)
            self._record()
            if isinstance(found, AbsentVersion):
                self._try_again(found)
            if synchronous:
                found.wait_ready()
        return self.describe(name, found.key.version)

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
        found = self._catalog.get(name, version)
        with self._catalog.gone_is_not_found(found):
            found.wait_ready(timeout)

    def set_default(self, name: str, version: str) -> None:
        """Have requests that name no version go to this one from now on. Does not block, but for the state file.

        Raises:
            ModelNotFound, ModelVersionNotFound: it is not registered.
        """
        self._catalog.set_default(name, version)
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
        self._catalog.check_usable(name, version)
        self._check_may_wait("unregister")
        limit = self.settings.unregister_model_timeout if timeout is None else timeout
        check_number("timeout", limit, minimum=0, unit="seconds", whole=False)
        with self._catalog.removing(name, version) as removed:
            self._record()
            self._announcer.tell(ModelUnregistered(removed.key))
            return removed.close(limit)

    def predict(
        self,
        name: str,
        data: object = None,
        *,
        fields: Mapping[str, Any] | None = None,
        version: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Run one request and return what the handler answered to it. Blocks until then; arguments as in :meth:`submit`.

        Raises:
            ModelNotFound, ModelVersionNotFound, NoWorker, QueueFull, InvalidArgument, ManagerClosed: as :meth:`submit`.
            HandlerFailed: the handler raised, or answered wrongly; has its traceback and the worker's last lines.
            WorkerDied: the worker ended while it ran the request.
            DeadlineExceeded: there was no answer within ``timeout``.
        """
        self._check_may_wait("predict")
        future = self.submit(name, data, fields=fields, version=version, headers=headers, timeout=timeout)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # the caller was interrupted, so nobody waits for it any more
            raise

    def submit(
        self,
        name: str,
        data: object = None,
        *,
        fields: Mapping[str, Any] | None = None,
        version: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> AnswerFuture:
        """Queue one request and return the future of its answer. Does not block; any thread.

        Callbacks of the future run on the thread that reads all answers, so they must not wait for another one:
        ``predict`` and other calls that wait raise WouldWaitForever there.

        Args:
            name: the model.
            data: what the handler gets as ``{"body": data}``; must be picklable.
            fields: the whole row that the handler gets, in place of that.
            version: the version; default: the default one.
            headers: what the handler finds through ``context.get_request_header``.
            timeout: seconds until the request fails with DeadlineExceeded, at least 0; None: no limit. One that was not
                started by then never runs. ``Future.cancel`` takes a request back that was not started.

        Raises:
            ModelNotFound, ModelVersionNotFound: it is not registered.
            NoWorker: it is scaled to zero, or its workers could not be started.
            QueueFull: ``job_queue_size`` requests wait already.
            InvalidArgument: the data cannot be pickled, or an argument has the wrong type or range.
        """
        found = self._catalog.get(name, version)
        request_id = f"{self._request_prefix}{next(self._request_numbers):016x}"
        request = request_of(data, fields, headers, request_id, timeout)
        future = AnswerFuture(found.key, keeps_alive=self)  # a caller may hold nothing but the future
        try:
            found.submit(request, timeout, future)
        except (ManagerClosed, ModelNotFound):
            raise self._catalog.not_found(found) from None
        return future

    def close(self, timeout: float = 30) -> CloseReport:
        """End everything within about ``timeout`` seconds and return what had to be done for it. Blocks; idempotent.

        In this order: refuse new requests, let accepted ones finish, tell the workers to end, kill those that do not,
        remove what was unpacked. In a forked copy it does nothing.
        """
        check_number("timeout", timeout, minimum=0, unit="seconds", whole=False)
        if self._catalog.is_forked:
            return CloseReport(0.0)
        self._check_may_wait("close")
        with self._close_lock:
            if self._report is None:
                self._report = self._close(timeout)
            return self._report

    # -- the rest is for this file -------------------------------------------------------------------------------------

    def _check_may_wait(self, call: str) -> None:
        for backend in tuple(self._backends.values()):
            if backend.on_own_thread():
                raise WouldWaitForever(call)

    def _warm_for(self, wishes: Wishes) -> None:
        """Have torch imported while the source is unpacked, if there are going to be worker processes."""
        workers = wishes.default_workers if wishes.initial_workers is None else wishes.initial_workers
        if workers and wishes.backend != "thread":
            with contextlib.suppress(OSError):  # the start of the first worker meets it again, and tells of it
                self._backend.warm()

    def _open_state(self, path: str | os.PathLike[str]) -> StateKeeper:
        """Take hold of the state file, and have the catalog show what it holds."""
        from torchmgmt.state_file import StateFile, StateKeeper  # most programs keep no state

        keeper = StateKeeper(StateFile(path), self._announcer.state_not_written)
        try:
            self._add_stored(keeper.load() or DesiredState())
        except BaseException:
            keeper.close()
            raise
        return keeper

    def _add_stored(self, state: DesiredState) -> None:
        for model in state.models:
            stand_ins = [AbsentVersion(stand_in_of(stored, self.settings), stored) for stored in model.versions]
            self._catalog.add_stored(model, stand_ins)

    def _record(self) -> None:
        """Return when what is wanted now is on the disk, if there is a state file."""
        if self._keeper is not None:
            self._keeper.record(self._catalog.desired)

    def _prepare(self, folder: ModelFolder, wishes: Wishes) -> tuple[ServedVersion, Scale]:
        """Return the version to register, not to be found yet, and how many workers to begin with."""
        key = key_of(folder, wishes)
        stored = self._stored_like(key, folder.url) if wishes.loaded_at_startup else None
        if stored is not None:
            wishes = complete(wishes, stored)
        spec = spec_of(folder, wishes, self.settings)
        if stored is not None and wishes.initial_workers is None and wishes.max_workers is None:
            scale = stored.scale
        else:
            scale = scale_of(folder, wishes, self.settings)
        kept = stored_of(key, folder, wishes, scale, self.model_store)
        return self._make_version(spec, folder, kept, is_kept=not wishes.synchronous), scale

    def _stored_like(self, key: ModelKey, url: str) -> StoredVersion | None:
        """Return what is stored, and not restored yet, of a version that came from the same place."""
        found = (absent.stored for absent in self._catalog.absent() if absent.key == key)
        return next((stored for stored in found if stored.url == url), None)

    def _make_version(
        self, spec: ModelSpec, folder: ModelFolder, stored: StoredVersion, *, is_kept: bool
    ) -> ServedVersion:
        backend = self._backend_of(spec)
        pool = WorkerPool(
            spec,
            backend=backend,
            worker_ids=self._worker_ids,
            listener=self._announcer.tell,
        )
        batcher: Batcher[WorkerRequest, Encoded] = Batcher(
            batch_size=spec.batch_size,
            max_batch_delay=spec.max_batch_delay_ms,
            capacity=spec.job_queue_size,
            name=f"model {spec.key.name} version {spec.key.version}",
            on_ready=pool.pump,
            call_at=backend.call_at,
        )
        pool.feed_from(batcher)
        return ServedVersion(spec, folder, batcher, pool, stored, is_kept)

    def _announce(self, version: Version, *, is_default: bool) -> None:
        self._announcer.tell(ModelRegistered(version.key))
        if is_default:
            self._announcer.tell(DefaultVersionSet(version.key))

    def _bring_back(self, absent: AbsentVersion) -> None:
        """Restore a version and wait for its workers; what goes wrong is logged and told, and stops no other."""
        self._try_again(absent)
        try:
            absent.wait_ready()
        except ManagerClosed:
            self._catalog.check_usable()  # else somebody has unregistered it
        except TorchmgmtError as error:
            log.error("%s could not be restored: %s", absent.key, str(error).partition("\n")[0])

    def _try_again(self, absent: AbsentVersion) -> None:
        """Open the source of a version that is stored, and serve it; unless another thread is at it."""
        if not absent.begin():
            return
        try:
            self._open_stored(absent)
        except BaseException as error:
            absent.fail(str(error) or type(error).__name__)
            if not isinstance(error, TorchmgmtError | OSError) or isinstance(error, ManagerClosed):
                raise
            self._announcer.tell(ModelNotRestored(absent.key, str(error)))

    def _open_stored(self, absent: AbsentVersion) -> None:
        stored = absent.stored
        with contextlib.ExitStack() as undo:
            wishes = wishes_of(stored)
            opened = undo.enter_context(self._sources.open(stored.place or stored.url, trusted=stored.trusted))
            folder = evolve(opened, url=stored.url)
            check_is_same(folder, wishes, stored)
            spec = spec_of(folder, wishes, self.settings)
            version = self._make_version(spec, folder, evolve(stored, digest=folder.digest), is_kept=True)
            if not self._catalog.replace(absent, version):
                return
            undo.pop_all()
        self._announce(version, is_default=self._catalog.is_default(version.key))
        version.start(absent.stored.scale)  # as scaled last, perhaps since this was begun

    def _backend_of(self, spec: ModelSpec) -> Backend:
        with self._backends_lock:
            self._catalog.check_usable()
            if spec.backend not in self._backends:
                from torchmgmt.backends.thread import ThreadBackend  # most programs use none

                self._backends[spec.backend] = ThreadBackend()
                self._owned_backends.append(self._backends[spec.backend])
            return self._backends[spec.backend]

    def _wait_or_withdraw(self, version: ServedVersion) -> None:
        """Wait until a new version's workers are ready; if they cannot be, leave nothing registered.

        One that is kept already, because it took the place of what was stored, stays.
        """
        try:
            with self._catalog.gone_is_not_found(version):
                version.wait_ready()
            self._catalog.keep(version)
        except BaseException:
            if not version.is_kept:
                self._withdraw(version)
            raise

    def _withdraw(self, version: ServedVersion) -> None:
        with self._catalog.withdrawing(version) as is_ours:
            if is_ours:
                self._announcer.tell(ModelUnregistered(version.key))
            version.close(0)

    def _close(self, timeout: float) -> CloseReport:
        started = time.monotonic()
        versions = self._catalog.shut()
        # Each phase for all of them before the next one: their workers finish and end side by side.
        for version in versions:
            version.refuse()
        for version in versions:
            version.wait_quiet(started + timeout - time.monotonic())
        for version in versions:
            version.end(started + timeout)
        reports = [version.join(started) for version in versions]
        for version in versions:
            version.release()
        for backend in self._owned_backends:
            backend.close()
        self._sources.close()
        if self._keeper is not None:
            self._keeper.close()
        self._finalizer.detach()
        return _total(time.monotonic() - started, reports)


def _check_listeners(listeners: object) -> tuple[Listener, ...]:
    found = tuple(listeners) if isinstance(listeners, Iterable) else (None,)
    if not all(callable(listener) for listener in found):
        raise InvalidArgument("listeners", listeners, "a sequence of callables that take an event")
    return found


def _total(seconds: float, reports: Sequence[CloseReport]) -> CloseReport:
    return CloseReport(
        seconds,
        sum(report.stopped_workers for report in reports),
        tuple(pid for report in reports for pid in report.killed_pids),
        sum(report.failed_requests for report in reports),
    )


_open_managers: weakref.WeakSet[ModelManager] = weakref.WeakSet()


@atexit.register
def _close_open_managers() -> None:
    """Leaving the program closes what is open: requests finish, workers end in good order."""
    for manager in list(_open_managers):
        manager.close()


def _abandon(catalog: Catalog, sources: ModelSources, backends: Sequence[Backend], keeper: StateKeeper | None) -> None:
    """End what a manager ran that nobody can reach any more."""
    if catalog.is_forked:
        return

    def end() -> None:
        for version in catalog.shut():
            version.close(0)
        for backend in backends:
            backend.close()
        sources.close()
        if keeper is not None:
            keeper.close()

    # Not here: a garbage collection may run anywhere, also while this thread holds one of the locks that this needs.
    threading.Thread(target=end, name="torchmgmt-abandoned", daemon=True).start()
