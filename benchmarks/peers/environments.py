"""The virtual environments of the peers: ``python -m benchmarks peers install NAME ...`` and ``peers list``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import field, frozen

from benchmarks.measure import Missing, say

NAMES = ("torchserve", "litserve", "mosec")
"""Each is a package of this name; ``NAME.txt`` beside this file has what is installed, pinned."""
DEFAULT = Path(__file__).resolve().parent.parent / ".peers"
VARIABLE = "TORCHMGMT_BENCH_TORCHSERVE"
"""The environment variable that names the virtual environment of TorchServe where ``--torchserve`` does not."""

_VERSIONS = """
import sys
from importlib.metadata import version
print(version(sys.argv[1]), "with torch", version("torch"))
"""


@frozen
class Environments:
    """Where the peers are installed: a folder with one virtual environment for each, and those that lie elsewhere."""

    folder: Path = DEFAULT
    elsewhere: Mapping[str, Path] = field(factory=dict)

    @classmethod
    def find(cls, folder: Path | None, torchserve: Path | None) -> Environments:
        """Take what the command line gives, or else :data:`VARIABLE` and :data:`DEFAULT`."""
        named = os.environ.get(VARIABLE)
        found = torchserve or (Path(named) if named else None)
        return cls((folder or DEFAULT).absolute(), {"torchserve": found.absolute()} if found else {})

    def path(self, name: str) -> Path:
        """Return the folder of a peer, whether it is there or not."""
        return self.elsewhere.get(name, self.folder / name)

    def program(self, name: str, program: str) -> Path:
        """Return a program of a peer's environment; raise Missing, with how to install it, if it is not there."""
        file = self.path(name) / "bin" / program
        if not file.is_file():
            option = f", --torchserve DIR or {VARIABLE}" if name == "torchserve" else ""
            raise Missing(f"There is no {file}: python -m benchmarks peers install {name}, or --peers-dir DIR{option}")
        return file

    def version(self, name: str) -> str:
        """Return the version of a peer and of its torch; raise Missing if it is not there."""
        command = [str(self.program(name, "python")), "-c", _VERSIONS, name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise Missing(f"{command[0]} has no {name}: {''.join(done.stderr.strip().splitlines()[-1:])}")
        return done.stdout.strip()

    def install(self, name: str) -> None:
        """Make the environment of a peer and install it; one that is there is brought to the pinned versions. Blocks."""
        path = self.path(name)
        if not (path / "bin" / "python").is_file():
            subprocess.run([sys.executable, "-m", "venv", str(path)], check=True)
        pip = [str(path / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(Path(__file__).with_name(f"{name}.txt"))], check=True)


def main(arguments: Sequence[str]) -> int:
    """Run ``peers install`` or ``peers list``; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks peers", description="The programs that torchmgmt is measured beside."
    )
    parser.add_argument("--peers-dir", type=Path, metavar="DIR", help=f"where they are (default: {DEFAULT})")
    parser.add_argument("--torchserve", type=Path, metavar="DIR", help=f"where TorchServe is (default: {VARIABLE})")
    commands = parser.add_subparsers(dest="command", required=True)
    install = commands.add_parser("install", help="install peers, each into a virtual environment of its own")
    install.add_argument("names", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    commands.add_parser("list", help="say which peers are there, in which version")
    given = parser.parse_args(arguments)
    environments = Environments.find(given.peers_dir, given.torchserve)
    return _install(environments, given.names) if given.command == "install" else _list(environments)


def _install(environments: Environments, names: Sequence[str]) -> int:
    failed = 0
    for name in names:
        say(f"{name}: into {environments.path(name)}")
        try:
            environments.install(name)
            print(f"{name}: {environments.version(name)}")
        except (subprocess.CalledProcessError, Missing) as error:
            failed += 1
            print(f"{name}: failed: {error}")
    return 1 if failed else 0


def _list(environments: Environments) -> int:
    for name in NAMES:
        try:
            print(f"{name}: {environments.version(name)}, in {environments.path(name)}")
        except Missing as error:
            print(f"{name}: not there. {error}")
    return 0
