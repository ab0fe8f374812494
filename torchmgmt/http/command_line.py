"""The command line of the server program: the settings' flags, and the fate of each of TorchServe's others."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from attrs import frozen

import torchmgmt
from torchmgmt.errors import InvalidArgument
from torchmgmt.settings import Settings, add_arguments, from_arguments

__all__ = ["CommandLine", "parse_command_line"]

PROGRAM = "python -m torchmgmt.http"

WITHOUT_EFFECT: Mapping[str, str] = {
    "--log-config": "it configures log4j; use --log-level",
    "--workflow-store": "workflows are not supported",
    "--plugins-path": "TorchServe's plug-ins are Java archives",
    "--cpp-log-config": "there is no C++ backend",
}
NOT_YET: Mapping[str, str] = {
    "--start": "starting in the background; leave --start away, or add --foreground",
    "--stop": "stopping another server; send it SIGTERM",
    "--ts-config": "configuration files; pass the settings as flags, see --help",
}
ALIASES: Mapping[str, Sequence[str]] = {
    "--plugins-path": ("--ppath",),
}


@frozen
class CommandLine:
    """What the command line said."""

    settings: Settings
    warnings: Sequence[str]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with code 2 and one line: the usage, with all the settings, would bury it."""
        self.exit(2, f"torchmgmt: error: {message}\n")


def parse_command_line(arguments: Sequence[str] | None = None) -> CommandLine:
    """Read the arguments (``sys.argv`` if None); end the program with code 2 and one line if one is wrong."""
    parser = _make_parser()
    namespace = parser.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    given = vars(namespace)
    for flag, what in NOT_YET.items():
        if given[_dest(flag)] and not (flag == "--start" and namespace.foreground):
            parser.error(f"{flag} is not supported in this release ({what})")
    try:
        settings = from_arguments(namespace)
    except InvalidArgument as error:
        parser.error(str(error))
    warnings = [f"{flag} has no effect: {why}" for flag, why in WITHOUT_EFFECT.items() if given[_dest(flag)]]
    return CommandLine(settings, warnings)


def _make_parser() -> _Parser:
    parser = _Parser(prog=PROGRAM, description="Serve the Management API of PyTorch models.", allow_abbrev=False)
    parser.add_argument("--version", "-v", action="version", version=f"torchmgmt {torchmgmt.__version__}")
    parser.add_argument("--foreground", action="store_true", help="Stay in the foreground, as it always does.")
    add_arguments(parser.add_argument_group("settings"))
    others = parser.add_argument_group("flags of TorchServe without effect, or not supported yet")
    for flag, why in WITHOUT_EFFECT.items():
        _add_other(others, flag, f"No effect: {why}.", takes_value=True)
    for flag, what in NOT_YET.items():
        _add_other(others, flag, f"Not in this release: {what}.", takes_value=flag == "--ts-config")
    return parser


def _add_other(group: argparse._ArgumentGroup, flag: str, text: str, *, takes_value: bool) -> None:
    flags = (flag, *ALIASES.get(flag, ()))
    if takes_value:
        group.add_argument(*flags, help=text, metavar="VALUE", dest=_dest(flag))
    else:
        group.add_argument(*flags, help=text, action="store_true", dest=_dest(flag))


def _dest(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")
