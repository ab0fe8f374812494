"""Signals that the embedding process sends to the processes that it has started, and that nobody else does."""

from __future__ import annotations

import signal

__all__ = ["HURRY", "LAST_WORDS"]

LAST_WORDS = signal.SIGUSR2
"""Write down where you are: what kills you comes next."""
HURRY = getattr(signal, "SIGRTMIN", signal.SIGUSR1) + (6 if hasattr(signal, "SIGRTMIN") else 0)
"""End at once, but for what cannot be left undone; a process that has nothing of that ends by it.

Not SIGTERM, which service managers send to every process of a service: those go on as long as the embedding one does.
"""
