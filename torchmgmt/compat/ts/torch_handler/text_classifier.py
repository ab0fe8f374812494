"""``ts.torch_handler.text_classifier``."""

from torchmgmt.handlers.text_classifier import TextClassifier

__all__ = ["TextClassifier"]
