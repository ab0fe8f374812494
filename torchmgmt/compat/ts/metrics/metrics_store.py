"""``ts.metrics.metrics_store``."""

from torchmgmt.handlers.metrics_store import MetricsStore

__all__ = ["MetricsStore"]
