"""A storm: processes are killed and stopped at random while clients ask and models come, go and are scaled.

``benchmarks/soak.py`` runs it, for as long as one likes, and judges how memory and latency go meanwhile; a test runs that
for half a minute. All choices follow from the seed; what they meet depends on the machine. What must hold is written down in
:mod:`tests.faults.storm_audit` and here: every request ends once, in time, with its answer or an error that makes sense,
and is begun at most once; the pools come to what was wanted; nothing is left.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from random import Random
from typing import TypeAlias
from unittest import mock

import attrs
import psutil

from tests.faults.storm_actors import Assassin, Caller, Client, Steward, World, write_models
from tests.faults.storm_audit import Audit
from tests.faults.storm_http import HTTPClient
from tests.faults.storm_nuisances import Clumsy, Grumbler, Hasty, Interrupter, Switcher
from tests.leaks import MARK, carries, our_descriptors
from torchmgmt import ModelManager
from torchmgmt.errors import TorchmgmtError
from torchmgmt.http import serve
from torchmgmt.http.asgi_server import no_work
from torchmgmt.http.server import start_inference
from torchmgmt.http.sockets import address_of, bind
from torchmgmt.settings import Address

__all__ = ["DefectsLogged", "Look", "Remains", "Report", "storm"]

CLIENTS = 6
HTTP_CLIENTS = 3
HASTY_ONES = 2
REST_S = 60.0
"""How long the pools may take to come to what is wanted, once nobody disturbs them."""


# libuv opens a pipe for signals with the first loop of a process and keeps it: no leak of the storm's.
with suppress(ImportError):
    import uvloop

    uvloop.new_event_loop().close()

Look: TypeAlias = Callable[[World, float], object]


@attrs.frozen
class Watch:
    """Who looks on while the storm rages, and for how long that is."""

    seconds: float
    look: Look
    period_s: float

    def run(self, world: World, audit: Audit) -> None:
        """Block until it is over."""
        end = time.monotonic() + self.seconds
        while (left_s := end - time.monotonic()) > 0:
            audit.look()
            self.look(world, left_s)
            world.over.wait(max(0.0, min(self.period_s, end - time.monotonic())))


@attrs.frozen
class Remains:
    """How much of what a storm makes exists at one moment."""

    processes: int
    descriptors: int
    memory_files: int
    """Shared memory segments: the memory files that are open or mapped here."""
    temporary: int

    @classmethod
    def now(cls, run: str) -> Remains:
        gc.collect()
        descriptors = [target for _, target in our_descriptors()]
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:torchmgmt" in line]
        return cls(
            processes=sum(carries(pid, run) for pid in psutil.pids() if pid != os.getpid()),
            descriptors=len(descriptors),
            memory_files=sum("/memfd:torchmgmt" in target for target in descriptors) + len(mapped),
            temporary=sum(name.startswith("torchmgmt") for name in os.listdir(tempfile.gettempdir())),  # noqa: PTH208 - names are enough
        )

    def exceeds(self, before: Remains) -> bool:
        return any(after > than for after, than in zip(attrs.astuple(self), attrs.astuple(before), strict=True))


@attrs.frozen
class Report:
    """What a storm did and what it found."""

    seconds: float
    seed: int
    requests: int
    begun: int
    outcomes: Mapping[str, int]
    """How those in process ended."""
    predictions: Mapping[str, int]
    """How those over HTTP did."""
    kills: Mapping[str, int]
    steps: Mapping[str, int]
    calls: Mapping[str, int]
    """Of the Management API."""
    before: Remains
    after: Remains
    complaints: list[str]

    def __str__(self) -> str:
        lines = [
            f"storm of {self.seconds:g} s, seed {self.seed}: {self.requests} requests, {self.begun} begun",
            f"  in process: {_listed(self.outcomes)}",
            f"  {sum(self.predictions.values())} predictions over HTTP: {_listed(self.predictions)}",
            f"  kills: {_listed(self.kills)}",
            f"  steps: {_listed(self.steps)}",
            f"  management over HTTP: {_listed(self.calls)}",
            f"  before: {_fields(self.before)}",
            f"  after: {_fields(self.after)}",
        ]
        shown = self.complaints[:20]
        lines += [f"  WRONG: {complaint}" for complaint in shown]
        lines += [f"  … and {len(self.complaints) - len(shown)} more"] if len(self.complaints) > len(shown) else []
        return "\n".join(lines)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"


def _fields(remains: Remains) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in attrs.asdict(remains).items())


def storm(
    seconds: float,
    seed: int,
    *,
    look: Look = lambda _world, _left_s: None,
    look_period_s: float = 1.0,
    peace_s: float = 0.4,
) -> Report:
    """Run one storm of ``seconds`` seconds; blocks for some seconds longer than that.

    ``look`` is called meanwhile, so often, with the seconds that are left; at last, with 0, when the storm is over and
    nothing is closed yet. ``peace_s`` is the most time between two attempts on a process.
    """
    folder = Path(tempfile.mkdtemp(prefix="storm-"))
    try:
        with _marked() as run, _temporary_files_in(folder / "temporary"):
            before = Remains.now(run)
            manager = ModelManager(listeners=[Grumbler(Random(f"{seed} listener"))])
            world = World(manager, write_models(folder), folder / "begun", run, peace_s)
            audit = Audit(world)
            wrong = _rage(world, audit, Watch(seconds, look, look_period_s), seed)
            after = _settled(run, before)
        audit.finish()
        wrong += audit.wrong
        if after.exceeds(before):
            wrong.append("something was left: see the counts")
        if audit.steady_answered <= audit.steady / 2:
            wrong.append(
                f"only {audit.steady_answered} of {audit.steady} requests to models that are always there were answered"
            )
        return Report(
            seconds,
            seed,
            audit.ended,
            audit.begun,
            audit.outcomes,
            audit.predictions,
            world.kills,
            world.steps,
            world.calls,
            before,
            after,
            wrong,
        )
    finally:
        shutil.rmtree(folder)


@contextmanager
def _marked() -> Iterator[str]:
    """Mark the environment, so that every process that is started meanwhile can be told from all others."""
    run, outer = uuid.uuid4().hex, os.environ.get(MARK)
    os.environ[MARK] = f"{outer}/{run}" if outer else run
    try:
        yield run
    finally:
        del os.environ[MARK]
        if outer is not None:
            os.environ[MARK] = outer


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Have temporary files go to a folder of our own: what is left there is ours."""
    folder.mkdir()
    before = tempfile.tempdir
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def _rage(world: World, audit: Audit, watch: Watch, seed: int) -> list[str]:
    """Let everybody loose, then see whether all comes to rest; return what is wrong."""
    wrong: list[str] = []
    defects = DefectsLogged(wrong)
    with defects.watched(), world.manager, serve(world.manager, port=0) as server, ExitStack() as stack:
        # The server's loop has the dispatcher's work, or one of those that give it back all the time.
        switchers = [Switcher(world, Random(f"{seed} switcher"))] if seed % 2 else []
        with mock.patch.object(ModelManager, "run_on", _nobody) if switchers else nullcontext():
            address = stack.enter_context(_inference(world, wrong))
        steward = Steward(world, Random(f"{seed} steward"))
        steward.begin()
        actors = [Client(world, Random(f"{seed} client {number}"), number) for number in range(CLIENTS)]
        over_http = [
            HTTPClient.of(world, Random(f"{seed} HTTP client {number}"), address.host, address.port)
            for number in range(HTTP_CLIENTS)
        ]
        caller = Caller(world, Random(f"{seed} caller"), server.url)
        hasty = [Hasty(world, Random(f"{seed} hasty {number}")) for number in range(HASTY_ONES)]
        nuisances = (
            *hasty,
            *switchers,
            Interrupter(world, Random(f"{seed} interrupter"), hasty),
            Clumsy(world, Random(f"{seed} clumsy")),
        )
        threads = [threading.Thread(target=actor.run) for actor in (*actors, *over_http, steward, caller, *nuisances)]
        assassin = threading.Thread(target=Assassin(world, Random(f"{seed} assassin")).run)
        for thread in (*threads, assassin):
            thread.start()
        try:
            watch.run(world, audit)
        finally:
            world.over.set()
        deadline = time.monotonic() + REST_S
        for thread in (assassin, *threads):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                frame = sys._current_frames().get(thread.ident or 0)
                wrong.append(f"a call did not come back:\n{''.join(traceback.format_stack(frame))}")
        wrong += world.wrong
        wrong += _restless(world)
        watch.look(world, 0.0)
        report = world.manager.close(30)
        if report.failed_requests:
            wrong.append(f"closing found {report.failed_requests} requests that nobody waits for")
    return wrong


def _nobody(_manager: ModelManager, loop: asyncio.AbstractEventLoop) -> Callable[[], object]:
    """Leave the dispatcher's work with its own thread."""
    return no_work(loop)


@contextmanager
def _inference(world: World, wrong: list[str]) -> Iterator[Address]:
    """Serve predictions over HTTP; note if somebody is still waiting for an answer at the end."""
    sock = bind(Address("http", "127.0.0.1", 0))
    address = address_of(sock)
    server = start_inference(world.manager, sock)
    try:
        yield address
    finally:
        if not server.close():
            wrong.append("closing the inference address cut off requests that nobody waits for")


class DefectsLogged(logging.Handler):
    """Takes what only a defect is logged for: that an exception came to where none may come."""

    def __init__(self, wrong: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._wrong = wrong

    def emit(self, record: logging.LogRecord) -> None:
        self._wrong.append(f"{record.name} logged: {self.format(record)}")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch who serves HTTP, and event loops, even where the rest of the log is off."""
        loggers = [logging.getLogger(name) for name in ("torchmgmt.http", "asyncio")]
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(min(logger.getEffectiveLevel(), logging.ERROR))
            logger.addHandler(self)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.removeHandler(self)
                logger.setLevel(level)


def _restless(world: World) -> list[str]:
    """Wait until each version has the workers that are wanted and serves; say which never does."""
    deadline = time.monotonic() + REST_S
    wrong = []
    for name in world.manager:
        while not (is_settled := _is_settled(world.manager, name)) and time.monotonic() < deadline:
            time.sleep(0.02)
        info = world.manager.describe(name)
        if not is_settled:
            states = [worker.state.name for worker in info.workers]
            wrong.append(f"{name} did not come to {info.scale} but has {states}: {info.last_error}")
        elif info.scale.max_workers:
            wrong += _unserved(world, name)
    return wrong


def _is_settled(manager: ModelManager, name: str) -> bool:
    info = manager.describe(name)
    ready = sum(worker.state.name == "READY" for worker in info.workers)
    return ready == len(info.workers) and info.scale.min_workers <= ready <= info.scale.max_workers


def _unserved(world: World, name: str) -> Iterator[str]:
    for _ in range(5):
        try:
            world.manager.predict(name, fields=world.row(size=10, pause_s=0.0), timeout=20)
        except (TorchmgmtError, FutureTimeoutError) as error:
            yield f"{name} does not serve: {error!r}"


def _settled(run: str, before: Remains) -> Remains:
    """Return what remains, after a moment for what is on its way out."""
    deadline = time.monotonic() + 5
    while (after := Remains.now(run)).exceeds(before) and time.monotonic() < deadline:
        time.sleep(0.05)
    return after
