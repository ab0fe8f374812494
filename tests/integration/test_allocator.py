"""What a model's layers need for one batch, its worker keeps for the next, unless the environment says how memory is kept."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.handlers import Deployer

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep freed memory")

# Tensors of 40 MB, which glibc by itself gives back whenever one is freed, and how many pages were cleared for them.
FAULTS_OF_LAYERS = """(lambda used, torch: (
    lambda before: ([torch.ones(10_000_000).add(1).sum() for _ in range(2)], used().ru_minflt - before)[1]
)(used().ru_minflt))(lambda: __import__('resource').getrusage(0), __import__('torch'))"""
PAGES = 2 * 2 * 40_000_000 // 4096
"""That the tensors have, all together."""


@pytest.mark.parametrize("share_weights", ["auto", "never"])
def test_a_batch_finds_the_memory_of_those_before(deploy: Deployer, share_weights: str) -> None:
    """Hardly a page is cleared for it, however its worker was started. Where batches lie differently, it takes a few to be so."""
    model = deploy(initial_workers=1, share_weights=share_weights)
    faults = [model.predict(FAULTS_OF_LAYERS) for _ in range(9)]
    assert min(faults[4:]) < PAGES / 20, faults


@pytest.mark.parametrize(
    "variable, is_told", [("MALLOC_TRIM_THRESHOLD_", False), ("GLIBC_TUNABLES", False), ("X", True)]
)
def test_what_the_environment_says_of_memory_counts(variable: str, is_told: bool) -> None:
    """Then glibc does what its own variables tell it, and nothing else."""
    code = "from torchmgmt.allocator import keep_freed_memory; print(keep_freed_memory())"
    run = subprocess.run([sys.executable, "-c", code], env={variable: "1"}, capture_output=True, text=True, check=True)
    assert run.stdout == f"{is_told}\n"
