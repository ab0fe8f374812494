"""The command line of the server program: what is to be done, with which settings, and the fate of TorchServe's flags."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import NoReturn

from attrs import frozen

import torchmgmt
from torchmgmt.errors import InvalidArgument
from torchmgmt.http.flags import add_settings, given_settings
from torchmgmt.settings import Settings, gather

__all__ = ["EXIT_CODES", "Action", "CommandLine", "parse_command_line"]

PROGRAM = "python -m torchmgmt.http"
USUAL_FILE = Path("config.properties")

WITHOUT_EFFECT: Mapping[str, str] = {
    "--log-config": "it configures log4j; use --log-level",
    "--workflow-store": "workflows are not supported",
    "--plugins-path": "TorchServe's plug-ins are Java archives",
    "--cpp-log-config": "there is no C++ backend",
}
ALIASES: Mapping[str, Sequence[str]] = {"--plugins-path": ("--ppath",)}

EPILOG = """\
A setting in the environment counts before one on the command line, that before one in the configuration file. That is
the file in the environment variable TS_CONFIG_FILE, else the one of --ts-config, else ./config.properties. Variables
TS_<NAME> count if enable_envvars_config is true; TS_ENABLE_MODEL_API and TS_DISABLE_TOKEN_AUTHORIZATION always do.
"""

EXIT_CODES: Mapping[int, str] = {
    0: "it was told to end (SIGTERM, SIGINT) and did; --start: the server serves; --stop: none of this folder runs now",
    1: "it cannot serve: an address is taken, a server of --start runs already; --stop: the server does not end",
    2: "an argument, the configuration file or a setting is wrong",
    3: "the workers of a model could not be started any more, and on_give_up is exit",
    130: "--start was interrupted (Ctrl-C), and the server ended with it",
}


class Action(Enum):
    """What the program is asked to do."""

    SERVE = "serve"
    """Serve in this process until told to end."""
    SERVE_STOPPABLE = "serve stoppable"
    """The same, as the one server of this folder that --stop ends (--start --foreground)."""
    START = "start"
    """Start one in the background and return once it serves."""
    STOP = "stop"
    """End the one that was started from this folder."""


@frozen
class CommandLine:
    """What the command line said, joined with the environment and the configuration file."""

    action: Action
    settings: Settings
    warnings: Sequence[str]
    file: Path | None = None
    """The configuration file, None if there is none."""
    names_models: bool = False
    """Whether the models to load were named at this start, on the command line or in the environment."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with code 2 and one line: the usage, with all the settings, would bury it."""
        self.exit(2, f"torchmgmt: error: {message}\n")


def parse_command_line(
    arguments: Sequence[str] | None = None, environment: Mapping[str, str] | None = None
) -> CommandLine:
    """Read the arguments (``sys.argv`` if None), the environment and the configuration file.

    Raises :class:`SystemExit`: with code 2 after one line on stderr if something is wrong, with 0 after --help and
    --version.
    """
    variables = os.environ if environment is None else environment
    parser = _make_parser()
    namespace = parser.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    action = _action(namespace)
    if action is Action.STOP:
        return CommandLine(action, Settings(), ())
    file = _find_file(namespace.ts_config, variables)
    try:
        given = given_settings(namespace)
        gathered = gather(given, file=file, environment=variables)
    except InvalidArgument as error:
        parser.error(str(error))
    ignored = [f"{flag} has no effect: {why}" for flag, why in WITHOUT_EFFECT.items() if vars(namespace)[_dest(flag)]]
    in_environment = gathered.settings.enable_envvars_config and bool(variables.get("TS_LOAD_MODELS", "").strip())
    names_models = "load_models" in given or in_environment
    return CommandLine(action, gathered.settings, (*ignored, *gathered.warnings), file, names_models)


def _action(namespace: argparse.Namespace) -> Action:
    if namespace.stop:
        return Action.STOP
    if namespace.start:
        return Action.SERVE_STOPPABLE if namespace.foreground else Action.START
    return Action.SERVE


def _find_file(flag: str | None, environment: Mapping[str, str]) -> Path | None:
    named = environment.get("TS_CONFIG_FILE") or flag
    if named:
        return Path(named)
    return USUAL_FILE if USUAL_FILE.is_file() else None


def _make_parser() -> _Parser:
    parser = _Parser(
        prog=PROGRAM,
        description="Serve the Management API of PyTorch models.",
        epilog=EPILOG + "\nexit codes:\n" + "".join(f"  {code:<4}{what}\n" for code, what in EXIT_CODES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,  # the epilog has lines of its own
        allow_abbrev=False,
    )
    parser.add_argument("--version", "-v", action="version", version=f"torchmgmt {torchmgmt.__version__}")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--start", action="store_true", help="Start a server in the background; its log goes to logs/.")
    what.add_argument("--stop", action="store_true", help="End the server that --start started from this folder.")
    parser.add_argument("--foreground", action="store_true", help="Stay in the foreground, as it does without --start.")
    parser.add_argument("--ts-config", metavar="FILE", help="The configuration file, in place of ./config.properties.")
    add_settings(parser.add_argument_group("settings"))
    others = parser.add_argument_group("flags of TorchServe without effect")
    for flag, why in WITHOUT_EFFECT.items():
        flags = (flag, *ALIASES.get(flag, ()))
        others.add_argument(*flags, help=f"No effect: {why}.", metavar="VALUE", dest=_dest(flag))
    return parser


def _dest(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")
