"""object_detector: what is in a picture, and where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchmgmt.handlers.images import ImagePreset
from torchmgmt.handlers.outputs import label_of
from torchmgmt.handlers.timing import timed
from torchmgmt.handlers.vision_handler import VisionHandler

__all__ = ["ObjectDetector"]


class ObjectDetector(VisionHandler):
    """Answers each picture with a list of ``{name: [left, top, right, bottom], "score": score}``, as the model orders them.

    The model is called as torchvision's are: with the pictures, each [channels, height, width] of numbers from 0 to 1 in
    its own size, and returns for each ``boxes``, ``labels`` and ``scores``. Pictures of one size go to it as one tensor,
    others as a list; a TorchScript model that declares a list always gets one. Pictures are neither resized nor
    normalised unless model-config.yaml says so; boxes are in pixels of what the model was given.

    ``handler.threshold`` in model-config.yaml is the least score that is answered; 0.5 unless set.
    """

    image_processing: Any = ImagePreset(resize_size=None, crop_size=None, mean=None, std=None)
    threshold = 0.5

    def initialize(self, context: Any) -> None:
        """Load the model and read the options. Raises whatever loading raises, and ValueError for a wrong option."""
        super().initialize(context)
        self.threshold = self.options.share("threshold", self.threshold)

    @timed
    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the model on the whole batch."""
        images = list(data) if _takes_list(self.model) else data
        with torch.inference_mode():
            output = self.model(images, *args, **kwargs)
        # torchvision's return the losses, too, once they are TorchScript.
        return output[1] if isinstance(output, tuple) and len(output) == 2 else output

    @timed
    def postprocess(self, data: Any) -> list[Any]:
        """Make an answer for each picture of the model's output. Raises TypeError if that has not the form it needs."""
        return [self._found(row) for row in data]

    def _found(self, row: Any) -> list[dict[str, Any]]:
        if not isinstance(row, Mapping) or not all(
            isinstance(row.get(key), Tensor) for key in ("boxes", "labels", "scores")
        ):
            raise TypeError(
                "object_detector needs a model that returns, for each picture, a mapping with the tensors boxes, labels"
                f" and scores; it returned an object of type {type(row).__qualname__}"
            )
        kept = row["scores"] >= self.threshold
        boxes, labels, scores = (row[key][kept].tolist() for key in ("boxes", "labels", "scores"))
        return [
            {label_of(self.mapping, int(label)): box, "score": score}
            for box, label, score in zip(boxes, labels, scores, strict=True)
        ]


def _takes_list(model: Any) -> bool:
    """Whether a TorchScript model declares that its first argument is a list; it would refuse a tensor then."""
    schema = getattr(getattr(model, "forward", None), "schema", None)
    arguments = [each for each in getattr(schema, "arguments", ()) if each.name != "self"]
    return bool(arguments) and isinstance(arguments[0].type, torch.ListType)
