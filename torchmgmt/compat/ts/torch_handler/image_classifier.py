"""``ts.torch_handler.image_classifier``."""

from torchmgmt.handlers.image_classifier import ImageClassifier

__all__ = ["ImageClassifier"]
