"""Real models out of packages, packed by the real torch-model-archiver, answer as they do when they are called directly."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.compat.real import (
    ONET,
    PNET,
    PNET_MAP,
    RNET,
    TOKENIZER,
    VAD,
    Packer,
    called_directly,
    packaged,
)
from tests.pictures import png_head
from torchmgmt import ModelManager, ProcessBackend
from torchmgmt.errors import HandlerFailed, WorkerStartFailed

TEXTS = ["A cat sits on the mat.", "There is a kitten on the rug.", "The stock market fell sharply today."]
TONES_HZ = (110.0, 440.0, 880.0)
FACE_OPTIONS = "handler:\n  resize_size: {size}\n  crop_size: {size}\n  mean: [0.5]\n  std: [0.5]\n"
# Batches are computed in another order than single requests; these networks are deep, and their numbers up to 1.
CLOSE = {"abs": 2e-4}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn face and a picture without one; sounds; texts."""
    folder = tmp_path_factory.mktemp("inputs")
    face().save(folder / "face.png")
    Image.linear_gradient("L").resize((70, 44)).convert("RGB").save(folder / "sky.png")
    (folder / "vowel.pcm").write_bytes(vowel(16_000).tobytes())
    (folder / "silence.pcm").write_bytes(bytes(2 * 5_000))
    np.save(folder / "tones.npy", np.stack([tone(hz) for hz in TONES_HZ]))
    (folder / "texts.json").write_text(json.dumps(TEXTS))
    return folder


def face() -> Image.Image:
    image = Image.new("RGB", (60, 64), (90, 120, 160))
    draw = ImageDraw.Draw(image)
    draw.ellipse((14, 6, 46, 56), fill=(224, 180, 150))
    draw.chord((14, 4, 46, 30), 180, 360, fill=(70, 45, 30))
    for x in (24, 37):
        draw.ellipse((x - 4, 25, x + 3, 30), fill=(250, 250, 250))
        draw.ellipse((x - 2, 25, x + 1, 30), fill=(40, 30, 20))
    draw.line((30, 30, 28, 38, 32, 39), fill=(180, 130, 100), width=2)
    draw.ellipse((23, 43, 38, 48), fill=(180, 70, 70))
    return image.resize((21, 22))  # where a face has the 12 pixels that P-Net looks for


def tone(hz: float) -> Any:
    """1024 samples at 16 kHz, as torchcrepe prepares a frame: no mean, a deviation of one."""
    wave = sum(np.sin(2 * np.pi * hz * k * np.arange(1024) / 16_000) / k for k in (1, 2, 3))
    return ((wave - wave.mean()) / wave.std(ddof=1)).astype(np.float32)


def loudness(hz: float) -> float:
    return sum(math.exp(-(((hz - formant) / 120) ** 2)) for formant in (730, 1090, 2440))


def vowel(count: int) -> Any:
    """Something like "aaa": the harmonics of a voice that rises and falls, louder at the formants of the vowel."""
    seconds = np.arange(count) / 16_000
    hz = 120 + 15 * np.sin(2 * np.pi * 3 * seconds)
    phase = 2 * np.pi * np.cumsum(hz) / 16_000
    wave = sum((0.05 + loudness(120 * k)) * np.sin(k * phase) for k in range(1, 30))
    loud = wave * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * seconds))
    return (loud / np.abs(loud).max() * 20_000).astype(np.int16)


@pytest.fixture(scope="module")
def direct(inputs: Path) -> dict[str, Any]:
    """Model -> what it answers when it is called without torchmgmt."""
    return called_directly(inputs)


@pytest.fixture(scope="module")
def packer(tmp_path_factory: pytest.TempPathFactory) -> Packer:
    return Packer(tmp_path_factory.mktemp("packing"), tmp_path_factory.mktemp("store"))


@pytest.fixture
def served(packer: Packer, backend: ProcessBackend) -> Iterator[ModelManager]:
    with ModelManager(packer.store, backend=backend) as manager:
        yield manager


def png(name: str, inputs: Path) -> bytes:
    return (inputs / f"{name}.png").read_bytes()


def test_silero_vad(served: ModelManager, packer: Packer, inputs: Path, direct: dict[str, Any], tmp_path: Path) -> None:
    """TorchScript with a state, served in batches of clips of several lengths by a handler written for TorchServe."""
    weights = tmp_path / "silero_vad.pt"
    weights.write_bytes(packaged("silero-vad", "silero_vad/data/silero_vad.jit").read_bytes())
    archive = packer.pack("silero", VAD, weights)
    model = served.register(archive.name, batch_size=4, max_batch_delay=300)
    clips = ["vowel", "silence", "vowel", "silence"]
    answers = list(model.map((inputs / f"{clip}.pcm").read_bytes() for clip in clips))
    for clip, answer in zip(clips, answers, strict=True):
        assert answer == pytest.approx(direct["silero"][clip], **CLOSE)
    assert max(answers[0]) > 0.5 > max(answers[1])


def test_torchcrepe_in_two_sizes_is_two_versions(
    served: ModelManager, packer: Packer, inputs: Path, direct: Any
) -> None:
    """State dicts of 2 and of 89 MB side by side, and both hear the tones' pitch."""
    for capacity, version in (("tiny", "1.0"), ("full", "2.0")):
        archive = packer.crepe(capacity, version)
        model = served.register(
            archive.name, model_name="crepe", handler="tensor_handler", batch_size=3, max_batch_delay=300
        )
        frames = np.load(inputs / "tones.npy")
        answers = list(model.map([frames[0].tobytes(), frames[1].tolist(), frames[2]]))
        for answer, wanted, hz in zip(answers, direct["crepe"][capacity], TONES_HZ, strict=True):
            assert answer == pytest.approx(wanted, **CLOSE)
            assert abs(int(np.argmax(answer)) - (1200 * math.log2(hz / 10) - 1997.3794) / 20) < 2
    assert {info.version for info in served.versions("crepe")} == {"1.0", "2.0"}


def test_pnet_detects(served: ModelManager, packer: Packer, inputs: Path, direct: dict[str, Any]) -> None:
    """object_detector, pictures of several sizes in a batch; a bomb and noise are 4xx, and do not hurt it."""
    archive = packer.face("pnet", "object_detector", "pnet", PNET, "handler:\n  threshold: 0.6\n")
    model = served.register(archive.name, batch_size=3, max_batch_delay=300)
    names = ["face", "sky", "face"]
    for name, found in zip(names, model.map(png(name, inputs) for name in names), strict=True):
        scores = np.array(direct["pnet"][name])
        rows, columns = np.nonzero(scores >= 0.6)
        boxes = [[2 * x, 2 * y, 2 * x + 12, 2 * y + 12] for y, x in zip(rows, columns, strict=True)]
        assert [each["face"] for each in found] == boxes
        assert [each["score"] for each in found] == pytest.approx(scores[rows, columns].tolist(), **CLOSE)
        assert bool(boxes) == (name == "face")
    for bad, code, text in ((png_head(30_000, 30_000), 413, "too large"), (b"noise", 400, "no picture")):
        error = model.submit(bad).exception(20)
        assert isinstance(error, HandlerFailed)
        assert (error.error_code, error.error_type) == (code, "torchmgmt.handlers.inputs.InputRefused")
        assert text in str(error)
    assert model.predict(png("face", inputs))


def test_pnet_segments(served: ModelManager, packer: Packer, inputs: Path, direct: dict[str, Any]) -> None:
    """image_segmenter: for each cell, whether it is a face."""
    config = "handler:\n  resize_size: null\n  crop_size: null\n  mean: [0.5]\n  std: [0.5]\n"
    archive = packer.face("pnet-map", "image_segmenter", "pnet", PNET_MAP, config)
    model = served.register(archive.name, batch_size=2, max_batch_delay=300)
    for name, answer in zip(("face", "sky"), model.map(png(name, inputs) for name in ("face", "sky")), strict=True):
        face_shares = np.array(direct["pnet"][name])
        assert np.array(answer)[..., 0].tolist() == (face_shares > 0.5).tolist()
        assert np.array(answer)[..., 1] == pytest.approx(np.maximum(face_shares, 1 - face_shares), **CLOSE)


def test_rnet_classifies(served: ModelManager, packer: Packer, inputs: Path, direct: dict[str, Any]) -> None:
    """image_classifier, with names from index_to_name.json, for base64 in JSON as for bytes."""
    config = FACE_OPTIONS.format(size="null").replace("crop_size: null", "crop_size: 24")
    archive = packer.face("rnet", "image_classifier", "rnet", RNET, config)
    model = served.register(archive.name, batch_size=2, max_batch_delay=300)
    small = {name: encoded(name, inputs, 24) for name in ("face", "sky")}
    for name, answer in zip(small, model.map(small.values()), strict=True):
        none, share = direct["rnet"][name]
        assert answer == {"face": pytest.approx(share, **CLOSE), "no face": pytest.approx(none, **CLOSE)}
        assert next(iter(answer)) == ("face" if name == "face" else "no face")


def encoded(name: str, inputs: Path, size: int) -> bytes:
    """The picture squeezed into a square, which no handler does by itself."""
    file = io.BytesIO()
    with Image.open(inputs / f"{name}.png") as image:
        image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR).save(file, "PNG")
    return file.getvalue()


def test_onet_takes_tensors(served: ModelManager, packer: Packer, inputs: Path, direct: dict[str, Any]) -> None:
    """tensor_handler: several outputs by name, for the bytes of a .npy file; the handler is named at registration."""
    config = "handler:\n  input_shape: [3, 48, 48]\n"
    archive = packer.face("onet", "base_handler", "onet", ONET, config)
    model = served.register(archive.name, handler="tensor_handler", batch_size=2, max_batch_delay=300)
    with Image.open(io.BytesIO(encoded("face", inputs, 48))) as image:
        array = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255 * 2 - 1
    file = io.BytesIO()
    np.save(file, array)
    for answer in model.map([file.getvalue(), array.tolist()]):
        assert answer["face"] == pytest.approx(direct["onet"]["face"], **CLOSE)
        assert answer["box"] == pytest.approx(direct["onet"]["box"], **CLOSE)
        assert answer["landmarks"] == pytest.approx(direct["onet"]["landmarks"], **CLOSE)
    error = model.submit([[1.0]]).exception(20)
    assert isinstance(error, HandlerFailed)
    assert error.error_code == 400


def test_minilm_embeds_texts(served: ModelManager, packer: Packer, direct: dict[str, Any]) -> None:
    """safetensors and a tokenizer of transformers; texts of several lengths in a batch; what means the same is near."""
    model = served.register(packer.minilm().name, batch_size=3, max_batch_delay=300)
    vectors = list(model.map(TEXTS))
    for vector, wanted in zip(vectors, direct["minilm"], strict=True):
        assert vector == pytest.approx(wanted, **CLOSE)
    cat, kitten, market = map(np.array, vectors)
    assert cat @ kitten > 0.5 > cat @ market
    assert model.describe().sharing.is_shared


def test_a_classifier_of_transformers(
    served: ModelManager, packer: Packer, inputs: Path, direct: dict[str, Any]
) -> None:
    """text_classifier on a folder that transformers wrote: the names of the classes are the model's own."""
    folder = inputs / "classifier"
    files = {name: folder / name for name in TOKENIZER if (folder / name).is_file()}
    archive = packer.pack("mood", "text_classifier", folder / "model.safetensors", files=files)
    model = served.register(archive.name, batch_size=3, max_batch_delay=300)
    for answer, wanted in zip(model.map(TEXTS), direct["classifier"], strict=True):
        assert list(answer) == ["bad", "so so", "good"]
        assert list(answer.values()) == pytest.approx(wanted, **CLOSE)
    # Explained beside a prediction, which it leaves as it is.
    asked = model.submit(fields={"data": TEXTS[0], "target": 2}, headers={"explain": "True"})
    assert model.predict(TEXTS[1])["good"] == pytest.approx(direct["classifier"][1][2], **CLOSE)
    insight = asked.result(20)
    assert insight["words"] == ["a", "cat", "sits", "on", "the", "mat", "."]
    assert len(insight["importances"]) == 7
    assert any(insight["importances"])


def test_the_checkpoint_of_pesto_is_refused(served: ModelManager, packer: Packer) -> None:
    """It holds objects of other packages; the error names the file, the class and what to do, and runs nothing."""
    weights = packaged("pesto-pitch", "pesto/weights/mir-1k_g7.ckpt")
    model = "import torch\n\nclass Net(torch.nn.Linear):\n    def __init__(self):\n        super().__init__(1, 1)\n"
    archive = packer.pack("pesto", "base_handler", weights, model=model)
    with pytest.raises(WorkerStartFailed) as raised:
        served.register(archive.name)
    reason = raised.value.reason
    for part in ("mir-1k_g7.ckpt", "weights_only", "omegaconf.listconfig.ListConfig", "state_dict"):
        assert part in reason, reason
    assert not re.search(r"\n|\x1b", reason)
