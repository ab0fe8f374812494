"""Workers as processes: forked from a template that has loaded the model, spoken to through a socket."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Protocol

from torchmgmt.backends import WorkerListener
from torchmgmt.backends.child import Child
from torchmgmt.backends.forkserver import ForkServer
from torchmgmt.backends.output import Output
from torchmgmt.backends.process_worker import ProcessWorker
from torchmgmt.backends.template import Template
from torchmgmt.checks import check_pattern
from torchmgmt.dispatcher import Dispatcher
from torchmgmt.errors import ManagerClosed, TorchmgmtError
from torchmgmt.log_relay import LogRelay
from torchmgmt.records import ModelSpec, ShareWeights, Sharing, WorkerJob

__all__ = ["ProcessBackend"]

log = logging.getLogger(__name__)
worker_log = logging.getLogger("torchmgmt.workers")

_LOOK_PERIOD_S = 0.5
_SETTLED_S = 1.0  # after its start, the memory of a process is worth knowing
_SAMPLE_PERIOD_S = 5.0
# A template that is to go is given up after so long, or once nobody would hear of its end, which is looked at so often.
_GONE_LIMIT_S = 30.0
_GONE_LOOK_S = 0.1
_SAMPLING_S = 0.01  # at one look: it takes milliseconds for each process, of which there may be hundreds


class _Looked(Protocol):
    """A process that is looked after."""

    @property
    def child(self) -> Child: ...

    def end_if_stopped(self) -> None: ...

    def process_exited(self, exitcode: int | None) -> None: ...


class ProcessBackend:
    """Runs each worker in a process of its own (the default backend).

    One object serves any number of models. It starts nothing before the first worker or :meth:`warm`: then one process
    that imports torch, and two threads; one more once something is logged. POSIX only: it needs fork and descriptors passed over sockets.

    Args:
        blacklist_env_vars: a regular expression: no environment variable whose whole name matches is given to any process.
            None: only those are kept from a worker that its model's registration keeps from it.

    Raises:
        InvalidArgument: ``blacklist_env_vars`` is no regular expression.
    """

    can_kill = True

    def __init__(self, blacklist_env_vars: str | None = None) -> None:
        check_pattern("blacklist_env_vars", blacklist_env_vars)
        self._relay = LogRelay()
        self.dispatcher = Dispatcher("torchmgmt-dispatcher", relay=self._relay)
        """Reads channels, and has pools decide."""
        # Answers must not wait for who prints much, nor for psutil.
        self._output_dispatcher = Dispatcher("torchmgmt-output", relay=self._relay)
        self.forkserver = ForkServer(self.dispatcher, self._output_dispatcher, blacklist_env_vars)
        self.is_closed = False
        self._close_lock = threading.Lock()
        self._lock = threading.Lock()
        # guarded by _lock
        self._processes: dict[_Looked, float] = {}  # with when its memory is to be sampled next, as of time.monotonic
        self._is_looking = False

    def __repr__(self) -> str:
        return f"<ProcessBackend: {len(self._processes)} processes, torch-only process {self.forkserver.pid}>"

    def host(self, spec: ModelSpec) -> ProcessHost:
        """Return what will run the workers of ``spec``; see :class:`torchmgmt.backends.Backend`."""
        return ProcessHost(self, spec)

    def warm(self) -> None:
        """Start the torch-only process in the background. Any thread; idempotent."""
        self.forkserver.warm()

    def close(self) -> None:
        """End the torch-only process, every process that is left, and the two threads. Blocks shortly; idempotent."""
        self.is_closed = True
        with self._close_lock:  # one after the other: the second must not close what the first still tells workers with
            self.forkserver.close()
            self._report_the_rest()
            self.dispatcher.close()
            self._output_dispatcher.close()
            self._relay.close()

    def output(self, fd: int, spec: ModelSpec, who: str) -> Output:
        """Read what a process prints that is called ``who``; for this backend's own parts."""
        return Output(fd, self._output_dispatcher, _WorkerLog(worker_log, spec, who))

    def log(self, level: int, message: str, *args: object) -> None:
        """Log a message on another thread; for this backend's own parts."""
        self._relay.log(log, level, message, *args)

    def look_after(self, process: _Looked) -> None:
        """Sample its memory and see that it is not stopped, until :meth:`forget`; for this backend's own parts."""
        with self._lock:
            self._processes[process] = time.monotonic() + _SETTLED_S
            was_looking, self._is_looking = self._is_looking, True
        if not was_looking:
            try:
                self._look_later()
            except BaseException:
                with self._lock:
                    self._is_looking = False
                raise

    def forget(self, process: _Looked) -> None:
        """Drop a process that is gone."""
        with self._lock:
            self._processes.pop(process, None)

    def _look_later(self) -> None:
        self._output_dispatcher.call_at(time.monotonic() + _LOOK_PERIOD_S, self._look)

    def _look(self) -> None:
        with self._lock:
            processes = dict(self._processes)
            self._is_looking = bool(processes)
        if not processes:
            return
        with contextlib.suppress(ManagerClosed):
            self._look_later()  # first: whatever goes wrong with one of them, the others are looked after
        for process in processes:
            process.end_if_stopped()
        self.forkserver.end_if_stopped()
        self._sample(processes)

    def _sample(self, due: Mapping[_Looked, float]) -> None:
        """Sample the memory of those whose turn it is, as many as there is time for; the others are the first next time."""
        until = time.monotonic() + _SAMPLING_S
        for process in sorted(due, key=due.__getitem__):
            now = time.monotonic()
            if due[process] > now or now > until:
                return
            with self._lock:
                if process in self._processes:
                    self._processes[process] = now + _SAMPLE_PERIOD_S
            process.child.sample_memory()

    def _report_the_rest(self) -> None:
        """Tell of what ended with the torch-only process: nobody else does, and pools wait for it."""
        with self._lock:
            processes = list(self._processes)
        if not processes:
            return
        for process in processes:
            process.child.send(signal.SIGKILL)  # what had outlived an earlier one did not end with this one
        told = threading.Event()
        try:
            for process in processes:
                self.dispatcher.call_soon(functools.partial(process.process_exited, None))
            self.dispatcher.call_soon(told.set)
        except ManagerClosed:
            return  # it was closed before, and they were told then
        if not self.dispatcher.on_thread():
            told.wait()


class ProcessHost:
    """Runs the workers of one model version: keeps their template; see :class:`torchmgmt.backends.ModelHost`."""

    def __init__(self, backend: ProcessBackend, spec: ModelSpec) -> None:
        self.dispatcher = backend.dispatcher
        self._backend = backend
        self._spec = spec
        self._changed = threading.Condition()
        # guarded by _changed
        self._sharing = _decided_before(spec)
        self._template: Template | None = None
        self._templates: set[Template] = set()  # those on their way out included
        self._said = ""
        self._unforked: set[ProcessWorker] = set()  # those that were started and have no process yet

    @property
    def is_closed(self) -> bool:
        """Whether the backend is closed, so that there will be no more workers."""
        return self._backend.is_closed

    @property
    def sharing(self) -> Sharing:
        """Which way the workers get their weights, and why."""
        return self._sharing

    def worker(self, worker_id: str, threads: int, listener: WorkerListener) -> ProcessWorker:
        """Return a worker, not started yet, that will compute with ``threads`` threads. Starts nothing."""
        return ProcessWorker(self, WorkerJob(self._spec, worker_id, threads), listener)

    def rest(self) -> None:
        """Give up the template; the next worker loads the model anew. Does not block; idempotent.

        While a worker waits to be forked from it this does nothing: that was wanted after the wish to rest.
        """
        with self._changed:
            if self._unforked:
                return
            template, self._template = self._template, None
            self._sharing = _decided_before(self._spec)
        if template is not None:
            template.end()

    def close(self) -> None:
        """Give up the template, and block until it is gone. To be called when no worker is left; idempotent."""
        self.rest()
        with self._changed:
            templates = list(self._templates)
        for template in templates:
            template.end()
        deadline = time.monotonic() + _GONE_LIMIT_S
        with self._changed:
            # It is killed, and the backend reports every end, its own included; unless the thread has ended that would.
            while self._templates and not self.dispatcher.has_ended and time.monotonic() < deadline:
                self._changed.wait(_GONE_LOOK_S)
            left = list(self._templates)
        for template in left:
            template.child.send(signal.SIGKILL)

    # -- for its workers -----------------------------------------------------------------------------------------------

    def open_output(self, fd: int, job: WorkerJob) -> Output:
        """Read what a worker prints."""
        return self._backend.output(fd, self._spec, f"worker {job.worker_id}")

    def fork(self, worker: ProcessWorker, job: WorkerJob, fds: Sequence[int]) -> None:
        """Have a worker forked, from the template unless there must be none."""
        try:
            with self._changed:
                self._unforked.add(worker)
            self._backend.look_after(worker)
            with self._changed:
                template = self._template_locked()
        except BaseException:
            for fd in fds:
                os.close(fd)
            self.forget(worker)
            raise
        try:
            if template is None:
                self._say_once()
            if template is None or not template.fork(worker, job, fds):
                worker.template = None
                self._backend.forkserver.fork(job, fds, worker)
        except BaseException:
            self.forget(worker)
            raise

    def withdraw(self, worker: ProcessWorker) -> bool:
        """Take back the wish to have a worker forked; whether that was in time."""
        template = self._template
        return template is not None and template.withdraw(worker)

    def end_loading(self, worker: ProcessWorker) -> bool:
        """End the template that the worker waits for; whether it waits for one."""
        template = self._template
        limit = f"it did not load the model within startup_timeout ({self._spec.startup_timeout_s:g} s)"
        return template is not None and template.end_loading(worker, limit)

    def hung_after_fork(self, worker: ProcessWorker) -> None:
        """Fork no more from this template: what comes of it hangs."""
        reason = f"{worker} was forked from a template and hung"
        with self._changed:
            template, self._template = self._template, None
            self._sharing = Sharing(False, reason)
        self._say_once(logging.WARNING)
        if template is not None:
            template.end()

    def forget(self, worker: ProcessWorker) -> None:
        """A worker is gone."""
        self._backend.forget(worker)
        self.was_forked(worker)

    def was_forked(self, worker: ProcessWorker) -> None:
        """A worker does not wait for the template any more."""
        with self._changed:
            self._unforked.discard(worker)

    def _template_locked(self) -> Template | None:
        if self._sharing.is_shared is False:
            return None
        if self._template is None:
            template = Template(self, self._spec, self._backend.forkserver, self.dispatcher)
            self._templates.add(template)
            try:
                self._backend.look_after(template)
                template.start(lambda fd: self._backend.output(fd, self._spec, "template"))
            except BaseException:
                self._backend.forget(template)
                self._templates.discard(template)
                raise
            self._template = template
        return self._template

    def _say_once(self, level: int = logging.INFO) -> None:
        """Say in the log that workers load by themselves, and why, unless that was said."""
        with self._changed:
            said, self._said = self._said, self._sharing.reason
        if said != self._said:
            self._backend.log(level, "Workers of %s load the model by themselves: %s", self._spec.key, self._said)

    # -- for its template, on the dispatcher's thread ------------------------------------------------------------------

    def check_fitness(self, template: Template, objections: Sequence[str], *, is_impossible: bool) -> bool:
        """Decide whether the template may be forked, given what loading the model left behind."""
        found = "; ".join(objections)
        may = not objections or (self._spec.share_weights is ShareWeights.ALWAYS and not is_impossible)
        if may:
            reason = f"share_weights=always, in spite of {found}" if found else "loading it left nothing behind"
            message = "Workers of %s are forked from a template and share its weights: %s"
            self._backend.log(logging.INFO, message, self._spec.key, reason)
        else:
            reason = f"loading it left behind {found}"
        with self._changed:
            if self._template is not template:
                return may  # it was given up meanwhile
            self._sharing = Sharing(may, reason)
            if not may:
                self._template = None
        if not may:
            self._say_once()
        return may

    def fork_separately(self, worker: ProcessWorker, job: WorkerJob, fds: Sequence[int]) -> None:
        """Have a worker forked that loads the model by itself."""
        try:
            self._backend.forkserver.fork(job, fds, worker)
        except (OSError, TorchmgmtError) as error:
            worker.fork_failed(f"its process could not be started: {error}", [])

    def ended(self, template: Template) -> None:
        """A template is gone, or has become a worker."""
        self._backend.forget(template)
        with self._changed:
            if self._template is template:
                self._template = None
            self._templates.discard(template)
            self._changed.notify_all()


class _WorkerLog(logging.LoggerAdapter):  # type: ignore[type-arg]  # cannot be subscripted before Python 3.11
    """Says which process a line is from, in the text and as fields of the record."""

    def __init__(self, logger: logging.Logger, spec: ModelSpec, who: str) -> None:
        super().__init__(
            logger, {"model": spec.key.name, "version": spec.key.version, "worker": who.removeprefix("worker ")}
        )
        self._prefix = f"{spec.key} {who}: "

    def process(self, msg: str, kwargs: MutableMapping[str, Any]) -> tuple[str, MutableMapping[str, Any]]:
        return self._prefix.replace("%", "%%") + msg, {**kwargs, "extra": self.extra}


def _decided_before(spec: ModelSpec) -> Sharing:
    """Return what is known before the model is loaded."""
    if spec.share_weights is ShareWeights.NEVER:
        return Sharing(False, "share_weights=never")
    device = spec.config.get("deviceType")
    if isinstance(device, str) and device.lower() != "cpu":
        return Sharing(False, f"its deviceType is {device}: a context on an accelerator does not survive a fork")
    return Sharing()
