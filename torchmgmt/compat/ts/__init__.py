"""What ``import ts`` finds inside a worker."""

__all__ = ["__version__"]

__version__ = "0.12.0"
"""That of the TorchServe whose names these are, its last: handlers compare it with the version that they need."""
