"""What the torch-only process does first, before it imports torch: a second or more, in which it serves nobody yet."""

from __future__ import annotations

import os
import signal
import sys

from torchmgmt.system_calls import has_ended, set_death_signal
from torchmgmt.worker.stop_signals import ignore_stops

__all__ = ["begin"]


def begin() -> None:
    """Live and die with the embedding process alone. Its arguments are those of :func:`torchmgmt.worker.forkserver.main`."""
    root_pidfd, is_tied = int(sys.argv[2]), sys.argv[4] == "tied"
    if is_tied:
        set_death_signal(signal.SIGKILL)
    if root_pidfd >= 0 and has_ended(root_pidfd):  # it was quicker
        os._exit(0)
    ignore_stops()
    # What the program has blocked, perhaps to wait for it, is its own affair; and who started this has blocked what would
    # have ended it until now.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
