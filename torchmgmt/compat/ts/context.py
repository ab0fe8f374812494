"""``ts.context``."""

from torchmgmt.worker.context import Context, RequestProcessor

__all__ = ["Context", "RequestProcessor"]
