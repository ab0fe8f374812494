"""Flags: the settings on a command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from torchmgmt.errors import InvalidArgument
from torchmgmt.settings import Declaration, declarations

__all__ = ["add_settings", "given_settings"]


def add_settings(parser: argparse._ActionsContainer) -> None:
    """Add every setting's flags to ``parser``; what was given lands in the namespace, what was not does not."""
    for declaration in declarations():
        if declaration.all_flags:
            _add(parser, declaration)
        if declaration.flags_for_false:
            parser.add_argument(
                *declaration.flags_for_false,
                dest=declaration.name,
                default=argparse.SUPPRESS,
                action="store_false",
                help=f"The same as {declaration.all_flags[0]} false.",
            )


def given_settings(namespace: argparse.Namespace) -> Mapping[str, Any]:
    """Return the settings that the command line gave, from a namespace that :func:`add_settings` filled."""
    known = {declaration.name for declaration in declarations()}
    return {name: value for name, value in vars(namespace).items() if name in known}


def _add(parser: argparse._ActionsContainer, declaration: Declaration) -> None:
    options: dict[str, Any] = {"type": _reader(declaration)}
    if declaration.is_switch:
        options.update(nargs="?", const=True)
    elif declaration.kind.takes_many:
        options.update(nargs="+", action="extend", type=str)
    parser.add_argument(
        *declaration.all_flags,
        dest=declaration.name,
        default=argparse.SUPPRESS,
        metavar=declaration.kind.metavar,
        help=_help_text(declaration),
        **options,
    )


def _reader(declaration: Declaration) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return declaration.parse(text)
        except InvalidArgument as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _help_text(declaration: Declaration) -> str:
    facts = [f"unit: {declaration.unit}"] if declaration.unit else []
    if declaration.default_text:
        facts.append(f"default: {declaration.default_text}")
    if declaration.without_effect:
        facts.append(f"no effect in this release: {declaration.without_effect}")
    text = declaration.help + (f" [{', '.join(facts)}]" if facts else "")
    return text.replace("%", "%%")
