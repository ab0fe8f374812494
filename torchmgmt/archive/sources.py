"""From what a caller calls a model's source to the place where it lies, and whether it may."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from torchmgmt.archive.allowed import Rules, not_allowed
from torchmgmt.archive.urls import ALLOWED, Source
from torchmgmt.errors import InvalidArchive, InvalidArgument, SourceNotAllowed, SourceNotFound

__all__ = ["resolve"]

_FILE_URL = re.compile(r"file://(?P<host>[^/]*)(?P<path>/.*)", re.IGNORECASE | re.DOTALL)
_SEPARATORS = re.compile(r"[/\\]")


def resolve(source: Source, *, model_store: Path | None, rules: Rules | None = None) -> Path:
    """Return the absolute path of the existing file or folder that ``source`` stands for.

    The Python library may name anything: a bare name is looked up in the model store first, then, like any other relative
    path, in the working directory. A caller over HTTP stays in the model store: bare names directly in it, absolute paths
    and ``file://`` below it; both after symbolic links, so a link in the store must not lead out of it. Where there are
    patterns, they decide of ``file://`` URLs in place of that. Looks at the file system only; any thread.

    Args:
        source: a name, a path, or a ``file://`` URL (no or ``localhost`` as host, percent-encoded).
        model_store: the folder of the operator's models, or None for no such folder.
        rules: those of a caller over HTTP; None for the library.

    Raises:
        InvalidArgument: a ``file://`` URL with a host or NUL.
        SourceNotAllowed: not in the model store, or no pattern matches. Says nothing of whether it exists.
        SourceNotFound: nothing is there.
        InvalidArchive: neither a file nor a folder is there (a device, a pipe).
    """
    text = source.place
    try:
        path = _locate(source, model_store, rules)
        mode = path.stat().st_mode
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise SourceNotFound(text) from None
        why = getattr(error, "strerror", None) or "a loop of symbolic links"
        raise SourceNotFound(text, why) from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InvalidArchive(text, "it is neither a file nor a folder")
    return path


def _locate(source: Source, store: Path | None, rules: Rules | None) -> Path:
    url = source.place
    path = url if not source.scheme else _path_of(source, is_trusted=rules is None)
    if rules is None:
        return _locate_trusted(path, store)
    if source.scheme and rules.patterns is not None:
        return _locate_by_pattern(url, path, rules)
    return _locate_in_store(url, path, store)


def _path_of(source: Source, *, is_trusted: bool) -> str:
    """Return what a ``file://`` URL says."""
    url = source.place
    found = _FILE_URL.fullmatch(url)
    if found is None or found["host"].lower() not in {"", "localhost"}:
        if not is_trusted:
            raise not_allowed(source.shown, "the host of a file:// URL must be empty or localhost")
        raise InvalidArgument("url", source.shown, "file:///path or file://localhost/path")
    # "?" and "#" stay part of the path: only a digest is taken off, which Source.parse did.
    from urllib.parse import unquote  # with what it imports in turn, for URLs alone

    path = unquote(found["path"], errors="surrogateescape")
    if "\0" in path:
        raise InvalidArgument("url", source.shown, ALLOWED)
    # file:///C:/models on Windows
    return path[1:] if os.name == "nt" and re.match(r"/[A-Za-z]:", path) else path


def _locate_by_pattern(url: str, path: str, rules: Rules) -> Path:
    """Return the path with all links followed, if patterns allow the URL, and that of where the links lead, too."""
    if ".." in _SEPARATORS.split(path):
        raise SourceNotAllowed(url, f"Relative path is not allowed in url: {url}")
    real = Path(path).resolve() if rules.matches(url) else None
    if real is None or not (str(real) == path or rules.matches(f"file://{real}")):
        raise not_allowed(url, "no pattern of the setting allowed_urls matches the whole of it")
    return real


def _locate_trusted(path: str, store: Path | None) -> Path:
    if store is not None and _is_bare(path):
        in_store = store.absolute() / path
        if in_store.exists():
            return in_store
    return Path(path).absolute()


def _locate_in_store(url: str, path: str, store: Path | None) -> Path:
    """Return the path with all links followed; that it is in the store is checked before it is
    looked at, so that nobody learns from an answer what exists outside.
    """
    # Both separators on every system: what is refused must not depend on where the server runs.
    if ".." in _SEPARATORS.split(path) or not (Path(path).is_absolute() or _is_bare(path)):
        raise SourceNotAllowed(url, f"Relative path is not allowed in url: {url}")
    if store is None:
        raise SourceNotFound(url, "no model store is set; give one with model_store, --model-store")
    root = store.resolve()
    real = (root / path).resolve()
    if root not in real.parents:
        raise not_allowed(url, f"models are registered from the model store {store}; put it there")
    return real


def _is_bare(path: str) -> bool:
    return path not in {".", ".."} and not _SEPARATORS.search(path)
