"""The metrics that an archive declares: ``model_metrics``, in a metrics.yaml as TorchServe reads it, or in model-config.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchmgmt.handlers.metrics import Metrics
    from torchmgmt.records import ModelSpec

__all__ = ["declare_metrics"]

_FILE = "metrics.yaml"
_SECTION = "model_metrics"


def declare_metrics(metrics: Metrics, spec: ModelSpec) -> None:
    """Declare the metrics of ``spec`` in ``metrics``; those of model-config.yaml count before those of the file.

    A metrics.yaml without the section is somebody else's. Raises ValueError if what is declared does not have the form, or
    the file is not YAML.
    """
    for content in (_read(Path(spec.model_dir, _FILE)), spec.config):
        if isinstance(content, Mapping) and content.get(_SECTION) is not None:
            metrics.declare(content[_SECTION])


def _read(file: Path) -> Any:
    if not file.is_file():
        return None
    import yaml  # most archives have none

    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.name} is not YAML: {error}") from error
