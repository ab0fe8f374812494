"""What a handler raises that is no error of its requests: all else is, whether it is an ``Exception`` or not.

Libraries raise more than that: pyo3's PanicException and asyncio's CancelledError are ``BaseException``s, and say nothing of
the worker that they were raised in.
"""

from __future__ import annotations

__all__ = ["NO_FAULT", "BatchAbandoned"]


class BatchAbandoned(BaseException):
    """Nobody waits for the batch any more: raised where its handler sends a part, and not meant for it to catch."""


NO_FAULT = (SystemExit, KeyboardInterrupt, BatchAbandoned)
"""The first two end the worker."""
