"""Makes names and texts that handlers choose such that Prometheus takes them, and keeps apart what would clash."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torchmgmt.records import MetricKind

__all__ = ["Names", "legal_labels", "legal_name", "text"]

_NOT_IN_A_NAME = re.compile(r"[^a-zA-Z0-9_]")
# Prometheus' own: `le` are the bounds of histograms, `quantile` the parts of summaries.
_TAKEN_LABELS = frozenset({"le", "quantile"})
_RESERVED_PREFIXES = ("torchmgmt_", "process_", "python_")
_HISTOGRAM_SUFFIXES = ("", "_bucket", "_count", "_sum", "_created")


def text(value: object) -> str:
    """Return ``value`` as text that can be encoded: halves of characters, which Python's texts may have, are replaced."""
    return str(value).encode("utf-8", "replace").decode()


def legal_name(name: str) -> str:
    """Return ``name`` as a legal name of a metric or a label: letters, digits and ``_``, and no digit first."""
    legal = _NOT_IN_A_NAME.sub("_", name)
    return f"_{legal}" if not legal or legal[0].isdigit() else legal


def legal_labels(dimensions: Mapping[str, str]) -> dict[str, str]:
    """Return dimensions as labels; those whose names are the same once they are legal are told apart by numbers."""
    labels: dict[str, str] = {}
    for name, value in dimensions.items():
        legal = legal_name(name)
        if legal == "_" or legal.startswith("__"):  # Prometheus' own, also once a number is added to the former
            legal = f"x{legal}"
        if legal in _TAKEN_LABELS:
            legal += "_"
        free, number = legal, 2
        while free in labels:
            free, number = f"{legal}_{number}", number + 1
        labels[free] = text(value)
    return labels


class Names:
    """Which names of metrics are in use, and for which kind: one name has one kind on the whole page."""

    def __init__(self, reserved: Iterable[str]) -> None:
        self._reserved = frozenset(reserved)
        self._kinds: dict[str, MetricKind] = {}
        self._claims: dict[str, str] = {}  # each name that a sample may have -> the metric whose it is

    def claim(self, name: str, kind: MetricKind) -> str | None:
        """Return by which name a metric of a handler is shown; None if there is none.

        That is its own, made legal; where this is of another kind or ours, with ``_counter``, ``_gauge`` or
        ``_histogram`` after it.
        """
        if (found := self.find(name, kind)) is not None:
            return found
        legal = legal_name(name)
        for candidate in (legal, f"{legal}_{kind.value}"):
            if self._is_free(candidate, kind):
                self._kinds[candidate] = kind
                self._claims.update(dict.fromkeys(_samples(candidate, kind), candidate))
                return candidate
        return None

    def find(self, name: str, kind: MetricKind) -> str | None:
        """Return the same for a metric that has been claimed; None if it has not."""
        legal = legal_name(name)
        return next((each for each in (legal, f"{legal}_{kind.value}") if self._kinds.get(each) is kind), None)

    def release(self, names: Iterable[str]) -> None:
        """Let these metrics, which nobody records any more, be of any kind again."""
        gone = set(names)
        self._kinds = {name: kind for name, kind in self._kinds.items() if name not in gone}
        self._claims = {sample: name for sample, name in self._claims.items() if name not in gone}

    def _is_free(self, name: str, kind: MetricKind) -> bool:
        samples = _samples(name, kind)
        if name in self._kinds or not self._reserved.isdisjoint(samples):
            return False
        return not name.startswith(_RESERVED_PREFIXES) and not any(sample in self._claims for sample in samples)


def _samples(name: str, kind: MetricKind) -> list[str]:
    """Return the names that the samples of a metric have, and that of its family."""
    if kind is MetricKind.HISTOGRAM:
        return [name + suffix for suffix in _HISTOGRAM_SUFFIXES]
    return [name, name.removesuffix("_total")]
