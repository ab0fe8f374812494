"""The shipped handlers for pictures: one answer for each request, whatever the batch, in TorchServe's forms."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.pictures import encoded, picture
from tests.unit.shipped import answers, context_of, initialised, one_thread
from torchmgmt.handlers.image_classifier import ImageClassifier
from torchmgmt.handlers.image_segmenter import ImageSegmenter
from torchmgmt.handlers.images import ImagePreset
from torchmgmt.handlers.inputs import InputRefused
from torchmgmt.handlers.object_detector import ObjectDetector
from torchmgmt.handlers.vision_handler import VisionHandler

__all__ = ["one_thread"]

CLASSES = 6
NAMES = [f"class {number}" for number in range(CLASSES)]

CLASSIFIER = f"""
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(16, {CLASSES})

    def forward(self, x):
        return 20 * self.head(self.layers(x))
"""
SEGMENTER = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.layer = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return {"out": self.layer(x), "aux": None}
"""
# Two boxes for each picture: the whole of it with its mean as score, and a corner.
DETECTOR = """
from typing import Dict, List

class Net(nn.Module):
    def forward(self, images: List[torch.Tensor]):
        found: List[Dict[str, torch.Tensor]] = []
        for image in images:
            height, width = image.shape[-2], image.shape[-1]
            boxes = torch.tensor([[0, 0, width, height], [0, 0, 2, 2]], dtype=torch.float32)
            scores = torch.stack([image.mean() / 2 + 0.5, image.mean() / 2])
            found.append({"boxes": boxes, "labels": torch.tensor([1, 3]), "scores": scores})
        return found
"""
PNG = encoded(picture(300, 260))


def classifier(folder: Path, options: Any = None, kind: type[ImageClassifier] = ImageClassifier) -> ImageClassifier:
    folder.mkdir(exist_ok=True)
    (folder / "index_to_name.json").write_text(json.dumps({str(n): name for n, name in enumerate(NAMES)}))
    return initialised(kind, folder, CLASSIFIER, options)


def direct(handler: VisionHandler, image: Image.Image) -> Any:
    with torch.inference_mode():
        return handler.model(ImagePreset()(image)[None])


def test_a_classifier_answers_the_most_probable_classes_by_name(tmp_path: Path) -> None:
    """Five, greatest first, with the probabilities that the network gives when it is called directly."""
    handler = classifier(tmp_path)
    (answer,) = answers(handler, PNG)
    shares = torch.softmax(direct(handler, picture(300, 260)), dim=1)[0]
    best = shares.topk(5)
    assert list(answer) == [NAMES[number] for number in best.indices]
    assert list(answer.values()) == pytest.approx(best.values.tolist(), rel=1e-5)


def test_every_way_to_send_a_picture_gives_one_answer(tmp_path: Path) -> None:
    """Bytes, base64 as text, in JSON and as data URI, an open picture, and the tensor and the list that it becomes."""
    handler = classifier(tmp_path)
    text = base64.b64encode(PNG).decode()
    tensor = ImagePreset()(picture(300, 260))
    payloads = [
        *(PNG, bytearray(PNG), memoryview(PNG), picture(300, 260)),
        *(text, {"data": text}, {"image": text}, {"body": text}, {"b64": text}, "data:image/png;base64," + text),
        *(tensor, tensor.tolist(), tensor.numpy(), {"data": tensor.tolist()}),
    ]
    for answer in answers(handler, *payloads):
        assert answer == pytest.approx(answers(handler, PNG)[0], rel=1e-4)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_batch_has_one_answer_for_each_in_order(tmp_path: Path, size: int) -> None:
    """The same as each would have alone, also where one sent a tensor of another shape."""
    handler = classifier(tmp_path)
    payloads: list[Any] = [encoded(picture(230 + 20 * n, 240)) for n in range(size)]
    if size > 2:
        payloads[1] = torch.rand(3, 64, 48)
    together = answers(handler, *payloads)
    for payload, answer in zip(payloads, together, strict=True):
        (alone,) = answers(handler, payload)
        assert list(answer) == list(alone)
        assert answer == pytest.approx(alone, rel=1e-4)


def test_options_change_the_preset_and_the_number_of_classes(tmp_path: Path) -> None:
    """topk and sizes; more classes than there are means all."""
    handler = classifier(tmp_path / "a", {"topk": 2, "resize_size": 40, "crop_size": 32})
    assert handler.get_max_result_classes() == 2
    assert len(answers(handler, PNG)[0]) == 2
    assert handler.preprocess([{"body": PNG}]).shape == (1, 3, 32, 32)
    assert len(answers(classifier(tmp_path / "b", {"topk": 99}), PNG)[0]) == CLASSES
    handler.set_max_result_classes(1)
    assert len(answers(handler, PNG)[0]) == 1


class Mnist(ImageClassifier):
    """As TorchServe's users write theirs: their own steps for a picture that stays grey."""

    topk = 3

    @staticmethod
    def image_processing(image: Image.Image) -> torch.Tensor:
        assert image.mode == "L"
        return ImagePreset(None, None, None, None, image_mode="L")(image).expand(3, -1, -1)


def test_the_steps_of_a_subclass_get_the_picture_as_it_was_opened(tmp_path: Path) -> None:
    """Nothing of ours is done to it before, and our options do not replace them."""
    handler = classifier(tmp_path, {"crop_size": 10}, Mnist)
    assert handler.preprocess([{"body": encoded(picture(28, 28, "L"))}]).shape == (1, 3, 28, 28)
    assert len(answers(handler, encoded(picture(28, 28, "L")))[0]) == 3


def test_a_subclass_of_another_preset_starts_from_that(tmp_path: Path) -> None:
    """Options change the one of the class."""

    class Small(ImageClassifier):
        image_processing = ImagePreset(20, 16, None, None)

    handler = classifier(tmp_path, {"mean": [0.5]}, Small)
    assert handler.image_processing == ImagePreset(20, 16, (0.5,), None)
    assert Small.image_processing.mean is None


@pytest.mark.parametrize(
    "payload, code, text",
    [
        (b"noise", 400, "no picture"),
        (encoded(picture(30, 30), "JPEG")[:300], 400, "broken"),
        ("%%%", 400, "base64"),
        ({"url": "x"}, 400, "none of the fields"),
        ([[1, 2], [3]], 400, "list of numbers"),
        (["a"], 400, "list of numbers"),
        (encoded(picture(50, 30)), 413, "too large"),
    ],
    ids=["noise", "cut off", "text", "no field", "ragged", "letters", "large"],
)
def test_a_bad_picture_is_refused_with_its_place_in_the_batch(
    tmp_path: Path, payload: Any, code: int, text: str
) -> None:
    """The error says which of the requests is at fault, as a number, too, and with which status."""
    handler = classifier(tmp_path, {"max_image_pixels": 1000})
    good = encoded(picture(30, 30))
    with pytest.raises(InputRefused, match=text) as raised:
        answers(handler, good, payload)
    assert (raised.value.error_code, raised.value.indexes) == (code, (1,))
    assert "request 1 of a batch of 2" in str(raised.value)
    assert len(answers(handler, good)) == 1


def test_the_server_may_leave_the_size_of_pictures_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """limit_max_image_pixels: false, as in TorchServe; Pillow's own bound goes with it."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    handler = initialised(VisionHandler, tmp_path, CLASSIFIER, limit_max_image_pixels=False)
    assert handler.preprocess([{"body": PNG}]).shape == (1, 3, 224, 224)


def test_scores_of_another_shape_are_an_error_that_says_so(tmp_path: Path) -> None:
    """With the shape that the model returned and the one that is needed."""
    for kind, needed in ((ImageClassifier, "batch, classes"), (ImageSegmenter, "batch, classes, height, width")):
        handler = kind()
        with pytest.raises(ValueError, match=rf"shape \[1, 2, 3\].*{needed}"):
            handler.postprocess(torch.zeros(1, 2, 3))


@pytest.mark.parametrize("kind", [ImageClassifier, ImageSegmenter, ObjectDetector])
@pytest.mark.parametrize("options", [{"topk": 0}, {"threshold": 2}, {"answer": "png"}, {"exif_orientation": "yes"}])
def test_a_wrong_option_fails_the_loading(tmp_path: Path, kind: type[VisionHandler], options: dict[str, Any]) -> None:
    """Before a request finds it out; options of other handlers are left alone."""
    own = {ImageClassifier: "topk", ImageSegmenter: "answer", ObjectDetector: "threshold"}
    (key,) = options
    if key in {own[kind], "exif_orientation"}:
        with pytest.raises(ValueError, match=rf"handler\.{key}"):
            initialised(kind, tmp_path, CLASSIFIER, options)
    else:
        initialised(kind, tmp_path, CLASSIFIER, options)


def test_without_pillow_loading_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module is imported without it; only the handler needs it."""
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"ImageClassifier needs Pillow.*pip install"):
        classifier(tmp_path)


def test_explaining_without_captum_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predicting does without."""
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    handler = classifier(tmp_path)
    assert answers(handler, PNG)
    with pytest.raises(ImportError, match="captum"):
        handler.get_insights(torch.zeros(1, 3, 8, 8), None)


class Explaining(ImageClassifier):
    """As in TorchServe's examples: no __init__ of its base, and an explainer of its own."""

    def __init__(self) -> None:
        self.initialized = False

    def initialize(self, context: Any) -> None:
        super().initialize(context)
        self.ig = Explainer()


class Explainer:
    def attribute(self, inputs: torch.Tensor, target: int, n_steps: int) -> torch.Tensor:
        return inputs.sum() * 0 + target


def test_a_subclass_may_bring_its_explainer(tmp_path: Path) -> None:
    """It is asked instead of captum's."""
    handler = classifier(tmp_path, kind=Explaining)
    handler.context.begin_batch(["0"], [{"explain": "True"}])
    assert handler.handle([{"data": PNG, "target": 3}], handler.context) == 3
    assert len(answers(handler, PNG)) == 1


def segmenter(folder: Path, options: Any = None) -> ImageSegmenter:
    return initialised(ImageSegmenter, folder, SEGMENTER, options)


def test_a_segmenter_answers_the_class_and_its_probability_for_each_pixel(tmp_path: Path) -> None:
    """Lists of [height][width][2], as the network has them when it is called directly."""
    handler = segmenter(tmp_path)
    first, second = answers(handler, PNG, encoded(picture(240, 230)))
    shares, classes = torch.softmax(direct(handler, picture(300, 260))["out"], dim=1).max(dim=1)
    assert isinstance(first, list)
    found = torch.tensor(first)
    assert found.shape == torch.tensor(second).shape == (224, 224, 2)
    assert torch.equal(found[..., 0], classes[0].float())
    assert torch.allclose(found[..., 1], shares[0], atol=1e-6)
    assert first != second


def test_a_segmenter_answers_tensors_where_asked_to(tmp_path: Path) -> None:
    """Each in memory of its own: pickling one does not carry the whole batch."""
    one, two = answers(segmenter(tmp_path, {"answer": "tensor"}), PNG, PNG)
    assert one.equal(two)
    assert one.untyped_storage().nbytes() == one.nbytes
    assert one.tolist() == answers(segmenter(tmp_path), PNG)[0]


def test_tensors_of_several_sizes_are_segmented_in_one_batch(tmp_path: Path) -> None:
    """Each in its own size."""
    found = answers(segmenter(tmp_path, {"answer": "tensor"}), torch.rand(3, 8, 9), torch.rand(3, 5, 4))
    assert [list(each.shape) for each in found] == [[8, 9, 2], [5, 4, 2]]


def detector(folder: Path, options: Any = None) -> ObjectDetector:
    folder.mkdir(exist_ok=True)
    (folder / "index_to_name.json").write_text('["nothing", "cat", "dog"]')
    return initialised(ObjectDetector, folder, DETECTOR, options)


def test_a_detector_answers_names_boxes_and_scores(tmp_path: Path) -> None:
    """In the picture's own pixels, for pictures of several sizes in one batch; what is below the threshold is left out."""
    pictures = [picture(30, 20), picture(8, 9)]
    found = answers(detector(tmp_path), *map(encoded, pictures))
    for image, boxes in zip(pictures, found, strict=True):
        score = ImagePreset(None, None, None, None)(image).mean().item() / 2 + 0.5
        assert boxes == [{"cat": [0, 0, image.width, image.height], "score": pytest.approx(score, rel=1e-5)}]


def test_the_threshold_is_an_option(tmp_path: Path) -> None:
    """A class without a name is answered by its number; nothing found is an empty list."""
    image = encoded(picture(8, 9))
    assert [min(box) for box in answers(detector(tmp_path / "a", {"threshold": 0}), image)[0]] == ["cat", "3"]
    assert answers(detector(tmp_path / "b", {"threshold": 1}), image, image) == [[], []]


def test_a_scripted_detector_gets_the_list_that_it_declares(tmp_path: Path) -> None:
    """As torchvision's, which also return their losses once they are TorchScript; also for pictures of one size."""
    source = DETECTOR.replace("return found", "return torch.zeros(0), found")
    plain = detector(tmp_path / "plain")
    (tmp_path / "plain" / "net.py").write_text("import torch\nfrom torch import nn\n" + source)
    again = initialised(ObjectDetector, tmp_path / "plain", source)
    folder = tmp_path / "script"
    folder.mkdir()
    torch.jit.script(again.model).save(folder / "net.pt")
    handler = ObjectDetector()
    handler.initialize(context_of(folder, {"serializedFile": "net.pt"}))
    handler.mapping = plain.mapping
    images = [encoded(picture(30, 20)), encoded(picture(30, 20)), encoded(picture(7, 7))]
    assert answers(handler, *images) == answers(plain, *images)
    assert answers(handler, *images[:2]) == answers(plain, *images[:2])


def test_a_detector_whose_model_returns_something_else_says_so(tmp_path: Path) -> None:
    """What is needed, and what there was."""
    with pytest.raises(TypeError, match=r"boxes, labels and scores; it returned .* Tensor"):
        answers(initialised(ObjectDetector, tmp_path, CLASSIFIER), PNG)
