"""What ``import ts`` finds inside a worker."""

import importlib.metadata

__all__ = ["__version__"]

__version__ = importlib.metadata.version("torchmgmt")
