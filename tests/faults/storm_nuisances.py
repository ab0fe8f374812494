"""Who makes a nuisance of themselves in a storm: callers that are interrupted or ask nonsense, listeners and callbacks that raise,
event loops that take the dispatcher's work and give it back."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import enum
import sys
import threading
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import attrs

from tests.faults.storm_actors import GUESTS, STEADY, World
from torchmgmt.errors import InvalidArgument, TorchmgmtError
from torchmgmt.events import Event

__all__ = ["Clumsy", "Grumbler", "Hasty", "Interrupter", "Switcher", "grumble"]


class Interruption(BaseException):
    """What Ctrl-C, a limit of somebody's or a signal handler raises in the midst of a call."""


def grumble(*_of: object) -> None:
    """Raise what nobody expects."""
    sys.exit("a callback that ends the program")


@attrs.define
class Grumbler:
    """A listener that fails now and then, with all that can be raised."""

    random: Random
    told: int = 0

    def __call__(self, _event: Event) -> None:
        self.told += 1
        if self.random.random() < 0.1:
            raise self.random.choice([ValueError, KeyboardInterrupt, SystemExit, MemoryError])("the listener fails")


@attrs.define
class Hasty:
    """Calls, and is interrupted all the time. What it asked for may come to be or not; nothing else may change by it."""

    world: World
    random: Random
    ident: int = 0
    calls: int = 0

    def run(self) -> None:
        self.ident = threading.get_ident()
        while not self.world.over.is_set():
            with contextlib.suppress(Interruption):
                self._call_until_interrupted()

    def _call_until_interrupted(self) -> None:
        while not self.world.over.is_set():
            try:
                self.random.choice([self._predict, self._predict, self._submit, self._stream, self._map, self._scale])()
            except TorchmgmtError:
                pass
            except Exception as error:
                self.world.wrong.append(f"a hasty caller met {error!r}")
            self.calls += 1

    def _row(self) -> Mapping[str, Any]:
        return self.world.row(size=100, pause_s=self.random.random() ** 8 * 0.1)

    def _predict(self) -> None:
        self.world.manager.predict(self.random.choice([*STEADY]), fields=self._row(), timeout=5)

    def _submit(self) -> None:
        future = self.world.manager.submit(self.random.choice([*STEADY, *GUESTS]), fields=self._row(), timeout=5)
        future.add_done_callback(grumble)
        if self.random.random() < 0.5:
            future.cancel()
        else:
            future.result(10)

    def _stream(self) -> None:
        with self.world.manager.stream(self.random.choice([*STEADY]), fields=self._row(), timeout=5) as parts:
            for _ in parts:
                pass

    def _map(self) -> None:
        rows = [self._row() for _ in range(5)]
        for _ in self.world.manager[self.random.choice([*STEADY])].map(rows, timeout=5):
            break

    def _scale(self) -> None:
        self.world.manager.scale(self.random.choice([*STEADY]), self.random.randint(1, 3), synchronous=False)


@attrs.define
class Interrupter:
    """Raises an exception in the hasty ones, wherever they are, as a program's own threads may."""

    world: World
    random: Random
    victims: list[Hasty]

    def run(self) -> None:
        while not self.world.over.wait(self.random.uniform(0.001, 0.05)):
            victim = self.random.choice(self.victims)
            if victim.ident and not self.world.over.is_set():
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(victim.ident), ctypes.py_object(Interruption))
                self.world.steps["interrupted"] += 1


class _Name(str, enum.Enum):
    STEADY = "forked"


class _Text(str):
    """A text of the caller's own class."""

    __slots__ = ()


@attrs.define
class Clumsy:
    """Gives arguments of kinds that nobody foresaw: each is taken for what it says, or refused, and harms nobody."""

    world: World
    random: Random

    def run(self) -> None:
        while not self.world.over.wait(self.random.uniform(0.01, 0.1)):
            call = self.random.choice([self._enum, self._lambda, self._subclass, self._register, self._unpicklable])
            try:
                call()
            except InvalidArgument:
                self.world.steps["refused"] += 1
            except TorchmgmtError:
                pass  # a worker was killed, or no time was left
            except BaseException as error:
                self.world.wrong.append(f"{call.__name__} failed with {error!r}")

    def _row(self) -> Mapping[str, Any]:
        return self.world.row(size=10, pause_s=0.0)

    def _enum(self) -> None:
        self.world.manager.predict(_Name.STEADY, fields=self._row(), timeout=5)

    def _lambda(self) -> None:
        headers: Any = {"X-Why": lambda: None}
        self.world.manager.predict("alone", fields=self._row(), headers=headers, timeout=5)

    def _subclass(self) -> None:
        headers = {_Text("X-Why"): _Text("because")}
        self.world.manager.submit(
            _Text("batched"), fields=self._row(), headers=headers, request_id=_Text("a"), timeout=5
        ).result(10)

    def _register(self) -> None:
        size: Any = self.random.choice([_Name.STEADY, 2.5, object(), -1, True])
        self.world.manager.register(
            self.world.models / "model", model_name="clumsy", handler="handler.py", batch_size=size
        )

    def _unpicklable(self) -> None:
        row = {**self._row(), "more": threading.Lock()}
        self.world.manager.predict(self.random.choice([*STEADY]), fields=row, timeout=5)


@attrs.define
class Switcher:
    """Has event loops of its own do what the dispatcher's thread does, for a moment each, and asks on them meanwhile."""

    world: World
    random: Random

    def run(self) -> None:
        while not self.world.over.is_set():
            asyncio.run(self._use_loop())

    async def _use_loop(self) -> None:
        for _ in range(20):
            if self.world.over.is_set():
                return
            undo: Callable[[], object] = self.world.manager.run_on(asyncio.get_running_loop())
            try:
                asks = [self._ask() for _ in range(self.random.randint(0, 5))]
                await asyncio.gather(*asks)
                await asyncio.sleep(self.random.random() ** 4 * 0.1)
            finally:
                undo()
            self.world.steps["run_on"] += 1
            if self.random.random() < 0.5:
                await self._ask()

    async def _ask(self) -> None:
        try:
            await self.world.manager.apredict(
                self.random.choice([*STEADY]), fields=self.world.row(size=10, pause_s=0.0), timeout=5
            )
        except TorchmgmtError:
            pass
        except Exception as error:
            self.world.wrong.append(f"a request on a loop failed with {error!r}")
