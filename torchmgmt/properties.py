"""Java properties files: the keys of a ``config.properties``, each with its text and the line where it stands.

The rules (comments, separators, continuation lines, escapes) are Java's and read by the package ``javaproperties``; here
are the encoding, ``$$VARIABLE$$`` in values as TorchServe has it, and the lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from attrs import frozen

from torchmgmt.errors import InvalidArgument, InvalidSetting

__all__ = ["Entry", "parse_properties", "read_properties"]

_LINE_END = re.compile(r"\r\n|\r|\n")
_VARIABLE = re.compile(r"\$\$([^$]+)\$\$")


@frozen
class Entry:
    """One key of a properties file, with escapes and variables replaced."""

    key: str
    text: str
    line: int
    """Where it begins, from 1."""


def read_properties(path: Path, environment: Mapping[str, str]) -> list[Entry]:
    """Return the entries of a file in their order, a key that stands twice twice. Blocks while it is read.

    The file is UTF-8, or else Latin-1, as Java has it.

    Raises:
        InvalidArgument: the file cannot be read.
        InvalidSetting: an escape is broken, or a variable is not in ``environment``; names file and line.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = getattr(error, "strerror", None) or str(error)
        raise InvalidArgument("the configuration file", str(path), f"a file that can be read ({why})") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return list(parse_properties(text, str(path), environment))


def parse_properties(text: str, source: str, environment: Mapping[str, str]) -> Iterator[Entry]:
    """Yield the entries of a properties file's text; raise as :func:`read_properties`, which names it ``source``."""
    import javaproperties  # with what it imports in turn, for programs that have such a file

    line = 1
    elements = javaproperties.parse(text)
    while True:
        where = f"{source}, line {line}"
        try:
            element = next(elements, None)
        except javaproperties.InvalidUEscapeError as error:
            raise InvalidSetting("an escape", error.escape, "\\u and four hexadecimal digits", where) from None
        if element is None:
            return
        if isinstance(element, javaproperties.KeyValue):
            _check_characters(element.key + element.value, where)
            yield Entry(element.key, _fill_in(element.key, element.value, environment, where), line)
        line += len(_LINE_END.findall(element.source))


def _check_characters(text: str, where: str) -> None:
    """Refuse halves of characters, which can neither be printed nor written to a file."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise InvalidSetting("an escape", f"\\u{ord(half):04x}", "a whole character, not half a pair", where) from None


def _fill_in(key: str, text: str, environment: Mapping[str, str], where: str) -> str:
    def value_of(match: re.Match[str]) -> str:
        try:
            return environment[match[1]]
        except KeyError:
            allowed = f"made of environment variables that are set; {match[1]} is not"
            raise InvalidSetting(key, text, allowed, where) from None

    return _VARIABLE.sub(value_of, text)
