"""``ts.metrics.metric``."""

from torchmgmt.handlers.metrics_store import Metric

__all__ = ["Metric"]
