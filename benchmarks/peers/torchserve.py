"""The peer TorchServe: run from a virtual environment of its own, on the loopback address, with ports that are free."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

from benchmarks.measure import Missing
from benchmarks.servers import LOOPBACK, Launch, Server, ServerFailed, free_ports

VARIABLE = "TORCHMGMT_BENCH_TORCHSERVE"
"""The environment variable that names the virtual environment where ``--torchserve`` does not."""

_VERSIONS = """
from importlib.metadata import version
print(version("torchserve"), "with torch", version("torch"))
"""

# Tokens are switched off and registering is switched on by flags. What TorchServe does every minute for its system
# metrics would fall into some measurements and not into others.
_CONFIG = """\
inference_address=http://{host}:{inference}
management_address=http://{host}:{management}
metrics_address=http://{host}:{metrics}
grpc_inference_address={host}
grpc_inference_port={grpc_inference}
grpc_management_address={host}
grpc_management_port={grpc_management}
disable_system_metrics=true
"""
_PORTS = ("inference", "management", "metrics", "grpc_inference", "grpc_management")


@frozen
class TorchServe:
    """Where TorchServe is installed: a virtual environment, or None if nobody said one."""

    environment: Path | None

    @classmethod
    def find(cls, environment: Path | None) -> TorchServe:
        """Take the folder that is given, or else that of :data:`VARIABLE`."""
        named = os.environ.get(VARIABLE)
        return cls(environment or (Path(named) if named else None))

    def version(self) -> str:
        """Return its version and that of its torch; raise Missing if it cannot be run."""
        python = self._program("python")
        self._program("torchserve")
        if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
            raise Missing("TorchServe needs Java, and there is none")
        done = subprocess.run([str(python), "-c", _VERSIONS], capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise Missing(f"{python} has no TorchServe: {done.stderr.strip().splitlines()[-1:]}")
        return done.stdout.strip()

    @contextmanager
    def serve(self, store: Path) -> Iterator[Server]:
        """Run a server over a model store; it is gone at the end of the block, with all its files.

        Raises Missing if it cannot be run, and for a ServerFailed in the block.
        """
        self.version()
        with tempfile.TemporaryDirectory(prefix="torchmgmt-bench-ts-") as scratch:
            try:
                with Server(self._launch(store, Path(scratch))) as server:
                    yield server
            except ServerFailed as error:
                raise Missing(f"TorchServe failed: {error}") from error

    def _launch(self, store: Path, folder: Path) -> Launch:
        ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
        config = folder / "config.properties"
        config.write_text(_CONFIG.format(host=LOOPBACK, **ports), encoding="utf-8")
        command = [str(self._program("torchserve")), "--start", "--foreground", "--ncs"]
        command += ["--ts-config", str(config), "--model-store", str(store)]
        command += ["--disable-token-auth", "--enable-model-api"]
        return Launch(
            command, ports["inference"], ports["management"], folder, self._environ(folder), behind_launcher=True
        )

    def _environ(self, folder: Path) -> dict[str, str]:
        """Its own programs come first, and it leaves its pid file, its sockets and what it unpacks in ``folder``."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TS_")}
        path = f"{self._program('python').parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        return {**inherited, "PATH": path, "TMPDIR": str(folder), "TEMP": str(folder), "PYTHONUNBUFFERED": "1"}

    def _program(self, name: str) -> Path:
        if self.environment is None:
            raise Missing(f"No virtual environment with TorchServe is named: --torchserve DIR, or {VARIABLE}")
        program = self.environment.absolute() / "bin" / name
        if not program.is_file():
            raise Missing(f"There is no {program}")
        return program
