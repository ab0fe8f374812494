"""Train both versions of the digits model, measure them, and write everything the example ships.

The only file of the example that needs scikit-learn (its `load_digits` is the data):

    pip install "torch==2.13.0" scikit-learn
    python train.py

Writes digits_v1.pt (a state dict), digits_v2.pt (TorchScript), metrics.json and samples/, on the
CPU, with one thread, in well under a minute. The seed fixes the split, the weights and the samples.
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import sklearn
import torch
from model import DigitsNet
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

SEED = 2024
HELD_OUT = 0.25
SAMPLES = 32
MAX_PIXEL = 16

Images = torch.Tensor  # (N, 8, 8), uint8, 0..16
Labels = torch.Tensor  # (N,), int64, 0..9


def to_input(images: Images) -> torch.Tensor:
    """What the network takes, (N, 1, 8, 8) float32 in 0..1; the handler scales the same way."""
    return images.unsqueeze(1).to(torch.float32) / MAX_PIXEL


def split(images: Images, labels: Labels, test_size: float | int, seed: int) -> tuple[Images, ...]:
    """Rest and chosen part as (images, images, labels, labels), every digit in proportion."""
    rest, chosen = train_test_split(
        range(len(labels)), test_size=test_size, random_state=seed, stratify=labels.tolist()
    )
    return images[rest], images[chosen], labels[rest], labels[chosen]


def fit(images: Images, labels: Labels, width: int, epochs: int, seed: int) -> DigitsNet:
    """Train one network from scratch; the last epoch is kept, nothing is chosen by the result."""
    torch.manual_seed(seed)
    model = DigitsNet(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    inputs = to_input(images)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def count_right(model: nn.Module, images: Images, labels: Labels) -> int:
    """How many images the model names correctly."""
    return int((model(to_input(images)).argmax(dim=1) == labels).sum())


def save_torchscript(model: DigitsNet, path: Path) -> None:
    """Write the model as TorchScript, without the source paths of the machine that trained it.

    torch.jit.save adds debug records that name every source file by its absolute path. They are
    left out by one more round: save, drop the records, load, save.
    """
    first, bare = io.BytesIO(), io.BytesIO()
    torch.jit.save(torch.jit.script(model), first)
    with zipfile.ZipFile(first) as source, zipfile.ZipFile(bare, "w") as target:
        for name in source.namelist():
            if not name.endswith(".debug_pkl"):
                target.writestr(name, source.read(name))
    bare.seek(0)
    torch.jit.save(torch.jit.load(bare), str(path))


def write_samples(folder: Path, images: Images, labels: Labels) -> None:
    """One binary PGM (P5, 8x8, maxval 16) per image, and labels.json in the same order."""
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        header = f"P5\n8 8\n{MAX_PIXEL}\n".encode()
        (folder / f"{number:02}.pgm").write_bytes(header + bytes(image.flatten().tolist()))
    (folder / "labels.json").write_text(json.dumps(labels.tolist()) + "\n")


def measure(model: nn.Module, held_out: tuple[Images, Labels], samples: tuple[Images, Labels]) -> dict[str, float]:
    """Held-out accuracy (0..1) and the number of samples named correctly."""
    return {
        "accuracy": round(count_right(model, *held_out) / len(held_out[1]), 4),
        "samples_right": count_right(model, *samples),
        "parameters": sum(each.numel() for each in model.parameters()),
    }


def train(output: Path, seed: int) -> dict[str, Any]:
    """Train, measure the files as written (not the networks in memory), write; the metrics."""
    data = load_digits()
    images = torch.from_numpy(data.images).to(torch.uint8)
    labels = torch.from_numpy(data.target).to(torch.int64)
    train_images, held_images, train_labels, held_labels = split(images, labels, HELD_OUT, seed)
    _, sample_images, _, sample_labels = split(held_images, held_labels, SAMPLES, seed)

    v1 = fit(train_images, train_labels, width=16, epochs=40, seed=seed)
    torch.save(v1.state_dict(), output / "digits_v1.pt")
    v2 = fit(train_images, train_labels, width=32, epochs=60, seed=seed)
    save_torchscript(v2, output / "digits_v2.pt")
    write_samples(output / "samples", sample_images, sample_labels)

    loaded = DigitsNet()
    loaded.load_state_dict(torch.load(output / "digits_v1.pt", weights_only=True))
    scripted = torch.jit.load(str(output / "digits_v2.pt"))
    parts = (held_images, held_labels), (sample_images, sample_labels)
    return {
        "seed": seed,
        "train_size": len(train_labels),
        "held_out_size": len(held_labels),
        "samples": len(sample_labels),
        "torch": torch.__version__,
        "scikit_learn": sklearn.__version__,
        "versions": {"1.0": measure(loaded, *parts), "2.0": measure(scripted, *parts)},
    }


def main() -> None:
    """Parse the command line, train, print the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="where to write")
    parser.add_argument("--seed", type=int, default=SEED, help="fixes split, weights and samples")
    options = parser.parse_args()
    torch.set_num_threads(1)  # one order of sums, however many cores there are
    torch.use_deterministic_algorithms(True)
    options.output.mkdir(parents=True, exist_ok=True)
    metrics = train(options.output, options.seed)
    (options.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    for version, measured in metrics["versions"].items():
        accuracy = f"{measured['accuracy']:.2%} of {metrics['held_out_size']} held-out images"
        samples = f"{measured['samples_right']} of {metrics['samples']} samples"
        print(f"digits {version}: {accuracy}, {samples}")


if __name__ == "__main__":
    main()
