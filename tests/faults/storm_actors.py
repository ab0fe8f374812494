"""Who is loose in a storm: clients that ask, a steward and a caller who change what there is, an assassin who kills."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import signal
import threading
import time
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from random import Random
from typing import Any

import attrs
import psutil
import requests

from tests.leaks import carries
from torchmgmt import ModelManager
from torchmgmt.errors import (
    ManagerClosed,
    ModelNotFound,
    ModelVersionNotFound,
    NoWorker,
    QueueFull,
    TorchmgmtError,
    WorkerStartFailed,
)

__all__ = [
    "GUESTS",
    "LONG_S",
    "SMALL",
    "STEADY",
    "Assassin",
    "Caller",
    "Client",
    "Request",
    "Steward",
    "World",
    "end",
    "payload_of",
    "write_models",
]

HANDLER = """
import os, time, zlib

def handle(data, context):
    if data is None:
        return None
    data = [row["body"] if isinstance(row.get("body"), dict) else row for row in data]
    fd = os.open({begun!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, "".join(f"{{int(row['number'])}} {{time.monotonic()}}\\n" for row in data).encode())
    os.close(fd)
    time.sleep(max(float(row["pause_s"]) for row in data))
    return [over_http(row) if "body" in row else in_process(row) for row in data]

def in_process(row):
    return row["number"], zlib.crc32(row["payload"]), bytes(row["payload"])[::-1]

def over_http(row):
    answer = b"%d %d " % (int(row["number"]), zlib.crc32(row["body"])) + bytes(row["body"])[::-1]
    return in_parts(answer, int(row["parts"])) if "parts" in row else answer

def in_parts(answer, count):
    step = -(-len(answer) // count)
    for start in range(0, len(answer), step):
        yield answer[start : start + step]
        time.sleep(0.002)
"""
"""Notes which requests it begins and when, in one write, and answers with what only this request can be answered with."""

STEADY: Mapping[str, Mapping[str, Any]] = {
    "forked": {"share_weights": "auto", "batches_in_flight": 4},
    "alone": {"share_weights": "never", "batches_in_flight": 2},
    "batched": {"share_weights": "auto", "batch_size": 4, "max_batch_delay": 2},
}
"""Models that are there all the time, and what they are registered with."""
LIMITS: Mapping[str, Any] = {"startup_timeout": 30, "response_timeout": 30}
SIZES = (*[10, 100, 1000] * 30, *[100_000] * 7, *[4_000_000] * 2, 1 << 17)
"""In bytes, each as often as it is there."""
SMALL = 1000
"""Up to so many bytes are small: how long they take is the latency."""
GUESTS = ("guest0", "guest1", "guest2")
"""Models that come and go, from an archive."""
MOST_WORKERS = 3
LONG_S = 20.0
"""So much time that a request to a model that is always there is answered in it, whoever is killed meanwhile."""


@attrs.define
class Request:
    """One request: what was asked, and how it ended."""

    number: int
    model: str
    limit_s: float
    size: int
    pause_s: float = 0.0
    """How long the handler sleeps over it."""
    asked_at: float = 0.0
    ended_at: float = 0.0
    ends: int = 0
    outcome: BaseException | None = None
    """None: an answer."""
    is_right: bool = False
    closed_at: float = math.inf
    """When who asked has seen how it ended."""
    is_over_http: bool = False
    parts: int = 0
    """In how many parts the answer is wanted; 0: whole."""

    @property
    def allowed(self) -> tuple[type[BaseException], ...]:
        """The errors that this one may end with, beside what may happen to any."""
        if self.model in STEADY:
            return (QueueFull,)
        return (QueueFull, NoWorker, ModelNotFound, ModelVersionNotFound, ManagerClosed)

    def __str__(self) -> str:
        return f"request {self.number} to {self.model} ({self.size} bytes, limit {self.limit_s:.2f} s)"


@attrs.define
class World:
    """What all actors share. The counters are each written by one thread alone."""

    manager: ModelManager
    models: Path
    begun: Path
    run: str
    peace_s: float = 0.4
    """The most time between two attempts on a process."""
    over: threading.Event = attrs.field(factory=threading.Event)
    requests: deque[Request] = attrs.field(factory=deque)
    """Those that were not checked yet."""
    took_s: deque[float] = attrs.field(factory=deque)
    """How long it took to answer each small request to a model that is always there, less what its handler slept."""
    http_took_s: deque[float] = attrs.field(factory=deque)
    """The same of those over HTTP."""
    unasked: set[int] = attrs.field(factory=set)
    """The numbers of rows that belong to no request of a client."""
    kills: Counter[str] = attrs.field(factory=Counter)
    steps: Counter[str] = attrs.field(factory=Counter)
    calls: Counter[str] = attrs.field(factory=Counter)
    """Of the Management API, by their method and the status of the answer."""
    wrong: list[str] = attrs.field(factory=list)
    _numbers: itertools.count[int] = attrs.field(factory=itertools.count)

    def row(self, *, size: int, pause_s: float, number: int | None = None) -> dict[str, Any]:
        """Return a request's fields; without a number, one of its own."""
        if number is None:
            number = next(self._numbers)
            self.unasked.add(number)
        return {"number": number, "pause_s": pause_s, "payload": payload_of(number, size)}

    def request(self, model: str, limit_s: float, size: int, *, pause_s: float) -> Request:
        request = Request(next(self._numbers), model, limit_s, size, pause_s)
        self.requests.append(request)
        return request


def payload_of(number: int, size: int) -> bytes:
    """Return ``size`` bytes that no other request has."""
    word = number.to_bytes(8, "little")
    return (word * (size // 8 + 1))[:size]


def write_models(folder: Path) -> Path:
    """Write the handler as a folder and as an archive; return where they are."""
    source = HANDLER.format(begun=str(folder / "begun"))
    (folder / "begun").touch()
    (folder / "model").mkdir()
    (folder / "model" / "handler.py").write_text(source)
    manifest = {"runtime": "python", "model": {"modelName": "guest", "handler": "handler.py", "modelVersion": "1.0"}}
    with zipfile.ZipFile(folder / "guest.mar", "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        archive.writestr("handler.py", source)
    return folder


@attrs.define
class Client:
    """Asks all the time, one request after the other or several at once."""

    world: World
    random: Random
    number: int
    _open: deque[tuple[Request, Future[Any]]] = attrs.field(factory=deque)

    def run(self) -> None:
        while not self.world.over.is_set():
            choose = self.random
            name = choose.choice([*STEADY, *STEADY, *GUESTS])
            size = choose.choice(SIZES)
            limit_s = choose.choice([0.05, 0.5, 5.0, LONG_S, LONG_S])
            request = self.world.request(name, limit_s, size, pause_s=choose.random() ** 8 * 0.2)
            row = self.world.row(size=size, pause_s=request.pause_s, number=request.number)
            (self._submit if choose.random() < 0.5 else self._predict)(request, row)
            if name in GUESTS and isinstance(request.outcome, TorchmgmtError):
                self.world.over.wait(0.01)  # it is away; that costs nothing, so it would be most of all requests
        while self._open:
            self._collect()

    def _predict(self, request: Request, row: Mapping[str, Any]) -> None:
        request.asked_at = time.monotonic()
        try:
            answer = self.world.manager.predict(request.model, fields=row, timeout=request.limit_s)
        except BaseException as error:
            end(request, error)
        else:
            end(request, None)
            self._answered(request, answer)
        request.closed_at = time.monotonic()

    def _submit(self, request: Request, row: Mapping[str, Any]) -> None:
        request.asked_at = time.monotonic()
        try:
            future = self.world.manager.submit(request.model, fields=row, timeout=request.limit_s)
        except BaseException as error:
            end(request, error)
            request.closed_at = time.monotonic()
            return
        future.add_done_callback(lambda done: end(request, done.exception()))
        self._open.append((request, future))
        if len(self._open) >= 4:
            self._collect()

    def _collect(self) -> None:
        request, future = self._open.popleft()
        try:
            self._answered(request, future.result(request.limit_s + 30))
        except (TorchmgmtError, FutureTimeoutError) as error:
            error.with_traceback(None)  # how it ended is noted; its frames hold other requests' answers
        request.closed_at = time.monotonic()

    def _answered(self, request: Request, answer: object) -> None:
        request.is_right = _is_right(request, answer)
        if request.size <= SMALL and request.model in STEADY:
            self.world.took_s.append((request.ended_at or time.monotonic()) - request.asked_at - request.pause_s)


def end(request: Request, error: BaseException | None) -> None:
    """Note how a request has ended; None: with an answer."""
    request.ended_at = time.monotonic()
    request.ends += 1
    request.outcome = None if error is None else error.with_traceback(None)


def _is_right(request: Request, answer: object) -> bool:
    payload = payload_of(request.number, request.size)
    return answer == (request.number, zlib.crc32(payload), payload[::-1])


@attrs.define
class Steward:
    """Scales, registers and unregisters."""

    world: World
    random: Random

    def begin(self) -> None:
        """Register what is there all the time."""
        for name, options in STEADY.items():
            settings = {"handler": "handler.py", "initial_workers": 2, "max_batch_delay": 0, **LIMITS, **options}
            self.world.manager.register(self.world.models / "model", model_name=name, **settings)

    def run(self) -> None:
        while not self.world.over.wait(self.random.uniform(0.05, 0.4)):
            step = self.random.choice([self._scale, self._scale, self._scale_guest, self._register, self._unregister])
            name = step.__name__.strip("_")
            try:
                step()
            except (WorkerStartFailed, ModelNotFound, ManagerClosed) as error:
                name += f" ({type(error).__name__})"
            except BaseException as error:
                self.world.wrong.append(f"{name} failed with {error!r}")
            self.world.steps[name] += 1

    def _scale(self) -> None:
        least = self.random.randint(1, MOST_WORKERS)
        most = self.random.randint(least, MOST_WORKERS)
        name = self.random.choice([*STEADY])
        self.world.manager.scale(name, least, max_worker=most, synchronous=self.random.random() < 0.3)

    def _scale_guest(self) -> None:
        name, least = self.random.choice(GUESTS), self.random.randint(0, 2)
        if name in self.world.manager:
            self.world.manager.scale(name, least, synchronous=self.random.random() < 0.3)

    def _register(self) -> None:
        name, workers = self.random.choice(GUESTS), self.random.randint(0, 2)
        share = self.random.choice(["auto", "never"])
        wait = self.random.random() < 0.5
        if name not in self.world.manager:
            self.world.manager.register(
                self.world.models / "guest.mar",
                model_name=name,
                initial_workers=workers,
                share_weights=share,
                synchronous=wait,
                **LIMITS,
            )

    def _unregister(self) -> None:
        name = self.random.choice(GUESTS)
        if name in self.world.manager:
            self.world.manager.unregister(name)


@attrs.define
class Caller:
    """Lists, describes and scales over HTTP: what comes back is as it should be, whatever happens meanwhile."""

    world: World
    random: Random
    url: str

    def run(self) -> None:
        with requests.Session() as session:
            while not self.world.over.wait(self.random.uniform(0.02, 0.2)):
                method, path, allowed = self._choose()
                try:
                    status = session.request(method, self.url + path, timeout=60).status_code
                except requests.RequestException as error:
                    self.world.wrong.append(f"{method} {path} failed with {error!r}")
                    continue
                self.world.calls[f"{method} {status}"] += 1
                if status not in allowed:
                    self.world.wrong.append(f"{method} {path} was answered with {status}")

    def _choose(self) -> tuple[str, str, set[int]]:
        steady, guest = self.random.choice([*STEADY]), self.random.choice(GUESTS)
        least = self.random.randint(1, MOST_WORKERS)
        return self.random.choice(
            [
                ("GET", f"/models?limit={self.random.randint(1, 5)}", {200}),
                ("GET", f"/models/{steady}", {200}),
                ("GET", f"/models/{guest}/all", {200, 404}),
                ("GET", "/models/nobody", {404}),
                ("PUT", f"/models/{steady}?min_worker={least}&max_worker={MOST_WORKERS}", {202}),
            ]
        )


CHOICES: Sequence[tuple[str, signal.Signals, int]] = (
    ("worker", signal.SIGKILL, 60),
    ("worker", signal.SIGSEGV, 20),
    ("worker", signal.SIGTERM, 12),  # which it ignores
    ("torch-only", signal.SIGTERM, 4),
    ("worker", signal.SIGSTOP, 16),
    ("template", signal.SIGKILL, 28),
    ("template", signal.SIGSTOP, 8),
    ("torch-only", signal.SIGKILL, 3),
    ("torch-only", signal.SIGSTOP, 1),
)
"""Whom to send what, and how often in comparison. (For some seconds after a torch-only process nothing can be started.)"""


@attrs.define
class Assassin:
    """Kills and stops."""

    world: World
    random: Random

    def run(self) -> None:
        while not self.world.over.wait(self.random.uniform(0.02, self.world.peace_s)):
            ((kind, number, _),) = self.random.choices(CHOICES, [weight for *_, weight in CHOICES])
            place = self.random.random()
            targets = self._targets()[kind]()
            if targets and self._send(targets[int(place * len(targets))], number):
                self.world.kills[f"{kind} {number.name}"] += 1

    def _targets(self) -> Mapping[str, Callable[[], list[int]]]:
        return {"worker": self._workers, "template": self._templates, "torch-only": self._torch_only}

    def _workers(self) -> list[int]:
        pids = set()
        for name in self.world.manager:
            with contextlib.suppress(ModelNotFound):
                pids |= {worker.pid for worker in self.world.manager.describe(name).workers if worker.pid}
        return sorted(pids)

    def _templates(self) -> list[int]:
        """All of ours that are neither: templates, and now and then a worker that nobody has heard of yet."""
        ours = [pid for pid in psutil.pids() if pid != os.getpid() and carries(pid, self.world.run)]
        return sorted({*ours} - {*self._workers()} - {*self._torch_only()})

    def _torch_only(self) -> list[int]:
        return [child.pid for child in psutil.Process().children() if carries(child.pid, self.world.run)]

    def _send(self, pid: int, number: signal.Signals) -> bool:
        """Signal the process, if it is one of ours still."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        try:
            if not carries(pid, self.world.run):
                return False
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
                return True
            return False
        finally:
            os.close(pidfd)
