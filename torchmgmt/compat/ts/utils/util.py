"""``ts.utils.util``."""

from __future__ import annotations

import enum
import functools
import inspect
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from torchmgmt.handlers.labels import load_label_mapping, map_class_to_label
from torchmgmt.handlers.prediction import PredictionException

__all__ = [
    "PT2Backend",
    "PredictionException",
    "check_valid_pt2_backend",
    "deprecated",
    "get_yaml_config",
    "list_classes_from_module",
    "load_label_mapping",
    "map_class_to_label",
]

log = logging.getLogger(__name__)


class PT2Backend(str, enum.Enum):
    """The backends of torch.compile that TorchServe knew by name; which there are is for torch to say."""

    EAGER = "eager"
    AOT_EAGER = "aot_eager"
    INDUCTOR = "inductor"
    NVFUSER = "nvfuser"
    AOT_NVFUSER = "aot_nvfuser"
    AOT_CUDAGRAPHS = "aot_cudagraphs"
    OFI = "ofi"
    FX2TRT = "fx2trt"
    ONNXRT = "onnxrt"
    IPEX = "ipex"
    TORCHXLA_TRACE_ONCE = "torchxla_trace_once"
    OPENVINO = "openvino"
    TENSORRT = "tensorrt"
    HPU_BACKEND = "hpu_backend"


def check_valid_pt2_backend(backend: str) -> bool:
    """Return whether torch.compile has this backend here; log a warning if not."""
    import torch._dynamo  # which takes a second

    found = torch._dynamo.list_backends(exclude_tags=())
    if backend not in found:
        log.warning("%s is not a backend of torch.compile here; there are: %s", backend, ", ".join(found))
    return backend in found


def list_classes_from_module(module: ModuleType, parent_class: type | None = None) -> list[type]:
    """Return the classes that ``module`` itself defines, sorted by name; with ``parent_class``, subclasses of it alone."""
    own = [each for _, each in inspect.getmembers(module, inspect.isclass) if each.__module__ == module.__name__]
    return own if parent_class is None else [each for each in own if issubclass(each, parent_class)]


def get_yaml_config(yaml_file_path: str | Path) -> Any:
    """Return what a file of YAML holds. Raises OSError and yaml.YAMLError."""
    return yaml.safe_load(Path(yaml_file_path).read_text(encoding="utf-8"))


def deprecated(
    version: object, replacement: str = "", klass: type[Warning] = PendingDeprecationWarning
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Have a function warn, with a warning of ``klass``, that ``replacement`` takes its place since ``version``."""

    def decorate(func: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(func)
        def warned(*args: Any, **kwargs: Any) -> Any:
            warnings.warn(f"{func.__name__} is deprecated since {version}: use {replacement}", klass, stacklevel=2)
            return func(*args, **kwargs)

        return warned

    return decorate
