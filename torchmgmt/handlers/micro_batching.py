"""MicroBatching: a handler's batch in smaller parts, whose steps overlap.

Its methods are those of TorchServe's ``ts.handler_utils.micro_batching.MicroBatching``.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from torchmgmt.handlers.base_handler import answer_batch

__all__ = ["HANDLER_METHODS", "MicroBatching"]

HANDLER_METHODS = ["preprocess", "inference", "postprocess"]


class MicroBatching:
    """Calls the three steps of a handler for parts of a batch: while one part is in a step, the next is in the one before.

    It is a callable ``(data, context)``, to be used in place of the handler's ``handle``. Its threads begin with the first
    batch, so that a model can be loaded once for several workers.

    Args:
        parent_handler: a BaseHandler.
        micro_batch_size: requests in a part, at least 1. May be changed between batches.
        parallelism: how many threads each step has, at least 1; 1 unless given.

    Raises:
        ValueError: a number is too small, or a step has another name than those of :data:`HANDLER_METHODS`.
    """

    def __init__(
        self, parent_handler: Any, micro_batch_size: int = 1, parallelism: Mapping[str, int] | None = None
    ) -> None:
        self.handler = parent_handler
        self.micro_batch_size = micro_batch_size
        self.thread_local_data = threading.local()
        self._parallelism: dict[str, int] = {}
        self._executors: dict[str, ThreadPoolExecutor] = {}
        self.parallelism = parallelism or {}

    def __call__(self, data: Any, context: Any) -> Any:
        """Answer a batch, as :meth:`BaseHandler.handle` does."""
        return answer_batch(self.handler, data, context, self.handle)

    @property
    def parallelism(self) -> Mapping[str, int]:
        """How many threads each step has that was set; setting it changes the steps that are named."""
        return dict(self._parallelism)

    @parallelism.setter
    def parallelism(self, parallelism: Mapping[str, int]) -> None:
        for name, threads in parallelism.items():
            if name not in HANDLER_METHODS or threads < 1:
                raise ValueError(
                    f"parallelism must give numbers of threads, at least 1, for {', '.join(HANDLER_METHODS)}; not"
                    f" {name}: {threads!r}"
                )
        self.shutdown()
        self._parallelism.update(parallelism)

    def handle(self, data: Sequence[Any]) -> list[Any]:
        """Run the steps on all parts; return the answers in order. Raises what a step raises, when all have ended."""
        size = self.micro_batch_size
        if size < 1:
            raise ValueError(f"micro_batch_size must be a whole number of at least 1, not {size!r}")
        parts = [
            self._begin(index, data[start : start + size]) for index, start in enumerate(range(0, len(data), size))
        ]
        wait(parts)
        return [answer for part in parts for answer in part.result()]

    def get_micro_batch_idx(self) -> int | None:
        """Return the number of the part, from 0, that the calling thread works on; None if it works on none."""
        return getattr(self.thread_local_data, "micro_batch_idx", None)

    def shutdown(self) -> None:
        """End the threads; blocks until their steps are done. The next batch begins new ones."""
        executors, self._executors = self._executors, {}
        for executor in executors.values():
            executor.shutdown()

    def _begin(self, index: int, rows: Any) -> Future[Any]:
        """Have a part go through the steps; return the future of the last one."""
        before: Future[Any] = Future()
        before.set_result(rows)
        for name in HANDLER_METHODS:
            before = self._executor(name).submit(self._call, name, index, before)
        return before

    def _call(self, name: str, index: int, before: Future[Any]) -> Any:
        # A step waits for the one before in a thread of its own, and that never waits for a later one.
        value = before.result()
        self.thread_local_data.micro_batch_idx = index
        return getattr(self.handler, name)(value)

    def _executor(self, name: str) -> ThreadPoolExecutor:
        if name not in self._executors:
            self._executors[name] = ThreadPoolExecutor(self._parallelism.get(name, 1), f"torchmgmt-{name}")
        return self._executors[name]
