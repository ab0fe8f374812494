"""Tells a forked copy of this program from the one that it was copied from.

Locks and threads do not survive a fork, so what lived before one must refuse to work in the copy instead of hanging.
``os.getpid`` would tell, too, but is a system call (1.5 us here), and every request asks three times.
"""

from __future__ import annotations

import os

__all__ = ["depth"]

_depth = 0


def depth() -> int:
    """Return how many times this process was forked since torchmgmt was imported: an object of another depth is a copy."""
    return _depth


def _note_fork() -> None:
    global _depth  # noqa: PLW0603 - a fact of the whole process
    _depth += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
