"""``ts.torch_handler.unit_tests.test_utils.mock_context``: a context for unit tests of handlers, without a server."""

from __future__ import annotations

import uuid
from pathlib import Path

import torch

from torchmgmt.compat.ts.utils.util import get_yaml_config
from torchmgmt.handlers.context import Context
from torchmgmt.handlers.metrics_store import MetricsStore

__all__ = ["MockContext"]


class MockContext(Context):
    """What a worker would give a handler, made of the names of a few files. It has a batch of one request.

    Args:
        model_pt_file: the serialized file; None or "" for none.
        model_dir: the folder that it and the others are in.
        model_file: the file that defines the model; None or "" for none.
        gpu_id: the accelerator to use, where there is CUDA.
        model_name: the name of the model.
        model_yaml_config_file: a model-config.yaml, if there is one.
    """

    def __init__(
        self,
        model_pt_file: str | None = "model.pt",
        model_dir: str = "ts/torch_handler/unit_tests/models/tmp",
        model_file: str | None = "model.py",
        gpu_id: str | None = "0",
        model_name: str = "mnist",
        model_yaml_config_file: str | None = None,
    ) -> None:
        files = {"serializedFile": model_pt_file, "modelFile": model_file}
        manifest = {"model": {key: name for key, name in files.items() if name}}
        config = get_yaml_config(str(Path(model_dir, model_yaml_config_file))) if model_yaml_config_file else {}
        gpu = int(gpu_id) if gpu_id and torch.cuda.is_available() else None
        super().__init__(model_name, model_dir, manifest, 1, gpu, "0", model_yaml_config=config)
        self.begin_batch([str(uuid.uuid4())], [{}])
        self.metrics = MetricsStore(self.request_ids, model_name)  # type: ignore[assignment]  # a test can look into it

    def get_request_header(self, idx: int, exp: str) -> str | None:
        """Return a header of the request; where :attr:`explain` is set, "True" for that name."""
        return "True" if self.explain and exp == "explain" else super().get_request_header(idx, exp)
