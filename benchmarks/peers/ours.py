"""Our own server program, started as the peers are."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torchmgmt
from benchmarks.peers.managed import ManagedServer


class Ours(ManagedServer):
    """``python -m torchmgmt.http``, of the same package as this program."""

    title = "torchmgmt"

    def version(self) -> str:
        """Return the version of the installed package."""
        return version("torchmgmt")

    def command(self, store: Path, config: Path) -> list[str]:
        """Return the command with this program's Python."""
        command = [sys.executable, "-m", "torchmgmt.http", "--ts-config", str(config), "--model-store", str(store)]
        return [*command, "--ncs", "--enable-model-api"]

    def environment(self, folder: Path) -> Mapping[str, str]:
        """Return an environment in which a server that runs in another folder imports the same package."""
        root = Path(torchmgmt.__file__).resolve().parent.parent
        others = os.environ.get("PYTHONPATH")
        path = f"{root}{os.pathsep}{others}" if others else str(root)
        return {**os.environ, "PYTHONPATH": path, "TMPDIR": str(folder)}
