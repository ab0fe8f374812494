"""From what a caller calls a model's source to the place where it lies, and whether it may."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from torchmgmt.errors import (
    DownloadFailed,
    InvalidArchive,
    InvalidArgument,
    SourceNotAllowed,
    SourceNotFound,
)

__all__ = ["resolve"]

_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://")
_FILE_URL = re.compile(r"file://(?P<host>[^/]*)(?P<path>/.*)", re.IGNORECASE | re.DOTALL)
_SEPARATORS = re.compile(r"[/\\]")
_ALLOWED = "the name of a file in the model store, a path, or a file:// URL"


def resolve(url: str | os.PathLike[str], *, model_store: Path | None, trusted: bool) -> Path:
    """Return the absolute path of the existing file or folder that ``url`` stands for.

    A trusted caller (the Python library) may name anything: a bare name is looked up in the model
    store first, then, like any other relative path, in the working directory. One that is not
    trusted (over HTTP) stays in the model store: bare names directly in it, absolute paths and
    ``file://`` below it; both after symbolic links, so a link in the store must not lead out of it.
    Nothing is ever fetched. Looks at the file system only; any thread.

    Args:
        url: a name, a path, or a ``file://`` URL (no or ``localhost`` as host, percent-encoded).
        model_store: the folder of the operator's models, or None for no such folder.
        trusted: whether the caller may read any file anyway.

    Raises:
        InvalidArgument: no text, empty, or with a NUL.
        SourceNotAllowed: not in the model store. Says nothing of whether it exists.
        SourceNotFound: nothing is there.
        DownloadFailed: a URL that would have to be fetched.
        InvalidArchive: neither a file nor a folder is there (a device, a pipe).
    """
    text = _check_url(url)
    try:
        path = _locate(text, model_store, trusted=trusted)
        mode = path.stat().st_mode
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise SourceNotFound(text) from None
        why = getattr(error, "strerror", None) or "a loop of symbolic links"
        raise SourceNotFound(text, why) from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InvalidArchive(text, "it is neither a file nor a folder")
    return path


def _check_url(url: object) -> str:
    text = os.fspath(url) if isinstance(url, os.PathLike) else url
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise InvalidArgument("url", url, _ALLOWED)
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can bring
        raise InvalidArgument("url", url, _ALLOWED) from error
    return text


def _locate(url: str, store: Path | None, *, trusted: bool) -> Path:
    path = _path_of(url, trusted=trusted)
    if trusted:
        return _locate_trusted(path, store)
    return _locate_in_store(url, path, store)


def _path_of(url: str, *, trusted: bool) -> str:
    """Strip ``file://``; refuse the other schemes."""
    scheme = _SCHEME.match(url)
    if scheme is None:
        return url
    if scheme["scheme"].lower() != "file":
        raise DownloadFailed(
            url,
            "this release fetches nothing from the network; download the archive"
            " and register it by its path, or by its name in the model store",
        )
    found = _FILE_URL.fullmatch(url)
    if found is None or found["host"].lower() not in {"", "localhost"}:
        if not trusted:
            raise _not_allowed(url, "the host of a file:// URL must be empty or localhost")
        raise InvalidArgument("url", url, "file:///path or file://localhost/path")
    # "?" and "#" stay part of the path: a digest after "#" must never be dropped unchecked.
    from urllib.parse import unquote  # with what it imports in turn, for URLs alone

    path = _check_url(unquote(found["path"], errors="surrogateescape"))
    # file:///C:/models on Windows
    return path[1:] if os.name == "nt" and re.match(r"/[A-Za-z]:", path) else path


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
        raise _not_allowed(url, f"models are registered from the model store {store}; put it there")
    return real


def _is_bare(path: str) -> bool:
    return path not in {".", ".."} and not _SEPARATORS.search(path)


def _not_allowed(url: str, hint: str) -> SourceNotAllowed:
    return SourceNotAllowed(url, f"Given URL {url} does not match any allowed URL(s): {hint}")
