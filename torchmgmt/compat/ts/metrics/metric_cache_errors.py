"""``ts.metrics.metric_cache_errors``."""

import yaml

from torchmgmt.handlers.metric_types import MetricsCacheKeyError, MetricsCacheTypeError, MetricsCacheValueError

__all__ = [
    "GeneralMetricsCacheError",
    "MetricsCacheIOError",
    "MetricsCacheKeyError",
    "MetricsCachePyYamlError",
    "MetricsCacheTypeError",
    "MetricsCacheValueError",
]


class GeneralMetricsCacheError(Exception):
    """Something about the metrics of a handler is wrong that has no error of its own."""


class MetricsCacheIOError(OSError):
    """A file that declares metrics cannot be read."""


class MetricsCachePyYamlError(yaml.YAMLError):
    """A file that declares metrics is not YAML."""
