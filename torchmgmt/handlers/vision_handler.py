"""VisionHandler: pictures in, tensors to the model. What the shipped handlers for pictures build on, and those in the field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchmgmt.handlers.base_handler import BaseHandler
from torchmgmt.handlers.images import MAX_PIXELS, ImagePreset, allow_pixels, read_image
from torchmgmt.handlers.inputs import decode_base64, numbers_of, payload_of, read_each, stacked
from torchmgmt.handlers.optional import needed
from torchmgmt.handlers.options import Options
from torchmgmt.handlers.timing import timed

__all__ = ["VisionHandler"]


class VisionHandler(BaseHandler):
    """Makes a batch of tensors of pictures; a subclass says what is made of the model's output.

    A picture comes as the bytes of a file, as base64 text, or as the tensor or list of numbers that the model takes, in
    ``data``, ``body`` or ``image`` of the row, or of the JSON object in it. :attr:`image_processing` is called with each
    opened :class:`PIL.Image.Image` and returns a tensor; numbers and tensors go to the model as they are.

    The ``handler`` section of model-config.yaml changes the preset, unless a subclass has put something else there.
    """

    image_processing: Any = ImagePreset()
    _ig: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.options = Options({})
        self.max_image_pixels: int | None = MAX_PIXELS
        self._upright = False

    def initialize(self, context: Any) -> None:
        """Load the model and read the options. Raises whatever loading raises, and ValueError for a wrong option."""
        needed("PIL.Image", "Pillow", f"handler {type(self).__name__}")
        super().initialize(context)
        self.options = Options.of(self.model_yaml_config)
        self._upright = self.options.flag("exif_orientation", False)
        self.max_image_pixels = self.options.count("max_image_pixels", MAX_PIXELS)
        if not context.system_properties.get("limit_max_image_pixels", True):
            self.max_image_pixels = None
        allow_pixels(self.max_image_pixels)
        if isinstance(self.image_processing, ImagePreset):
            self.image_processing = self.image_processing.changed(self.options)

    @timed
    def preprocess(self, data: Sequence[Any]) -> Any:
        """Return a tensor [batch, channels, height, width]; a list of tensors where they differ in shape.

        Raises:
            InputRefused: some of the batch sent no picture that can be used.
        """
        return stacked(read_each(data, self._tensor_of), self.device)

    @timed
    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the model; on a list, on each by itself: what the others of its batch sent changes nobody's answer."""
        run = super().inference
        if isinstance(data, list):
            return [run(image[None], *args, **kwargs) for image in data]
        return run(data, *args, **kwargs)

    def get_insights(self, tensor_data: Tensor, _: Any, target: int = 0) -> list[Any]:
        """Return how much each number of the input adds to class ``target``. Needs captum. Named as in TorchServe."""
        insights: list[Any] = self.ig.attribute(tensor_data, target=target, n_steps=15).tolist()
        return insights

    @property
    def ig(self) -> Any:
        """Captum's IntegratedGradients of the model. Raises ImportError without captum. Named as in TorchServe."""
        if self._ig is None:
            self._ig = needed("captum.attr", "captum", "explaining a prediction").IntegratedGradients(self.model)
        return self._ig

    @ig.setter
    def ig(self, ig: Any) -> None:
        self._ig = ig

    def _tensor_of(self, row: Any) -> Tensor:
        value = payload_of(row, "image", "b64")
        if isinstance(value, str):
            value = decode_base64(value)
        if isinstance(value, (bytes, bytearray, memoryview)):
            value = read_image(value, max_pixels=self.max_image_pixels, upright=self._upright)
        elif not _is_image(value):
            return numbers_of(value, torch.float32)
        tensor: Tensor = self.image_processing(value)
        return tensor


def _is_image(value: object) -> bool:
    from PIL import Image

    return isinstance(value, Image.Image)
