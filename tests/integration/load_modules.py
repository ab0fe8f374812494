"""Loads each of modules_to_load.CASES with BaseHandler and as torch's tutorials do, and prints how the two differ.

A program of its own, so that the tests' process stays without torch: ``python -m tests.integration.load_modules FOLDER``.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import mmap
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from tests.integration.modules_to_load import CASES, NOT_MAPPABLE, SHARED_BY_DEFAULT, Case
from torchmgmt.handlers.base_handler import BaseHandler


def repack(path: str, compression: int) -> None:
    """Write a checkpoint's entries into a new zip file, as people do with tools that know nothing of alignment."""
    with zipfile.ZipFile(path) as old:
        entries = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, content in entries.items():
            new.writestr(name, content)


constructions: Any = ModuleType("constructions")
constructions.count, constructions.is_measured, constructions.repack = 0, False, repack
sys.modules["constructions"] = constructions


def imported(file: Path) -> Any:
    """A module made of ``file``, fresh."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def write(case: Case, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(case.source)
    file = imported(folder / "model.py")
    net = file.Net()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.is_floating_point() and not nn.parameter.is_lazy(parameter):
                parameter.uniform_(-0.1, 0.1)
        for name, buffer in net.named_buffers():
            if name in net.state_dict():
                buffer.fill_(2)
    path = str(folder / "state.pt")
    if hasattr(file, "save"):
        file.save(net, path)
    else:
        torch.save(net.state_dict(), path)


def load_plainly(folder: Path) -> nn.Module:
    net: nn.Module = imported(folder / "model.py").Net()
    net.load_state_dict(torch.load(folder / "state.pt", map_location="cpu", weights_only=True))
    net.eval()
    return net


def load_by_handler(folder: Path, *, is_sealed: bool) -> nn.Module:
    sys.modules.pop("model", None)  # else it takes what was imported above, as of a handler that knows its class
    handler = BaseHandler()
    properties = {"model_dir": str(folder), "gpu_id": None, "weights_only": True, "is_sealed": is_sealed}
    manifest = {"model": {"modelFile": "model.py", "serializedFile": "state.pt"}}
    handler.initialize(SimpleNamespace(system_properties=properties, manifest=manifest, model_yaml_config=None))
    model: nn.Module = handler.model
    return model


def outcome(load: Callable[[], nn.Module]) -> tuple[nn.Module | None, list[str] | None]:
    """The module, or the name and text of the error."""
    try:
        return load(), None
    except Exception as error:
        return None, [type(error).__name__, str(error)]


def entries(net: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, those that are not saved and those with several names included."""
    return dict(
        [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)],
    )


def facts(name: str, tensor: torch.Tensor, net: nn.Module) -> list[object]:
    if nn.parameter.is_lazy(tensor):
        return [type(tensor).__name__]
    same = [other for other, each in entries(net).items() if each is tensor]
    sharing = [
        other
        for other, each in entries(net).items()
        if not nn.parameter.is_lazy(each) and each.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    ]
    return [
        name,
        type(tensor).__name__,
        str(tensor.dtype),
        str(tensor.device),
        list(tensor.shape),
        list(tensor.stride()),
        tensor.requires_grad,
        tensor.is_leaf,
        tensor.data_ptr() % 64,
        sorted(vars(tensor)),
        described(tensor),
        same,
        sharing,
    ]


def described(value: object) -> object:
    """What can be compared of an attribute: tensors by their values, also in lists and dictionaries."""
    if isinstance(value, torch.Tensor) and nn.parameter.is_lazy(value):
        return "not known yet"
    if isinstance(value, torch.Tensor):
        # Of a copy: a tensor that numpy has seen cannot be resized any more.
        return hashlib.sha256(value.detach().clone().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        # Keys that are numbers are those of hooks, which count on.
        return [[key if isinstance(key, str) else "", described(each)] for key, each in value.items()]
    if isinstance(value, (list, tuple)):
        return [described(each) for each in value]
    return value if isinstance(value, (str, int, float)) else type(value).__name__


def answer(net: nn.Module) -> object:
    """What the module computes of the same rows; nothing if it was made to be looked at only."""
    if type(net).forward is nn.Module.forward:
        return None
    rows = torch.linspace(-1, 1, 5 * 512).reshape(5, 512)
    if isinstance(getattr(net, "big", None), nn.Embedding):
        rows = rows[:, :512]
    with torch.inference_mode():
        return described(net(rows))


def differences(net: nn.Module, plain: nn.Module) -> list[str]:
    found = [
        f"{name}: {facts(name, tensor, net)} and not {facts(name, plain_tensor, plain)}"
        for (name, tensor), plain_tensor in zip(entries(net).items(), entries(plain).values(), strict=True)
        if facts(name, tensor, net) != facts(name, plain_tensor, plain)
    ]
    if list(entries(net)) != list(entries(plain)):
        found.append(f"{list(entries(net))} and not {list(entries(plain))}")
    for (name, module), other in zip(net.named_modules(), plain.modules(), strict=True):
        if described(vars(module)) != described(vars(other)):
            found.append(f"the attributes of {name or 'the module'}")
    if answer(net) != answer(plain):
        found.append("what it computes")
    return found


def mapped_files(net: nn.Module) -> set[str]:
    """The names of the files in which the module's tensors lie (Linux only)."""
    maps = Path("/proc/self/maps")
    lines = [line.split() for line in maps.read_text().splitlines()] if maps.exists() else []
    regions = [(*(int(end, 16) for end in line[0].split("-")), line[-1]) for line in lines if len(line) > 5]
    addresses = [each.data_ptr() for each in entries(net).values() if not nn.parameter.is_lazy(each)]
    return {Path(name).name for start, end, name in regions if any(start <= at < end for at in addresses)}


def values(net: nn.Module) -> object:
    return described({name: tensor.detach() for name, tensor in entries(net).items()})


def is_file_unchanged_by(net: nn.Module, file: Path) -> bool:
    """Whether writing to all tensors of the module leaves the file alone."""
    before = file.read_bytes()
    with torch.no_grad():
        for tensor in entries(net).values():
            tensor.fill_(7)
    return file.read_bytes() == before


def is_unchanged_by_file(net: nn.Module, file: Path) -> bool:
    """Whether the module is as it was after the file is overwritten in place."""
    before, content = values(net), file.read_bytes()
    with file.open("r+b") as opened:
        opened.write(bytes(len(content)))
    after = values(net)
    file.write_bytes(content)
    return after == before


def report(folder: Path, *, is_sealed: bool) -> dict[str, Any]:
    constructions.is_measured, constructions.count = True, 0
    net, error = outcome(lambda: load_by_handler(folder, is_sealed=is_sealed))
    made = constructions.count
    plain, plain_error = outcome(lambda: load_plainly(folder))
    constructions.is_measured = False
    said: dict[str, Any] = {"made": made, "error": error, "plain_error": plain_error, "is_mapped": False}
    if net is not None and plain is not None:
        said["is_mapped"] = "state.pt" in mapped_files(net)
        said["differences"] = differences(net, plain)
        said["survives_overwriting"] = is_sealed or is_unchanged_by_file(net, folder / "state.pt")
        said["writes_stay_private"] = is_file_unchanged_by(net, folder / "state.pt")
    return said


def map_nothing(*_: object) -> None:
    """What torch does if the system refuses to map a file."""
    raise RuntimeError("unable to mmap bytes from file: No such device (19)")


def main() -> None:
    """Print what came of all cases, each from a sealed and from a plain folder."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    gc.freeze()  # as the process that workers are forked from does after importing torch
    reports: dict[str, Any] = {}
    for number, (name, case) in enumerate(CASES.items()):
        folder = Path(sys.argv[1], str(number))
        write(case, folder)
        reports[name] = {"sealed": report(folder, is_sealed=True), "plain folder": report(folder, is_sealed=False)}
    torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)
    reports[SHARED_BY_DEFAULT] = {"sealed": report(Path(sys.argv[1], "0"), is_sealed=True)}
    torch.serialization.set_default_mmap_options(mmap.MAP_PRIVATE)
    torch.UntypedStorage.from_file = map_nothing
    reports[NOT_MAPPABLE] = {"sealed": report(Path(sys.argv[1], "0"), is_sealed=True)}
    json.dump(reports, sys.stdout)


if __name__ == "__main__":
    main()
