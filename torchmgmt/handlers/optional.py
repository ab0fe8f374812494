"""Packages that a handler uses when they are installed, and names when they are missing."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["needed"]


def needed(module: str, package: str, purpose: str) -> Any:
    """Return the imported ``module``.

    Args:
        module: its dotted name.
        package: what to install to have it.
        purpose: who needs it, or for what: the beginning of the error.

    Raises:
        ImportError: it is not installed, or what it needs is not; the text says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{purpose} needs {package}, but {error}: pip install '{package}'") from error
