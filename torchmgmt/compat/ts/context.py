"""``ts.context``."""

from torchmgmt.handlers.context import Context, RequestProcessor

__all__ = ["Context", "RequestProcessor"]
