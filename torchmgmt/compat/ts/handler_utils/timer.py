"""``ts.handler_utils.timer``."""

from torchmgmt.handlers.timing import timed

__all__ = ["timed"]
