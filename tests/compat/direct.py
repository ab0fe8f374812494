"""Calls the networks of tests/models.txt directly: without torchmgmt, in a process of its own. Run by tests/compat/real.py.

Prints JSON: for each model what it answers to the inputs in a folder. Makes the small classifier of the same folder.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


def module_of(name: str, file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pixels(file: Path, size: int | None = None) -> torch.Tensor:
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    if size is not None:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def faces(folder: Path, weights: Path) -> dict[str, Any]:
    mtcnn = module_of("mtcnn", folder / "mtcnn.py")
    nets = {}
    for name in ("pnet", "rnet", "onet"):
        net = getattr(mtcnn, {"pnet": "PNet", "rnet": "RNet", "onet": "ONet"}[name])(pretrained=False)
        net.load_state_dict(torch.load(weights / f"{name}.pt", weights_only=True))
        nets[name] = net.eval()
    scores = {file.stem: nets["pnet"](pixels(file) * 2 - 1)[1][0, 1].tolist() for file in folder.glob("*.png")}
    box, landmarks, share = nets["onet"](pixels(folder / "face.png", 48) * 2 - 1)
    return {
        "pnet": scores,
        "rnet": {file.stem: nets["rnet"](pixels(file, 24) * 2 - 1)[1][0].tolist() for file in folder.glob("*.png")},
        "onet": {"box": box[0].tolist(), "landmarks": landmarks[0].tolist(), "face": share[0, 1].item()},
    }


def speech(folder: Path, weights: Path) -> dict[str, list[float]]:
    net = torch.jit.load(str(weights))
    found = {}
    for file in folder.glob("*.pcm"):
        clip = torch.from_numpy(np.fromfile(file, dtype=np.int16)).float() / 32768
        net.reset_states()
        chunks = torch.nn.functional.pad(clip, (0, -len(clip) % 512)).split(512)
        found[file.stem] = [net(chunk[None], 16000).item() for chunk in chunks]
    return found


def pitches(folder: Path, package: Path) -> dict[str, list[list[float]]]:
    sys.modules["torchcrepe"] = types.ModuleType("torchcrepe")
    sys.modules["torchcrepe"].PITCH_BINS = 360  # type: ignore[attr-defined]
    crepe = module_of("crepe", package / "model.py").Crepe
    frames = torch.from_numpy(np.load(folder / "tones.npy"))
    found = {}
    for capacity in ("tiny", "full"):
        net = crepe(capacity)
        net.load_state_dict(torch.load(package / "assets" / f"{capacity}.pth", weights_only=True))
        found[capacity] = net.eval()(frames).tolist()
    return found


def meanings(folder: Path, model: Path) -> dict[str, Any]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    texts = json.loads((folder / "texts.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
    net = transformers.AutoModel.from_pretrained(model, local_files_only=True).eval()
    vectors = []
    for text in texts:  # one by one: no padding, so no mask
        vector = net(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        vectors.append((vector / vector.norm()).tolist())
    # There is no classifier in a package: a small one with weights by chance, but with a real tokenizer.
    torch.manual_seed(5)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=3, id2label={0: "bad", 1: "so so", 2: "good"}
    )  # fmt: skip
    classifier = transformers.BertForSequenceClassification(config).eval()
    classifier.save_pretrained(folder / "classifier")
    tokenizer.save_pretrained(folder / "classifier")
    shares = [classifier(**tokenizer(text, return_tensors="pt")).logits[0].softmax(dim=0).tolist() for text in texts]
    return {"minilm": vectors, "classifier": shares}


def main() -> None:
    folder, paths = Path(sys.argv[1]), {name: Path(path) for name, path in json.loads(sys.argv[2]).items()}
    with torch.inference_mode():
        answers: dict[str, Any] = {
            **faces(folder, paths["faces"]),
            "silero": speech(folder, paths["silero"]),
            "crepe": pitches(folder, paths["crepe"]),
            **meanings(folder, paths["minilm"]),
        }
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
