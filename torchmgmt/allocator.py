"""What the C library does with memory that was freed: by itself it gives much of it back, and asks for it again.

An allocation of a megabyte is then cleared by the system, page by page, each time that it is made: a model whose layers pass
large tensors on spends more time on that than on computing.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["keep_freed_memory"]

# From glibc's <malloc.h>; see mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_VARIABLES = ("MALLOC_", "GLIBC_TUNABLES")
_KEPT_BYTES = 256 << 20


def keep_freed_memory(kept_bytes: int = _KEPT_BYTES) -> bool:
    """Have this process keep up to about ``kept_bytes`` of freed memory for what it allocates next; return whether it does.

    For processes that do the same again and again. Only glibc is told; where the environment tells it something itself
    (``MALLOC_TRIM_THRESHOLD_`` and others, mallopt(3)) that counts. Does not block; any thread.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name.startswith(_VARIABLES) for name in os.environ):
        return False
    # From the heap, however large: what has a mapping of its own is given back as soon as it is freed.
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, kept_bytes))
