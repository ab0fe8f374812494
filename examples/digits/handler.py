"""The handler of the digits example; runs unchanged in TorchServe and in torchmgmt.

`BaseHandler` loads the network, version 1.0 (a state dict and model.py) as well as version 2.0
(TorchScript), and calls it. Only what is special to digits is written here: from a request to a
tensor, and from logits to an answer.

This module defines one class alone, since the handler loader expects exactly one.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from ts.torch_handler.base_handler import BaseHandler

SIDE = 8
MAX_PIXEL = 16
ALLOWED = (
    "a binary PGM (P5) of 8x8 pixels and maxval 16, or, as application/json, "
    "a list of 64 numbers in 0..16 (flat, or 8 rows of 8)"
)

# Netpbm's rule: any white space and comments between the numbers, one white-space byte after the
# last. Exactly one: pixels 9 to 13 are white space too.
_GAP = rb"(?:\s|#[^\n]*\n)+"
_PGM = re.compile(rb"P5" + _GAP + rb"(\d{1,9})" + _GAP + rb"(\d{1,9})" + _GAP + rb"(\d{1,9})\s")


class DigitsHandler(BaseHandler):
    """Names the digit in each 8x8 image.

    A request is a dict with "body" (or "data"): a binary PGM (P5, 8x8, maxval 16) as bytes,
    bytearray or memoryview, or a list of 64 numbers in 0..16, flat or as 8 rows of 8.
    An answer is {"digit": 0..9, "probability": 0..1}.
    """

    def preprocess(self, data: list[dict[str, Any]]) -> torch.Tensor:
        """The requests of a batch as one tensor (N, 1, 8, 8), float32 in 0..1.

        Raises ValueError, which names the place in the batch, for a request that is no image.
        """
        pixels = [_read_request(number, row) for number, row in enumerate(data)]
        stacked = torch.tensor(pixels, dtype=torch.float32)
        return stacked.reshape(len(pixels), 1, SIDE, SIDE) / MAX_PIXEL

    def postprocess(self, data: torch.Tensor) -> list[dict[str, int | float]]:
        """Logits (N, 10) to one JSON-able answer per request, probability to 4 decimals."""
        best = torch.softmax(data, dim=1).max(dim=1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [{"digit": digit, "probability": round(share, 4)} for digit, share in pairs]


def _read_request(number: int, row: dict[str, Any]) -> list[float]:
    """The 64 pixels (0..16, row by row) of request `number` of the batch."""
    try:
        return _read_pixels(_payload(row))
    except ValueError as error:
        raise ValueError(f"Request {number} of the batch: {error}. Allowed: {ALLOWED}.") from None


def _payload(row: dict[str, Any]) -> Any:
    for key in ("body", "data"):
        if row.get(key) is not None:
            return row[key]
    raise ValueError(f'nothing under "body" or "data"; the keys are {sorted(row)}')


def _read_pixels(image: Any) -> list[float]:
    if isinstance(image, bytes | bytearray | memoryview):
        return _read_pgm(bytes(image))
    if isinstance(image, list):
        return _read_list(image)
    raise ValueError(f"got {type(image).__name__}")


def _read_pgm(image: bytes) -> list[float]:
    header = _PGM.match(image)
    if header is None:
        raise ValueError(f"got {len(image)} bytes that start with {image[:8]!r}, not a P5 header")
    width, height, maxval = map(int, header.groups())
    if (width, height, maxval) != (SIDE, SIDE, MAX_PIXEL):
        raise ValueError(f"got a PGM of {width}x{height} pixels and maxval {maxval}")
    return _check_pixels(list(image[header.end() :]))


def _read_list(image: list[Any]) -> list[float]:
    if image and all(isinstance(row, list) for row in image):
        lengths = [len(row) for row in image]
        if lengths != [SIDE] * SIDE:
            raise ValueError(f"got a list of {len(image)} rows with {lengths[:16]} numbers")
        image = [pixel for row in image for pixel in row]
    return _check_pixels(image)


def _check_pixels(pixels: list[Any]) -> list[float]:
    if len(pixels) != SIDE * SIDE:
        raise ValueError(f"got {len(pixels)} pixels")
    for place, pixel in enumerate(pixels):
        is_number = isinstance(pixel, int | float) and not isinstance(pixel, bool)
        if not is_number or not 0 <= pixel <= MAX_PIXEL:  # NaN fails the comparison too
            raise ValueError(f"got {pixel!r:.40} as pixel {place}")
    return pixels
