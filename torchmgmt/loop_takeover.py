"""Who runs the rounds of a dispatcher: its own thread, or an event loop that has taken them over for a while.

.. code-block:: text

   OWN --ask--> ASKED --park--> LOOP --give_back, lose--> RETURNING --resume--> OWN
    ^             |  ^                                        |
    +--give_back--+  +--------------------ask-----------------+

A loop asks; the dispatcher's own thread parks after the round that it runs; the loop begins, and gives the rounds back when
told to. A loop that has stopped without having done so loses them: the thread looks for that while it is parked.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Protocol

from torchmgmt.lifecycle import IllegalTransition
from torchmgmt.signals_held import SignalsHeld

__all__ = ["TRANSITIONS", "Handle", "Loop", "LoopTakeover", "Rounds", "RoundsEvent", "RoundsOwner", "RoundsState"]

Callback = Callable[[], object]


class RoundsState(Enum):
    """Who runs the rounds."""

    OWN = "own"
    """The dispatcher's own thread."""
    ASKED = "asked"
    """That thread, until it has seen that a loop has asked."""
    LOOP = "loop"
    """The loop; the thread is parked."""
    RETURNING = "returning"
    """Nobody: the thread is about to go on."""

    __hash__ = object.__hash__


class RoundsEvent(Enum):
    """What changes that."""

    ASK = "ask"
    PARK = "park"
    GIVE_BACK = "give_back"
    LOSE = "lose"
    RESUME = "resume"

    __hash__ = object.__hash__


TRANSITIONS: Mapping[RoundsState, Mapping[RoundsEvent, RoundsState]] = {
    RoundsState.OWN: {RoundsEvent.ASK: RoundsState.ASKED},
    RoundsState.ASKED: {RoundsEvent.PARK: RoundsState.LOOP, RoundsEvent.GIVE_BACK: RoundsState.OWN},
    RoundsState.LOOP: {RoundsEvent.GIVE_BACK: RoundsState.RETURNING, RoundsEvent.LOSE: RoundsState.RETURNING},
    RoundsState.RETURNING: {RoundsEvent.RESUME: RoundsState.OWN, RoundsEvent.ASK: RoundsState.ASKED},
}


class Handle(Protocol):
    """What undoes a :meth:`Loop.call_later`."""

    def cancel(self) -> None:
        """Undo it."""


class Loop(Protocol):
    """What of an :class:`asyncio.AbstractEventLoop` is needed to run rounds on it."""

    def is_running(self) -> bool:
        """Whether it runs now."""

    def add_reader(self, fd: int, callback: Callback, /) -> object:
        """Call ``callback`` whenever ``fd`` is readable."""

    def remove_reader(self, fd: int, /) -> bool:
        """End that."""

    def call_soon(self, callback: Callback, /) -> object:
        """Call ``callback`` in the next round. On the loop's thread."""

    def call_soon_threadsafe(self, callback: Callback, /) -> object:
        """The same from any thread; raise RuntimeError if the loop is closed."""

    def call_later(self, delay: float, callback: Callback, /) -> Handle:
        """Call ``callback`` in ``delay`` seconds."""


class RoundsOwner:
    """The state machine, and which thread is the owner's. Thread-safe; nothing blocks.

    A thread is known by a mark of its own, not by its id, which the next thread may be given.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._own, self._nobody = object(), object()
        self._gate = threading.Lock()
        # guarded by _gate
        self._state = RoundsState.OWN
        self._asker: LoopTakeover | None = None
        # these may be read without it
        self._mark: object = self._nobody
        self.host: LoopTakeover | None = None
        """The takeover whose loop runs the rounds now; None: the dispatcher's own thread does, or nobody."""

    def __repr__(self) -> str:
        return f"<RoundsOwner: {self._state.name}>"

    @property
    def state(self) -> RoundsState:
        """Who runs the rounds."""
        return self._state

    def is_here(self) -> bool:
        """Whether the calling thread is the one that runs the rounds, or that of the loop which does."""
        return getattr(self._local, "mark", None) is self._mark

    def begin(self) -> None:
        """Be the dispatcher's own thread, which calls this."""
        self._local.mark = self._mark = self._own

    def stand_in(self) -> None:
        """Have the calling thread count as the owner's, before there is one."""
        self._local.mark = self._mark = object()

    def end_standing_in(self) -> None:
        """End that."""
        self._mark = self._nobody

    def end(self) -> None:
        """There is no owner any more."""
        self._mark, self.host = self._nobody, None

    def mark_loop(self, takeover: LoopTakeover) -> None:
        """Know the calling thread as that of the takeover's loop."""
        self._local.mark = takeover

    # -- what happens; each returns whether it is so now ----------------------------------------------------------------

    def ask(self, takeover: LoopTakeover) -> bool:
        """Have a loop run the rounds soon; False if another one does, or will."""
        with self._gate:
            if RoundsEvent.ASK not in TRANSITIONS[self._state]:
                return False
            self._state = TRANSITIONS[self._state][RoundsEvent.ASK]
            self._asker = takeover
        return True

    def park(self) -> LoopTakeover | None:
        """Let the loop begin that has asked; None if none has. On the dispatcher's own thread."""
        with self._gate:
            if self._state is not RoundsState.ASKED or self._asker is None:
                return None
            self._advance(RoundsEvent.PARK)
            self._mark = self.host = self._asker
            return self._asker

    def give_back(self, takeover: LoopTakeover, event: RoundsEvent = RoundsEvent.GIVE_BACK) -> bool:
        """End a takeover; False if it had ended before. ``event``: LOSE where the loop has not done that itself."""
        with self._gate:
            if self._asker is not takeover:
                return False
            if self._state is RoundsState.LOOP:
                self._mark, self.host = self._nobody, None
            self._advance(event)
            self._asker = None
            return True

    def resume(self) -> bool:
        """Go on with the rounds, also if another loop has asked since; False if they were not given back, or that had no part.

        On the dispatcher's own thread.
        """
        with self._gate:
            is_returning = self._state is RoundsState.RETURNING
            if is_returning:
                self._advance(RoundsEvent.RESUME)
            if self._state is not RoundsState.LOOP:
                self._mark = self._own
            return is_returning

    def _advance(self, event: RoundsEvent) -> None:
        try:
            self._state = TRANSITIONS[self._state][event]
        except KeyError:
            raise IllegalTransition(f"{self._state} has no {event}") from None


class Rounds(Protocol):
    """What of a dispatcher a takeover needs."""

    @property
    def owner(self) -> RoundsOwner:
        """Who runs its rounds."""

    def clock(self) -> float:
        """Return the time, in s."""

    def visit(self) -> float | None:
        """Run a round without waiting; return when the next is due at the latest, by the clock; None: nothing is."""

    def note_returned(self) -> None:
        """Wake the parked thread."""


class LoopTakeover:
    """The time in which an event loop runs the rounds. All of it is for the loop's thread, but ``loop`` and ``is_over``."""

    def __init__(self, rounds: Rounds, loop: Loop, poll_fd: int) -> None:
        self.loop = loop
        self.held_signals = SignalsHeld()
        """Whatever does the dispatcher's work on the loop's thread is to do it in this block."""
        self.is_over = False
        """Whether it has ended, or been lost. May change on another thread."""
        self._rounds = rounds
        self._poll_fd = poll_fd
        self._has_begun = False
        self._is_awake = False  # whether a round is running, or about to
        self._timer: Handle | None = None
        self._timer_at = math.inf

    def begin(self) -> None:
        """Begin, unless it has ended before it came to that."""
        self._rounds.owner.mark_loop(self)
        if not self.is_over:
            self._has_begun = True
            self.loop.add_reader(self._poll_fd, self._run)
            self.wake()

    def end(self) -> None:
        """Give the rounds back. Idempotent; for who asked for the takeover."""
        self._unhook()
        self.is_over = True
        if self._rounds.owner.give_back(self):
            self._rounds.note_returned()

    def lose(self) -> None:
        """Take the rounds away from a loop that has stopped, or cannot go on. On any thread, while no round runs."""
        self.is_over = True
        if self._rounds.owner.give_back(self, RoundsEvent.LOSE):
            self._rounds.note_returned()

    def wake(self) -> None:
        """Have a round run soon: something may be due that no descriptor tells of."""
        if not self._is_awake:
            self._is_awake = True
            self.loop.call_soon(self._run)

    def _run(self) -> None:
        if self.is_over:
            self._unhook()  # it was lost while the loop did not run
            return
        with self.held_signals:
            self._is_awake = True
            next_at = self._rounds.visit()
            self._is_awake = False
            self._plan(next_at)

    def _plan(self, next_at: float | None) -> None:
        """Have the next round run by ``next_at``."""
        if self.is_over:
            self._unhook()
        elif next_at is None:
            self._set_timer(math.inf)
        elif next_at <= self._rounds.clock():
            self.wake()
        else:
            self._set_timer(next_at)

    def _unhook(self) -> None:
        if self._has_begun:
            self._has_begun = False
            self.loop.remove_reader(self._poll_fd)
            self._set_timer(math.inf)

    def _set_timer(self, when: float) -> None:
        """Have a round run at ``when``; a timer that is too early is left: it finds nothing to do."""
        if self._timer is not None:
            if self._timer_at <= when < math.inf:
                return
            self._timer.cancel()
            self._timer = None
        if when < math.inf:
            self._timer_at = when
            # Loops count in whole milliseconds, and uvloop takes what is left of the last one for none: until that is over
            # it would look again and again, and take the time from who is waited for.
            delay_ms = math.ceil((when - self._rounds.clock()) * 1000)
            self._timer = self.loop.call_later(max(0, delay_ms) / 1000, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None  # perhaps a little early: then the round sets it again
        self._run()
