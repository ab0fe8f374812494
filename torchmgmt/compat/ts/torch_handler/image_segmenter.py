"""``ts.torch_handler.image_segmenter``."""

from torchmgmt.handlers.image_segmenter import ImageSegmenter

__all__ = ["ImageSegmenter"]
