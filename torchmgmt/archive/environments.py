"""Packages of a model's own: what its requirements file asks for, installed once for all models that ask for the same."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from attrs import frozen

from torchmgmt.archive.cache import HASH_BYTES, Lease, UnpackedArchives
from torchmgmt.archive.names import Refused, quote, refusing
from torchmgmt.interpreter import interpreter

__all__ = ["KEEP_S", "PINNED", "Environments"]

_log = logging.getLogger(__name__)

KEEP_S = 30 * 24 * 3600.0
"""For how long packages that nobody uses are kept in a folder that outlives the program."""

PINNED = ("attrs", "numpy", "psutil", "torch", "tqdm", "typing_extensions")
"""What workers have imported before they know their model: other versions of these would be installed, but not used."""

_PROGRAM = Path(__file__).with_name("install.py")
_LOG_FILE = "pip.log"
_PACKAGES = "packages"
_MAX_REQUIREMENTS_BYTES = 1 << 20
_MAX_LOG_LINES = 30
_MAX_LOG_CHARACTERS = 4000
_POLL_S = 0.05
_COMMENT = re.compile(r"(?:^|\s)#.*", re.MULTILINE)
# What packages print must not move the cursor of who reads it.
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
_EDITABLE = re.compile(r"^\s*(-e|--editable)\b", re.MULTILINE)
_SHORT_OPTION = re.compile(r"^-[rcf]")
_BETWEEN_WORDS = re.compile(r"[\s=;@'\"]+")


@frozen
class _Wanted:
    """What is to be installed; the same key means that the same comes of it."""

    folder: Path
    requirements: str
    key: str
    path: Sequence[str]
    pins: Sequence[str]


class Environments:
    """Makes folders of packages and shares them. Thread-safe.

    Args:
        copies: where they are kept, each for as long as somebody uses it or its shelf keeps it; not closed with this.
        timeout_s: how long installing may take, in s.
        variables: the environment variables that pip gets; None: all of this process.
    """

    def __init__(
        self,
        copies: UnpackedArchives,
        timeout_s: float,
        variables: Callable[[], Mapping[str, str]] | None = None,
    ) -> None:
        self._copies = copies
        self._timeout_s = timeout_s
        self._variables = variables or (lambda: os.environ)

    def acquire(self, folder: Path, requirements: str, source: str) -> tuple[Path, Lease] | None:
        """Return where the packages are, and the lease on them; None if this program has all that the file asks for.

        Blocks while they are installed, or while another thread or program installs the same. Any thread. After an error
        nothing is left on the disk.

        Args:
            folder: the model's folder; what the file says of places is relative to it.
            requirements: the requirements file in it.
            source: how messages call the model.

        Raises:
            InvalidArchive: the file is missing or not usable, or pip failed or took too long; with the end of pip's log.
            ManagerClosed: it was closed meanwhile.
            OSError: the disk is full or fails.
        """
        with refusing(source):
            wanted = _wanted(folder, requirements)
            lease = self._copies.acquire_made(wanted.key, lambda partial: self._install(wanted, partial, source))
        packages = lease.folder / _PACKAGES
        if any(packages.iterdir()):
            return packages, lease
        lease.release()
        return None

    def _install(self, wanted: _Wanted, partial: Path, source: str) -> None:
        partial.mkdir()
        _log.info("Installing what %s of %s asks for", wanted.requirements, source)
        began = time.monotonic()
        log = partial / _LOG_FILE
        status = self._run(wanted, partial, log)
        took_s = time.monotonic() - began
        if status != 0:
            what = f"took longer than install_py_dep_timeout ({self._timeout_s:g} s)" if status is None else "failed"
            raise Refused(
                f"installing what {wanted.requirements} asks for {what}. It must go with what workers have imported"
                f" already ({', '.join(wanted.pins)}). pip's log ends with:\n{_end_of(log)}"
            )
        _log.info("Installed what %s of %s asks for in %.1f s", wanted.requirements, source, took_s)

    def _run(self, wanted: _Wanted, partial: Path, log: Path) -> int | None:
        """Run the program that installs and return its exit status; None if it took too long."""
        job = {
            "target": str(partial),
            "folder": str(wanted.folder),
            "requirements": wanted.requirements,
            "path": wanted.path,
            "pins": wanted.pins,
        }
        deadline = time.monotonic() + self._timeout_s
        with log.open("wb") as output, contextlib.ExitStack() as undo:
            process = subprocess.Popen(
                [interpreter(), str(_PROGRAM), json.dumps(job)],
                stdin=subprocess.PIPE,  # which ends with this process
                stdout=output,
                stderr=output,
                env=dict(self._variables()),
                start_new_session=True,
            )
            undo.callback(_end, process)
            while process.poll() is None:
                self._copies.check_open()
                if time.monotonic() > deadline:
                    return None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
            return process.returncode


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the program with all that it started, which has its process group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _end_of(log: Path) -> str:
    text = _CONTROL.sub(" ", log.read_text(encoding="utf-8", errors="replace"))
    return "\n".join(text.splitlines()[-_MAX_LOG_LINES:])[-_MAX_LOG_CHARACTERS:]


def _wanted(folder: Path, requirements: str) -> _Wanted:
    """Return what a requirements file asks for. Raises Refused."""
    file = folder / requirements
    if not file.is_file():
        raise Refused(f"its manifest names the requirements file {quote(requirements)}, which is not in it")
    if file.stat().st_size > _MAX_REQUIREMENTS_BYTES:
        raise Refused(f"{quote(requirements)} is larger than the allowed {_MAX_REQUIREMENTS_BYTES} bytes")
    path = [str(entry) for entry in map(Path.absolute, map(Path, sys.path)) if entry.is_dir()]
    pins = [f"{name}=={version}" for name in PINNED if (version := _version_of(name)) is not None]
    facts = [
        sys.implementation.cache_tag,
        sysconfig.get_platform(),
        sorted(_distributions(path)),
        pins,
        sorted(_contents(folder, file, {})),
    ]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return _Wanted(folder, requirements, key, path, pins)


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _distributions(path: Sequence[str]) -> Iterator[str]:
    """Give what is installed in the folders, each with its version: what pip finds there it does not install again."""
    for entry in path:
        with contextlib.suppress(OSError):
            yield from (place.name for place in Path(entry).iterdir() if place.suffix in {".dist-info", ".egg-info"})


def _contents(folder: Path, file: Path, seen: dict[Path, str]) -> list[tuple[str, str]]:
    """Return the digests of a requirements file and of all in the model's folder that it names, by their names there.

    Raises Refused if one of them asks for what cannot be installed for good.
    """
    _add_contents(folder.resolve(), file.resolve(), seen)
    return [(os.path.relpath(path, folder.resolve()), digest) for path, digest in seen.items()]


def _add_contents(folder: Path, file: Path, seen: dict[Path, str]) -> None:
    seen[file] = _digest_of(file)
    is_list = len(seen) == 1 or file.suffix in {".txt", ".in"}
    if not is_list or file.stat().st_size > _MAX_REQUIREMENTS_BYTES:
        return  # a wheel or a source, and no list that could name others
    text = _text_of(file)
    if _EDITABLE.search(text):
        raise Refused(f"{quote(file.name)} asks for something editable (-e), but what is installed outlives the folder")
    for word in _BETWEEN_WORDS.split(text):
        name = _SHORT_OPTION.sub("", word).removeprefix("file:")
        for base in (file.parent, folder) if name else ():
            for path in _files_at(folder, base / name):
                if path not in seen:
                    _add_contents(folder, path, seen)


def _files_at(folder: Path, place: Path) -> list[Path]:
    """Return the files at a place, or below it; none if it is not in the folder."""
    try:
        place = place.resolve()
        if not place.is_relative_to(folder):
            return []
        found = sorted(place.rglob("*")) if place.is_dir() else [place]
        return [path for path in found if path.is_file() and not path.is_symlink()]
    except (OSError, ValueError):  # a word too long for a name, or with a NUL
        return []


def _text_of(file: Path) -> str:
    return _COMMENT.sub("", file.read_text(encoding="utf-8", errors="replace"))


def _digest_of(file: Path) -> str:
    hasher = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(HASH_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()
