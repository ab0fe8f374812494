"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.handlers import Deployer, deploy, gate, light_torch, manager, swept
from torchmgmt import ModelManager, ProcessBackend

__all__ = ["deploy", "deploy_both", "deploy_own", "gate", "light_torch", "manager", "own", "swept"]

both_ways = pytest.mark.parametrize("share_weights", ["auto", "never"], ids=["forked", "alone"])
"""Run a test with workers that are forked from a template, and with workers that load the model by themselves."""


@pytest.fixture(params=["auto", "never"], ids=["forked", "alone"])
def deploy_both(request: pytest.FixtureRequest, tmp_path: Path, manager: ModelManager) -> Deployer:
    """As ``deploy``: once with workers forked from a template, once with workers that load the model by themselves."""
    return Deployer(tmp_path, manager, options={"share_weights": request.param})


@pytest.fixture
def own(light_torch: Path) -> Iterator[ProcessBackend]:
    """A backend that a test may break; torch is a light one."""
    backend = ProcessBackend()
    yield backend
    backend.close()


@pytest.fixture(params=["auto", "never"], ids=["forked", "alone"])
def deploy_own(request: pytest.FixtureRequest, own: ProcessBackend, tmp_path: Path) -> Iterator[Deployer]:
    """As ``deploy_both``, on the backend ``own``."""
    with ModelManager(backend=own) as manager:
        yield Deployer(tmp_path, manager, options={"share_weights": request.param})
