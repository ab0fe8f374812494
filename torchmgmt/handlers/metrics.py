"""``context.metrics``: what handlers measure, written as log lines in the form that TorchServe gave them."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Mapping

__all__ = ["Metrics"]

log = logging.getLogger("MODEL_METRICS")

_TIME_UNITS = {"ms": "Milliseconds", "s": "Seconds", "us": "Microseconds"}
_SIZE_UNITS = {"B": "Bytes", "kB": "Kilobytes", "MB": "Megabytes", "GB": "Gigabytes"}


class Metrics:
    """Takes a handler's figures and logs each, as ``metrics_mode=log`` does in TorchServe (its default).

    A line reads ``Name.Unit:value|#ModelName:m,Level:Model|#hostname:h,requestID:ids,timestamp:seconds``.
    """

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.request_ids: Mapping[int, str] = {}
        self._host = socket.gethostname()

    def add_counter(self, name: str, value: float, idx: int | None = None, dimensions: object = None) -> None:
        """Note a count."""
        self.add_metric(name, value, "count", idx, dimensions)

    def add_time(
        self, name: str, value: float, idx: int | None = None, unit: str = "ms", dimensions: object = None
    ) -> None:
        """Note a duration, in ``ms``, ``s`` or ``us``."""
        self.add_metric(name, value, _unit(unit, _TIME_UNITS), idx, dimensions)

    def add_size(
        self, name: str, value: float, idx: int | None = None, unit: str = "MB", dimensions: object = None
    ) -> None:
        """Note a size, in ``B``, ``kB``, ``MB`` or ``GB``."""
        self.add_metric(name, value, _unit(unit, _SIZE_UNITS), idx, dimensions)

    def add_percent(self, name: str, value: float, idx: int | None = None, dimensions: object = None) -> None:
        """Note a percentage."""
        self.add_metric(name, value, "Percent", idx, dimensions)

    def add_error(self, name: str, value: object, dimensions: object = None) -> None:
        """Note an error."""
        self.add_metric(name, value, "", None, dimensions)

    def add_metric(
        self, name: str, value: object, unit: str = "unit", idx: int | None = None, dimensions: object = None
    ) -> None:
        """Note any figure. ``dimensions``: a list of things that print as ``Name:value``, or None."""
        extra = "".join(f",{dimension}" for dimension in dimensions) if isinstance(dimensions, (list, tuple)) else ""
        ids = ",".join(self.request_ids.values()) if idx is None else self.request_ids.get(idx, "")
        head = f"{name}.{unit}:{value}|#ModelName:{self.model_name},Level:Model{extra}"
        log.info("%s|#hostname:%s,requestID:%s,timestamp:%d", head, self._host, ids, time.time())


def _unit(unit: str, units: Mapping[str, str]) -> str:
    if unit not in units:
        raise ValueError(f"unit is {unit!r}, but must be one of {', '.join(units)}")
    return units[unit]
