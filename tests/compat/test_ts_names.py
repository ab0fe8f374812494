"""The names that handlers import from TorchServe: which there are, how they are called, and what is said of others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.compat.ts_names import NAMES
from tests.handlers import Deployer, run_program, write_folder
from torchmgmt.errors import WorkerStartFailed

LOOK = """
import importlib, inspect, json, sys
import torchmgmt.compat
torchmgmt.compat.install_ts()
torchmgmt.compat.install_ts()

def parameters(member):
    if inspect.isclass(member):
        member = member.__init__
    return [
        [name, each.kind.name, each.default is not each.empty]
        for name, each in inspect.signature(member).parameters.items() if name != "self"
    ]

found = {}
for module, names in json.loads(sys.argv[1]).items():
    found[module] = {}
    for name in names:
        member = importlib.import_module(module)
        for part in name.split("."):
            member = getattr(member, part)
        found[module][name] = parameters(member) if callable(member) else None
print(json.dumps(found))
"""


def test_every_name_is_there_and_can_be_called_as_in_torchserve() -> None:
    """All that the table of TorchServe 0.12.0 holds is found, and takes its parameters, by position and by name."""
    done = run_program(LOOK, json.dumps(NAMES))
    assert done.returncode == 0, done.stderr
    for module, names in json.loads(done.stdout).items():
        for name, ours in names.items():
            wanted = NAMES[module][name]
            if ours is None or wanted is None or any(kind == "VAR_POSITIONAL" for _, kind, _ in ours[: len(wanted)]):
                continue
            assert [each for each, *_ in ours][: len(wanted)] == wanted, f"{module}.{name}"
            # What is ours alone must not be needed.
            needed = [each for each, kind, has_default in ours[len(wanted) :] if not has_default and "VAR" not in kind]
            assert not needed, f"{module}.{name}"


@pytest.mark.parametrize(
    "statement, says",
    [
        ("import ts.no_such", ["torchmgmt has no ts.no_such;", "ts.torch_handler.base_handler", "ts.launcher"]),
        ("from ts import no_such", ["torchmgmt has no ts.no_such;", "ts.utils.util"]),
        (
            "from ts.torch_handler import dali_handler",
            ["torchmgmt has no ts.torch_handler.dali_handler;", "ts.context"],
        ),
        ("from ts.utils.util import no_such", ["torchmgmt has no no_such in ts.utils.util;", "map_class_to_label"]),
        ("from ts.launcher import start", ["torchmgmt has no start in ts.launcher;", "register_model_with_params"]),
    ],
)
def test_a_name_that_is_not_there_is_an_import_error_that_lists_what_is(
    deploy: Deployer, statement: str, says: list[str]
) -> None:
    """Of modules, of modules in packages, and of names in modules; the handler's start says it."""
    with pytest.raises(WorkerStartFailed) as caught:
        deploy(f"{statement}\ndef handle(data, context):\n    return data\n")
    assert "Error: torchmgmt has no" in caught.value.reason
    for each in says:
        assert each in caught.value.reason


def test_asking_whether_a_name_is_there_raises_nothing(deploy: Deployer) -> None:
    """hasattr, getattr with a default, and a fallback after ImportError work as with any module."""
    source = """
import ts.utils.util, ts.torch_handler
try:
    from ts.utils.util import no_such
except ImportError:
    no_such = "fallback"
def handle(data, context):
    asked = hasattr(ts.utils.util, "no_such"), getattr(ts.torch_handler, "no_such", 1), no_such
    return data and [asked for row in data]
"""
    assert deploy(source).predict() == (False, 1, "fallback")


def test_install_ts_does_not_mix_with_another_ts() -> None:
    """A process that has imported a ts of somebody else is told, instead of getting parts of both."""
    done = run_program(
        "import sys, types\nsys.modules['ts'] = types.ModuleType('ts')\n"
        "import torchmgmt.compat\ntorchmgmt.compat.install_ts()"
    )
    assert "RuntimeError: another module ts was imported before" in done.stderr


SERVING = """
import sys
from torchmgmt import ModelManager

before = list(sys.meta_path)
with ModelManager() as manager:
    model = manager.register(sys.argv[1], model_name="m", handler="handler")
    print(model.predict(), [name for name in sys.modules if name.split(".")[0] == "ts"], sys.meta_path == before)
    try:
        import ts
    except ImportError as error:
        print(error)
"""


def test_a_program_that_serves_is_untouched(tmp_path: Path) -> None:
    """What its workers import as ts is nowhere in the program: no module, no hook, no package."""
    source = "import ts\ndef handle(data, context):\n    return data and [ts.__version__ for row in data]\n"
    done = run_program(SERVING, str(write_folder(tmp_path / "m", source)))
    assert done.stdout == "0.12.0 [] True\nNo module named 'ts'\n", done.stderr


HANDLER_TEST = """
import json, pathlib, sys, tempfile
import torchmgmt.compat
torchmgmt.compat.install_ts()
import torch
from ts.torch_handler.unit_tests.test_utils.mock_context import MockContext
from ts.torch_handler.base_handler import BaseHandler
from ts.context import Context
from ts.service import emit_metrics
from ts.launcher import register_model
from ts.model_loader import ModelLoaderFactory

folder = pathlib.Path(tempfile.mkdtemp())
net = "import torch\\nclass Net(torch.nn.Module):\\n    def __init__(self):\\n        super().__init__()\\n"
net += "        self.weight = torch.nn.Parameter(torch.ones(1))\\n    def forward(self, x):\\n        return x * self.weight\\n"
(folder / "model.py").write_text(net)
torch.save({"weight": torch.tensor([2.0])}, folder / "model.pt")
(folder / "config.yaml").write_text("handler: {profile: true}")
context = MockContext(model_dir=str(folder), model_name="mine", model_yaml_config_file="config.yaml")
assert isinstance(context, Context) and context.system_properties["model_dir"] == str(folder)
handler = BaseHandler()
handler.initialize(context)
assert handler.initialized and handler.handle([{"body": [3.0]}], context) == [[6.0]]
names = [metric.name for metric in context.metrics.store]
assert names == ["ts_handler_preprocess", "ts_handler_inference", "ts_handler_postprocess", "HandlerTime"], names
emit_metrics(context.metrics.store)
context.explain = True
assert handler._is_explain()

(folder / "mine.py").write_text("def handle(data, context):\\n    return data and [context.model_name for row in data]\\n")
service = ModelLoaderFactory.get_model_loader().load("m", str(folder), "mine.py", None, 4)
assert service.entry_point([{}, {}], service.context) == ["m", "m"]
assert service._entry_point([{}], service.context) == ["m"]
service = ModelLoaderFactory.get_model_loader().load("m", str(folder), "mine.py", None, 1, "kserve")
service.context.begin_batch(["1"], [{}])
assert service.entry_point([{"body": {"instances": [1, 2]}}], service.context) == [{"predictions": ["m", "m"]}]
import shutil
shutil.rmtree(folder)
print("well")
"""


def test_a_handler_is_tested_without_a_server() -> None:
    """In a program that asks for ts by name, MockContext stands for a worker's context, and a handler runs with it."""
    done = run_program(HANDLER_TEST)
    assert done.stdout == "well\n", done.stderr
