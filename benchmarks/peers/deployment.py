"""What every peer is asked to serve, and where it then takes requests."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from attrs import frozen

from benchmarks.models import Files
from benchmarks.servers import LOOPBACK, Server


@frozen
class Deployment:
    """One model, and how it is served."""

    model: str
    """The archive's name in the store, without ``.mar``."""
    store: Path
    """The model store: for the servers that have one."""
    kind: str
    """json: gives back what it got, decoded and encoded. raw: gives back the bytes. linear: computes with ``files``."""
    files: Files | None = None
    workers: int = 1
    batch_size: int = 1
    max_batch_delay_ms: int = 5
    device: str = "cpu"


@frozen
class Endpoint:
    """A model that is served."""

    server: Server
    path: str
    """Where it takes POST requests."""
    ready_after_s: float = 0.0
    """From the command until all workers were ready."""

    @property
    def url(self) -> str:
        """The whole address."""
        return f"http://{LOOPBACK}:{self.server.inference_port}{self.path}"


class Peer(Protocol):
    """A server that can be measured."""

    @property
    def title(self) -> str:
        """Its name in tables."""

    def version(self) -> str:
        """Return its version; raise Missing if it cannot be run here."""

    def deploy(self, deployment: Deployment) -> AbstractContextManager[Endpoint]:
        """Serve a model for the length of the block. Raises Missing if it cannot, and for what fails in the block."""
