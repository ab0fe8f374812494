"""The peer TorchServe: run from a virtual environment of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from benchmarks.measure import Missing
from benchmarks.peers.environments import Environments
from benchmarks.peers.managed import ManagedServer
from benchmarks.servers import LOOPBACK, free_ports

# What TorchServe does every minute for its system metrics would fall into some measurements and not into others.
_MORE_CONFIG = """\
grpc_inference_address={host}
grpc_inference_port={inference}
grpc_management_address={host}
grpc_management_port={management}
disable_system_metrics=true
"""


class TorchServe(ManagedServer):
    """The last release of TorchServe. It needs Java 11 or later."""

    title = "TorchServe"
    is_behind_launcher = True

    def __init__(self, environments: Environments) -> None:
        self._environments = environments

    def version(self) -> str:
        """Return its version and that of its torch; raise Missing if it cannot be run."""
        self._environments.program("torchserve", "torchserve")
        if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
            raise Missing("TorchServe needs Java, and there is none: apt-get install default-jre-headless, or the like")
        return self._environments.version("torchserve")

    def command(self, store: Path, config: Path) -> list[str]:
        """Return the command with its own program. Tokens are switched off and registering is switched on by flags."""
        command = [str(self._environments.program("torchserve", "torchserve")), "--start", "--foreground", "--ncs"]
        command += ["--ts-config", str(config), "--model-store", str(store)]
        return [*command, "--disable-token-auth", "--enable-model-api"]

    def more_config(self) -> str:
        """Return the lines about gRPC and system metrics."""
        inference, management = free_ports(2)
        return _MORE_CONFIG.format(host=LOOPBACK, inference=inference, management=management)

    def environment(self, folder: Path) -> Mapping[str, str]:
        """Its own programs come first, and it leaves its pid file, its sockets and what it unpacks in ``folder``."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TS_")}
        programs = self._environments.program("torchserve", "python").parent
        path = f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        return {**inherited, "PATH": path, "TMPDIR": str(folder), "TEMP": str(folder), "PYTHONUNBUFFERED": "1"}
