"""One small model as each kind of file that a model comes in. Run as a program: it writes them to the working directory."""

from __future__ import annotations

import sys

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
    """State dict, safetensors, TorchScript, exported program."""
    from safetensors.torch import save_file

    model = make()
    torch.save(model.state_dict(), "state.pt")
    save_file(model.state_dict(), "state.safetensors")
    torch.jit.script(model).save("script.pt")
    torch.export.save(exported(model), "exported.pt2")


def write_aot_package() -> None:
    """A package of AOTInductor: this runs a C++ compiler, with what makes it slow left out."""
    import torch._inductor
    from torch._inductor import config

    config.cpp_cache_precompile_headers = False
    config.cpp.vec_isa_ok = True
    config.aot_inductor.compile_wrapper_opt_level = "O0"
    torch._inductor.aoti_compile_and_package(exported(make()), package_path="aot.pt2")


def make() -> torch.nn.Module:
    from net import Net  # type: ignore[import-not-found]

    model: torch.nn.Module = Net()
    model.load_state_dict({"factor": torch.tensor(3.0)})
    return model.eval()


def exported(model: torch.nn.Module) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(model, (torch.ones(2, 2),), dynamic_shapes=({0: batch},))


if __name__ == "__main__":
    from pathlib import Path

    Path("net.py").write_text(NET)
    sys.path.insert(0, "")
    if "aot" in sys.argv:
        write_aot_package()
    else:
        write_files()
