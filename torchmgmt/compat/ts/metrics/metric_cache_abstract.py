"""``ts.metrics.metric_cache_abstract``."""

from torchmgmt.handlers.metrics import Metrics as MetricCacheAbstract

__all__ = ["MetricCacheAbstract"]
