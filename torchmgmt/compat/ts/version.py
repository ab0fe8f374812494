"""``ts.version``."""

from torchmgmt.compat.ts import __version__

__all__ = ["__version__"]
