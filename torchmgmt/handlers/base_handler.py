"""BaseHandler: loads a model by what its archive holds, and runs it in three steps that a subclass may override.

Its methods and attributes are those of TorchServe's ``ts.torch_handler.base_handler.BaseHandler``, which most handlers
in the field build on.
"""

from __future__ import annotations

import abc
import importlib.util
import inspect
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from torchmgmt.handlers.compilation import compiled
from torchmgmt.handlers.labels import load_label_mapping
from torchmgmt.handlers.model_files import (
    FileKind,
    kind_of,
    load_aot_library,
    load_aot_package,
    load_exported,
    read_safetensors,
    run_ort_session,
    setup_ort_session,
)
from torchmgmt.handlers.optional import needed
from torchmgmt.handlers.profiling import is_profiled, run_profiled, step
from torchmgmt.handlers.state_dict import file_in_common, make_and_load, read_state_dict
from torchmgmt.handlers.timing import timed

__all__ = ["BaseHandler", "answer_batch"]

log = logging.getLogger(__name__)

# Steps of the integral by which captum explains; TorchServe's number.
_INSIGHT_STEPS = 15


class BaseHandler(abc.ABC):  # noqa: B024 - abstract as TorchServe's is, whose subclasses may be so
    """Loads what the manifest names, and answers batches with it.

    The serializedFile is a state dict or a file of safetensors if there is a modelFile that defines its model; else
    TorchScript, a program of ``torch.export`` (``.pt2``), a package (``.pt2``) or library (``.so``) of AOTInductor, or ONNX.

    A subclass overrides any of its methods; after :meth:`initialize` it finds ``model``, ``device``, ``map_location``,
    ``manifest``, ``context``, ``model_pt_path``, ``model_yaml_config`` and ``mapping`` (from class to name, as
    ``index_to_name.json`` has it, if the archive does).
    """

    def __init__(self) -> None:
        self.model: Any = None
        self.mapping: Any = None
        self.device: torch.device = torch.device("cpu")
        self.map_location: str = "cpu"
        self.initialized = False
        self.context: Any = None
        self.model_pt_path: str | None = None
        self.manifest: Mapping[str, Any] = {}
        self.model_yaml_config: Mapping[str, Any] = {}
        self.explain = False
        self.target = 0
        self.profiler_args: dict[str, Any] = {}

    def initialize(self, context: Any) -> None:
        """Load the model that ``context`` describes.

        Raises:
            RuntimeError: the archive has no file to load, or what is in it is no model.
            ImportError: a package is missing that this kind of file needs.
            ValueError: ``pt2`` in model-config.yaml or index_to_name.json cannot be used.
        """
        properties = context.system_properties
        self.context = context
        self.manifest = context.manifest
        self.model_yaml_config = getattr(context, "model_yaml_config", None) or {}
        gpu = properties.get("gpu_id")
        self.map_location = _device_type() if gpu is not None else "cpu"
        self.device = torch.device(
            self.map_location if self.map_location in {"cpu", "mps"} else f"{self.map_location}:{gpu}"
        )
        folder = Path(properties["model_dir"])
        self.model = self._settled(self._load_by_manifest(folder, self.manifest.get("model", {})))
        self.model = compiled(self.model, self.model_yaml_config.get("pt2"))
        self.mapping = load_label_mapping(folder / "index_to_name.json")
        self.initialized = True

    @timed
    def preprocess(self, data: Sequence[Any]) -> Any:
        """Make the model's input of the rows of a batch; by default a tensor of the bodies, stacked."""
        rows = [_body(row) for row in data]
        if rows and all(isinstance(row, torch.Tensor) for row in rows):
            return torch.stack(rows).to(self.device)
        return torch.as_tensor(rows, device=self.device)

    @timed
    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        with torch.inference_mode():
            if not callable(self.model) and hasattr(self.model, "get_inputs"):
                return run_ort_session(self.model, data)
            return self.model(data.to(self.device), *args, **kwargs)

    @timed
    def postprocess(self, data: Any) -> list[Any]:
        """Make one answer for each request of the model's output; by default its rows as lists of numbers."""
        answers: list[Any] = data.tolist()
        return answers

    def handle(self, data: Any, context: Any) -> Any:
        """Answer a batch: preprocess, inference, postprocess; or an explanation, or a description, if headers ask for that.

        Records how long that took as ``HandlerTime``. With ENABLE_TORCH_PROFILER in the environment it is profiled.
        """
        return answer_batch(self, data, context, lambda rows: self.postprocess(self.inference(self.preprocess(rows))))

    def explain_handle(self, data_preprocess: Any, raw_data: Any) -> Any:
        """Explain the answers to a batch: :meth:`get_insights` for the class that the first row, or its JSON, has as ``target``."""
        row = raw_data[0]
        inputs = _body(row) if isinstance(row, dict) else None
        return self.get_insights(data_preprocess, inputs, _target_of(row, inputs))

    def get_insights(self, tensor_data: Any, _: Any, target: Any = 0) -> Any:
        """Return how much each number of the input adds to the output ``target``; a subclass overrides it.

        Raises:
            ImportError: captum is not installed.
            TypeError: the model gives no gradients.
        """
        if not callable(self.model):
            raise TypeError(
                "a session of ONNX Runtime gives no gradients to explain a prediction by; override get_insights"
            )
        captum = needed("captum.attr", "captum", "explaining a prediction")
        insights = captum.IntegratedGradients(self.model).attribute(tensor_data, target=target, n_steps=_INSIGHT_STEPS)
        return insights.tolist()

    def describe_handle(self) -> Any:
        """Say something of the model that the server cannot know; a subclass overrides it."""
        return {}

    def get_device(self) -> torch.device:
        """Return where the model computes."""
        return self.device

    def _infer_with_profiler(self, data: Any) -> tuple[Any, Any]:
        """Answer a batch under torch's profiler with ``profiler_args``; return that and the profiler. Named as in TorchServe."""
        name = self.manifest.get("model", {}).get("modelName", "")
        return run_profiled(lambda: self._steps_shown(data), self.profiler_args, name)

    def _steps_shown(self, data: Any) -> Any:
        with step("preprocess"):
            rows = self.preprocess(data)
        if self._is_explain():
            with step("explain"):
                return self.explain_handle(rows, data)
        with step("inference"):
            output = self.inference(rows)
        with step("postprocess"):
            return self.postprocess(output)

    def _is_explain(self) -> bool:
        if self.context and self.context.get_request_header(0, "explain") == "True":
            self.explain = True
            return True
        return False

    def _is_describe(self) -> bool:
        return bool(self.context) and self.context.get_request_header(0, "describe") == "True"

    def _load_by_manifest(self, folder: Path, model: Mapping[str, Any]) -> Any:
        serialized, model_file = model.get("serializedFile"), model.get("modelFile")
        path = self.model_pt_path = str(folder / serialized) if serialized else None
        if model_file:
            return self._load_pickled_model(str(folder), model_file, path)
        if path is None:
            raise RuntimeError(
                "the manifest names neither a serializedFile nor a modelFile, so there is nothing to load"
            )
        kind = kind_of(path)
        if kind is FileKind.TORCHSCRIPT:
            return self._load_torchscript_model(path)
        if kind is FileKind.EXPORTED:
            return load_exported(path, self.device)
        if kind is FileKind.ONNX:
            return setup_ort_session(path, self.map_location, self.context.system_properties.get("threads"))
        if kind is FileKind.WEIGHTS:
            raise RuntimeError(
                f"{Path(path).name} holds weights and no model; they need the file that defines it (modelFile in the manifest)"
            )
        return self._load_torch_export_aot_compile(path)

    def _settled(self, model: Any) -> Any:
        """Put a module on its device and in evaluation mode, as far as it can be."""
        if not isinstance(model, torch.nn.Module):
            return model
        model.to(self.device)
        try:
            model.eval()
        except NotImplementedError:  # an exported program is in the mode in which it was exported
            log.debug("The mode of the model cannot be changed")
        return model

    def _load_torch_export_aot_compile(self, model_so_path: str) -> Any:
        """Load a package or a library of AOTInductor. Named as in TorchServe, where subclasses override it."""
        if model_so_path.endswith(".so"):
            return load_aot_library(model_so_path, self.map_location)
        return load_aot_package(model_so_path, self.device)

    def _load_torchscript_model(self, model_pt_path: str) -> Any:
        """Load a TorchScript file. Named as in TorchServe, where subclasses override it."""
        try:
            return torch.jit.load(model_pt_path, map_location=self.device)
        except RuntimeError as error:
            raise RuntimeError(
                f"{Path(model_pt_path).name} is not a TorchScript file; a state dict needs the file that defines its"
                f" model (modelFile in the manifest): {error}"
            ) from error

    def _load_pickled_model(self, model_dir: str, model_file: str, model_pt_path: str | None) -> Any:
        """Make the model that ``model_file`` defines and load its state dict. Named as in TorchServe."""

        prefix = self.context.system_properties.get("module_prefix", "")
        file = Path(model_dir) / model_file
        # A handler that has imported it knows its class, and the model shall be of that. Threads may see it half imported.
        imported = [] if prefix else _imported(file)

        def import_class() -> type[torch.nn.Module]:
            return _model_class(imported.pop() if imported else _import_file(file, prefix))

        if not model_pt_path:
            return import_class()()
        # safetensors maps its files without our asking: theirs is the plain way.
        if self._is_on_cpu() and not model_pt_path.endswith(".safetensors"):
            return make_and_load(import_class, lambda: self._read_state_dict(model_pt_path))
        model = import_class()()
        model.load_state_dict(self._read_state_dict(model_pt_path))
        return model

    def _is_on_cpu(self) -> bool:
        return torch.device(self.device).type == "cpu" and str(self.map_location) == "cpu"

    def _read_state_dict(self, path: str) -> Any:
        properties = self.context.system_properties
        path = file_in_common(path, properties["model_dir"], properties.get("pristine_dir"))
        if path.endswith(".safetensors"):
            return read_safetensors(path, self.device)
        return read_state_dict(
            path,
            map_location=self.map_location,
            # Anything but False: a context that a test made by hand has no such key, and the safe way is the default.
            weights_only=properties.get("weights_only") is not False,
            is_sealed=properties.get("is_sealed") is True,
        )


def answer_batch(handler: Any, data: Any, context: Any, run: Callable[[Any], Any]) -> Any:
    """Answer a batch with ``run``, or as its headers ask: an explanation, a description. See :meth:`BaseHandler.handle`.

    ``handler`` is a BaseHandler, and becomes one of this batch's context.
    """
    started = time.perf_counter()
    handler.context = context
    if is_profiled():
        answers, _ = handler._infer_with_profiler(data=data)
    elif handler._is_describe():
        answers = [handler.describe_handle()]
    elif handler._is_explain():
        answers = handler.explain_handle(handler.preprocess(data), data)
    else:
        answers = run(data)
    context.metrics.add_time("HandlerTime", round((time.perf_counter() - started) * 1000, 2), None, "ms")
    return answers


def _device_type() -> str:
    """Return the kind of accelerator that there is; "cpu" if there is none."""
    if torch.cuda.is_available():
        return "cuda"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "xpu"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _body(row: Any) -> Any:
    if not isinstance(row, dict):
        return row
    return row["data"] if "data" in row else row.get("body")


def _target_of(*sent: Any) -> Any:
    """Return the first ``target`` of the dictionaries in ``sent``, 0 if there is none; forms send numbers as text."""
    target = next((each["target"] for each in sent if isinstance(each, dict) and each.get("target")), 0)
    if isinstance(target, (bytes, bytearray)):
        target = target.decode("utf-8", "replace")
    return int(target) if isinstance(target, str) and target.isdecimal() else target


def _imported(file: Path) -> list[ModuleType]:
    """Return the module that ``file`` is imported as; empty if it is not."""
    module = sys.modules.get(file.stem)
    return [module] if module is not None and getattr(module, "__file__", None) == str(file) else []


def _import_file(file: Path, prefix: str = "") -> ModuleType:
    if not file.is_file():
        raise RuntimeError(f"the manifest names the modelFile {file.name}, but the archive does not hold it")
    name = prefix + file.stem  # workers that are threads share their modules with the whole program
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"the modelFile {file.name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.pop(name, None)  # one that is displaced comes back later: see worker.modules
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
