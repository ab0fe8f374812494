"""What every suite is given: how often and how long to measure, beside whom, on which device."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from benchmarks.peers.deployment import Peer
from benchmarks.peers.environments import Environments
from benchmarks.peers.ours import Ours
from benchmarks.peers.scripted import litserve, mosec
from benchmarks.peers.torchserve import TorchServe

OURS = Ours.title
THEIRS = TorchServe.title


@frozen
class Setup:
    """What the command line asks for."""

    runs: int
    environments: Environments
    device: str = "cpu"
    is_quick: bool = False
    """Small counts and short times: shows that everything runs, and measures nothing that is worth keeping."""

    @property
    def torchserve(self) -> TorchServe:
        """The peer that has a Management API, too."""
        return TorchServe(self.environments)

    @property
    def peers(self) -> Mapping[str, Peer]:
        """All servers by name, ours first, whether they can be run here or not."""
        each: list[Peer] = [Ours(), self.torchserve, litserve(self.environments), mosec(self.environments)]
        return {peer.title: peer for peer in each}

    @property
    def seconds(self) -> int:
        """How long a load lasts."""
        return 1 if self.is_quick else 3
