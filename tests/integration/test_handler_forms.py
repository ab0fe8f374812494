"""The forms of handlers that existing archives have, and what they find around them in a worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.handlers import ECHO, TOOLS, Deployer, lines_of, write_folder, write_manifest
from torchmgmt import ModelManager
from torchmgmt.errors import WorkerStartFailed

CLASS = """
class Handler:
    def initialize(self, context):
        self.initialized = context.model_name
    def handle(self, data, context):
        return [(self.initialized, row["body"]) for row in data]
"""
HELPERS = """
from helpers import Base
class Mine(Base):
    pass
"""
BASES = """
class Base:
    def initialize(self, context):
        self.initialized = context.model_name
    def handle(self, data, context):
        return [(self.initialized, row["body"]) for row in data]
class Mine(Base):
    def unrelated(self):
        pass
class Helper:
    pass
"""
MODEL = """
import torch
class Double(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(0.0))
    def forward(self, x):
        return x * self.factor
"""


@pytest.mark.parametrize("source", [CLASS, HELPERS, BASES], ids=["class", "imported base", "base beside it"])
@pytest.mark.parametrize("handler", ["handler", "handler.py"])
def test_a_class_is_initialised_and_handles(deploy: Deployer, source: str, handler: str) -> None:
    """A module with one handler class, bases aside, is initialised once and handles batches; with or without .py."""
    model = deploy(source, handler=handler, files={"helpers": CLASS.replace("Handler", "Base")})
    assert model.predict("x") == ("m", "x")


def test_a_function_is_called_once_without_data(deploy: Deployer, tmp_path: Path) -> None:
    """A module-level handle is called with None once, when it is loaded, and with batches afterwards."""
    calls = tmp_path / "calls"
    source = f"{TOOLS}\ndef handle(data, context):\n    note({str(calls)!r}, data and len(data))\n    return data\n"
    model = deploy(source)
    assert lines_of(calls) == ["None"]
    model.predict("x")
    assert lines_of(calls) == ["None", "1"]


def test_a_function_of_any_name_can_be_named(deploy: Deployer) -> None:
    """``module:function`` names the function that handles."""
    source = "def run(data, context):\n    return data and ['run' for row in data]\n" + ECHO
    assert deploy(source, handler="handler:run").predict(1) == "run"
    assert deploy(source, handler="handler.py:run", version="2").predict(1) == "run"
    with pytest.raises(WorkerStartFailed, match="no function walk"):
        deploy(source, handler="handler:walk", version="3")


def test_a_class_may_do_without_initialize(deploy: Deployer) -> None:
    """A handler class with handle alone is legal."""
    assert deploy("class H:\n    def handle(self, data, context):\n        return [1 for row in data]\n").predict() == 1


def save(folder: Path, script: str) -> None:
    """Make files with torch, in a process of its own: the tests' process has no use for torch."""
    import subprocess
    import sys

    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=folder, check=True, timeout=60)


def test_the_shipped_handler_loads_what_the_archive_holds(manager: ModelManager, tmp_path: Path) -> None:
    """base_handler loads a TorchScript file, and a state dict with its model file, and computes with either."""
    folder = write_folder(tmp_path / "both", MODEL, model=MODEL)
    save(
        folder,
        "import torch, model\nm = model.Double()\nm.load_state_dict({'factor': torch.tensor(3.0)})\n"
        "torch.save(m.state_dict(), 'state.pt')\ntorch.jit.script(m).save('script.pt')\n",
    )
    write_manifest(folder, modelName="eager", handler="base_handler", modelFile="model.py", serializedFile="state.pt")
    assert manager.register(folder).predict([1.0, 2.0]) == [3.0, 6.0]
    write_manifest(folder, modelName="script", handler="base_handler", serializedFile="script.pt")
    assert manager.register(folder, batch_size=2).predict([1.0, 2.0]) == [3.0, 6.0]
    write_manifest(folder, modelName="none", handler="base_handler", serializedFile="state.pt")
    with pytest.raises(WorkerStartFailed, match="not a TorchScript file"):
        manager.register(folder)
    write_manifest(folder, modelName="none", handler="base_handler")
    with pytest.raises(WorkerStartFailed, match="nothing to load"):
        manager.register(folder)
    write_manifest(folder, modelName="none", handler="base_handler", modelFile="nope.py", serializedFile="state.pt")
    with pytest.raises(WorkerStartFailed, match=r"nope\.py"):
        manager.register(folder)


def test_a_pickle_that_runs_code_is_not_loaded(manager: ModelManager, tmp_path: Path) -> None:
    """A checkpoint that would run code when it is loaded is refused, and does not run it."""
    folder = write_folder(tmp_path / "evil", MODEL, model=MODEL)
    save(
        folder,
        "import os, torch\nclass Evil:\n    def __reduce__(self):\n        return os.mkdir, ('ran',)\n"
        "torch.save({'factor': Evil()}, 'state.pt')\n",
    )
    write_manifest(folder, modelName="m", handler="base_handler", modelFile="model.py", serializedFile="state.pt")
    with pytest.raises(WorkerStartFailed, match=r"weights_only|Weights only"):
        manager.register(folder)
    assert not (folder / "ran").exists()


def test_what_handlers_import_from_torchserve_is_there(deploy: Deployer) -> None:
    """The ts names that handlers import are found in a worker, and are one object under each of their names."""
    source = """
import ts
import ts.torch_handler.base_handler as module
from ts.context import Context
from ts.torch_handler.base_handler import BaseHandler
from ts.utils.util import PredictionException
class Mine(BaseHandler):
    def initialize(self, context):
        assert isinstance(context, Context)
        self.initialized = True
    def handle(self, data, context):
        from torchmgmt.handlers.base_handler import BaseHandler as ours
        return [module.BaseHandler is BaseHandler is ours for row in data]
"""
    assert deploy(source).predict() is True


def test_an_unknown_name_of_torchserve_says_what_there_is(deploy: Deployer) -> None:
    """Importing a ts module that there is not is an ImportError that names it and lists those that there are."""
    with pytest.raises(WorkerStartFailed) as caught:
        deploy("from ts.torch_handler.no_such_handler import Handler\n")
    for words in ("ts.torch_handler.no_such_handler", "ts.torch_handler.base_handler", "ts.context"):
        assert words in caught.value.reason
    assert "Error" in caught.value.reason


def test_ts_is_not_installed_in_the_program() -> None:
    """In the program that embeds torchmgmt nothing named ts can be imported, unless it has TorchServe."""
    with pytest.raises(ModuleNotFoundError):
        __import__("ts.context")


def test_the_model_folder_is_where_a_handler_works(deploy: Deployer) -> None:
    """A handler's working directory is the model's folder: relative files open, siblings import, first on sys.path."""
    source = "import os, sys, sibling\nfrom pathlib import Path\nHERE = Path('handler.py').read_text()\n"
    source += (
        "def handle(data, context):\n    return data and [(len(HERE) > 9, sibling.NAME, os.getcwd(), sys.path[0])]\n"
    )
    model = deploy(source, files={"sibling": "NAME = 'sibling'"})
    folder = model.describe().spec.model_dir
    assert model.predict() == (True, "sibling", folder, folder)


def test_models_with_modules_of_one_name_do_not_meet(deploy: Deployer) -> None:
    """Two models whose handler and helper modules have the same names each run their own."""
    source = "import helpers\ndef handle(data, context):\n    return data and [helpers.NAME]\n"
    models = [deploy(source, model_name=name, files={"helpers": f"NAME = {name!r}"}) for name in ("a", "b")]
    assert [model.predict() for model in models] == ["a", "b"]


@pytest.mark.parametrize("stem", ["torch", "json", "logging", "handler-v1", "psutil", "torchmgmt", "numpy"])
def test_a_handler_file_may_have_any_name(manager: ModelManager, tmp_path: Path, stem: str) -> None:
    """A handler's file may be named like a module that the worker has imported already."""
    folder = write_folder(tmp_path / "model", "")
    (folder / f"{stem}.py").write_text(ECHO)
    assert manager.register(folder, model_name="m", handler=f"{stem}.py").predict(1) == 1


def test_context_says_what_torchserve_says(manager: ModelManager, tmp_path: Path) -> None:
    """The context of a handler has TorchServe's fields: properties, manifest, configuration, ids and metrics."""
    source = """
def handle(data, context):
    if data is None:
        return
    context.metrics.add_counter("seen", 1)
    context.metrics.add_time("took", 1.5, 0, "ms")
    context.set_response_status(code=201, idx=0)
    context.set_response_content_type(0, "text/plain")
    context.set_response_header(0, "x-mine", "1")
    return [{
        "properties": context.system_properties, "manifest": context.manifest, "name": context.model_name,
        "config": context.model_yaml_config, "ids": context.request_ids, "id": context.get_request_id(0),
        "none": context.get_request_id(99), "explain": context.explain, "type": context.get_response_content_type(0),
        "processor": context.request_processor[0].get_request_properties(),
    }]
"""
    folder = write_folder(
        tmp_path / "model", source, config="handler:\n  mine: [1, 2]\nbatchSize: 3\nmaxBatchDelay: 0\n"
    )
    write_manifest(folder, modelName="m", modelVersion="4.2", handler="handler.py", extraKey="kept")
    model = manager.register(folder)
    said: dict[str, Any] = model.predict("x", headers={"X-Mine": "yes"})
    assert said["name"] == "m"
    assert said["config"] == {"handler": {"mine": [1, 2]}, "batchSize": 3, "maxBatchDelay": 0}
    assert said["manifest"] == json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())
    properties = said["properties"]
    assert properties["model_dir"] == model.describe().spec.model_dir != str(folder)
    assert (properties["gpu_id"], properties["batch_size"]) == (None, 3)
    assert {"server_name", "server_version", "limit_max_image_pixels"} <= set(properties)
    assert said["ids"] == {0: said["id"]}
    assert said["id"]
    assert (said["none"], said["explain"], said["type"]) == (None, False, "text/plain")
    assert said["processor"] == {"X-Mine": "yes"}


def test_headers_are_found_in_any_case_and_stay_with_their_request(deploy: Deployer) -> None:
    """Each request of a batch has its own headers, found in any case; ids differ from request to request."""
    source = """
def handle(data, context):
    return data and [(context.get_request_header(at, "X-NaMe"), context.get_request_header(at, "none"),
                      context.get_all_request_header(at), context.get_request_id(at)) for at in range(len(data))]
"""
    model = deploy(source, batch_size=3, max_batch_delay=200)
    futures = [model.submit(headers={"x-Name": str(number)} if number else None) for number in range(3)]
    answers = [future.result(20) for future in futures]
    assert [answer[0] for answer in answers] == [None, "1", "2"]
    assert [answer[1] for answer in answers] == [None] * 3
    assert answers[1][2] == {"x-Name": "1"}
    assert len({answer[3] for answer in answers}) == 3


def test_a_row_is_the_body_or_the_fields(deploy: Deployer) -> None:
    """The handler gets data under "body", or fields as the whole row."""
    model = deploy("def handle(data, context):\n    return data\n")
    assert model.predict([1, 2]) == {"body": [1, 2]}
    assert model.predict(fields={"image": b"x", "label": 5}) == {"image": b"x", "label": 5}
    assert model.predict() == {"body": None}


def test_workers_differ_in_their_random_numbers(deploy: Deployer) -> None:
    """Workers forked from one process do not draw the same random numbers, from torch, numpy or random."""
    source = """
import random, numpy, torch
def handle(data, context):
    return data and [(float(torch.rand(1)), float(numpy.random.rand()), random.random()) for row in data]
"""
    draws = [deploy(source, version=str(number)).predict() for number in range(3)]
    for kind in zip(*draws, strict=True):
        assert len(set(kind)) == 3


def test_a_worker_may_compute_with_many_threads(deploy: Deployer) -> None:
    """Operations of torch with several threads work in a forked worker."""
    source = """
import torch
def handle(data, context):
    if data is None:
        return
    torch.set_num_threads(4)
    return [float((torch.ones(600, 600) @ torch.ones(600, 600)).sum()) for row in data]
"""
    assert deploy(source, initial_workers=2).predict(timeout=30) == 600.0**3


def test_the_environment_of_a_worker_is_the_programs(deploy: Deployer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker does not see the thread limits that the torch-only process needs for itself."""
    import os

    model = deploy("import os\ndef handle(data, context):\n    return data and [dict(os.environ)]\n")
    environment = model.predict()
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PATH", "HOME")
    assert {name: environment.get(name) for name in names} == {name: os.environ.get(name) for name in names}


def test_a_worker_can_be_asked_in_the_ways_of_python(deploy: Deployer) -> None:
    """stdin of a worker is empty, its output is flushed line by line, and logging at INFO is heard."""
    source = """
import logging, sys
def handle(data, context):
    if data is None:
        return
    logging.getLogger("mine").info("logged")
    print("printed")
    raise ValueError(sys.stdin.read())
"""
    model = deploy(source)
    error: Any = model.submit().exception(20)
    assert error.reason.strip() == "ValueError:"
    assert [line.removeprefix("<6>") for line in error.last_lines[-2:]] == ["mine: logged", "printed"]
