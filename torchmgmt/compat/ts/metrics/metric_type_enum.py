"""``ts.metrics.metric_type_enum``."""

from torchmgmt.handlers.metric_types import MetricTypes

__all__ = ["MetricTypes"]
