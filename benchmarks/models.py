"""The models that are measured: written into a folder of the caller's, so that nothing of it lies in git."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path

from attrs import frozen

from benchmarks.measure import Missing

DIGITS = Path(__file__).resolve().parent.parent / "examples" / "digits"
DIGITS_HANDLER = "DigitsHandler"
HEAVY_WEIGHTS_MB = 403
_HEAVY_LAYERS, _HEAVY_WIDTH = 24, 2048  # 24 matrices of 2048 x 2048 float32: 24 * 16.8 MB
HEAVY_ITEM = [0.5] * _HEAVY_WIDTH
"""A request to the heavy model."""
_SMALL_LAYERS, _SMALL_WIDTH = 2, 64
SMALL_ITEM = [0.5] * _SMALL_WIDTH
"""A request to the small model."""
LINEAR_HANDLER = "LinearHandler"
MLP_WIDTH = 1024
MLP_HANDLER = "Mlp"

_NOOP = "def handle(data, context):\n    return [row['body'] for row in data or ()]\n"

_SLEEPER = """
import time

def handle(data, context):
    time.sleep({seconds} * len(data or ()))
    return ["slept" for _ in data or ()]
"""

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

_LINEAR = """
from torch import nn


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear({width}, {width}) for _ in range({layers})))

    def forward(self, rows):
        return self.layers(rows)
"""

# TorchServe's own base_handler makes a tensor of the rows as they are, which are dicts.
_LINEAR_HANDLER = """
import torch
from ts.torch_handler.base_handler import BaseHandler


class LinearHandler(BaseHandler):
    def preprocess(self, data):
        return torch.tensor([row["body"] for row in data], device=self.device)

    def postprocess(self, data):
        return data[:, :8].tolist()
"""

_MLP = """
import torch
from torch import nn


class Mlp:
    def initialize(self, context):
        layers = ((nn.Linear({width}, {width}), nn.ReLU()) for _ in range({layers}))
        self.model = nn.Sequential(*(each for pair in layers for each in pair)).eval().to("{device}")

    def handle(self, data, context):
        rows = torch.stack([torch.frombuffer(bytearray(row["body"]), dtype=torch.float32) for row in data])
        with torch.inference_mode():
            answers = self.model(rows.to("{device}")).cpu()
        return [row.numpy().tobytes() for row in answers]
"""

_THREADS = """
import torch

def handle(data, context):
    return [torch.get_num_threads() for _ in data or ()]
"""

# At each batch and not in initialize: that may have run in another process, from which the worker was forked.
_FIX_THREADS = """

import torch

_handle = {handler_class}.handle


def _handle_with_threads(self, data, context):
    torch.set_num_threads({threads})
    return _handle(self, data, context)


{handler_class}.handle = _handle_with_threads
"""

# Where BaseHandler's own choice is another: the same for every server that runs the handler.
_ON_DEVICE = """

import torch

_initialize, _inference = {handler_class}.initialize, {handler_class}.inference


def _initialize_on_device(self, context):
    _initialize(self, context)
    self.device = torch.device("{device}")
    self.model.to(self.device)


def _inference_on_device(self, data, *args, **kwargs):
    return _inference(self, data.to(self.device), *args, **kwargs)


{handler_class}.initialize, {handler_class}.inference = _initialize_on_device, _inference_on_device
"""

_SAVE_LINEAR = """
import sys, torch
layers, width, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
weights = {}
for layer in range(layers):
    weights[f"layers.{layer}.weight"] = torch.rand(width, width) / width  # answers stay finite: others are no JSON
    weights[f"layers.{layer}.bias"] = torch.rand(width)
torch.save(weights, file)
"""


@frozen
class Files:
    """A model's folder, for torchmgmt, and the same files one by one, for a bare script or the archiver."""

    folder: Path
    handler: Path
    model_file: Path
    model_class: str
    state_dict: Path


def write_noop(folder: Path) -> Path:
    """Write a handler that gives back what it gets; return its folder."""
    return _write_handler(folder, "noop", _NOOP)


def write_slow(folder: Path, seconds: float) -> Path:
    """Write a handler that computes for ``seconds`` in ``initialize``; return its folder."""
    return _write_handler(folder, "slow", _SLOW.format(seconds=seconds))


def write_threads(folder: Path) -> Path:
    """Write a handler that answers with the number of threads that torch computes with; return its folder."""
    return _write_handler(folder, "threads", _THREADS)


def write_mlp(folder: Path, layers: int, device: str = "cpu") -> Path:
    """Write a handler of so many linear layers of :data:`MLP_WIDTH`, random weights, raw float32 in and out."""
    return _write_handler(folder, "mlp", _MLP.format(width=MLP_WIDTH, layers=layers, device=device))


def write_sleeper(folder: Path, seconds: float) -> Path:
    """Write a handler that sleeps for ``seconds`` at each request; return its folder."""
    return _write_handler(folder, "sleeper", _SLEEPER.format(seconds=seconds))


def write_heavy(folder: Path, device: str = "cpu") -> Files:
    """Write a module with :data:`HEAVY_WEIGHTS_MB` of weights, loaded as the shipped base handler does it."""
    return _write_linear(folder, "heavy", _HEAVY_LAYERS, _HEAVY_WIDTH, device)


def write_small(folder: Path, device: str = "cpu") -> Files:
    """Write a module of the same kind with 33 kB of weights."""
    return _write_linear(folder, "small", _SMALL_LAYERS, _SMALL_WIDTH, device)


def _write_linear(folder: Path, name: str, layers: int, width: int, device: str) -> Files:
    folder.mkdir(parents=True)
    files = Files(folder, folder / "handler.py", folder / "model.py", "Linear", folder / "weights.pt")
    files.model_file.write_text(_LINEAR.format(layers=layers, width=width), encoding="utf-8")
    files.handler.write_text(_LINEAR_HANDLER, encoding="utf-8")
    put_on(device, files.handler, LINEAR_HANDLER)
    # In a process of its own: this one is to stay without torch, as the programs that embed the library do.
    command = [sys.executable, "-c", _SAVE_LINEAR, str(layers), str(width), str(files.state_dict)]
    subprocess.run(command, check=True, timeout=120)
    write_manifest(folder, name, "handler.py", {"modelFile": "model.py", "serializedFile": "weights.pt"})
    return files


def put_on(device: str, handler: Path, handler_class: str) -> None:
    """Have the class of a handler's file, one derived from BaseHandler, compute on this device, whoever runs it."""
    if device != "cpu":
        with handler.open("a", encoding="utf-8") as file:
            file.write(_ON_DEVICE.format(handler_class=handler_class, device=device))


def write_digits(folder: Path) -> Files:
    """Lay out version 1.0 of ``examples/digits`` as a folder that can be registered."""
    folder.mkdir(parents=True)
    for name in ("model.py", "handler.py", "digits_v1.pt"):
        (folder / name).write_bytes((DIGITS / name).read_bytes())
    write_manifest(folder, "digits", "handler.py", {"modelFile": "model.py", "serializedFile": "digits_v1.pt"})
    return Files(folder, folder / "handler.py", folder / "model.py", "DigitsNet", folder / "digits_v1.pt")


def fix_threads(handler: Path, handler_class: str, threads: int) -> None:
    """Have the class of a handler's file compute with so many threads, whoever runs it."""
    with handler.open("a", encoding="utf-8") as file:
        file.write(_FIX_THREADS.format(handler_class=handler_class, threads=threads))


def digits_image() -> bytes:
    """Return a request to the digits model."""
    return (DIGITS / "samples" / "00.pgm").read_bytes()


def _write_handler(folder: Path, name: str, code: str) -> Path:
    folder.mkdir(parents=True)
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    write_manifest(folder, name, f"{name}.py", {})
    return folder


def write_manifest(folder: Path, name: str, handler: str, files: Mapping[str, str]) -> None:
    """Write ``MAR-INF/MANIFEST.json``: the folder can be registered then."""
    model = {"modelName": name, "modelVersion": "1.0", "handler": handler, **files}
    (folder / "MAR-INF").mkdir()
    manifest = {"runtime": "python", "model": model, "archiverVersion": "0.12.0"}
    (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest), encoding="utf-8")


def pack_digits(folder: Path) -> Path:
    """Build the archive of ``examples/digits`` with the real torch-model-archiver; return the file.

    Raises Missing if that is not installed, subprocess.CalledProcessError if it fails.
    """
    _archiver()
    command = [sys.executable, str(DIGITS / "pack.py"), str(folder)]
    subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)
    return folder / "digits.mar"


def pack_noop(folder: Path) -> Path:
    """Build ``noop.mar``, the handler of :func:`write_noop`, in ``folder``; raises as :func:`pack_digits`."""
    with tempfile.TemporaryDirectory(prefix="torchmgmt-bench-") as scratch:
        source = write_noop(Path(scratch, "noop")) / "noop.py"
        return _pack(folder, "noop", {"--handler": source})


def pack_sleeper(folder: Path, seconds: float) -> Path:
    """Build ``sleeper.mar``, the handler of :func:`write_sleeper`; raises as :func:`pack_digits`."""
    with tempfile.TemporaryDirectory(prefix="torchmgmt-bench-") as scratch:
        source = write_sleeper(Path(scratch, "sleeper"), seconds) / "sleeper.py"
        return _pack(folder, "sleeper", {"--handler": source})


def pack_linear(folder: Path, name: str, files: Files) -> Path:
    """Build an archive of what :func:`write_heavy` or :func:`write_small` wrote; raises as :func:`pack_digits`.

    What is in it is stored, not deflated: random weights do not get smaller, and packing takes a second, not twenty.
    """
    options = {"--handler": files.handler, "--model-file": files.model_file, "--serialized-file": files.state_dict}
    return _pack(folder, name, options, "--archive-format", "zip-store")


def _pack(folder: Path, name: str, options: Mapping[str, Path], *more: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    command = [_archiver(), "--model-name", name, "--version", "1.0", "--export-path", str(folder), *more]
    for option, file in options.items():
        command += [option, str(file)]
    with tempfile.TemporaryDirectory(prefix="torchmgmt-bench-") as scratch:  # it collects the files in TMPDIR
        environment = {**os.environ, "TMPDIR": scratch}
        subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL, env=environment)
    return folder / f"{name}.mar"


def _archiver() -> str:
    found = shutil.which("torch-model-archiver", path=sysconfig.get_path("scripts"))
    if found is None:
        raise Missing("torch-model-archiver is not installed")
    return found
