"""What must hold of the requests of a storm: each ends once, in time, as it should, and is begun at most once."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import attrs

from tests.faults.storm_actors import LONG_S, STEADY, Request, World
from tests.faults.storm_http import BrokenOff, Left, Refused
from torchmgmt.errors import DeadlineExceeded, WorkerDied

__all__ = ["MARGIN_S", "Audit", "complaints"]

MARGIN_S = 5.0
"""How much later than its limit a request may end: the machine may be busy with other things."""
KEPT_S = 10.0
"""For so long a request that has ended is remembered: an hour's worth of them would look like a leak of the library's."""


@attrs.define
class Audit:
    """Checks requests while the storm rages, and forgets them: it needs no more memory in an hour than in a minute."""

    world: World
    ended: int = 0
    begun: int = 0
    outcomes: Counter[str] = attrs.field(factory=Counter)
    """Of requests in process."""
    predictions: Counter[str] = attrs.field(factory=Counter)
    """Of requests over HTTP: the codes that they were answered with, and where their clients left."""
    steady: int = 0
    """How many asked a model that is always there."""
    steady_answered: int = 0
    wrong: list[str] = attrs.field(factory=list)
    _times: dict[int, list[float]] = attrs.field(factory=dict)
    """When each was begun that is not checked yet."""
    _read_to: int = 0

    def look(self) -> None:
        """Check those that have ended a while ago."""
        self._read_begun()
        before = time.monotonic() - KEPT_S
        requests = self.world.requests
        while requests and requests[0].closed_at < before:
            self._check(requests.popleft())

    def finish(self) -> None:
        """Check all that are left, when nothing runs any more."""
        self._read_begun()
        while self.world.requests:
            self._check(self.world.requests.popleft())
        again = self._times.keys() - self.world.unasked
        self.wrong += [f"request {number} was begun again, long after it had ended" for number in sorted(again)]

    def _check(self, request: Request) -> None:
        begun = self._times.pop(request.number, [])
        self.wrong += complaints([request], {request.number: begun})
        self.ended += 1
        self.begun += bool(begun)
        (self.predictions if request.is_over_http else self.outcomes)[_end_of(request)] += 1
        if request.model in STEADY and not isinstance(request.outcome, Left):
            self.steady += 1
            self.steady_answered += request.is_right

    def _read_begun(self) -> None:
        with self.world.begun.open("rb") as file:
            file.seek(self._read_to)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self._read_to += len(text)
        for line in text.splitlines():
            number, when = line.split()
            self._times.setdefault(int(number), []).append(float(when))


def _end_of(request: Request) -> str:
    match request.outcome:
        case None:
            return "200" if request.is_over_http else "answer"
        case Refused(code=code):
            return str(code)
        case Left():
            return f"left in its {request.outcome}"
        case BrokenOff():
            return "broken off"
        case other:
            return type(other).__name__


def complaints(requests: Sequence[Request], begun: Mapping[int, list[float]]) -> Iterator[str]:
    """Say what is wrong with how requests ended; ``begun`` has the times at which each was begun, by its number."""
    for request in requests:
        yield from _complaints_of(request, begun.get(request.number, []))


def _complaints_of(request: Request, begun: list[float]) -> Iterator[str]:
    if request.ends != 1:
        yield f"{request} ended {request.ends} times"
        return
    took_s = request.ended_at - request.asked_at
    if took_s > request.limit_s + MARGIN_S:
        yield f"{request} ended after {took_s:.1f} s"
    yield from _complaints_of_beginnings(request, begun)
    yield from _complaints_of_end(request, took_s)


def _complaints_of_beginnings(request: Request, begun: list[float]) -> Iterator[str]:
    outcome = request.outcome
    if len(begun) > 1:
        yield f"{request} was begun {len(begun)} times"
    # Who leaves is known to be gone at once; whose time is over is so at its end.
    waited_until = request.ended_at if isinstance(outcome, Left) else request.asked_at + request.limit_s
    if begun and begun[0] > waited_until + MARGIN_S:
        yield f"{request} was begun when nobody waited for it any more"
    if (outcome is None or isinstance(outcome, BrokenOff)) and not begun:
        yield f"{request} was answered without having been begun"
    if begun and isinstance(outcome, Left) and str(outcome) == "body":
        yield f"{request} was begun although not all of it had come"


def _complaints_of_end(request: Request, took_s: float) -> Iterator[str]:
    outcome = request.outcome
    if outcome is None:
        if not request.is_right:
            yield f"{request} got a wrong answer"
    elif isinstance(outcome, DeadlineExceeded) or (isinstance(outcome, Refused) and outcome.is_late):
        if took_s < request.limit_s - 0.05:
            yield f"{request} failed too early, after {took_s:.3f} s: {outcome}"
        elif request.limit_s >= LONG_S and request.model in STEADY:
            yield f"{request} was lost: all that time nobody answered it"
    elif isinstance(outcome, WorkerDied):
        if not (outcome.pid and outcome.reason):
            yield f"{request} failed with a death that does not say whose and why: {outcome}"
    elif isinstance(outcome, BrokenOff):
        if not request.parts:
            yield f"{request} got half an answer that could have been whole: {outcome}"
    elif isinstance(outcome, Refused):
        if not outcome.may_end(request):
            yield f"{request} was answered with {outcome}"
    elif not isinstance(outcome, (Left, *request.allowed)):
        yield f"{request} failed with {type(outcome).__name__}: {outcome}"
