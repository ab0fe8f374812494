"""The parts that BaseHandler is made of: names of classes, options of torch.compile, kinds of files, steps that overlap."""

from __future__ import annotations

import json
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.handlers import PATIENCE_S
from tests.unit.shipped import answers, initialised, one_thread
from torchmgmt.handlers.base_handler import BaseHandler
from torchmgmt.handlers.compilation import compile_options
from torchmgmt.handlers.context import Context
from torchmgmt.handlers.image_classifier import ImageClassifier
from torchmgmt.handlers.image_segmenter import ImageSegmenter
from torchmgmt.handlers.labels import load_label_mapping, map_class_to_label
from torchmgmt.handlers.micro_batching import MicroBatching
from torchmgmt.handlers.model_files import FileKind, kind_of
from torchmgmt.handlers.object_detector import ObjectDetector
from torchmgmt.handlers.tensor_handler import TensorHandler
from torchmgmt.handlers.text_classifier import TextClassifier
from torchmgmt.handlers.timing import timed

__all__ = ["one_thread"]


@pytest.mark.parametrize(
    "content",
    [
        ["cat", "dog"],
        {"0": "cat", "1": "dog"},
        {"0": ["n01", "cat"], "1": ["n02", "dog"]},
        {"object_type_names": ["cat", "dog"]},
    ],
)
def test_classes_have_the_names_of_the_file_in_each_of_its_shapes(tmp_path: Path, content: object) -> None:
    """A list, names by number, lists of names by number."""
    file = tmp_path / "index_to_name.json"
    file.write_text(json.dumps(content))
    mapping = load_label_mapping(str(file))
    assert mapping == {"0": "cat", "1": "dog"}
    assert map_class_to_label([[0.9, 0.1]], mapping) == [{"cat": 0.9, "dog": 0.1}]


def test_names_are_given_to_the_classes_that_are_named() -> None:
    """Which they are may be said for each row; a class without a name has its number; without names all have."""
    assert map_class_to_label([[0.9], [0.8]], {"3": "cat"}, [[3], [4]]) == [{"cat": 0.9}, {"4": 0.8}]
    assert map_class_to_label([[0.9, 0.1]]) == [{"0": 0.9, "1": 0.1}]
    with pytest.raises(ValueError, match=r"call tolist\(\) first"):
        map_class_to_label((1,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mapping must be a dictionary"):
        map_class_to_label([[1]], ["cat"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text, says", [("{", "is not JSON"), ("5", "must hold a list"), ('{"0": 5}', "must name each class")]
)
def test_a_file_of_names_that_cannot_be_used_says_why(tmp_path: Path, text: str, says: str) -> None:
    """None at all is no error."""
    file = tmp_path / "index_to_name.json"
    assert load_label_mapping(file) is None
    file.write_text(text)
    with pytest.raises(ValueError, match=f"index_to_name.json {says}"):
        load_label_mapping(file)


@pytest.mark.parametrize(
    "pt2, options",
    [
        (None, None),
        ("inductor", {"backend": "inductor"}),
        ({"backend": "eager", "mode": "x"}, {"backend": "eager", "mode": "x"}),
        ({}, {}),
        ({"compile": {"enable": True, "backend": "eager"}}, {"backend": "eager"}),
        ({"compile": {"enable": True}}, {}),
        ({"compile": {"enable": False, "backend": "eager"}}, None),
        ({"export": {"aot_compile": True}}, None),
    ],
)
def test_options_of_torch_compile_are_read_in_all_their_forms(pt2: object, options: object) -> None:
    """Nested with a switch, flat, or the name of a backend; what they were read from stays as it is."""
    before = json.dumps(pt2)
    assert compile_options(pt2) == options
    assert json.dumps(pt2) == before


@pytest.mark.parametrize("pt2", [5, ["inductor"], {"compile": {"backend": "eager"}}, {"compile": {"enable": "yes"}}])
def test_options_in_no_form_are_refused(pt2: object) -> None:
    """The error names the key."""
    with pytest.raises(ValueError, match="pt2"):
        compile_options(pt2)


@pytest.mark.parametrize(
    "name, entry, kind",
    [
        ("m.pt2", "m/data/aotinductor/model/x.so", FileKind.AOT_PACKAGE),
        ("m.pt2", "m/archive_format", FileKind.EXPORTED),
        ("m.pt2", "serialized_exported_program.json", FileKind.EXPORTED),
        ("m.pt", "m/archive_format", FileKind.EXPORTED),
        ("m.pt", "m/code/net.py", FileKind.TORCHSCRIPT),
        ("m.pt", "", FileKind.TORCHSCRIPT),
        ("m.so", "", FileKind.AOT_LIBRARY),
        ("m.ONNX", "", FileKind.ONNX),
        ("m.safetensors", "", FileKind.WEIGHTS),
    ],
)
def test_the_kind_of_a_file_is_known_by_its_content(tmp_path: Path, name: str, entry: str, kind: FileKind) -> None:
    """By its name only where its content says nothing."""
    file = tmp_path / name
    if entry:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(entry, "")
    else:
        file.write_bytes(b"not an archive")
    assert kind_of(str(file)) is kind
    with pytest.raises(FileNotFoundError, match=r"serializedFile none\.pt"):
        kind_of(str(tmp_path / "none.pt"))


class Steps(BaseHandler):
    """Its steps overlap only if two parts are in two of them at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.meeting = threading.Barrier(2)
        self.batching = MicroBatching(self, micro_batch_size=2)
        self.parts: list[tuple[str, int | None]] = []

    def preprocess(self, data: Any) -> Any:
        self.note("preprocess")
        if self.batching.get_micro_batch_idx() == 1:
            self.meeting.wait(PATIENCE_S)
        return [row + 1 for row in data]

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        self.note("inference")
        if self.batching.get_micro_batch_idx() == 0:
            self.meeting.wait(PATIENCE_S)
        return [row * 10 for row in data]

    def postprocess(self, data: Any) -> Any:
        self.note("postprocess")
        if 990 in data:
            raise ValueError("99")
        return [str(row) for row in data]

    def note(self, step: str) -> None:
        self.parts.append((step, self.batching.get_micro_batch_idx()))


@pytest.fixture
def steps() -> Iterator[Steps]:
    steps = Steps()
    yield steps
    steps.batching.shutdown()


def test_parts_of_a_batch_are_in_several_steps_at_a_time(steps: Steps) -> None:
    """Answers come in order, and each step knows the number of its part; the caller's thread works on none."""
    context = Context("m", "", {}, 1, None, "0")
    context.begin_batch(["a"], [{}])
    assert not steps.batching._executors
    assert steps.batching([0, 1, 2, 3, 4], context) == ["10", "20", "30", "40", "50"]
    assert sorted(steps.parts) == [
        (step, part) for step in sorted(("inference", "postprocess", "preprocess")) for part in (0, 1, 2)
    ]
    assert steps.batching.get_micro_batch_idx() is None
    assert [name for name, *_ in context.metrics.recorder.take()] == ["HandlerTime"]


def test_a_step_that_fails_fails_the_batch_and_not_the_next(steps: Steps) -> None:
    """The error is the step's own, and comes when no part is in a step any more."""
    with pytest.raises(ValueError, match="99"):
        steps.batching.handle([98, 1, 2])
    assert steps.batching.handle([0, 1, 2]) == ["10", "20", "30"]


def test_the_number_of_threads_of_a_step_can_be_set(steps: Steps) -> None:
    """Two parts are in one step at a time then; wrong numbers and names are refused."""
    steps.batching.parallelism = {"preprocess": 2}
    assert steps.batching.handle([0, 1, 2]) == ["10", "20", "30"]
    assert steps.batching.parallelism == {"preprocess": 2}
    for wrong in ({"preprocess": 0}, {"handle": 1}):
        with pytest.raises(ValueError, match="parallelism must give numbers of threads"):
            steps.batching.parallelism = wrong
    steps.batching.micro_batch_size = 0
    with pytest.raises(ValueError, match="micro_batch_size"):
        steps.batching.handle([1])


@pytest.mark.parametrize("config, names", [({"handler": {"profile": True}}, ["ts_handler_work"]), ({}, [])])
def test_timed_methods_are_measured_where_the_configuration_asks(config: dict[str, Any], names: list[str]) -> None:
    """By the name of the method; without the key nothing is recorded."""

    class Handler:
        context = Context("m", "", {}, 1, None, "0", model_yaml_config=config)

        @timed
        def work(self, value: int) -> int:
            """Return one more."""
            return value + 1

    handler = Handler()
    assert handler.work(1) == 2
    assert (Handler.work.__name__, Handler.work.__doc__) == ("work", "Return one more.")
    assert [name for name, *_ in handler.context.metrics.recorder.take()] == names


RETURNS = "class Net(nn.Module):\n    def forward(self, *inputs):\n        return torch.ones({})\n"
BOXES = """
class Net(nn.Module):
    def forward(self, images):
        return [{name: torch.ones(0) for name in ("boxes", "labels", "scores")} for image in images]
"""
PIXELS = [[[0.0] * 3] * 3] * 3


@pytest.mark.parametrize(
    "kind, model, payload",
    [
        (BaseHandler, "class Net(nn.Identity):\n    pass\n", [1.0]),
        (TensorHandler, "class Net(nn.Identity):\n    pass\n", [1.0]),
        (ImageClassifier, RETURNS.format("1, 2"), PIXELS),
        (ImageSegmenter, RETURNS.format("1, 2, 3, 3"), PIXELS),
        (ObjectDetector, BOXES, PIXELS),
        (TextClassifier, RETURNS.format("1, 2"), "a"),
    ],
)
def test_the_steps_of_every_shipped_handler_are_measured(
    tmp_path: Path, kind: type[BaseHandler], model: str, payload: Any
) -> None:
    """handler: {profile: true} shows all three, whichever of them a handler has of its own."""
    torch.save({"a": 0}, tmp_path / "source_vocab.pt")
    handler = initialised(kind, tmp_path, model, {"profile": True})
    assert len(answers(handler, payload)) == 1
    names = {name for name, *_ in handler.context.metrics.recorder.take()}
    assert names == {"HandlerTime", *(f"ts_handler_{step}" for step in ("preprocess", "inference", "postprocess"))}
