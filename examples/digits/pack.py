"""Build the two archives of the digits example with the real torch-model-archiver.

python pack.py model_store
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TIMEOUT_S = 60.0

# version -> (name of the archive file, archiver option -> file beside this one)
_VERSIONS = {
    "1.0": (
        "digits.mar",
        {
            "--model-file": "model.py",
            "--serialized-file": "digits_v1.pt",
            "--handler": "handler.py",
        },
    ),
    "2.0": ("digits_v2.mar", {"--serialized-file": "digits_v2.pt", "--handler": "handler.py"}),
}


def build(export_dir: Path) -> dict[str, Path]:
    """Write digits.mar (1.0) and digits_v2.mar (2.0) into `export_dir`; version -> archive.

    Both hold a model named "digits". Files of the same names are replaced. Blocks for about a
    second, at most TIMEOUT_S per archive. Raises FileNotFoundError when the archiver is not
    installed, subprocess.CalledProcessError when it fails (its own message goes to stderr), and
    subprocess.TimeoutExpired.
    """
    export_dir.mkdir(parents=True, exist_ok=True)
    return {version: _build_one(version, export_dir) for version in _VERSIONS}


def _build_one(version: str, export_dir: Path) -> Path:
    file_name, files = _VERSIONS[version]
    command = [_archiver(), "--model-name", "digits", "--version", version]
    for option, file in files.items():
        command += [option, str(HERE / file)]
    with tempfile.TemporaryDirectory() as scratch:
        # The archiver collects its files in <temporary folder>/<model name>, and first removes
        # what is there: with a temporary folder of its own, two builds leave each other alone.
        collect = Path(scratch, "collect")
        collect.mkdir()
        command += ["--export-path", scratch]
        environment = {**os.environ, "TMPDIR": str(collect)}
        subprocess.run(command, check=True, timeout=TIMEOUT_S, env=environment)
        return Path(shutil.move(Path(scratch, "digits.mar"), export_dir / file_name))


def _archiver() -> str:
    """The console script of this interpreter's environment, whether activated or not."""
    scripts = sysconfig.get_path("scripts")
    found = shutil.which("torch-model-archiver", path=scripts)
    if found is None:
        raise FileNotFoundError(f"torch-model-archiver is not in {scripts}: pip install torch-model-archiver")
    return found


def main() -> None:
    """Parse the command line, build, print where the archives are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export_dir", type=Path, help="folder for the archives; made if missing")
    for version, archive in build(parser.parse_args().export_dir).items():
        print(f"digits {version}: {archive}")


if __name__ == "__main__":
    main()
