"""A handler loaded by hand, in the way of ``ts.model_loader`` and ``ts.service``: for people's tests and tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from torchmgmt.handlers.context import Context
from torchmgmt.handlers.metrics import Metrics
from torchmgmt.handlers.metrics_store import emit_metrics
from torchmgmt.records import ModelKey, ModelSpec
from torchmgmt.worker.loader import load_handler

__all__ = ["PREDICTION_METRIC", "ModelLoader", "ModelLoaderFactory", "Service", "TsModelLoader", "emit_metrics"]

PREDICTION_METRIC = "PredictionTime"


class Service:
    """A handler's entry point and the context that goes with it: ``service.entry_point(rows, service.context)``.

    Takes what TorchServe's takes. That one's ``predict``, which speaks the protocol of its own frontend, is not here.

    Args:
        model_name: what the context calls the model.
        model_dir: the folder with its files.
        manifest: the model's, or None; the configuration is read that it names.
        entry_point: the handler.
        gpu: what the context says of accelerators.
        batch_size: what the context says of batches.
        limit_max_image_pixels: what the context says of pictures.
        metrics_cache: where the handler's figures go; None: to one of its own.
    """

    def __init__(
        self,
        model_name: str,
        model_dir: str,
        manifest: Mapping[str, Any] | None,
        entry_point: Callable[[Any, Context], Any],
        gpu: int | None,
        batch_size: int | None,
        limit_max_image_pixels: bool | None = True,
        metrics_cache: Metrics | None = None,
    ) -> None:
        self.entry_point = entry_point
        self.context = Context(
            model_name,
            model_dir,
            manifest or {},
            batch_size or 1,
            gpu,
            "0",
            bool(limit_max_image_pixels),
            metrics_cache,
            _config_of(Path(model_dir), manifest or {}),
        )

    @property
    def _entry_point(self) -> Callable[[Any, Context], Any]:
        """As people's tests call it, who had no other way in TorchServe."""
        return self.entry_point


class ModelLoader:
    """Loads the handler in a folder."""

    def load(
        self,
        model_name: str,
        model_dir: str,
        handler: str | None = None,
        gpu_id: int | None = None,
        batch_size: int | None = None,
        envelope: str | None = None,
        limit_max_image_pixels: bool | None = True,
        metrics_cache: Metrics | None = None,
    ) -> Service:
        """Return what TorchServe would have loaded; the working directory and ``sys.path`` stay as they are.

        Args:
            model_name: what the context calls the model.
            model_dir: the folder with its files.
            handler: which handler; None: the one that the manifest names.
            gpu_id: what the context says of accelerators.
            batch_size: what the context says of batches.
            envelope: which request envelope stands around the handler; None: the one that the manifest names, if any.
            limit_max_image_pixels: what the context says of pictures.
            metrics_cache: where the handler's figures go.

        Raises:
            ValueError: no handler is named.
            InvalidArgument: there is no such envelope.
            Exception: whatever importing and initialising the handler, and its hook ``begin``, raise.
        """
        folder = Path(model_dir)
        manifest = _manifest_of(folder)
        model = manifest.get("model", {})
        named = handler or model.get("handler")
        if not named:
            raise ValueError(f"the manifest in {model_dir} names no handler; give handler=...")
        service = Service(
            model_name, str(folder), manifest, _not_loaded, gpu_id, batch_size, limit_max_image_pixels, metrics_cache
        )
        spec = ModelSpec(
            key=ModelKey(model_name, "1.0"),
            model_dir=str(folder),
            handler=named,
            envelope=envelope or model.get("envelope") or None,
            manifest=manifest,
            config=service.context.model_yaml_config,
        )
        loaded = load_handler(spec, service.context)
        loaded.begin()
        service.entry_point = loaded.entry_point
        return service


TsModelLoader = ModelLoader


class ModelLoaderFactory:
    """Where a loader comes from."""

    @staticmethod
    def get_model_loader() -> ModelLoader:
        """Return the one there is."""
        return TsModelLoader()


def _not_loaded(data: Any, context: Context) -> Any:
    raise RuntimeError("the handler is not loaded yet")


def _manifest_of(folder: Path) -> Mapping[str, Any]:
    file = folder / "MAR-INF" / "MANIFEST.json"
    manifest: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return manifest


def _config_of(folder: Path, manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    name = manifest.get("model", {}).get("configFile")
    config: Mapping[str, Any] = yaml.safe_load((folder / name).read_text(encoding="utf-8")) if name else {}
    return config or {}
