"""``ts.torch_handler.text_handler``."""

from torchmgmt.handlers.text_handler import TextHandler

__all__ = ["TextHandler"]
