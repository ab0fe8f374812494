"""How starting the workers of a pool has gone so far, and whether it is given up."""

from __future__ import annotations

import logging
import random
import time

from torchmgmt.errors import WorkerDied, WorkerStartFailed
from torchmgmt.pool.actions import Actions
from torchmgmt.pool.autoscaling import Failures
from torchmgmt.pool.workers import PoolWorker
from torchmgmt.records import ModelKey

__all__ = ["StartFailures"]

# A worker that ended after it had been ready for this long was well: its end is the first failure, not one more.
WELL_AFTER_S = 10.0


class StartFailures:
    """What the next attempt to start a worker depends on. Changed on the dispatcher's thread.

    Args:
        key: the model version that the workers are to serve.
        actions: the pool's.
    """

    def __init__(self, key: ModelKey, actions: Actions) -> None:
        self._key = key
        self._actions = actions
        self.failures = Failures()
        self.jitter = 1.0
        """What the next back-off is multiplied by, so that pools that failed together do not try again together."""
        self.failed_starts = 0
        """How many workers could not be started for a reason that stays."""
        self.gave_up = False
        """Whether no worker is to be started until :meth:`begin_anew`. May be read on any thread."""
        self.last_error: WorkerStartFailed | WorkerDied | None = None
        """Why a worker ended unasked the last time, unless all is well since. May be read on any thread."""

    def begin_anew(self) -> None:
        """Forget what failed, as somebody asks for workers."""
        self.gave_up = False
        self.failures = Failures()

    def note_success(self, *, all_there: bool) -> None:
        """A worker has served: back-off begins anew, and once all that are wanted are there, all is well again."""
        self.failures = Failures()
        if all_there:
            self.last_error = None

    def note_failure(self, worker: PoolWorker, error: WorkerStartFailed | WorkerDied, *, is_retryable: bool) -> None:
        """Note that a worker has ended unasked, or could not be started."""
        now = time.monotonic()
        earlier = Failures() if now - worker.ready_at >= WELL_AFTER_S else self.failures
        self.failures = earlier.another(now, worker.spawned_at)
        self.jitter = random.uniform(0.5, 1.5)
        self.last_error = error
        # Whoever waits for a start need not hear of what another attempt, which is made in a moment, may well set right.
        self.failed_starts += isinstance(error, WorkerStartFailed) and not is_retryable
        self._actions.log(logging.WARNING, "%s", str(error))  # its frames are not kept by who keeps the record

    def give_up(self, reason: WorkerStartFailed | WorkerDied | None = None) -> None:
        """Start none any more, and say so: for this ``reason``, or else for that of the last failure."""
        self.cease()
        self.last_error = reason or self.last_error
        self._actions.log(logging.ERROR, "Starting workers of %s was given up: %s", self._key, str(self.last_error))

    def cease(self) -> None:
        """Start none any more."""
        self.gave_up = True
