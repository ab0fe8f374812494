"""``ts.torch_handler.request_envelope.kserve``."""

from torchmgmt.handlers.envelopes import KServeEnvelope

__all__ = ["KServeEnvelope"]
