"""Live objects as a worker runs them, here in one process."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from torchmgmt.handlers.context import Context
from torchmgmt.handlers.live import LiveHandler
from torchmgmt.live import LiveObject, live_object

__all__ = ["Running", "one_thread"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """torch computes in the test's own thread: the threads that it starts otherwise stay for ever."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Running:
    """A live object as a worker runs it, and the shapes or lists that it was called with."""

    def __init__(
        self,
        function: Any,
        batching: str | None = "stack",
        *,
        isolates_errors: bool = False,
        batch_size: int = 8,
        is_written: bool = False,
    ) -> None:
        self.context = Context("m", ".", {}, batch_size, None, "0")
        live = live_object(function, batching)
        self.context.live = _written(live) if is_written else live
        self.context.live.isolates_errors = isolates_errors
        self.handler = LiveHandler()
        self.handler.initialize(self.context)

    def __call__(self, *values: Any) -> list[Any]:
        return self.rows(*({"body": value} for value in values))

    def rows(self, *rows: dict[str, Any]) -> list[Any]:
        return list(self.handler.handle(list(rows), self.context))


def _written(live: LiveObject) -> LiveObject:
    """Return a live object as a worker process gets it."""
    live.prepare("process", isolates_errors=False)
    (fd,) = live.descriptors()
    live.release()
    again: LiveObject = pickle.loads(pickle.dumps(live))
    again.attach((fd,))
    return again
