"""The models that are measured: written into a folder of the caller's, so that nothing of it lies in git."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits"
HEAVY_WEIGHTS_MB = 403

_NOOP = "def handle(data, context):\n    return [row['body'] for row in data or ()]\n"

_SLOW = """
import time

class Slow:
    def initialize(self, context):
        until = time.monotonic() + {seconds}
        while time.monotonic() < until:
            pass

    def handle(self, data, context):
        return [None for _ in data]
"""

# 24 matrices of 2048 x 2048 float32: 24 * 16.8 MB.
_HEAVY = """
from torch import nn


class Heavy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(24)))

    def forward(self, rows):
        return self.layers(rows)
"""

_SAVE_HEAVY = """
import sys, torch
weights = {}
for layer in range(24):
    weights[f"layers.{layer}.weight"] = torch.rand(2048, 2048)
    weights[f"layers.{layer}.bias"] = torch.rand(2048)
torch.save(weights, sys.argv[1])
"""


@frozen
class Files:
    """A model's folder, for torchmgmt, and the same files one by one, for a bare script."""

    folder: Path
    model_file: Path
    model_class: str
    state_dict: Path


def write_noop(folder: Path) -> Path:
    """Write a handler that gives back what it gets; return its folder."""
    return _write_handler(folder, "noop", _NOOP)


def write_slow(folder: Path, seconds: float) -> Path:
    """Write a handler that computes for ``seconds`` in ``initialize``; return its folder."""
    return _write_handler(folder, "slow", _SLOW.format(seconds=seconds))


def write_heavy(folder: Path) -> Files:
    """Write a module with :data:`HEAVY_WEIGHTS_MB` of weights, served by the shipped base handler."""
    folder.mkdir(parents=True)
    files = Files(folder, folder / "model.py", "Heavy", folder / "weights.pt")
    files.model_file.write_text(_HEAVY, encoding="utf-8")
    # In a process of its own: this one is to stay without torch, as the programs that embed the library do.
    subprocess.run([sys.executable, "-c", _SAVE_HEAVY, str(files.state_dict)], check=True, timeout=120)
    _write_manifest(folder, "heavy", "base_handler", {"modelFile": "model.py", "serializedFile": "weights.pt"})
    return files


def write_digits(folder: Path) -> Files:
    """Lay out version 1.0 of ``examples/digits`` as a folder that can be registered."""
    folder.mkdir(parents=True)
    for name in ("model.py", "handler.py", "digits_v1.pt"):
        (folder / name).write_bytes((DIGITS / name).read_bytes())
    _write_manifest(folder, "digits", "handler.py", {"modelFile": "model.py", "serializedFile": "digits_v1.pt"})
    return Files(folder, folder / "model.py", "DigitsNet", folder / "digits_v1.pt")


def _write_handler(folder: Path, name: str, code: str) -> Path:
    folder.mkdir(parents=True)
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    _write_manifest(folder, name, f"{name}.py", {})
    return folder


def _write_manifest(folder: Path, name: str, handler: str, files: Mapping[str, str]) -> None:
    model = {"modelName": name, "modelVersion": "1.0", "handler": handler, **files}
    (folder / "MAR-INF").mkdir()
    manifest = {"runtime": "python", "model": model, "archiverVersion": "0.12.0"}
    (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest), encoding="utf-8")


def pack_digits(folder: Path) -> Path:
    """Build the archive of ``examples/digits`` with the real torch-model-archiver; return the file.

    Raises subprocess.CalledProcessError if that is not installed.
    """
    command = [sys.executable, str(DIGITS / "pack.py"), str(folder)]
    subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)
    return folder / "digits.mar"
