"""The template of a model version: a process that has loaded the model once, and is forked for each worker.

It is forked from the torch-only process. If loading the model left something behind that workers must not share, it says
so and is not forked: it becomes the first worker itself, and the others load the model by themselves.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from attrs import evolve

from torchmgmt.channel import Frame, Kind, send
from torchmgmt.handlers.faults import NO_FAULT
from torchmgmt.records import ShareWeights, TemplateJob, WorkerJob
from torchmgmt.system_calls import become_subreaper
from torchmgmt.worker import fitness
from torchmgmt.worker.batch import fault_of
from torchmgmt.worker.forking import WORKER_VARIABLE, Body, Forker, dying_with
from torchmgmt.worker.main import Loaded, WorkerProcess, load_model
from torchmgmt.worker.modules import ImportedModules
from torchmgmt.worker.open_files import descriptors, open_files
from torchmgmt.worker.process import EXIT_NOT_LOADED, EXIT_STOPPED, be_process, hide_variables, run_to_exit
from torchmgmt.worker.uniqueness import LoadWatch

__all__ = ["TemplateProcess"]

log = logging.getLogger(__name__)

_MOST_NAMED = 5
_ADVICE = "what is made in begin() instead, which runs in each worker, is no obstacle"


class TemplateProcess:
    """One template, from just after the fork to its end.

    Args:
        job: what it is the template of.
        fds: the socket to the embedding process, where stdout and stderr go, and a live object that was written down.
        root_pidfd: the embedding process; -1 where there are no pidfds.
        environment: variables that the torch-only process needed otherwise than the program had them. They stay as they
            are while the model is loaded: what makes more than one thread makes a template unfit.
        modules: what was imported before the fork.
    """

    def __init__(
        self,
        job: TemplateJob,
        fds: Sequence[int],
        root_pidfd: int,
        environment: Mapping[str, str | None],
        modules: ImportedModules,
    ) -> None:
        self._spec = job.spec
        self._channel_fd, self._output_fd, *snapshot = fds
        if self._spec.live is not None:
            self._spec.live.attach(tuple(snapshot))
        self._root_pidfd = root_pidfd
        self._environment = environment
        self._modules = modules
        self._parent_pid = os.getpid()  # it is made before the fork
        self._loaded: Loaded | None = None

    def run(self) -> NoReturn:
        """Be the template. Never returns."""
        run_to_exit(self._run)

    def _run(self) -> int:
        be_process(self._output_fd)
        hide_variables(self._spec.blacklist_env_vars)
        become_subreaper()
        os.environ[WORKER_VARIABLE] = str(os.getpid())
        control = socket.socket(fileno=self._channel_fd)
        variables = {name: os.environ.get(name) for name in self._environment}
        ours = descriptors()
        before = fitness.marks() if fitness.can_tell() else None
        try:
            watch = LoadWatch(self._spec, self._modules)
            with dying_with(self._parent_pid), fitness.postponed_thread_settings() as threads, watch:
                handler = load_model(self._spec, self._modules)
        except NO_FAULT:
            raise
        except BaseException as error:
            send(control, Frame(Kind.FAILED, fault_of(error)))
            return EXIT_NOT_LOADED
        gc.collect()  # what is garbage already is no objection
        left, is_final = self._left_behind(before)
        objections = left if before is None else _objections(left, watch.findings(handler))
        if objections and self._spec.share_weights is ShareWeights.ALWAYS and not is_final:
            log.warning("Forked although loading the model left behind: %s", "; ".join(objections))
        self._loaded = Loaded(
            handler,
            pid=os.getpid(),
            left_open=descriptors() - ours,
            generators=watch.generators,
            threads=threads[-1] if threads else None,
            is_doubtful=bool(left),
            on_child_end=signal.getsignal(signal.SIGCHLD),
        )
        # What the handler has set itself, it has set for its workers.
        self._environment = {name: value for name, value in self._environment.items() if _is_still(name, variables)}
        send(control, Frame(Kind.READY, (objections, is_final)))
        if not objections or self._spec.share_weights is ShareWeights.ALWAYS:
            self._settle(open_files(ours) if objections else ())
        successor = Forker(control, self._root_pidfd, self._worker).run()
        if successor is not None:
            successor.run()
        return EXIT_STOPPED

    def _left_behind(self, before: fitness.Marks | None) -> tuple[list[str], bool]:
        """Return what loading has left in this process, and whether to fork it is beyond the handler's author to allow."""
        if accelerators := fitness.accelerators_in_use():
            return [f"a context on an accelerator ({name})" for name in accelerators], True
        if before is None:
            return ["this system does not show what loading a model leaves behind"], False
        return fitness.findings(before, fitness.marks_after(before)), False

    def _settle(self, files: Sequence[Any]) -> None:
        """Make ready to be forked often: what is written is out, and a collection in a worker copies no page of this."""
        for stream in (*files, sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):  # the handler may have closed or replaced it
                stream.flush()
        gc.freeze()

    def _worker(self, job: WorkerJob | TemplateJob, fds: Sequence[int]) -> Body:
        if not isinstance(job, WorkerJob):
            raise TypeError("a template forks workers only")
        loaded = self._loaded
        if loaded is not None and not loaded.is_doubtful and fitness.has_threads():
            loaded = self._loaded = evolve(loaded, is_doubtful=True)  # made by a finalizer, or by who hooks into forks
        return WorkerProcess(job, fds, self._root_pidfd, self._environment, self._modules, loaded)


def _objections(left: Sequence[str], unique: Sequence[str]) -> list[str]:
    """Return what speaks against forking: what loading left behind, what it made unique, and what one may do about that."""
    found = [*left, *(each for each in unique if not any(_path_in(each) in other for other in left))]
    named = found[:_MOST_NAMED]
    if len(found) > _MOST_NAMED:
        named.append(f"{len(found) - _MOST_NAMED} more")
    return [*named, _ADVICE] if found else []


def _path_in(finding: str) -> str:
    """Return the path that a finding names, or all of it."""
    return next((word for word in finding.split() if word.startswith("/")), finding)


def _is_still(name: str, variables: Mapping[str, str | None]) -> bool:
    return os.environ.get(name) == variables[name]
