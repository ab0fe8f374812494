"""What it costs to look after many processes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.handlers import until
from torchmgmt.backends import process as process_backend
from torchmgmt.backends.process import ProcessBackend


class Process:
    """A process of which it takes a while to learn how large it is."""

    at_this_look = 0

    def __init__(self) -> None:
        self.sampled = self.most_at_once = 0

    @property
    def child(self) -> Process:
        return self

    def sample_memory(self) -> None:
        time.sleep(0.004)
        self.sampled += 1
        Process.at_this_look += 1
        self.most_at_once = max(self.most_at_once, Process.at_this_look)

    def end_if_stopped(self) -> None:
        """It is not; all are asked before any is sampled."""
        Process.at_this_look = 0

    def process_exited(self, exitcode: int | None) -> None:
        """It has not."""

    def send(self, number: int) -> bool:
        return False


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessBackend]:
    monkeypatch.setattr(process_backend, "_LOOK_PERIOD_S", 0.02)
    monkeypatch.setattr(process_backend, "_SETTLED_S", 0.01)
    monkeypatch.setattr(process_backend, "_SAMPLE_PERIOD_S", 0.05)
    backend = ProcessBackend()
    yield backend
    backend.close()


def test_the_memory_of_many_processes_is_sampled_in_turn(backend: ProcessBackend) -> None:
    """At one look only as many as there is time for, then the others, so that each has its turn."""
    processes = [Process() for _ in range(20)]
    for process in processes:
        backend.look_after(process)  # type: ignore[arg-type]  # as much of one as is needed
    until(lambda: min(process.sampled for process in processes) >= 2, "each was sampled twice")
    assert max(process.sampled for process in processes) <= 4
    assert max(process.most_at_once for process in processes) <= 5
    for process in processes:
        backend.forget(process)  # type: ignore[arg-type]
