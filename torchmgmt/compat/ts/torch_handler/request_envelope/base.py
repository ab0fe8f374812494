"""``ts.torch_handler.request_envelope.base``."""

from torchmgmt.handlers.envelopes import BaseEnvelope

__all__ = ["BaseEnvelope"]
