"""image_classifier: the most probable classes of a picture."""

from __future__ import annotations

from typing import Any

import torch

from torchmgmt.handlers.outputs import labelled, main_tensor
from torchmgmt.handlers.timing import timed
from torchmgmt.handlers.vision_handler import VisionHandler

__all__ = ["ImageClassifier"]


class ImageClassifier(VisionHandler):
    """Answers each picture with ``{name: probability}`` of its :attr:`topk` most probable classes, greatest first.

    The model returns scores (logits) of shape [batch, classes]. Names are those in index_to_name.json, else numbers.
    ``handler.topk`` in model-config.yaml sets how many classes; 5 unless set.
    """

    topk = 5

    def initialize(self, context: Any) -> None:
        """Load the model and read the options. Raises whatever loading raises, and ValueError for a wrong option."""
        super().initialize(context)
        self.topk = self.options.count("topk", self.topk)

    def set_max_result_classes(self, topk: int) -> None:
        """Set how many classes an answer has. Named as in TorchServe."""
        self.topk = topk

    def get_max_result_classes(self) -> int:
        """Return how many classes an answer has. Named as in TorchServe."""
        return self.topk

    @timed
    def postprocess(self, data: Any) -> list[Any]:
        """Make an answer for each picture of the model's output.

        Raises:
            TypeError: the output holds no tensor.
            ValueError: its shape is not [batch, classes].
        """
        if isinstance(data, list):
            return [self.postprocess(each)[0] for each in data]
        scores = main_tensor(data)
        if scores.ndim != 2:
            raise ValueError(
                f"the model returned scores of shape {list(scores.shape)}; image_classifier needs [batch, classes]"
            )
        best = torch.topk(torch.softmax(scores.float(), dim=1), min(self.topk, scores.shape[1]), dim=1)
        rows = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [labelled(values, self.mapping, classes) for values, classes in rows]
