"""``ts.torch_handler.base_handler``."""

from torchmgmt.handlers.base_handler import BaseHandler
from torchmgmt.handlers.model_files import setup_ort_session

__all__ = ["BaseHandler", "setup_ort_session"]
