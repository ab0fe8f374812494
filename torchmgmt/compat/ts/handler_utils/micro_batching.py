"""``ts.handler_utils.micro_batching``."""

from torchmgmt.handlers.micro_batching import HANDLER_METHODS, MicroBatching

__all__ = ["HANDLER_METHODS", "MicroBatching"]
