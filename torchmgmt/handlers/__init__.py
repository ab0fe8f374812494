"""The handlers that ship, by the names under which an archive may ask for them, and what every handler is given."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["SHIPPED"]

SHIPPED: Mapping[str, str] = {
    name: f"torchmgmt.handlers.{name}"
    for name in (
        "base_handler",
        "image_classifier",
        "image_segmenter",
        "object_detector",
        "tensor_handler",
        "text_classifier",
    )
}
"""From the name in a manifest to the module that is loaded for it."""
