"""Which names may stand inside a model's folder, and how a refusal becomes an error with its source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torchmgmt.errors import InvalidArchive

__all__ = ["Refused", "parts_inside", "quote", "refusing"]

# What Linux file systems hold: bytes of one part, and of a whole name (PATH_MAX less room for the
# folder that it is placed in).
MAX_PART_BYTES = 255
MAX_NAME_BYTES = 2048
# Removing folders takes a Python frame for each level (shutil.rmtree before Python 3.13), and there are 1000 in all.
MAX_DEPTH = 100

# They would let a name write a line of its own into a log, or move the cursor of who lists the folder.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# In any part, not the first alone: on Windows, joining "C:x" to a folder forgets that folder.
_DRIVE = re.compile(r"[A-Za-z]:")


class Refused(Exception):
    """A model's files are not as they must be; the text is the reason, without the source.

    The rooms of this wing raise it; it leaves the wing as :class:`InvalidArchive` (`refusing`).
    """


@contextmanager
def refusing(source: str) -> Iterator[None]:
    """Turn a :class:`Refused` of the block into an :class:`InvalidArchive` of ``source``."""
    try:
        yield
    except Refused as refused:
        raise InvalidArchive(source, str(refused)) from refused.__cause__


def parts_inside(name: str) -> tuple[str, ...]:
    """Split a name with ``/`` into its parts, so that joined to a folder they stay below it.

    Empty parts and ``.`` are dropped; an empty result is the folder itself. Raises
    :class:`Refused` for any name that leaves the folder on any system, or that none can hold.
    """
    reason = _why_unsafe(name)
    if reason:
        raise Refused(f"the name {quote(name)} {reason}")
    return tuple(part for part in name.split("/") if part not in {"", "."})


def quote(text: object, limit: int = 120) -> str:
    """Quote what came from outside for a message, at most about ``limit`` characters of it."""
    shown = repr(text)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def _why_unsafe(name: str) -> str:
    parts = name.split("/")
    if "\0" in name:
        return "holds a NUL character"
    if _CONTROL.search(name):
        return "holds a control character"
    if "\\" in name:
        return "holds a backslash; folders are separated by '/'"
    if name.startswith("/"):
        return "is absolute; it must be relative to the model's folder"
    if any(_DRIVE.match(part) for part in parts):
        return "begins with a drive letter; it must be relative to the model's folder"
    if ".." in parts:
        return "has '..' in it; it must stay inside the model's folder"
    return _why_unstorable(name, parts)


def _why_unstorable(name: str, parts: list[str]) -> str:
    try:
        too_long = len(name.encode()) > MAX_NAME_BYTES
    except UnicodeEncodeError:  # bytes that are no UTF-8, which tarfile hands on as surrogates
        return "is not valid UTF-8"
    if too_long or any(len(part.encode()) > MAX_PART_BYTES for part in parts):
        return f"is too long; at most {MAX_PART_BYTES} bytes a part, {MAX_NAME_BYTES} in all"
    if len(parts) > MAX_DEPTH:
        return f"is too deep; at most {MAX_DEPTH} folders in each other are allowed"
    return ""
