"""BaseHandler loads weights without copying them where that changes nothing, and else as torch's tutorials do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.handlers import write_folder, write_manifest
from tests.integration.modules_to_load import CASES, FAILING, MAPPED, NOT_MAPPABLE, SHARED_BY_DEFAULT
from torchmgmt import Model, ModelManager

WAYS = ["sealed", "plain folder"]
LOADING = [name for name in CASES if name not in FAILING]
Reports = Mapping[str, Mapping[str, Mapping[str, Any]]]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only /proc says what is mapped")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Reports:
    """What came of loading all modules, in a process of its own: this one stays without torch."""
    folder = tmp_path_factory.mktemp("modules")
    command = [sys.executable, "-m", "tests.integration.load_modules", str(folder)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    loaded: Reports = json.loads(done.stdout)
    return loaded


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOADING)
def test_a_module_is_as_if_it_was_loaded_plainly(reports: Reports, name: str, way: str) -> None:
    """Tensors, what they share, attributes and answers are those of ``Net().load_state_dict(torch.load(...))``."""
    assert reports[name][way]["error"] is None
    assert reports[name][way]["differences"] == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAILING)
def test_an_error_is_the_one_that_plain_loading_raises(reports: Reports, name: str, way: str) -> None:
    """What cannot be loaded says so by the same error, with the same text, unless weights_only refuses it: in ours then."""
    error, plain = reports[name][way]["error"], reports[name][way]["plain_error"]
    assert error[0] == plain[0] == FAILING[name].fails
    if "Unsupported global" in plain[1]:
        assert error[1].startswith("state.pt holds an object of ")
    else:
        assert error[1] == plain[1]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_a_constructor_runs_again_only_where_it_must(reports: Reports, name: str, way: str) -> None:
    """A module is made once, and a second time only if it could not do without its weights the first time."""
    assert reports[name][way]["made"] == CASES[name].made


@linux_only
@pytest.mark.parametrize("name", CASES)
def test_weights_are_mapped_where_they_can_be(reports: Reports, name: str) -> None:
    """Large parameters that the file holds as the module wants them are views of it; buffers are no views."""
    assert reports[name]["sealed"]["is_mapped"] == (name in MAPPED)


@pytest.mark.parametrize("name", CASES)
def test_files_of_others_are_not_mapped(reports: Reports, name: str) -> None:
    """A file that its owner may rewrite is read once: what becomes of it does not reach the module."""
    said = reports[name]["plain folder"]
    assert not said["is_mapped"]
    assert said.get("survives_overwriting", True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOADING)
def test_writing_to_weights_changes_no_file(reports: Reports, name: str, way: str) -> None:
    """A module that changes its weights changes them for itself."""
    assert reports[name][way]["writes_stay_private"]


@pytest.mark.parametrize("where", [SHARED_BY_DEFAULT, NOT_MAPPABLE])
def test_what_cannot_be_mapped_safely_is_read(reports: Reports, where: str) -> None:
    """If torch is set to map files shared, or the system maps none, the file is read."""
    said = reports[where]["sealed"]
    assert (said["error"], said["made"], said["is_mapped"]) == (None, 1, False)
    assert (said["differences"], said["writes_stay_private"]) == ([], True)


NET = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.big = torch.nn.Linear(512, 512)
    def forward(self, rows):
        return self.big(rows)
"""
HANDLER = """
from pathlib import Path
from torchmgmt.handlers.base_handler import BaseHandler
class Handler(BaseHandler):
    def preprocess(self, rows):
        return super().preprocess([[1.0] * 512 for row in rows])
    def postprocess(self, data):
        at = self.model.big.weight.data_ptr()
        for line in Path("/proc/self/maps").read_text().splitlines():
            start, end = (int(each, 16) for each in line.split()[0].split("-"))
            if start <= at < end:
                return [(float(row.sum()), line.split()[5] if len(line.split()) > 5 else "") for row in data]
"""


def write_model(folder: Path) -> Path:
    """A model of 512 x 512 ones and no bias: it answers a row of ones with 512 times 512."""
    write_folder(folder, HANDLER, model=NET)
    script = "import torch; torch.save({'big.weight': torch.ones(512, 512), 'big.bias': torch.zeros(512)}, 'state.pt')"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=folder, check=True, timeout=60)
    return write_manifest(folder, modelName="m", handler="handler.py", modelFile="model.py", serializedFile="state.pt")


def asked(model: Model) -> tuple[float, str]:
    total, file = model.predict("x")
    return total, Path(file).name


@linux_only
def test_workers_map_what_was_unpacked_and_read_what_was_not(manager: ModelManager, tmp_path: Path) -> None:
    """The weights of an archive lie in our unpacked copy of it, those of a plain folder in the worker's memory."""
    folder = write_model(tmp_path / "m")
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", folder))
    packed, plain = manager.register(archive, version="1"), manager.register(folder, version="2")
    assert (packed.describe().spec.is_sealed, plain.describe().spec.is_sealed) == (True, False)
    assert asked(packed) == (512.0 * 512.0, "state.pt")
    total, file = asked(plain)
    assert total == 512.0 * 512.0
    assert file != "state.pt"


@linux_only
def test_mapped_weights_outlive_their_file(manager: ModelManager, tmp_path: Path) -> None:
    """A worker whose unpacked files are removed under it answers as before."""
    folder = write_model(tmp_path / "m")
    model = manager.register(Path(shutil.make_archive(str(tmp_path / "packed"), "zip", folder)))
    unpacked = Path(model.describe().spec.model_dir)
    (unpacked / "state.pt").unlink()
    assert asked(model)[0] == 512.0 * 512.0
