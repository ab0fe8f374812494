"""``ts.torch_handler.vision_handler``."""

from torchmgmt.handlers.vision_handler import VisionHandler

__all__ = ["VisionHandler"]
