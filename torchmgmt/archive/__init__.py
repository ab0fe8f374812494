"""Where models come from: names and paths are resolved, archives checked, unpacked and shared.

:class:`ModelSources` is the wing's face. It imports neither torch nor, until an archive is opened
or fetched, the modules that do that.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from torchmgmt.archive.allowed import Rules
from torchmgmt.archive.cache import Lease, UnpackedArchives
from torchmgmt.archive.downloads import Downloads
from torchmgmt.archive.manifest import Manifest, read_config, read_manifest
from torchmgmt.archive.pristine import Spoiled
from torchmgmt.archive.shelves import PrivateShelf, SharedShelf
from torchmgmt.archive.sources import resolve
from torchmgmt.archive.transfer import DownloadLimits
from torchmgmt.archive.unpack import UnpackLimits
from torchmgmt.archive.url_memory import OwnMemory, SharedMemory, UrlMemory
from torchmgmt.archive.urls import Source
from torchmgmt.archive.working import WorkingFolders
from torchmgmt.checks import check_number, check_pattern
from torchmgmt.errors import DownloadFailed, InvalidArchive, InvalidArgument
from torchmgmt.events import Listener
from torchmgmt.variables import without_matching

if TYPE_CHECKING:
    from torchmgmt.archive.environments import Environments
    from torchmgmt.archive.packing import inspect, pack, verify
    from torchmgmt.live import LiveObject

__all__ = [
    "DownloadLimits",
    "Installing",
    "Manifest",
    "ModelFolder",
    "ModelSources",
    "UnpackLimits",
    "inspect",
    "pack",
    "verify",
]

_log = logging.getLogger(__name__)


def __getattr__(name: str) -> object:
    # With what reads and writes archives, for those who ask for it.
    if name in {"inspect", "pack", "verify"}:
        from torchmgmt.archive import packing

        return getattr(packing, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@frozen
class Installing:
    """That requirements files are installed, and how.

    Raises:
        InvalidArgument: a value has the wrong type or range.
    """

    timeout_s: float = 600
    """How long that may take for one of them, in s, at least 0.001."""
    blacklist_env_vars: str | None = None
    """A regular expression: pip gets no environment variable whose whole name matches."""

    def __attrs_post_init__(self) -> None:
        check_number("timeout_s", self.timeout_s, minimum=1e-3, unit="seconds", whole=False)
        check_pattern("blacklist_env_vars", self.blacklist_env_vars)


@frozen(eq=False)
class ModelFolder:
    """A folder with a model's files, to be used until it is released.

    As a context manager it is released at the end of the block.
    """

    path: Path
    """Absolute; what a worker has as its working directory. Nobody else has it, unless :attr:`live` is set."""
    url: str
    """Where it came from, as the caller gave it, less the credentials in a URL."""
    manifest: Manifest | None
    """None if the folder has none: then the caller must say name and handler."""
    config: Mapping[str, Any]
    """``model-config.yaml``; empty if there is none."""
    digest: str | None
    """SHA-256 of the archive in hexadecimal; None for a plain folder."""
    packages: Path | None = None
    """Where the packages are that it asks for and this program does not have; None: nowhere."""
    pristine: Path | None = None
    """Where the same files lie in the one copy that all versions of the archive share; None for a plain folder."""
    _leases: Sequence[Lease] = field(default=(), repr=False)
    live: LiveObject | None = None
    """What is registered in place of an archive; released with the folder, which is the working directory alone."""

    @property
    def is_sealed(self) -> bool:
        """Whether nobody rewrites its files but its own workers; large files of a plain folder may be its owner's."""
        return self.digest is not None

    def release(self) -> None:
        """Give the folder back, which is removed with all that was written there; the plain folder or the program's own
        that it was made of is left alone. Idempotent; any thread; blocks while files are removed.
        """
        try:
            _release(self._leases)
        finally:
            if self.live is not None:
                self.live.release()

    def __enter__(self) -> ModelFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class ModelSources:
    """Opens models by name, path or URL. Thread-safe.

    Each model that is opened has a folder of its own. Archives of the same content are unpacked once, to a pristine copy of
    which these folders are made. All of them exist only while they are needed: in a temporary folder ``torchmgmt-*``, or in
    ``cache_dir``, which any number of programs may share. In a process that was forked from the one that made it, it is
    closed and removes nothing.

    Args:
        model_store: the folder in which bare names are looked up, or None for none. It need not exist yet.
        limits: what an archive may unpack to at most.
        cache_dir: a folder of this user's, made if it is not there, that keeps downloaded archives and is where archives
            are unpacked; on a file system that has locks. None: nothing outlives its use.
        max_cache_bytes: how large the kept archives may be together, at least 0; those not used for longest go first.
        download_limits: how large a downloaded archive may be, and how long it may take.
        installing: has what the requirements files of models ask for installed, in a folder of packages that models share
            if they ask for the same. It is kept in ``cache_dir`` for 30 days after its last use. None: they are ignored.
        allowed_urls: regular expressions; the whole URL that a caller over HTTP gives must match one. None: ``file://``
            in the model store, and ``http(s)://`` to all but link-local hosts, from callers who ``may_fetch``.
        listener: is told of the progress of downloads.

    Raises:
        InvalidArgument: an argument has the wrong type or range.
    """

    def __init__(
        self,
        model_store: str | os.PathLike[str] | None,
        *,
        limits: UnpackLimits | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        max_cache_bytes: int = 64 << 30,
        download_limits: DownloadLimits | None = None,
        installing: Installing | None = None,
        allowed_urls: Sequence[str] | None = None,
        listener: Listener = lambda _event: None,
    ) -> None:
        check_number("max_cache_bytes", max_cache_bytes, minimum=0, unit="bytes")
        self._model_store = _check_folder("model_store", model_store)
        folder = _check_folder("cache_dir", cache_dir)
        # By who may fetch: for one object, the patterns are compiled and checked once.
        self._rules = {may_fetch: Rules(allowed_urls, may_fetch) for may_fetch in (True, False)}
        memory: UrlMemory
        if folder is None:
            shelf = PrivateShelf()
            self._unpacked = UnpackedArchives(limits, shelf=shelf)
            memory = OwnMemory(shelf)
        else:
            self._unpacked = UnpackedArchives(limits, shelf=SharedShelf(folder / "unpacked"))
            memory = SharedMemory(folder, max_cache_bytes, self._unpacked.check_open)
        self._working = WorkingFolders(self._unpacked)
        self._installed, self._environments = self._unpacked, None
        if installing is not None:
            self._installed, self._environments = _environments(installing, folder, self._unpacked)
        self._downloads = Downloads(self._unpacked, memory, download_limits or DownloadLimits(), listener)

    @property
    def model_store(self) -> Path | None:
        """The folder in which bare names are looked up, absolute."""
        return self._model_store

    def find(self, url: str | os.PathLike[str]) -> Path | None:
        """Return the file or folder on this machine that ``url`` stands for; None if it must be fetched.

        For the library's own callers. Raises as :meth:`open` does for what cannot be found. Looks at the file system; any
        thread.
        """
        source = Source.parse(url)
        return None if source.is_remote else resolve(source, model_store=self._model_store)

    def open(self, url: str | os.PathLike[str], *, trusted: bool = True, may_fetch: bool = False) -> ModelFolder:
        """Return a new folder with the model's files, unpacked if it is an archive; the caller releases it.

        Blocks while an archive is fetched, hashed and unpacked, and its requirements are installed, or while another thread
        or program does that; and while files are copied. Any thread. After an error nothing is left on the disk.

        Args:
            url: the name of an archive or folder in the model store, a path, or a URL: ``file://``, ``http(s)://``, or
                one of another scheme that fsspec knows. ``#sha256=`` and 64 hexadecimal digits after it: an archive of
                another digest is refused. User and password in a URL are used, but never shown.
            trusted: False for a caller over HTTP, who may register from the model store and ``allowed_urls`` only.
            may_fetch: whether a caller who is not trusted may name remote hosts where ``allowed_urls`` is None: one on
                this machine, or with a valid key.

        Raises:
            InvalidArgument: ``url`` is no text, is empty, holds a NUL, or is no legal URL.
            SourceNotAllowed: not trusted, and neither in the model store nor allowed.
            SourceNotFound: nothing is there.
            DownloadFailed: it cannot be fetched, is too large, takes too long, or has another digest.
            InvalidArchive: damaged, hostile or too large, or its manifest or configuration is
                wrong. The reason names the entry or key, what was found and what is allowed. Or its requirements
                file cannot be installed; the reason has the end of pip's log.
            ManagerClosed: after close, or in a forked process.
            OSError: the disk is full or fails.
        """
        self._unpacked.check_open()
        source = Source.parse(url)
        rules = None if trusted else self._rules[may_fetch]
        if source.lacks_credentials:
            raise DownloadFailed(
                source.shown, "its credentials were taken out where it was shown or saved; give them anew"
            )
        if source.is_remote:
            return self._of_archive(source.shown, lambda: self._downloads.open(source, rules))
        path = resolve(source, model_store=self._model_store, rules=rules)
        if not path.is_dir():
            return self._of_archive(
                source.shown, lambda: self._unpacked.acquire(path, source.shown, wanted=source.sha256)
            )
        if source.sha256 is not None:
            raise InvalidArchive(source.shown, "it is a folder, which has no SHA-256; leave #sha256= out")
        return self._of_folder(source.shown, path)

    def _of_archive(self, shown: str, acquire: Callable[[], Lease]) -> ModelFolder:
        while True:
            try:
                return self._of_pristine(shown, acquire)
            except Spoiled as spoiled:  # just now: another copy is made
                _log.info("A version of %s writes to its files while they are copied: %s", shown, spoiled)

    def _of_pristine(self, shown: str, acquire: Callable[[], Lease]) -> ModelFolder:
        leases: list[Lease] = []
        try:
            leases.append(acquire())
            files, digest = leases[0].folder, leases[0].digest
            leases.append(self._working.of_archive(files))
            path = _top_of(leases[1].folder)
            pristine = files / path.relative_to(leases[1].folder)
            return self._opened(path, shown, leases, path, digest=digest, pristine=pristine)
        except BaseException:
            _release(leases)
            raise

    def _of_folder(self, shown: str, source: Path) -> ModelFolder:
        leases: list[Lease] = []
        try:
            leases.append(self._working.of_folder(source))
            return self._opened(leases[0].folder, shown, leases, source, digest=None, pristine=None)
        except BaseException:
            _release(leases)
            raise

    def _opened(
        self, path: Path, shown: str, leases: list[Lease], origin: Path, *, digest: str | None, pristine: Path | None
    ) -> ModelFolder:
        """Return what is in a folder; ``origin`` has its requirements file, and what that names."""
        manifest = read_manifest(path, shown)
        config = read_config(path, manifest, shown)
        packages = self._packages_of(manifest, origin, shown, leases)
        return ModelFolder(path, shown, manifest, config, digest, packages, pristine, leases)

    def _packages_of(self, manifest: Manifest | None, origin: Path, shown: str, leases: list[Lease]) -> Path | None:
        """Return where the packages are that the requirements file asks for, and add the lease on them."""
        requirements = manifest.requirements_file if manifest is not None else None
        if requirements is None:
            return None
        if self._environments is None:
            _log.warning("%s of %s is not installed: set install_py_dep_per_model=true for that", requirements, shown)
            return None
        found = self._environments.acquire(origin, requirements, shown)
        if found is None:
            return None
        leases.append(found[1])
        return found[0]

    def close(self) -> None:
        """Remove everything that was unpacked here, whoever uses it, and end downloads, unpacking and installing under way.

        What other programs share in ``cache_dir`` stays. Idempotent; any thread; blocks while files are removed.
        """
        self._unpacked.close(then=self._downloads.end_all)
        self._installed.close()


def _environments(
    installing: Installing, folder: Path | None, unpacked: UnpackedArchives
) -> tuple[UnpackedArchives, Environments]:
    """Return what installs requirements, and what keeps that."""
    from torchmgmt.archive.environments import KEEP_S, Environments  # for those who ask for it

    if folder is not None:
        unpacked = UnpackedArchives(shelf=SharedShelf(folder / "environments", KEEP_S))

    def variables() -> Mapping[str, str]:
        return without_matching(os.environ, installing.blacklist_env_vars)

    return unpacked, Environments(unpacked, installing.timeout_s, variables)


def _check_folder(argument: str, folder: object) -> Path | None:
    if folder is None:
        return None
    text = os.fspath(folder) if isinstance(folder, os.PathLike) else folder
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise InvalidArgument(argument, folder, "the path of a folder, or None")
    return Path(text).absolute()  # the working directory may change


def _release(leases: Sequence[Lease]) -> None:
    """Give back all that are leased, the last one first; one that fails keeps none of the others."""
    with contextlib.ExitStack() as each:
        for lease in leases:
            each.callback(lease.release)


def _top_of(folder: Path) -> Path:
    """Find the model's folder in what was unpacked.

    torch-model-archiver puts all of a ``.tar.gz`` below a folder named as the model, and nothing
    above a ``.mar``. Hidden files beside that folder are what macOS adds to archives.
    """
    if (folder / "MAR-INF").is_dir():
        return folder
    shown = [p for p in folder.iterdir() if not p.name.startswith(".") and p.name != "__MACOSX"]
    if len(shown) == 1 and (shown[0] / "MAR-INF").is_dir():
        return shown[0]
    return folder
