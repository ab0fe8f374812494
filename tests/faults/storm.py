"""A storm: processes are killed and stopped at random while clients ask and models come, go and are scaled.

The test runs it for some seconds; ``python -m tests.faults.storm --seconds 600 --seed 1`` for as long as one likes. All
choices follow from the seed; what they meet depends on the machine. What must hold is written down in
:func:`complaints` and :meth:`Storm.run`: every request ends once, in time, with its answer or an error that makes sense,
and is begun at most once; the pools come to what was wanted; nothing is left.
"""

from __future__ import annotations

import argparse
import functools
import gc
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from pathlib import Path
from random import Random

import attrs
import psutil

from tests.faults.storm_actors import LONG_S, STEADY, Assassin, Client, Request, Steward, World, write_models
from tests.leaks import MARK, carries, our_descriptors
from torchmgmt import ModelManager
from torchmgmt.errors import DeadlineExceeded, TorchmgmtError, WorkerDied

__all__ = ["Remains", "Report", "complaints", "storm"]

CLIENTS = 6
MARGIN_S = 5.0
"""How much later than its limit a request may end: the machine may be busy with other things."""
REST_S = 60.0
"""How long the pools may take to come to what is wanted, once nobody disturbs them."""


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
    kills: Mapping[str, int]
    steps: Mapping[str, int]
    before: Remains
    after: Remains
    complaints: list[str]

    def __str__(self) -> str:
        lines = [
            f"storm of {self.seconds:g} s, seed {self.seed}: {self.requests} requests, {self.begun} begun",
            f"  ends: {_listed(self.outcomes)}",
            f"  kills: {_listed(self.kills)}",
            f"  steps: {_listed(self.steps)}",
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


def complaints(requests: list[Request], begun: Mapping[int, list[float]]) -> Iterator[str]:
    """Say what is wrong with how requests ended; ``begun`` has the times at which each was begun, by its number."""
    for request in requests:
        yield from _complaints_of(request, begun.get(request.number, []))


def _complaints_of(request: Request, begun: list[float]) -> Iterator[str]:
    outcome = request.outcome
    if request.ends != 1:
        yield f"{request} ended {request.ends} times"
        return
    took_s = request.ended_at - request.asked_at
    if took_s > request.limit_s + MARGIN_S:
        yield f"{request} ended after {took_s:.1f} s"
    if len(begun) > 1:
        yield f"{request} was begun {len(begun)} times"
    if begun and begun[0] > request.asked_at + request.limit_s + MARGIN_S:
        yield f"{request} was begun when nobody waited for it any more"
    if outcome is None:
        if not request.is_right:
            yield f"{request} got a wrong answer"
        if not begun:
            yield f"{request} was answered without having been begun"
    elif isinstance(outcome, DeadlineExceeded):
        if took_s < request.limit_s - 0.05:
            yield f"{request} failed too early, after {took_s:.3f} s: {outcome}"
        elif request.limit_s >= LONG_S and request.model in STEADY:
            yield f"{request} was lost: all that time nobody answered it"
    elif isinstance(outcome, WorkerDied):
        if not (outcome.pid and outcome.reason):
            yield f"{request} failed with a death that does not say whose and why: {outcome}"
    elif not isinstance(outcome, request.allowed):
        yield f"{request} failed with {type(outcome).__name__}: {outcome}"


def storm(seconds: float, seed: int) -> Report:
    """Run one storm of ``seconds`` seconds; blocks for some seconds longer than that."""
    folder = Path(tempfile.mkdtemp(prefix="storm-"))
    try:
        with _marked() as run, _temporary_files_in(folder / "temporary"):
            before = Remains.now(run)
            world = World(ModelManager(), write_models(folder), folder / "begun", run)
            wrong = _rage(world, seconds, seed)
            after = _settled(run, before)
        if after.exceeds(before):
            wrong.append("something was left: see the counts")
        begun = _begun(world.begun)
        wrong += complaints(world.requests, begun)
        ends = Counter(type(each.outcome).__name__ if each.outcome else "answer" for each in world.requests)
        steady = [each for each in world.requests if each.model in STEADY]
        answered = sum(each.is_right for each in steady)
        if answered <= len(steady) / 2:
            wrong.append(f"only {answered} of {len(steady)} requests to models that are always there were answered")
        return Report(
            seconds, seed, len(world.requests), len(begun), ends, world.kills, world.steps, before, after, wrong
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


def _rage(world: World, seconds: float, seed: int) -> list[str]:
    """Let everybody loose, then see whether all comes to rest; return what is wrong."""
    wrong: list[str] = []
    with world.manager:
        steward = Steward(world, Random(f"{seed} steward"))
        steward.begin()
        actors = [Client(world, Random(f"{seed} client {number}"), number) for number in range(CLIENTS)]
        threads = [threading.Thread(target=actor.run) for actor in (*actors, steward)]
        assassin = threading.Thread(target=Assassin(world, Random(f"{seed} assassin")).run)
        for thread in (*threads, assassin):
            thread.start()
        world.over.wait(seconds)
        world.over.set()
        deadline = time.monotonic() + REST_S
        for thread in (assassin, *threads):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                wrong.append("a call did not come back")
        wrong += world.wrong
        wrong += _restless(world)
        report = world.manager.close(30)
        if report.failed_requests:
            wrong.append(f"closing found {report.failed_requests} requests that nobody waits for")
    return wrong


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


def _begun(file: Path) -> dict[int, list[float]]:
    begun: dict[int, list[float]] = {}
    for line in file.read_text().splitlines():
        number, when = line.split()
        begun.setdefault(int(number), []).append(float(when))
    return begun


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(prog="storm", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600, help="how long it rages (default: 600)")
    parser.add_argument("--seed", type=int, help="what its choices follow from (default: another each time)")
    options = parser.parse_args(arguments)
    seed = Random().randrange(1 << 32) if options.seed is None else options.seed
    logging.getLogger("torchmgmt").setLevel(logging.CRITICAL)  # of deaths there is no end
    say = functools.partial(print, flush=True)
    say(f"storm of {options.seconds:g} s, seed {seed}")
    report = storm(options.seconds, seed)
    say(report)
    return 1 if report.complaints else 0


if __name__ == "__main__":
    sys.exit(main())
