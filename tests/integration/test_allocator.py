"""What a model's layers need for one batch, its worker keeps for the next, unless the environment says how memory is kept."""

from __future__ import annotations

import platform

import pytest

from tests.handlers import Deployer

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep freed memory")

# Three tensors of 8 MB, each freed before the next one but one, and how many pages the system had to clear for them.
FAULTS_OF_LAYERS = """(lambda used, torch: (
    lambda before: ([torch.ones(2_000_000).add(1).sum() for _ in range(3)], used().ru_minflt - before)[1]
)(used().ru_minflt))(lambda: __import__('resource').getrusage(0), __import__('torch'))"""
PAGES = 3 * 2 * 8_000_000 // 4096
"""That the tensors have, all together."""


@pytest.mark.parametrize("share_weights", ["auto", "never"])
def test_a_batch_finds_the_memory_of_those_before(deploy: Deployer, share_weights: str) -> None:
    """Once the first few have found their places hardly a page is cleared, however its worker was started."""
    model = deploy(initial_workers=1, share_weights=share_weights)
    first = model.predict(FAULTS_OF_LAYERS)
    later = [model.predict(FAULTS_OF_LAYERS) for _ in range(6)]
    assert max(later[3:]) < PAGES / 20, (first, later)


def test_what_the_environment_says_of_memory_counts(deploy: Deployer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then glibc does what its own variables tell it, and nothing else."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    model = deploy(initial_workers=1)
    model.predict(FAULTS_OF_LAYERS)
    assert model.predict(FAULTS_OF_LAYERS) > PAGES / 4
