"""What the peers that are told in Python what to serve have in common: the case, and its model. Run by the peers' Pythons."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

CASE = json.loads(os.environ["TORCHMGMT_BENCH_CASE"])
"""kind (json, raw or linear), workers, batch_size, delay_ms, port, folder, device; for linear the model's files."""


def load():
    """Return what answers one batch: a list of requests in, a list of answers out. Then this worker is ready."""
    answer = _linear() if CASE["kind"] == "linear" else list
    Path(CASE["folder"], f"ready-{os.getpid()}").touch()
    return answer


def _linear():
    """The model loaded as TorchServe's base handler does it."""
    import torch

    spec = importlib.util.spec_from_file_location("model", CASE["model_file"])
    module = importlib.util.module_from_spec(spec)
    sys.modules["model"] = module
    spec.loader.exec_module(module)
    net = getattr(module, CASE["model_class"])()
    net.load_state_dict(torch.load(CASE["state_dict"], map_location="cpu", weights_only=True))
    net.to(CASE["device"]).eval()

    def answer(rows):
        with torch.inference_mode():
            return net(torch.tensor(rows, device=CASE["device"]))[:, :8].tolist()

    return answer
