"""``ts.torch_handler.request_envelope.body``."""

from torchmgmt.handlers.envelopes import BodyEnvelope

__all__ = ["BodyEnvelope"]
