"""``ts.metrics.dimension``."""

from torchmgmt.handlers.metric_types import Dimension

__all__ = ["Dimension"]
