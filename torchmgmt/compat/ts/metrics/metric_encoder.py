"""``ts.metrics.metric_encoder``."""

from __future__ import annotations

import json
from typing import Any

from torchmgmt.handlers.metric_types import Dimension
from torchmgmt.handlers.metrics_store import Metric

__all__ = ["MetricEncoder"]


class MetricEncoder(json.JSONEncoder):
    """Writes metrics and dimensions as JSON objects: ``json.dumps(metrics, cls=MetricEncoder)``."""

    def default(self, obj: Any) -> Any:
        """Return what stands for ``obj``; raise TypeError for what JSON has no form for."""
        return obj.to_dict() if isinstance(obj, (Metric, Dimension)) else super().default(obj)
