"""BaseHandler: loads a model by what its archive holds, and runs it in three steps that a subclass may override.

Its methods and attributes are those of TorchServe's ``ts.torch_handler.base_handler.BaseHandler``, which most handlers
in the field build on.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from torchmgmt.handlers.state_dict import make_and_load, read_state_dict

__all__ = ["BaseHandler"]

log = logging.getLogger(__name__)


class BaseHandler:
    """Loads a TorchScript file, or a state dict together with the file that defines its model.

    A subclass overrides any of :meth:`preprocess`, :meth:`inference` and :meth:`postprocess`; after :meth:`initialize`
    it finds ``model``, ``device``, ``map_location``, ``manifest``, ``context``, ``model_yaml_config`` and ``mapping``
    (the contents of ``index_to_name.json``, if the archive has one).
    """

    def __init__(self) -> None:
        self.model: Any = None
        self.mapping: Any = None
        self.device: torch.device = torch.device("cpu")
        self.map_location: str = "cpu"
        self.initialized = False
        self.context: Any = None
        self.manifest: Mapping[str, Any] = {}
        self.model_yaml_config: Mapping[str, Any] = {}
        self.explain = False
        self.target = 0

    def initialize(self, context: Any) -> None:
        """Load the model that ``context`` describes.

        Raises:
            RuntimeError: the archive has no file to load, or what is in it is no model.
        """
        properties = context.system_properties
        self.context = context
        self.manifest = context.manifest
        self.model_yaml_config = context.model_yaml_config or {}
        on_gpu = torch.cuda.is_available() and properties.get("gpu_id") is not None
        self.map_location = "cuda" if on_gpu else "cpu"
        self.device = torch.device(f"cuda:{properties['gpu_id']}" if on_gpu else "cpu")
        self.model = self._load(Path(properties["model_dir"]), self.manifest.get("model", {}))
        self.model.to(self.device)
        self.model.eval()
        self.mapping = _read_mapping(Path(properties["model_dir"]) / "index_to_name.json")
        self.initialized = True

    def preprocess(self, data: Sequence[Any]) -> Any:
        """Make the model's input of the rows of a batch; by default a tensor of the bodies, stacked."""
        rows = [_body(row) for row in data]
        if rows and all(isinstance(row, torch.Tensor) for row in rows):
            return torch.stack(rows).to(self.device)
        return torch.as_tensor(rows, device=self.device)

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        with torch.inference_mode():
            return self.model(data.to(self.device), *args, **kwargs)

    def postprocess(self, data: Any) -> list[Any]:
        """Make one answer for each request of the model's output; by default its rows as lists of numbers."""
        answers: list[Any] = data.tolist()
        return answers

    def handle(self, data: Any, context: Any) -> list[Any]:
        """Answer a batch: preprocess, inference, postprocess."""
        self.context = context
        return self.postprocess(self.inference(self.preprocess(data)))

    def describe_handle(self) -> dict[str, Any]:
        """Say something of the model that the server cannot know; a subclass overrides it."""
        return {}

    def _load(self, folder: Path, model: Mapping[str, Any]) -> Any:
        serialized, model_file = model.get("serializedFile"), model.get("modelFile")
        if model_file:
            path = folder / serialized if serialized else None
            return self._load_pickled_model(str(folder), model_file, str(path) if path else "")
        if not serialized:
            raise RuntimeError(
                "the manifest names neither a serializedFile nor a modelFile, so there is nothing to load"
            )
        return self._load_torchscript_model(str(folder / serialized))

    def _load_torchscript_model(self, model_pt_path: str) -> Any:
        """Load a TorchScript file. Named as in TorchServe, where subclasses override it."""
        try:
            return torch.jit.load(model_pt_path, map_location=self.device)
        except RuntimeError as error:
            raise RuntimeError(
                f"{Path(model_pt_path).name} is not a TorchScript file; a state dict needs the file that defines its"
                f" model (modelFile in the manifest): {error}"
            ) from error

    def _load_pickled_model(self, model_dir: str, model_file: str, model_pt_path: str) -> Any:
        """Make the model that ``model_file`` defines and load its state dict. Named as in TorchServe."""

        prefix = self.context.system_properties.get("module_prefix", "")

        def import_class() -> type[torch.nn.Module]:
            return _model_class(_import_file(Path(model_dir) / model_file, prefix))

        if not model_pt_path:
            return import_class()()
        # safetensors files, which newer torch reads, too, are mapped without our asking: theirs is the plain way.
        if self._is_on_cpu() and not model_pt_path.endswith(".safetensors"):
            return make_and_load(import_class, lambda: self._read_state_dict(model_pt_path))
        model = import_class()()
        model.load_state_dict(self._read_state_dict(model_pt_path))
        return model

    def _is_on_cpu(self) -> bool:
        return torch.device(self.device).type == "cpu" and str(self.map_location) == "cpu"

    def _read_state_dict(self, path: str) -> Any:
        properties = self.context.system_properties
        return read_state_dict(
            path,
            map_location=self.map_location,
            # Anything but False: a context that a test made by hand has no such key, and the safe way is the default.
            weights_only=properties.get("weights_only") is not False,
            is_sealed=properties.get("is_sealed") is True,
        )


def _body(row: Any) -> Any:
    if not isinstance(row, dict):
        return row
    return row["data"] if "data" in row else row.get("body")


def _import_file(file: Path, prefix: str = "") -> ModuleType:
    if not file.is_file():
        raise RuntimeError(f"the manifest names the modelFile {file.name}, but the archive does not hold it")
    name = prefix + file.stem  # workers that are threads share their modules with the whole program
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"the modelFile {file.name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _model_class(module: ModuleType) -> type[torch.nn.Module]:
    own = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, torch.nn.Module) and value.__module__ == module.__name__
    ]
    if len(own) != 1:
        found = ", ".join(each.__name__ for each in own) or "none"
        raise RuntimeError(f"a modelFile must define exactly one nn.Module; {module.__name__}.py defines: {found}")
    return own[0]


def _read_mapping(file: Path) -> Any:
    if not file.is_file():
        log.debug("There is no %s; classes are answered by number", file.name)
        return None
    return json.loads(file.read_text(encoding="utf-8"))
