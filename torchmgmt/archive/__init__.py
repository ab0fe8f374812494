"""Where models come from: names and paths are resolved, archives checked, unpacked and shared.

:class:`ModelSources` is the wing's face. It imports neither torch nor, until an archive is opened,
the modules that read archives.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from torchmgmt.archive.cache import Lease, UnpackedArchives
from torchmgmt.archive.manifest import Manifest, read_config, read_manifest
from torchmgmt.archive.sources import resolve
from torchmgmt.archive.unpack import UnpackLimits
from torchmgmt.errors import InvalidArgument

if TYPE_CHECKING:
    from torchmgmt.archive.packing import inspect, pack, verify

__all__ = ["Manifest", "ModelFolder", "ModelSources", "UnpackLimits", "inspect", "pack", "verify"]


def __getattr__(name: str) -> object:
    # With what reads and writes archives, for those who ask for it.
    if name in {"inspect", "pack", "verify"}:
        from torchmgmt.archive import packing

        return getattr(packing, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@frozen(eq=False)
class ModelFolder:
    """A folder with a model's files, to be used until it is released.

    As a context manager it is released at the end of the block.
    """

    path: Path
    """Absolute; what a worker has as its working directory."""
    url: str
    """Where it came from, as the caller gave it."""
    manifest: Manifest | None
    """None if the folder has none: then the caller must say name and handler."""
    config: Mapping[str, Any]
    """``model-config.yaml``; empty if there is none."""
    digest: str | None
    """SHA-256 of the archive in hexadecimal; None for a plain folder, which is used in place."""
    _lease: Lease | None = field(default=None, repr=False)

    @property
    def is_sealed(self) -> bool:
        """Whether it is an unpacked copy of ours, whose files nobody rewrites; a plain folder is its owner's."""
        return self._lease is not None

    def release(self) -> None:
        """Give the folder back. The last user of an unpacked archive removes its files; a plain
        folder is left alone. Idempotent; any thread; blocks while files are removed.
        """
        if self._lease is not None:
            self._lease.release()

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
    """Opens models by name, path or ``file://`` URL. Thread-safe.

    Archives of the same content share one unpacked copy, in a temporary folder
    ``torchmgmt-*`` that exists only while it is needed. In a process that was forked from the one
    that made it, it is closed and removes nothing.

    Args:
        model_store: the folder in which bare names are looked up, or None for none. It need not
            exist yet.
        limits: what an archive may unpack to at most.

    Raises:
        InvalidArgument: ``model_store`` is neither a path nor None.
    """

    def __init__(self, model_store: str | os.PathLike[str] | None, *, limits: UnpackLimits | None = None) -> None:
        self._model_store = _check_store(model_store)
        self._unpacked = UnpackedArchives(limits)

    @property
    def model_store(self) -> Path | None:
        """The folder in which bare names are looked up, absolute."""
        return self._model_store

    def open(self, url: str | os.PathLike[str], *, trusted: bool = True) -> ModelFolder:
        """Return the model's folder, unpacked if it is an archive; the caller releases it.

        Blocks while an archive is hashed and unpacked, or while another thread unpacks the same
        one. Any thread. After an error nothing is left on the disk.

        Args:
            url: the name of an archive or folder in the model store, a path, or a ``file://`` URL.
            trusted: False for a caller over HTTP, who may register from the model store only.

        Raises:
            InvalidArgument: ``url`` is no text, is empty, or holds a NUL.
            SourceNotAllowed: not trusted, and not in the model store.
            SourceNotFound: nothing is there.
            DownloadFailed: a URL that would have to be fetched; this release fetches nothing.
            InvalidArchive: damaged, hostile or too large, or its manifest or configuration is
                wrong. The reason names the entry or key, what was found and what is allowed.
            ManagerClosed: after close, or in a forked process.
            OSError: the disk is full or fails.
        """
        self._unpacked.check_open()
        path = resolve(url, model_store=self._model_store, trusted=trusted)
        source = os.fspath(url)
        if path.is_dir():
            return _model_folder(path, source, None)
        lease = self._unpacked.acquire(path, source)
        try:
            return _model_folder(_top_of(lease.folder), source, lease)
        except BaseException:
            lease.release()
            raise

    def close(self) -> None:
        """Remove everything that was unpacked, whoever uses it, and end the unpacking under way.

        Idempotent; any thread; blocks while files are removed.
        """
        self._unpacked.close()


def _check_store(store: object) -> Path | None:
    if store is None:
        return None
    text = os.fspath(store) if isinstance(store, os.PathLike) else store
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise InvalidArgument("model_store", store, "the path of a folder, or None")
    return Path(text).absolute()  # the working directory may change


def _model_folder(path: Path, source: str, lease: Lease | None) -> ModelFolder:
    manifest = read_manifest(path, source)
    config = read_config(path, manifest, source)
    digest = lease.digest if lease is not None else None
    return ModelFolder(path, source, manifest, config, digest, lease)


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
