"""One small model as each kind of file that a model comes in. Run as a program: it writes them to the working directory."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import torch

NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return x * self.factor
"""
"""Multiplies by 1 until it has weights, and then by 3."""


def write_files() -> None:
    """State dict, safetensors, TorchScript, exported program, ONNX."""
    from safetensors.torch import save_file

    model = make()
    torch.save(model.state_dict(), "state.pt")
    save_file(model.state_dict(), "state.safetensors")
    torch.jit.script(model).save("script.pt")
    torch.export.save(exported(model), "exported.pt2")
    write_onnx()


def write_aot_package() -> None:
    """A package of AOTInductor: this runs a C++ compiler, with what makes it slow left out."""
    import torch._inductor
    from torch._inductor import config

    config.cpp_cache_precompile_headers = False
    config.cpp.vec_isa_ok = True
    config.aot_inductor.compile_wrapper_opt_level = "O0"
    torch._inductor.aoti_compile_and_package(exported(make()), package_path="aot.pt2")


def write_onnx() -> None:
    """What multiplies by 3, as ONNX: written by hand, since what would write it is a package larger than its use here."""
    three = _message((2, 1), (8, b"three"), (9, struct.pack("<f", 3.0)))
    node = _message((1, b"x"), (1, b"three"), (2, b"y"), (4, b"Mul"))
    shape = _message((1, _message((2, b"batch"))), (1, _message((1, 2))))
    kind = _message((1, _message((1, 1), (2, shape))))
    x, y = (_message((1, name), (2, kind)) for name in (b"x", b"y"))
    graph = _message((1, node), (2, b"net"), (5, three), (11, x), (12, y))
    Path("model.onnx").write_bytes(_message((1, 8), (7, graph), (8, _message((2, 13)))))


def _message(*fields: tuple[int, int | bytes]) -> bytes:
    """A message of protobuf: numbers below 128 and bytes, by the numbers of their fields."""
    parts = []
    for number, value in fields:
        if isinstance(value, int):
            parts.append(bytes([number << 3, value]))
        else:
            assert len(value) < 1 << 14
            parts.append(bytes([number << 3 | 2, len(value) & 127 | 128, len(value) >> 7]) + value)
    return b"".join(parts)


def make() -> torch.nn.Module:
    from net import Net  # type: ignore[import-not-found]

    model: torch.nn.Module = Net()
    model.load_state_dict({"factor": torch.tensor(3.0)})
    return model.eval()


def exported(model: torch.nn.Module) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(model, (torch.ones(2, 2),), dynamic_shapes=({0: batch},))


if __name__ == "__main__":
    Path("net.py").write_text(NET)
    sys.path.insert(0, "")
    if "aot" in sys.argv:
        write_aot_package()
    else:
        write_files()
