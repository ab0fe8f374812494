"""How busy this machine is, in TorchServe's units: percent, MB (2**20) and GB (2**30)."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import psutil

__all__ = ["HostLoad"]

_MB = 1 << 20
_GB = 1 << 30


class HostLoad:
    """Looks at processor, memory and disk when asked; the processor's load is that since the last look. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # psutil.cpu_percent() keeps the last look for the whole program, which may use it, too.
        self._before = psutil.cpu_times()  # guarded by _lock
        self._percent = 0.0

    def figures(self) -> Mapping[str, tuple[str, float]]:
        """Return each figure's documentation and value by its name. Blocks for less than a millisecond."""
        memory, disk = psutil.virtual_memory(), psutil.disk_usage("/")
        return {
            "CPUUtilization": ("How busy the processors are, in percent, since the last look.", self._cpu_percent()),
            "MemoryUsed": ("Memory in use, in MB.", memory.used / _MB),
            "MemoryAvailable": ("Memory that programs could have, in MB.", memory.available / _MB),
            "MemoryUtilization": ("Memory in use, in percent.", memory.percent),
            "DiskUsage": ("Used on the file system of /, in GB.", disk.used / _GB),
            "DiskAvailable": ("Free on the file system of /, in GB.", disk.free / _GB),
            "DiskUtilization": ("Used on the file system of /, in percent.", disk.percent),
        }

    def _cpu_percent(self) -> float:
        now = psutil.cpu_times()
        with self._lock:
            idle = _idle(now) - _idle(self._before)
            total = _total(now) - _total(self._before)
            if total > 0:
                self._before = now
                self._percent = max(0.0, min(100.0, 100 * (1 - idle / total)))
            return self._percent


def _idle(times: object) -> float:
    return float(getattr(times, "idle", 0.0)) + float(getattr(times, "iowait", 0.0))


def _total(times: object) -> float:
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")  # guests are in user and nice
    return sum(float(getattr(times, name, 0.0)) for name in names)
