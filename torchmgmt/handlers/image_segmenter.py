"""image_segmenter: the most probable class of each pixel."""

from __future__ import annotations

from typing import Any

import torch

from torchmgmt.handlers.outputs import main_tensor
from torchmgmt.handlers.timing import timed
from torchmgmt.handlers.vision_handler import VisionHandler

__all__ = ["ImageSegmenter"]


class ImageSegmenter(VisionHandler):
    """Answers each picture with [height, width, 2]: of each pixel the number of its class and its probability.

    The model returns scores of shape [batch, classes, height, width], by themselves or as ``out`` (as torchvision's do).
    ``handler.answer`` in model-config.yaml: ``list`` (as TorchServe; JSON) or ``tensor``.
    """

    def initialize(self, context: Any) -> None:
        """Load the model and read the options. Raises whatever loading raises, and ValueError for a wrong option."""
        super().initialize(context)
        self._as_tensor = self.options.choice("answer", "list", ("list", "tensor")) == "tensor"

    @timed
    def postprocess(self, data: Any) -> list[Any]:
        """Make an answer for each picture of the model's output.

        Raises:
            TypeError: the output holds no tensor.
            ValueError: its shape is not [batch, classes, height, width].
        """
        if isinstance(data, list):
            return [self.postprocess(each)[0] for each in data]
        scores = main_tensor(data)
        if scores.ndim != 4:
            raise ValueError(
                f"the model returned scores of shape {list(scores.shape)};"
                " image_segmenter needs [batch, classes, height, width]"
            )
        best = torch.softmax(scores.float(), dim=1).max(dim=1)
        answers = torch.stack([best.indices.to(best.values.dtype), best.values], dim=3).cpu()
        # Each with memory of its own: the pickle of a view holds all that it is a view of.
        return [each.clone() for each in answers] if self._as_tensor else answers.tolist()
