"""``ts.metrics.metric_cache_yaml_impl``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from torchmgmt.compat.ts.metrics.metric_cache_errors import (
    MetricsCacheIOError,
    MetricsCacheKeyError,
    MetricsCachePyYamlError,
    MetricsCacheTypeError,
    MetricsCacheValueError,
)
from torchmgmt.handlers.metrics import Metrics

__all__ = ["MetricsCacheYamlImpl"]


class MetricsCacheYamlImpl(Metrics):
    """Metrics with those that a file declares in ``model_metrics``, once :meth:`initialize_cache` was called.

    Raises:
        MetricsCacheTypeError: ``config_file_path`` is no path.
        MetricsCacheIOError, MetricsCachePyYamlError: the file cannot be read, or is not YAML.
    """

    def __init__(self, config_file_path: Any) -> None:
        super().__init__()
        if not isinstance(config_file_path, (str, Path)) or not str(config_file_path):
            raise MetricsCacheTypeError(f"config_file_path must be the path of a file, not {config_file_path!r}")
        self.config_file_path = config_file_path
        try:
            self._content: Any = yaml.safe_load(Path(config_file_path).read_text(encoding="utf-8"))
        except OSError as error:
            raise MetricsCacheIOError(f"Error reading file {config_file_path}: {error}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise MetricsCachePyYamlError(f"Error parsing file {config_file_path}: {error}") from error

    def initialize_cache(self) -> None:
        """Declare the metrics.

        Raises:
            MetricsCacheKeyError: the file has no ``model_metrics``.
            MetricsCacheValueError: there is nothing in it, or what is there does not have the form.
        """
        if not isinstance(self._content, dict) or "model_metrics" not in self._content:
            raise MetricsCacheKeyError(f"{self.config_file_path} has no model_metrics")
        if not self._content["model_metrics"]:
            raise MetricsCacheValueError(f"model_metrics of {self.config_file_path} is empty")
        self.declare(self._content["model_metrics"])
