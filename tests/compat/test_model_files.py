"""BaseHandler loads every kind of file that a model comes in, from archives of the real torch-model-archiver."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.compat import model_files
from tests.compat.real import Packer
from torchmgmt import ModelManager
from torchmgmt.errors import HandlerFailed, WorkerStartFailed

NET = model_files.NET
# What stands in for a package that is not there, or for one that is.
ABSENT = "raise ModuleNotFoundError('No module named ' + repr(__name__), name=__name__)\n"
CAPTUM = """
class IntegratedGradients:
    def __init__(self, model):
        self.model = model

    def attribute(self, inputs, target, n_steps):
        return self.model(inputs).detach() * 100 + target
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in all files that need no compiler."""
    folder = tmp_path_factory.mktemp("files")
    make_files(folder)
    return folder


def make_files(folder: Path, *arguments: str) -> None:
    """Run the program that writes model files; torch stays out of the tests' own process."""
    command = [sys.executable, "-W", "ignore", model_files.__file__, *arguments]
    environment = {"PATH": "/usr/bin:/bin", "TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=220, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def packer(tmp_path: Path) -> Packer:
    (tmp_path / "store").mkdir()
    return Packer(tmp_path, tmp_path / "store")


@pytest.mark.parametrize(
    "name, model",
    [("state.pt", NET), ("state.safetensors", NET), ("script.pt", ""), ("exported.pt2", "")],
    ids=["state dict", "safetensors", "TorchScript", "exported"],
)
def test_every_kind_of_file_is_loaded_once_and_computes(
    files: Path, packer: Packer, manager: ModelManager, name: str, model: str
) -> None:
    """Batches are answered as the model says, and the workers are forked from a process that has loaded it."""
    archive = packer.pack("net", "base_handler", files / name, model=model)
    served = manager.register(archive, initial_workers=2, batch_size=4, max_batch_delay=50)
    futures = [served.submit([float(number), 2.0]) for number in range(3)]
    assert [future.result(20) for future in futures] == [[0.0, 6.0], [3.0, 6.0], [6.0, 6.0]]
    assert served.describe().sharing.is_shared


def test_a_package_of_aotinductor_goes_where_a_subclass_expects_it(
    packer: Packer, manager: ModelManager, tmp_path: Path
) -> None:
    """A package is known by its content; the method that loads it has TorchServe's name, and can be overridden."""
    source = """
from ts.torch_handler.base_handler import BaseHandler

class Handler(BaseHandler):
    def _load_torch_export_aot_compile(self, model_so_path):
        return lambda batch: batch * len(model_so_path.rpartition("/")[2])
"""
    with zipfile.ZipFile(tmp_path / "aot.pt2", "w") as archive:
        archive.writestr("aot/archive_format", "pt2")
        archive.writestr("aot/data/aotinductor/model/x.wrapper.so", "")
    assert manager.register(packer.pack("aot", source, tmp_path / "aot.pt2")).predict([1.0, 2.0]) == [7.0, 14.0]


@pytest.mark.timeout(240)
@pytest.mark.skipif(
    not os.environ.get("TORCHMGMT_SLOW_TESTS"), reason="compiles C++; set TORCHMGMT_SLOW_TESTS to run it"
)
def test_a_package_of_aotinductor_computes_and_leaves_nothing(
    tmp_path: Path, packer: Packer, manager: ModelManager
) -> None:
    """It is loaded once, as the others; what it unpacks for that is gone when it is loaded."""
    make_files(tmp_path, "aot")
    source = """
import glob, tempfile
from ts.torch_handler.base_handler import BaseHandler

class Handler(BaseHandler):
    def postprocess(self, data):
        left = glob.glob(tempfile.gettempdir() + "/*aot*/*")
        return [(row, left) for row in data.tolist()]
"""
    served = manager.register(packer.pack("aot", source, tmp_path / "aot.pt2"))
    assert served.predict([1.0, 2.0]) == ([3.0, 6.0], [])
    assert served.describe().sharing.is_shared


def test_a_model_of_onnx_runs_where_onnxruntime_is(files: Path, packer: Packer, manager: ModelManager) -> None:
    """Its session takes the batch as its first input and gives the answers as its first output."""
    archive = packer.pack("o", "base_handler", files / "model.onnx")
    served = manager.register(archive, initial_workers=2, batch_size=4, max_batch_delay=50)
    assert list(served.map([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])) == [[3.0, 6.0], [9.0, 12.0], [15.0, 18.0]]
    with pytest.raises(HandlerFailed, match="gives no gradients"):
        served.predict([1.0, 2.0], headers={"explain": "True"})


@pytest.mark.parametrize(
    "name, content, model, extra, says",
    [
        ("m.onnx", b"3", "", {"onnxruntime.py": ABSENT}, "running m.onnx needs onnxruntime"),
        ("m.safetensors", b"3", NET, {"safetensors.py": ABSENT}, "reading m.safetensors needs safetensors"),
        ("m.safetensors", b"3", "", {}, "holds weights and no model"),
        ("m.pt", b"nothing", "", {}, "m.pt is not a TorchScript file"),
        ("m.pt", b"nothing", NET, {"net.py": "from torch import nn\n"}, "must define exactly one nn.Module"),
    ],
    ids=["no onnxruntime", "no safetensors", "only weights", "no TorchScript", "no class"],
)
def test_what_cannot_be_loaded_says_why(
    packer: Packer,
    manager: ModelManager,
    tmp_path: Path,
    name: str,
    content: bytes,
    model: str,
    extra: Mapping[str, str],
    says: str,
) -> None:
    """A missing package is named, and so is what a file lacks."""
    (tmp_path / name).write_bytes(content)
    model = extra.get("net.py", model)
    files = {file: text for file, text in extra.items() if file != "net.py"}
    archive = packer.pack("m", "base_handler", tmp_path / name, model=model, files=files)
    with pytest.raises(WorkerStartFailed) as caught:
        manager.register(archive)
    assert says in caught.value.reason


def test_a_prediction_is_explained_with_captum(
    files: Path, packer: Packer, manager: ModelManager, tmp_path: Path
) -> None:
    """The header asks for it, the row names the target; without captum the error names it."""
    captum = {
        "captum.py": "import sys\n__path__ = []\nimport attr_of_captum\nsys.modules['captum.attr'] = attr_of_captum\n"
    }
    with_it = packer.pack("with", "base_handler", files / "script.pt", files=captum | {"attr_of_captum.py": CAPTUM})
    row = {"data": [1.0, 2.0], "target": 1}
    served = manager.register(with_it)
    assert served.predict(fields=row, headers={"Explain": "True"}) == [301.0, 601.0]
    assert served.predict(fields=row) == [3.0, 6.0]
    for sent in ({"target": bytearray(b"2")}, {"target": "2"}):
        assert served.predict(fields={"data": [1.0, 2.0]} | sent, headers={"explain": "True"}) == [302.0, 602.0]
    assert served.predict(fields={"data": [1.0, 2.0]}, headers={"explain": "True"}) == [300.0, 600.0]
    without = packer.pack("without", "base_handler", files / "script.pt", files={"captum.py": ABSENT})
    with pytest.raises(HandlerFailed, match="explaining a prediction needs captum"):
        manager.register(without).predict(fields=row, headers={"explain": "True"})


COMPILED = """
from ts.torch_handler.base_handler import BaseHandler

class Handler(BaseHandler):
    def postprocess(self, data):
        return [(type(self.model).__name__, row) for row in data.tolist()]
"""


@pytest.mark.parametrize(
    "pt2, kind",
    [
        ("{compile: {enable: true, backend: eager}}", "OptimizedModule"),
        ("{backend: eager}", "OptimizedModule"),
        ("no_such_backend", "Net"),
        ("{compile: {enable: false, backend: eager}}", "Net"),
    ],
)
def test_the_options_of_torch_compile_come_from_the_configuration(
    files: Path, packer: Packer, manager: ModelManager, pt2: str, kind: str
) -> None:
    """Both forms of pt2 compile; a backend that is not there is left, as TorchServe does; a warm-up compiles early."""
    config = f"pt2: {pt2}\nwarmup:\n  - body: [1.0, 2.0]\n"
    archive = packer.pack("c", COMPILED, files / "state.pt", model=NET, config=config)
    assert manager.register(archive).predict([1.0, 2.0]) == (kind, [3.0, 6.0])


def test_the_profiler_watches_the_steps(files: Path, packer: Packer, manager: ModelManager, tmp_path: Path) -> None:
    """With ENABLE_TORCH_PROFILER the three steps are in the profile, and the answer is what it always is."""
    source = """
import os
from ts.torch_handler.base_handler import BaseHandler

class Handler(BaseHandler):
    def initialize(self, context):
        super().initialize(context)
        os.environ["ENABLE_TORCH_PROFILER"] = "TRUE"
        self.profiler_args = {"on_trace_ready": self.look}

    def look(self, profiler):
        self.steps = {event.key for event in profiler.key_averages()}

    def handle(self, data, context):
        answers = super().handle(data, context)
        return [(answer, {"preprocess", "inference", "postprocess"} <= self.steps) for answer in answers]
"""
    served = manager.register(packer.pack("p", source, files / "script.pt"))
    assert served.predict([1.0, 2.0]) == ([3.0, 6.0], True)
