"""The states of a model version and of a worker, each as one table of its legal transitions.

A step that the table does not have raises :class:`IllegalTransition`: it would be a defect of ours, never the caller's.

.. code-block:: text

   version:  REGISTERED --want--> LOADING --serve--> READY        any of the four --retire--> RETIRING --vanish--> GONE
                 ^                 ^  |                |
                 |                 |  +--<----lose-----+
                 |               want |
                 |                 |  v give_up
                 +----unwant----- FAILED --serve--> READY
                                   ^
                                   +--give_up, also from REGISTERED and READY; unwant leads back from LOADING and READY, too

   worker:   WANTED --spawn--> LOADING --ready--> READY --assign--> BUSY --drain--> DRAINING
                                                    ^                 |
                                                    +-----finish------+
             LOADING, READY, BUSY, DRAINING --stop--> STOPPING       every state --exit--> EXITED
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

__all__ = [
    "VERSION_TRANSITIONS",
    "WORKER_TRANSITIONS",
    "IllegalTransition",
    "VersionEvent",
    "VersionState",
    "WorkerEvent",
    "WorkerState",
    "advance_version",
    "advance_worker",
]


class _Member(Enum):
    """A member is found by being itself: Enum's own hash is Python code, and four of them are taken for each request."""

    __hash__ = object.__hash__


class VersionState(_Member):
    """Where a model version stands."""

    REGISTERED = "REGISTERED"
    """Known and routable; no worker is wanted now."""
    LOADING = "LOADING"
    """Workers are wanted, none serves yet."""
    READY = "READY"
    """At least one worker serves."""
    FAILED = "FAILED"
    """Workers are wanted, none serves, and starting them was given up; scaling again tries again."""
    RETIRING = "RETIRING"
    """Takes no new request; what it accepted is being finished."""
    GONE = "GONE"
    """Unregistered; nothing of it is left."""


class VersionEvent(_Member):
    """What can happen to a model version."""

    WANT = "want"
    """A worker is wanted while there is none."""
    UNWANT = "unwant"
    """No worker is wanted any more."""
    SERVE = "serve"
    """A worker became ready while none was."""
    LOSE = "lose"
    """The last ready worker went while workers are wanted."""
    GIVE_UP = "give_up"
    """Starting workers failed for longer than it may."""
    RETIRE = "retire"
    """It is being unregistered."""
    VANISH = "vanish"
    """Its last worker is gone after it was retired."""


class WorkerState(_Member):
    """Where one worker stands."""

    WANTED = "WANTED"
    """Decided on; no process yet (it may be waiting out a back-off)."""
    LOADING = "LOADING"
    """Its process was asked for and is loading the model."""
    READY = "READY"
    """Idle; may be handed a batch."""
    BUSY = "BUSY"
    """At least one batch is assigned to it."""
    DRAINING = "DRAINING"
    """Finishes its batch and gets no other."""
    STOPPING = "STOPPING"
    """Was told to end."""
    EXITED = "EXITED"
    """Its process is gone."""


class WorkerEvent(_Member):
    """What can happen to a worker."""

    SPAWN = "spawn"
    READY = "ready"
    ASSIGN = "assign"
    FINISH = "finish"
    DRAIN = "drain"
    STOP = "stop"
    EXIT = "exit"


class IllegalTransition(RuntimeError):
    """A state machine was asked for a step that its table does not have."""


VERSION_TRANSITIONS: Mapping[VersionState, Mapping[VersionEvent, VersionState]] = {
    VersionState.REGISTERED: {
        VersionEvent.WANT: VersionState.LOADING,
        VersionEvent.SERVE: VersionState.READY,
        # Its backend was closed, so that none can be started.
        VersionEvent.GIVE_UP: VersionState.FAILED,
        VersionEvent.RETIRE: VersionState.RETIRING,
    },
    VersionState.LOADING: {
        VersionEvent.UNWANT: VersionState.REGISTERED,
        VersionEvent.SERVE: VersionState.READY,
        VersionEvent.GIVE_UP: VersionState.FAILED,
        VersionEvent.RETIRE: VersionState.RETIRING,
    },
    VersionState.READY: {
        VersionEvent.UNWANT: VersionState.REGISTERED,
        VersionEvent.LOSE: VersionState.LOADING,
        # The last ready worker went, and none is to come.
        VersionEvent.GIVE_UP: VersionState.FAILED,
        VersionEvent.RETIRE: VersionState.RETIRING,
    },
    VersionState.FAILED: {
        VersionEvent.WANT: VersionState.LOADING,
        VersionEvent.UNWANT: VersionState.REGISTERED,
        # A worker that was still loading when the others were given up.
        VersionEvent.SERVE: VersionState.READY,
        VersionEvent.RETIRE: VersionState.RETIRING,
    },
    VersionState.RETIRING: {VersionEvent.VANISH: VersionState.GONE},
    VersionState.GONE: {},
}

WORKER_TRANSITIONS: Mapping[WorkerState, Mapping[WorkerEvent, WorkerState]] = {
    WorkerState.WANTED: {
        WorkerEvent.SPAWN: WorkerState.LOADING,
        WorkerEvent.EXIT: WorkerState.EXITED,
    },
    WorkerState.LOADING: {
        WorkerEvent.READY: WorkerState.READY,
        WorkerEvent.STOP: WorkerState.STOPPING,
        WorkerEvent.EXIT: WorkerState.EXITED,
    },
    WorkerState.READY: {
        WorkerEvent.ASSIGN: WorkerState.BUSY,
        WorkerEvent.STOP: WorkerState.STOPPING,
        WorkerEvent.EXIT: WorkerState.EXITED,
    },
    WorkerState.BUSY: {
        # A further batch that lies with it until this one is done.
        WorkerEvent.ASSIGN: WorkerState.BUSY,
        WorkerEvent.FINISH: WorkerState.READY,
        WorkerEvent.DRAIN: WorkerState.DRAINING,
        # A batch that ran past its limit, or a drain whose time is over.
        WorkerEvent.STOP: WorkerState.STOPPING,
        WorkerEvent.EXIT: WorkerState.EXITED,
    },
    WorkerState.DRAINING: {
        WorkerEvent.STOP: WorkerState.STOPPING,
        WorkerEvent.EXIT: WorkerState.EXITED,
    },
    WorkerState.STOPPING: {WorkerEvent.EXIT: WorkerState.EXITED},
    WorkerState.EXITED: {},
}

S = TypeVar("S", VersionState, WorkerState)
E = TypeVar("E", VersionEvent, WorkerEvent)


def advance_version(state: VersionState, event: VersionEvent) -> VersionState:
    """Return the state of a version after ``event``; raise :class:`IllegalTransition` if there is none."""
    return _advance(VERSION_TRANSITIONS, state, event)


def advance_worker(state: WorkerState, event: WorkerEvent) -> WorkerState:
    """Return the state of a worker after ``event``; raise :class:`IllegalTransition` if there is none."""
    return _advance(WORKER_TRANSITIONS, state, event)


def _advance(table: Mapping[S, Mapping[E, S]], state: S, event: E) -> S:
    try:
        return table[state][event]
    except KeyError:
        legal = ", ".join(e.name for e in table[state]) or "none, it is final"
        raise IllegalTransition(f"{state} has no {event}; legal are: {legal}") from None
