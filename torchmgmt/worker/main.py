"""The body of a worker process: takes over after the fork, loads the handler, runs batches until told to stop."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

import torch
from attrs import evolve, frozen

from torchmgmt.allocator import keep_freed_memory
from torchmgmt.channel import Buffer, Channel, Frame, Kind
from torchmgmt.compat import install_ts
from torchmgmt.exchange import AnswerHead, Encoded
from torchmgmt.handlers.context import Context
from torchmgmt.handlers.faults import NO_FAULT
from torchmgmt.handlers.recorder import make_current
from torchmgmt.page import Page
from torchmgmt.records import ModelSpec, RawMetric, WorkerFault, WorkerJob
from torchmgmt.segments import BrokenSegment
from torchmgmt.variables import without_matching
from torchmgmt.worker.batch import attempt, fault_of, run_batch
from torchmgmt.worker.forking import WORKER_VARIABLE
from torchmgmt.worker.generators import GlobalGenerators, reseed
from torchmgmt.worker.loader import Handler, load_handler
from torchmgmt.worker.modules import ImportedModules
from torchmgmt.worker.open_files import Descriptor, descriptors
from torchmgmt.worker.parts import PartSender
from torchmgmt.worker.process import (
    EXIT_NOT_LOADED,
    EXIT_STOPPED,
    add_packages,
    be_process,
    die_with,
    hide_variables,
    keep_standard_streams_open,
    redirect_output,
    restore_environment,
    run_to_exit,
)
from torchmgmt.worker.shutdown import ShutDown, disown_finalizers
from torchmgmt.worker.warmup import has_warm_up, warm_up

__all__ = ["Loaded", "WorkerProcess", "load_model"]

log = logging.getLogger(__name__)

# For so long a worker waits awake for its next batch.
_AWAKE_S = 200e-6
# So many numbers that torch splits the work among its threads (it gives each at least 32768).
_ENOUGH_TO_SHARE = 1 << 18


@frozen
class Loaded:
    """A model that a template has loaded."""

    handler: Handler
    pid: int
    """The template's, which may become a worker itself."""
    left_open: frozenset[Descriptor]
    """The descriptors that loading it has left open."""
    generators: GlobalGenerators
    """The global random generators, as loading has left them."""
    threads: int | None
    """The number of threads that the handler asked for, if it did."""
    is_doubtful: bool = False
    """Whether the template is forked in spite of what it has, such as threads, so that a worker may hang."""
    on_child_end: Callable[[int, FrameType | None], Any] | int | None = signal.SIG_DFL
    """What the handler wants to happen at SIGCHLD, which the template needs for itself."""


class WorkerProcess:
    """One worker, from just after the fork to its end.

    Args:
        job: what to load, and how many threads to use.
        fds: the socket to the embedding process, where stdout and stderr go, the page of shared memory in which it
            writes the number of the batch that it begins, and a live object that was written down.
        root_pidfd: the embedding process; -1 where there are no pidfds.
        environment: variables that the torch-only process needed otherwise than the program had them.
        modules: what was imported before the fork.
        loaded: the model, if it was forked from a template; None: it loads the model itself.
    """

    def __init__(
        self,
        job: WorkerJob,
        fds: Sequence[int],
        root_pidfd: int,
        environment: Mapping[str, str | None],
        modules: ImportedModules,
        loaded: Loaded | None = None,
    ) -> None:
        self._job = job
        self._channel_fd, self._output_fd, self._page_fd, *snapshot = fds
        if job.spec.live is not None:
            job.spec.live.attach(tuple(snapshot))
        self._root_pidfd = root_pidfd
        self._environment = environment
        self._modules = modules
        self._loaded = loaded
        self._ours: frozenset[Descriptor] = frozenset()

    def run(self) -> NoReturn:
        """Be the worker. Never returns."""
        run_to_exit(self._run)

    def _run(self) -> int:
        self._take_over_process()
        channel = Channel(socket.socket(fileno=self._channel_fd), forgives=True)
        # A child that the handler forks must not keep our channel open when we are gone.
        os.register_at_fork(after_in_child=channel.close)
        try:
            handler = self._handler()
            # What the layers need for one batch they need for the next one again; what loading has left nobody needs.
            keep_freed_memory()
            if handler.has_begin or has_warm_up(self._job.spec):
                channel.send(Frame(Kind.ALIVE))
            handler.begin(self._job.threads)
            warm_up(handler, self._job.spec)
        except NO_FAULT:
            raise
        except BaseException as error:
            channel.send(Frame(Kind.FAILED, fault_of(error)))
            return EXIT_NOT_LOADED
        try:
            # What was measured while the model was loaded once for all workers counts for each, as if it had loaded it.
            channel.send(Frame(Kind.READY, handler.take_metrics()))
            if _serve(channel, handler, _page(self._page_fd), may_spin=self._job.threads > 1):
                ShutDown(handler.endings(), self._ours).run()
        except BrokenSegment:
            raise
        except ConnectionError:
            log.debug("The embedding process is gone", exc_info=True)
        return EXIT_STOPPED

    def _take_over_process(self) -> None:
        if self._loaded is None:
            be_process(self._output_fd)
            self._ours = descriptors()
            hide_variables(self._job.spec.blacklist_env_vars)
        else:
            # The template has done the rest, and the handler may have changed it to its liking since.
            redirect_output(self._output_fd)
            self._ours = descriptors() - self._loaded.left_open
            if self._loaded.pid != os.getpid():
                disown_finalizers()
            signal.signal(signal.SIGCHLD, self._loaded.on_child_end or signal.SIG_DFL)
            with contextlib.suppress(PermissionError):  # one that was the template leads its session already
                os.setsid()
        restore_environment(without_matching(self._environment, self._job.spec.blacklist_env_vars))
        os.environ[WORKER_VARIABLE] = str(os.getpid())
        if self._loaded is None:
            reseed()
        else:
            self._loaded.generators.settle()
        die_with(self._root_pidfd)

    def _handler(self) -> Handler:
        threads = self._job.threads
        if self._loaded is None:
            torch.set_num_threads(threads)
            return load_model(self._job.spec, self._modules, threads)
        if self._job.spec.live is not None:
            self._job.spec.live.release()  # the template has loaded it
        if self._loaded.is_doubtful:
            _prove_threads()
        torch.set_num_threads(self._loaded.threads or threads)
        return self._loaded.handler


def load_model(spec: ModelSpec, modules: ImportedModules, threads: int | None = None) -> Handler:
    """Load the handler of ``spec`` in the way that archives expect: from its folder, with the ``ts`` names in place.

    ``modules`` are imported afterwards as they were before.
    ``threads`` is how many threads an operation may use; None in a template, whose workers may have other numbers.
    """
    install_ts()
    context = Context.for_model(spec)
    context.system_properties["threads"] = threads
    make_current(context.recorder)
    os.chdir(spec.model_dir)
    if spec.packages is not None:
        add_packages(spec.packages)
    sys.path.insert(0, spec.model_dir)
    try:
        with modules.kept():
            return load_handler(spec, context)
    finally:
        keep_standard_streams_open()


def _prove_threads() -> None:
    """Show that computing with several threads works: where those of OpenMP were lost in the fork it hangs, for ever.

    Then the embedding process, which waits for a sign of life, ends this one and gives up forking the template. A
    template that has no thread but its first when it is forked loses none; to prove that would take half the time of the
    start, as threads of OpenMP wait awake for one another.
    """
    torch.set_num_threads(2)
    torch.ones(_ENOUGH_TO_SHARE).sum()


def _page(fd: int) -> Page:
    with os.fdopen(fd, "r+b", buffering=0) as file:
        return Page(file.fileno())


class _Attention:
    """Waits for what comes next without going to sleep, for a moment, where that has come at once before.

    To wake a process that sleeps takes as long as a small prediction, and it begins with cold caches. So where batches
    follow one another closely, and this worker has more than one core to itself, it looks for the next for a while.
    """

    def __init__(self, channel: Channel, *, may_spin: bool) -> None:
        self._poll = select.poll()
        self._poll.register(channel.fileno(), select.POLLIN)
        self._may_spin = may_spin
        self._idle_since = 0.0
        self._comes_soon = False

    def wait(self) -> None:
        """Return as soon as something is there, or it is not worth to wait awake any longer."""
        self._idle_since = time.perf_counter()
        if not (self._may_spin and self._comes_soon):
            return
        until = self._idle_since + _AWAKE_S
        while not self._poll.poll(0) and time.perf_counter() < until:
            os.sched_yield()  # whoever else needs this core goes first

    def note_arrival(self) -> None:
        """Remember whether what is there now has come soon."""
        self._comes_soon = time.perf_counter() - self._idle_since < _AWAKE_S


def _serve(channel: Channel, handler: Handler, page: Page, *, may_spin: bool) -> bool:
    """Run what comes in, one after the other, until told to stop (True) or the embedding process is gone (False)."""
    attention = _Attention(channel, may_spin=may_spin)
    while True:
        attention.wait()
        frames = channel.read()
        if frames is None:
            return False
        attention.note_arrival()
        for frame in frames:
            if frame.kind is Kind.STOP:
                return True
            if frame.error is not None:
                channel.send(Frame(Kind.REFUSED, _refusal(frame.error), number=frame.number))
            elif frame.kind is Kind.RUN and _begins(channel, page, frame):
                began = time.perf_counter()
                outcomes = run_batch(handler, frame.head, frame.segments, _ChannelSender(channel, page, frame.number))
                frame.segments = ()  # their memory can be used again: the answer says so
                _answer(channel, frame.number, outcomes, handler.take_metrics(), time.perf_counter() - began)
            elif frame.kind is Kind.DESCRIBE and _begins(channel, page, frame):
                _answer(channel, frame.number, [attempt(handler.describe)], handler.take_metrics())


def _begins(channel: Channel, page: Page, frame: Frame) -> bool:
    """Note that a batch begins, if it was not recalled; else say so."""
    page.start(frame.number)  # in this order: what is recalled now is known to be begun
    if not page.is_recalled(frame.number):
        return True
    frame.segments = ()  # their memory can be used again: the answer says so
    channel.send(Frame(Kind.SKIPPED, number=frame.number))
    return False


def _refusal(error: Exception) -> WorkerFault:
    fault = fault_of(error)
    return evolve(fault, reason=f"its worker could not read the request: {fault.reason}")


class _ChannelSender(PartSender):
    """Sends the parts of one batch to the embedding process."""

    def __init__(self, channel: Channel, page: Page, number: int) -> None:
        self._channel = channel
        self._page = page
        self._number = number

    def send(self, index: int, part: Encoded) -> None:
        self._channel.send(Frame(Kind.PART, (index, _head_of(part)), part.segments, self._number))

    def is_abandoned(self) -> bool:
        return self._page.abandoned == self._number


def _answer(
    channel: Channel,
    number: int,
    outcomes: Sequence[Encoded | WorkerFault],
    metrics: Sequence[RawMetric],
    handler_s: float | None = None,
) -> None:
    head: list[WorkerFault | AnswerHead] = []
    segments: list[Buffer] = []
    for outcome in outcomes:
        if isinstance(outcome, WorkerFault):
            head.append(outcome)
            continue
        head.append(_head_of(outcome))
        segments += outcome.segments
    channel.send(Frame(Kind.DONE, (head, metrics, handler_s), segments, number))


def _head_of(answer: Encoded) -> AnswerHead:
    count = len(answer.segments)
    if answer.properties is None and answer.content_type is None:
        return count
    return count, answer.properties, answer.content_type
