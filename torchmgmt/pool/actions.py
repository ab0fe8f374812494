"""What a pool has decided and is yet to do: start, stop, tell. In order, after the decision, whatever one of them raises.

And when it looks at its workers again.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from torchmgmt.dispatcher import Alarm, Dispatcher
from torchmgmt.errors import ManagerClosed
from torchmgmt.events import Event, Listener
from torchmgmt.records import ModelKey

__all__ = ["Actions"]

log = logging.getLogger(__name__)


class Actions:
    """A queue of actions. For the dispatcher's thread.

    Args:
        key: the model version that they are about.
        dispatcher: has the pool look at its workers in time, and logs what goes wrong.
        listener: called with each event; None: nobody is.
        on_look: called at the time for which :meth:`look_by` asked.
        on_closed: called when an action found the backend closed.
    """

    def __init__(
        self,
        key: ModelKey,
        dispatcher: Dispatcher,
        listener: Listener | None,
        *,
        on_look: Callable[[], object],
        on_closed: Callable[[], object],
    ) -> None:
        self._key = key
        self._dispatcher = dispatcher
        self._listener = listener
        self._alarm = Alarm(dispatcher, on_look)
        self._on_closed = on_closed
        self._actions: deque[Callable[[], object]] = deque()
        self._is_running = False

    def add(self, action: Callable[[], object]) -> None:
        """Have ``action`` done; whatever it raises is logged."""
        self._actions.append(action)

    def tell(self, event: Event) -> None:
        """Have the listener told of ``event``, after what happened before it."""
        listener = self._listener
        if listener is not None:
            self._actions.append(lambda: listener(event))

    def look_by(self, when: float) -> None:
        """Have the pool look at its workers at ``when`` at the latest: one alarm is enough, however many batches run."""
        if when < self._alarm.when:
            self._alarm.set(when)

    def log(self, level: int, message: str, *args: object) -> None:
        """Have a message logged."""
        self._dispatcher.log(log, level, message, *args)

    def run(self) -> None:
        """Do all that is to be done. What an action has decided in turn is done after those that were decided before."""
        if self._is_running:
            return
        self._is_running = True
        try:
            while self._actions:
                self._do(self._actions.popleft())
        finally:
            self._is_running = False

    def _do(self, action: Callable[[], object]) -> None:
        try:
            action()
        except ManagerClosed as error:
            self._dispatcher.log(log, logging.DEBUG, "The backend of %s is closed", self._key, exc_info=error)
            self._on_closed()
        except BaseException as error:  # a listener that calls sys.exit() must not keep a worker from being started
            message = "Something that the pool of %s set off failed"
            self._dispatcher.log(log, logging.ERROR, message, self._key, exc_info=error)
