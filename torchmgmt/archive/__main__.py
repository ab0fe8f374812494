"""``python -m torchmgmt.archive pack | inspect | verify``: archives on the command line.

Exit codes: 0 if all is well, 1 if an archive is refused or cannot be read, 2 if an argument is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from torchmgmt.archive.packing import Inspection, inspect, pack, verify
from torchmgmt.errors import InvalidArgument, TorchmgmtError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments (``sys.argv`` if None) ask for; return the exit code."""
    given = _parser().parse_args(arguments)
    try:
        text = _pack(given) if given.command == "pack" else _look(given)
    except InvalidArgument as error:
        return _fail(error, 2)
    except (TorchmgmtError, OSError) as error:
        return _fail(error, 1)
    sys.stdout.write(text + "\n")
    return 0


def _pack(given: argparse.Namespace) -> str:
    packed = pack(
        given.archive,
        model_name=given.model_name,
        version=given.version,
        handler=given.handler,
        serialized_file=given.serialized_file,
        model_file=given.model_file,
        extra_files=given.extra_files,
        requirements_file=given.requirements_file,
        config_file=given.config_file,
        runtime=given.runtime,
        overwrite=given.force,
    )
    return f"{packed.path}: {packed.size_bytes} bytes, {len(packed.files)} files, sha256={packed.sha256}"


def _look(given: argparse.Namespace) -> str:
    if given.command == "inspect":
        return json.dumps(_item(inspect(given.archive)), indent=2, ensure_ascii=False, default=str)
    found = verify(given.archive)
    return f"{found.path}: a model can be registered from it, sha256={found.sha256}"


def _item(found: Inspection) -> dict[str, object]:
    return {
        "path": str(found.path),
        "sha256": found.sha256,
        "size_bytes": found.size_bytes,
        "manifest": found.manifest.raw if found.manifest else None,
        "config": found.config,
        "files": found.files,
        "problems": list(found.problems),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m torchmgmt.archive", description="Model archives (.mar).")
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write an archive; the same files give the same bytes")
    packing.add_argument("archive", help="the file to write")
    packing.add_argument("--model-name", required=True)
    packing.add_argument("--handler", required=True, help="a file.py, file.py:function, or a shipped handler's name")
    packing.add_argument("--version", "-v", default="1.0")
    packing.add_argument("--serialized-file", help="weights, TorchScript, or what else the handler loads")
    packing.add_argument("--model-file", help="the file with the nn.Module class of a state dict")
    packing.add_argument("--extra-files", nargs="+", default=[], action="extend", help="files and folders")
    packing.add_argument("--requirements-file")
    packing.add_argument("--config-file", help="a model-config.yaml")
    packing.add_argument("--runtime", default="python")
    packing.add_argument("--force", "-f", action="store_true", help="replace the archive if it exists")
    for name, text in (("inspect", "show what is in an archive, as JSON"), ("verify", "check that it can be served")):
        commands.add_parser(name, help=text).add_argument("archive")
    return parser


def _fail(error: Exception, code: int) -> int:
    sys.stderr.write(f"torchmgmt: error: {error}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
