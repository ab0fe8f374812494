"""Request envelopes around handlers of every form, as the settings or the manifest ask for them, on both backends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.compat.real import Packer
from tests.handlers import write_folder, write_manifest
from torchmgmt import ModelManager, ProcessBackend, Settings
from torchmgmt.errors import HandlerFailed, InvalidArchive, InvalidArgument

FUNCTION = """
LOADED = []
def handle(data, context):
    if data is None:
        LOADED.append(context.model_name)
        return None
    return [value * 2 for value in data]
"""
CLASS = """
class Doubling:
    def initialize(self, context):
        self.factor = 2
    def handle(self, data, context):
        return [value * self.factor for value in data]
"""
NET = """
import torch
class Net(torch.nn.Module):
    def forward(self, rows):
        return rows * 2
"""
REFUSING = """
class Refused(Exception):
    error_code = 422
    def __init__(self, indexes):
        super().__init__("odd numbers are refused")
        self.indexes = indexes

def handle(data, context):
    if data is None:
        return None
    if odd := [index for index, value in enumerate(data) if value % 2]:
        raise Refused(odd)
    return [ValueError("thirteen times two") if value == 26 else value for value in data]
"""

TENSOR = {"name": "x", "shape": [2, 1], "datatype": "INT64", "data": [3, 4]}
BODIES: dict[str, Any] = {
    "body": 3,
    "json": {"instances": [3, 4]},
    "kserve": {"instances": [3, 4]},
    "kservev2": {"id": "mine", "inputs": [TENSOR]},
}
V2_OUTPUT = {"name": "x", "shape": [2], "datatype": "INT64", "data": [3, 4]}


@pytest.fixture(scope="module")
def packer(tmp_path_factory: pytest.TempPathFactory) -> Packer:
    return Packer(tmp_path_factory.mktemp("packing"), tmp_path_factory.mktemp("store"))


@pytest.fixture
def manager(backend: ProcessBackend) -> Iterator[ModelManager]:
    with ModelManager(backend=backend) as manager:
        yield manager


@pytest.mark.parametrize("envelope", ["body", "json", "kserve"])
@pytest.mark.parametrize("form", ["function", "class", "shipped"])
def test_service_envelope_stands_around_a_handler_of_each_form(
    packer: Packer, backend: ProcessBackend, envelope: str, form: str
) -> None:
    """As in TorchServe's config.properties; whether or not the body was parsed before."""
    handler = {"function": FUNCTION, "class": CLASS}.get(form, "base_handler")
    name = f"{form}_{envelope}"
    archive = packer.pack(name, handler, None, model=NET if form == "shipped" else "")
    with ModelManager(packer.store, settings=Settings(service_envelope=envelope), backend=backend) as manager:
        model = manager.register(archive.name)
        body = BODIES[envelope]
        answers = [model.predict(body)]
        if envelope != "body":
            answers.append(model.predict(json.dumps(body).encode()))
    wanted = {"body": 6, "json": '{"predictions": [6, 8]}', "kserve": {"predictions": [6, 8]}}[envelope]
    assert [plain(answer) for answer in answers] == [plain(wanted)] * len(answers)


def plain(answer: Any) -> Any:
    return json.loads(json.dumps(json.loads(answer) if isinstance(answer, str) else answer))


def test_version_2_of_the_protocol(manager: ModelManager, tmp_path: Path) -> None:
    """The handler gets tensors in their shapes; the answer has the id, the names and the model."""
    source = "def handle(data, context):\n    return data and [[row[0] for row in each['data']] for each in data]\n"
    folder = write_folder(tmp_path / "m", source)
    write_manifest(folder, modelName="m", modelVersion="2.0", handler="handler.py", envelope="kservev2")
    answer = manager.register(folder).predict(BODIES["kservev2"])
    assert answer == {"id": "mine", "model_name": "m", "model_version": "2.0", "outputs": [V2_OUTPUT]}


@pytest.mark.parametrize("backend_name", ["process", "thread"])
def test_the_manifest_names_one(manager: ModelManager, tmp_path: Path, backend_name: str) -> None:
    """It counts before the settings, on each backend, and a batch of requests comes to the handler as one."""
    folder = write_folder(tmp_path / "m", CLASS)
    write_manifest(folder, modelName="m", handler="handler.py", envelope="kserve")
    model = manager.register(folder, backend=backend_name, batch_size=4, max_batch_delay=50)
    bodies = [{"instances": list(range(count))} for count in (1, 3, 0, 2)]
    answers = [future.result(20) for future in [model.submit(body) for body in bodies]]
    assert answers == [{"predictions": [2 * value for value in range(count)]} for count in (1, 3, 0, 2)]


def test_an_error_of_single_items_is_that_of_their_request(manager: ModelManager, tmp_path: Path) -> None:
    """Raised with indexes or returned in place of an answer; and one who sends no envelope fails nobody else."""
    folder = write_folder(tmp_path / "m", REFUSING)
    write_manifest(folder, modelName="m", handler="handler.py", envelope="kserve")
    model = manager.register(folder, batch_size=5, max_batch_delay=1000)
    bodies = ([2, 4], [2, 3], [26, 2], None, [8, 10])
    futures = [model.submit({"instances": body} if body else {"inputs": []}) for body in bodies]
    assert futures[0].result(20) == {"predictions": [2, 4]}
    assert futures[4].result(20) == {"predictions": [8, 10]}
    for index, says, code in (
        (1, "odd numbers", 422),
        (2, "thirteen", None),
        (3, "a list as 'instances'; it has: inputs", 400),
    ):
        with pytest.raises(HandlerFailed, match=says) as caught:
            futures[index].result(20)
        assert caught.value.error_code == code


def test_an_unknown_envelope_is_refused_at_once(manager: ModelManager, tmp_path: Path) -> None:
    """At registration, or where the settings are made; the error lists those that there are."""
    folder = write_manifest(write_folder(tmp_path / "m", CLASS), modelName="m", handler="handler.py", envelope="seldon")
    with pytest.raises(
        InvalidArchive, match="\"envelope\" in its manifest is 'seldon', but must be one of body, json, "
    ):
        manager.register(folder)
    with pytest.raises(
        InvalidArgument, match="service_envelope is 'seldon', but must be body, json, kserve or kservev2"
    ):
        Settings(service_envelope="seldon")


def test_extra_files_lie_in_the_folders_that_they_were_packed_from(
    packer: Packer, manager: ModelManager, tmp_path: Path
) -> None:
    """A handler imports packages and opens files of its own archive, by the names that they had below the folder."""
    files = {
        "helpers/__init__.py": "from helpers.deep import WORDS\n",
        "helpers/deep/__init__.py": "from ..more import WORDS\n",
        "helpers/more.py": "from pathlib import Path\nWORDS = Path(__file__).with_name('words.txt').read_text().split()\n",
        "helpers/words.txt": "zero one two",
        "data/nested/last.txt": "three",
    }
    for name, text in files.items():
        (tmp_path / "extra" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "extra" / name).write_text(text)
    source = """
import helpers
from helpers.deep import WORDS
def handle(data, context):
    words = [*WORDS, open("data/nested/last.txt").read()]
    return data and [words[row["body"]] for row in data]
"""
    archive = packer.pack("extra", source, None, folders=[tmp_path / "extra"])
    model = manager.register(archive)
    assert list(model.map(range(4))) == ["zero", "one", "two", "three"]
