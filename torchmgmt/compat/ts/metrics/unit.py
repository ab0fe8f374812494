"""``ts.metrics.unit``."""

from torchmgmt.handlers.metric_types import Units

__all__ = ["Units"]
