"""``ts.metrics.caching_metric``."""

from torchmgmt.handlers.metrics import CachingMetric

__all__ = ["CachingMetric"]
