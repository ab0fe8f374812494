"""The handlers that ship, by the names under which an archive may ask for them, and what every handler is given."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["SHIPPED"]

SHIPPED: Mapping[str, str] = {
    "base_handler": "torchmgmt.handlers.base_handler",
}
"""From the name in a manifest to the module that is loaded for it."""
