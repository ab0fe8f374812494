"""``ts.torch_handler.base_handler``."""

from torchmgmt.handlers.base_handler import BaseHandler

__all__ = ["BaseHandler"]
