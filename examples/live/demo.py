"""Registers what this program has made, as it is: a module, a function, a handler, and a file of weights.

Runs as it stands: `python examples/live/demo.py`. No archive is made, and no `if __name__ == "__main__"` is needed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DIGITS = Path(__file__).resolve().parent.parent / "digits"
sys.path[:0] = [str(DIGITS.parent.parent), str(DIGITS)]

from model import DigitsNet  # noqa: E402  # the folder of the other example is on the path from here on

from torchmgmt import ModelManager  # noqa: E402  # so that this runs in a checkout, too


class Weather(nn.Module):
    """Two outputs from one input: tomorrow's temperature, and the chances of sun, rain and snow."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 32), nn.ReLU())
        self.temperature = nn.Linear(32, 1)
        self.sky = nn.Linear(32, 3)

    def forward(self, measured: Tensor) -> dict[str, Tensor]:
        """Measurements (N, 5) to temperatures (N) and chances (N, 3)."""
        hidden = self.body(measured)
        return {"temperature": self.temperature(hidden).squeeze(1), "sky": self.sky(hidden).softmax(1)}


class Counting:
    """A handler, as in an archive: loaded once, given whole batches."""

    def initialize(self, context: Any) -> None:
        """Learn what the model is called."""
        self.name = context.model_name

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        """Answer each request with how long it is."""
        return [f"{self.name}: {len(row['body'])} characters" for row in data]


def read_image(file: Path) -> Tensor:
    """A PGM of 8x8 pixels as a tensor (1, 8, 8) in 0..1."""
    return torch.tensor(list(file.read_bytes()[-64:]), dtype=torch.float32).reshape(1, 8, 8) / 16


def main() -> None:
    """Show each way once."""
    with ModelManager() as manager:
        weather = manager.register(Weather(), model_name="weather", initial_workers=2, batch_size=8)
        answer = weather.predict(torch.randn(5))
        print("a module:", {name: tuple(part.shape) for name, part in answer.items()})
        print("a module:", len(list(weather.map(torch.randn(100, 5)))), "answers by", len(weather.describe().workers))

        skies = ("sun", "rain", "snow")
        net = Weather().eval()
        told = manager.register(
            lambda batch: [skies[best] for best in net(batch)["sky"].argmax(1)], model_name="told", batching="stack"
        )
        print("a function:", told.predict(torch.randn(5)) in skies)

        print("a handler:", manager.register(Counting, model_name="counting").predict("live objects"))

        digits = manager.register(DIGITS / "digits_v1.pt", model_name="digits", model_class=DigitsNet, batch_size=8)
        images = [read_image(file) for file in sorted((DIGITS / "samples").glob("*.pgm"))]
        labels = json.loads((DIGITS / "samples" / "labels.json").read_text(encoding="utf-8"))
        found = [int(logits.argmax()) for logits in digits.map(images)]
        print("a file of weights:", sum(map(int.__eq__, found, labels)), "of", len(labels), "digits are right")


main()
