"""Reads pages of metrics as Prometheus does, and refuses what it would refuse."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from torchmgmt.metrics import Metrics

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class Samples(dict[tuple[str, frozenset[tuple[str, str]]], float]):
    """The samples of a page by names and labels."""

    def __call__(self, sample: str, **labels: str) -> float | None:
        """The sum of all samples of this name that have these labels; None if there is none."""
        found = self.all(sample, **labels)
        return sum(found.values()) if found else None

    def all(self, sample: str, **labels: str) -> Mapping[frozenset[tuple[str, str]], float]:
        return {of: value for (name, of), value in self.items() if name == sample and set(labels.items()) <= of}

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self}


def read(page: str) -> Samples:
    """Parse a page in Prometheus' text format; each name has one kind on it, and each sample is there once."""
    samples = Samples()
    kinds = [line.split()[2:] for line in page.split("\n") if line.startswith("# TYPE ")]
    assert len(kinds) == len({name for name, _ in kinds})
    # This parser gives every counter the end that only some have.
    plain = {f"{name}_total": name for name, kind in kinds if kind == "counter" and not name.endswith("_total")}
    for family in parse_text(page):
        for sample in family.samples:
            place = (plain.get(sample.name, sample.name), frozenset(sample.labels.items()))
            assert place not in samples, place
            samples[place] = sample.value
    return samples


def samples_of(metrics: Metrics, *names: str) -> Samples:
    """What ``metrics`` show now; the page must be right in both formats."""
    open_metrics = metrics.page(names, OPENMETRICS).decode()
    assert list(parse_openmetrics(open_metrics)) or names
    return read(metrics.page(names).decode())
