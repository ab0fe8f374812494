"""``ts.torch_handler.request_envelope.json``."""

from torchmgmt.handlers.envelopes import JSONEnvelope

__all__ = ["JSONEnvelope"]
