"""The network of the digits example: a small CNN for 8x8 grey images."""

from __future__ import annotations

import torch
from torch import nn


class DigitsNet(nn.Module):
    """Tells which of the ten digits an image shows.

    The only class of this file, and constructible without arguments: the handler that loads an
    eager model looks for exactly one class and calls it so.

    width: channels of the first convolution (16 in version 1.0, 32 in version 2.0).
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classify = nn.Linear(2 * width * 2 * 2, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 1, 8, 8), float32 in 0..1, to logits (N, 10), one column per digit."""
        return self.classify(self.features(images).flatten(1))
