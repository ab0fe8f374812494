"""A program of its own: installs a requirements file into a new folder, seeing what the packages beside it have already.

It is run by its path and imports nothing but the standard library. It makes a virtual environment, has pip install there
what the folders of packages lack, and keeps of it the folder of packages alone: nothing in that knows where it lies. It
ends, with all that it started, when its standard input does.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What would have pip install elsewhere; its files of configuration can say the same.
ELSEWHERE = {"PIP_USER": "0", "PIP_TARGET": None, "PIP_PREFIX": None, "PIP_ROOT": None}


def main() -> int:
    """Do what the JSON object in the first argument says; return pip's exit status."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    job: Mapping[str, Any] = json.loads(sys.argv[1])
    target, folder = Path(job["target"]), Path(job["folder"])
    scratch = target / "venv"
    path = [*job["path"], *_path_of_pip(job["path"], scratch / "pip")]
    packages = _make_environment(scratch)
    inherited = packages / "inherited.pth"
    inherited.write_text("".join(f"{entry}\n" for entry in path), encoding="utf-8")
    pins = scratch / "pins.txt"
    pins.write_text("".join(f"{pin}\n" for pin in job["pins"]), encoding="utf-8")
    status = _pip(scratch, ["-c", str(pins), "-r", str(folder / job["requirements"])], folder)
    inherited.unlink()
    packages.rename(target / "packages")
    shutil.rmtree(scratch)
    return status


def _make_environment(place: Path, *, with_pip: bool = False) -> Path:
    """Make a virtual environment and return its folder of packages."""
    venv.EnvBuilder(symlinks=True, with_pip=with_pip).create(place)
    return Path(sysconfig.get_path("purelib", "posix_prefix", {"base": str(place)}))


def _path_of_pip(path: Sequence[str], place: Path) -> list[str]:
    """Return where pip is besides; nowhere if it is on the path. Python brings one, which is unpacked to ``place``."""
    if importlib.machinery.PathFinder.find_spec("pip", path) is not None:
        return []
    packages = _make_environment(place, with_pip=True)
    for each in packages.glob("*"):
        if not each.name.startswith("pip"):  # setuptools comes along, and would not be installed for who asks for it
            shutil.rmtree(each, ignore_errors=True)
    return [str(packages)]


def _pip(scratch: Path, what: Sequence[str], folder: Path) -> int:
    # Isolated: a file of the model must not stand in for one of pip's modules.
    command = [
        str(scratch / "bin" / "python"),
        "-I",
        "-m",
        "pip",
        "--no-input",
        "--disable-pip-version-check",
        "install",
    ]
    environment = {**os.environ, **ELSEWHERE}
    known = {name: value for name, value in environment.items() if value is not None}
    return subprocess.run([*command, *what], cwd=folder, env=known, check=False, stdin=subprocess.DEVNULL).returncode


def _end_with_input() -> None:
    """End this process's group when whoever started it closes its standard input, or is gone."""
    os.read(0, 1)  # nothing is ever written to it
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
