"""``ts.metrics.metric_abstract``."""

from torchmgmt.handlers.metrics import MetricAbstract

__all__ = ["MetricAbstract"]
