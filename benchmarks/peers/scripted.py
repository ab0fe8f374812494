"""Peers that are told in Python what to serve: LitServe, mosec, and a bare uvicorn. Each runs a script of ours."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from attrs import frozen

from benchmarks.measure import Missing
from benchmarks.peers.deployment import Deployment, Endpoint
from benchmarks.peers.environments import Environments
from benchmarks.servers import LOOPBACK, Launch, Server, ServerFailed, free_ports

_SCRIPTS = Path(__file__).parent / "scripts"
_READY_WITHIN_S = 180.0
_LARGEST = str(100_000_000)


@frozen
class Scripted:
    """A server of one model, which starts with all its workers and has no Management API."""

    title: str
    name: str
    """Of the package, and of the script."""
    path: str
    health: tuple[str, bytes]
    environments: Environments | None
    """None: it runs in this program's own environment."""

    def version(self) -> str:
        """Return its version; raise Missing if it is not installed."""
        if self.environments is not None:
            return self.environments.version(self.name)
        try:
            return version(self.name)
        except PackageNotFoundError as error:
            raise Missing(f"{self.name} is not installed") from error

    @contextmanager
    def deploy(self, deployment: Deployment) -> Iterator[Endpoint]:
        """Run the script; it is gone at the end of the block."""
        self.version()
        with tempfile.TemporaryDirectory(prefix="torchmgmt-bench-") as scratch:
            folder = Path(scratch)
            started = time.perf_counter()
            try:
                with Server(self._launch(deployment, folder)) as server:
                    _wait_ready(server, folder, deployment.workers, started + _READY_WITHIN_S)
                    yield Endpoint(server, self.path, time.perf_counter() - started)
            except ServerFailed as error:
                raise Missing(f"{self.title} failed: {error}") from error

    def _launch(self, deployment: Deployment, folder: Path) -> Launch:
        python = sys.executable
        if self.environments is not None:
            python = str(self.environments.program(self.name, "python"))
        (port,) = free_ports(1)
        case = {**_case(deployment), "port": port, "folder": str(folder)}
        limits = {"MOSEC_ADDRESS": LOOPBACK, "MOSEC_PORT": str(port), "MOSEC_PATH": str(folder / "ipc")}
        limits |= {"MOSEC_TIMEOUT": "120000", "MOSEC_MAX_REQUEST_SIZE": _LARGEST, "MOSEC_LOG_LEVEL": "warning"}
        environment = {**os.environ, **limits, "TMPDIR": str(folder), "TORCHMGMT_BENCH_CASE": json.dumps(case)}
        environment.pop("PYTHONPATH", None)
        command = [python, str(_SCRIPTS / f"serve_{self.name}.py")]
        return Launch(command, port, 0, folder, environment, health=self.health)


def litserve(environments: Environments) -> Scripted:
    """LitServe: FastAPI on uvicorn, and worker processes that share one queue."""
    return Scripted("LitServe", "litserve", "/predict", ("/health", b"ok"), environments)


def mosec(environments: Environments) -> Scripted:
    """mosec: HTTP and batching in Rust, and Python worker processes."""
    return Scripted("mosec", "mosec", "/inference", ("/", b""), environments)


def bare_uvicorn() -> Scripted:
    """uvicorn alone, in this program's environment: it sends back the body that it got."""
    return Scripted("bare uvicorn", "uvicorn", "/", ("/", b""), None)


def _case(deployment: Deployment) -> dict[str, object]:
    case: dict[str, object] = {
        "kind": deployment.kind,
        "workers": deployment.workers,
        "batch_size": deployment.batch_size,
        "delay_ms": deployment.max_batch_delay_ms,
        "device": deployment.device,
    }
    if deployment.files is not None:
        files = deployment.files
        case |= {"model_file": str(files.model_file), "model_class": files.model_class}
        case["state_dict"] = str(files.state_dict)
    return case


def _wait_ready(server: Server, folder: Path, workers: int, until: float) -> None:
    """Wait until each worker has loaded its model: a server that is healthy may still start workers."""
    while len(list(folder.glob("ready-*"))) < workers:
        if time.perf_counter() > until:
            raise ServerFailed(f"fewer than {workers} workers were ready after {_READY_WITHIN_S:g} s")
        server.check_alive()
        time.sleep(0.002)
