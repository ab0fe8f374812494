"""The kinds of files that models come in, told apart by their content, and how each is loaded."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Iterator
from enum import Enum, auto
from pathlib import Path
from typing import Any

import torch

from torchmgmt.handlers.optional import needed

__all__ = [
    "FileKind",
    "kind_of",
    "load_aot_library",
    "load_aot_package",
    "load_exported",
    "read_safetensors",
    "run_ort_session",
    "setup_ort_session",
]


class FileKind(Enum):
    """What a serialized file is, where no model file says what it belongs to."""

    TORCHSCRIPT = auto()
    EXPORTED = auto()
    """What ``torch.export.save`` wrote."""
    AOT_PACKAGE = auto()
    """A package of AOTInductor."""
    AOT_LIBRARY = auto()
    """A shared library of AOTInductor, as before there were packages."""
    ONNX = auto()
    WEIGHTS = auto()
    """Tensors by their names, as safetensors: no model without a model file."""


_BY_SUFFIX = {".so": FileKind.AOT_LIBRARY, ".onnx": FileKind.ONNX, ".safetensors": FileKind.WEIGHTS}


def kind_of(path: str) -> FileKind:
    """Return what ``path`` is; TorchScript, if nothing speaks for something else. Raises FileNotFoundError."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"the manifest names the serializedFile {file.name}, but the archive does not hold it")
    if (kind := _BY_SUFFIX.get(file.suffix.lower())) is not None:
        return kind
    if not zipfile.is_zipfile(file):
        return FileKind.TORCHSCRIPT
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    if any("data/aotinductor/" in name for name in names):
        return FileKind.AOT_PACKAGE
    # Since torch 2.7 an export is an archive of its own format; before, these files were at its top.
    is_export = any(name.endswith(("/archive_format", "serialized_exported_program.json")) for name in names)
    return FileKind.EXPORTED if is_export else FileKind.TORCHSCRIPT


def load_exported(path: str, device: torch.device) -> Any:
    """Return what computes the program that ``torch.export.save`` wrote: a module. Raises whatever torch does."""
    program = torch.export.load(path)
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    return program.module()


def load_aot_package(path: str, device: torch.device) -> Any:
    """Return what computes a package of AOTInductor: a callable.

    Raises:
        RuntimeError: this torch cannot load packages, or not this one.
    """
    import torch._inductor  # takes a second, and torch leaves it out

    load = getattr(torch._inductor, "aoti_load_package", None)
    if load is None:
        raise RuntimeError(
            f"{Path(path).name} is a package of AOTInductor, which torch {torch.__version__} cannot load; 2.6 or newer can"
        )
    if device.type != "cpu":
        return load(path, device_index=device.index)
    with _passing_temporary_folder():
        return load(path)


def load_aot_library(path: str, device: str) -> Any:
    """Return what computes a shared library of AOTInductor: a callable.

    Raises:
        RuntimeError: this torch cannot load such libraries, or not this one.
    """
    import torch._export

    load = getattr(torch._export, "aot_load", None)
    if load is None:
        raise RuntimeError(
            f"{Path(path).name} is a shared library, which torch {torch.__version__} does not load as a model; make a package"
            " of it (torch._inductor.aoti_compile_and_package)"
        )
    return load(path, device)


def read_safetensors(path: str, device: torch.device) -> Any:
    """Return the tensors in a file of safetensors, by their names. Raises ImportError where that is not installed."""
    load = needed("safetensors.torch", "safetensors", f"reading {Path(path).name}").load_file
    return load(path, device=str(device))


def setup_ort_session(model_pt_path: str, map_location: str | None, threads: int | None = None) -> Any:
    """Return a session of ONNX Runtime. Named as in TorchServe.

    Args:
        model_pt_path: a model as ONNX.
        map_location: "cuda" for that, if the package has it; else it computes on the CPU.
        threads: how many threads an operation may use; None: as many as ONNX Runtime thinks best.

    Raises:
        ImportError: onnxruntime is not installed.
    """
    runtime = needed("onnxruntime", "onnxruntime", f"running {Path(model_pt_path).name}")
    providers = ["CUDAExecutionProvider"] if map_location == "cuda" else []
    options = runtime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    return runtime.InferenceSession(model_pt_path, providers=[*providers, "CPUExecutionProvider"], sess_options=options)


def run_ort_session(session: Any, data: torch.Tensor) -> torch.Tensor:
    """Return the first output of a session of ONNX Runtime for its first input."""
    (output, *_others) = session.run(None, {session.get_inputs()[0].name: data.cpu().numpy()})
    return torch.as_tensor(output)


@contextlib.contextmanager
def _passing_temporary_folder() -> Iterator[None]:
    """Have a library that unpacks itself for good leave nothing behind: what it has mapped lives on without its file.

    torch removes what it has unpacked when the interpreter shuts down, which a worker's never does.
    """
    before = os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="torchmgmt-aot-", ignore_cleanup_errors=True) as folder:
        os.environ["TMPDIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = before
