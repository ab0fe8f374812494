"""Servers with TorchServe's Management API, ours and its own: started with the same configuration, asked for the same."""

from __future__ import annotations

import abc
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measure import Missing
from benchmarks.peers.deployment import Deployment, Endpoint
from benchmarks.servers import LOOPBACK, Launch, Server, ServerFailed, free_ports

_ADDRESSES = """\
inference_address=http://{host}:{inference}
management_address=http://{host}:{management}
metrics_address=http://{host}:{metrics}
"""
_PORTS = ("inference", "management", "metrics")


class ManagedServer(abc.ABC):
    """A server program over a model store, on the loopback address, with ports that are free."""

    title: str

    @abc.abstractmethod
    def version(self) -> str:
        """Return its version; raise Missing if it cannot be run here."""

    @abc.abstractmethod
    def command(self, store: Path, config: Path) -> list[str]:
        """Return how it is started: in the foreground, without a state of its own, with the model API on."""

    def more_config(self) -> str:
        """Return lines of config.properties that only this server needs."""
        return ""

    @abc.abstractmethod
    def environment(self, folder: Path) -> Mapping[str, str]:
        """Return its environment variables; what it leaves behind belongs into ``folder``."""

    @property
    def is_behind_launcher(self) -> bool:
        """Whether the command starts the server as a child, and waits."""
        return False

    @contextmanager
    def serve(self, store: Path, config: Mapping[str, object] | None = None) -> Iterator[Server]:
        """Run a server; it is gone at the end of the block, with all its files.

        Raises Missing if it cannot be run, and for a ServerFailed in the block.
        """
        self.version()
        with tempfile.TemporaryDirectory(prefix="torchmgmt-bench-") as scratch:
            try:
                with Server(self._launch(store, Path(scratch), config or {})) as server:
                    yield server
            except ServerFailed as error:
                raise Missing(f"{self.title} failed: {error}") from error

    @contextmanager
    def deploy(self, deployment: Deployment) -> Iterator[Endpoint]:
        """Serve one model of the store."""
        largest = {"max_request_size": 100_000_000, "max_response_size": 100_000_000}
        with self.serve(deployment.store, largest if deployment.kind == "raw" else {}) as server:
            started = time.perf_counter()
            server.register(
                f"{deployment.model}.mar",
                deployment.workers,
                batch_size=deployment.batch_size,
                max_batch_delay=deployment.max_batch_delay_ms,
            )
            ready_after_s = server.healthy_after_s + time.perf_counter() - started
            server.check_ready(deployment.model, deployment.workers)
            yield Endpoint(server, f"/predictions/{deployment.model}", ready_after_s)

    def _launch(self, store: Path, folder: Path, config: Mapping[str, object]) -> Launch:
        ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
        file = folder / "config.properties"
        lines = "".join(f"{name}={value}\n" for name, value in config.items())
        file.write_text(_ADDRESSES.format(host=LOOPBACK, **ports) + self.more_config() + lines, encoding="utf-8")
        return Launch(
            self.command(store, file),
            ports["inference"],
            ports["management"],
            folder,
            self.environment(folder),
            behind_launcher=self.is_behind_launcher,
        )
