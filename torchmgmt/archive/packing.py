"""Archives written and looked at: what torch-model-archiver does, reproducibly, and without its surprises.

An archive depends on nothing but its content: the entries stand in the order of their names, with one time and one mode,
so that packing the same files again gives the same bytes, and the same SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from attrs import field, frozen

from torchmgmt.archive.manifest import MANIFEST_FILE, Manifest, read_config, read_manifest
from torchmgmt.archive.names import Refused, parts_inside
from torchmgmt.archive.unpack import UnpackLimits, unpack
from torchmgmt.checks import check_text
from torchmgmt.errors import InvalidArchive, InvalidArgument, SourceNotFound

if TYPE_CHECKING:
    import zipfile

__all__ = ["Inspection", "Packed", "inspect", "pack", "verify"]

_CHUNK_BYTES = 1 << 20
_DATE = (1980, 1, 1, 0, 0, 0)
"""The first that a zip file can hold."""
_MODE = 0o100644
# Weights do not get smaller, and storing them lets readers map what they unpack without a pause.
_STORED = frozenset({".pt", ".pth", ".pt2", ".bin", ".safetensors", ".onnx", ".npz", ".gz", ".zip", ".png", ".jpg"})


@frozen
class Packed:
    """What :func:`pack` wrote."""

    path: Path
    sha256: str
    """Of the whole file, in hexadecimal; what ``url=…#sha256=…`` pins."""
    size_bytes: int
    files: Sequence[str]
    """The names in it, in their order."""


@frozen
class Inspection:
    """What is in an archive."""

    path: Path
    sha256: str
    size_bytes: int
    manifest: Manifest | None
    config: Mapping[str, Any]
    files: Mapping[str, int]
    """Name -> size in bytes, unpacked."""
    problems: Sequence[str] = field(factory=tuple)
    """What would keep a model from being loaded from it."""


def pack(
    destination: str | os.PathLike[str],
    *,
    model_name: str,
    handler: str,
    version: str = "1.0",
    serialized_file: str | os.PathLike[str] | None = None,
    model_file: str | os.PathLike[str] | None = None,
    extra_files: Iterable[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]] = (),
    requirements_file: str | os.PathLike[str] | None = None,
    config_file: str | os.PathLike[str] | None = None,
    runtime: str = "python",
    overwrite: bool = False,
) -> Packed:
    """Write a ``.mar`` that torchmgmt and TorchServe read. Blocks while it does; any thread.

    Args:
        destination: the file, whose name should end with ``.mar``; it comes to be whole or not at all.
        model_name: the model's name, without ``/``.
        handler: a Python file, optionally with ``:function``; or the name of a shipped handler or an installed module.
        version: the version's name.
        serialized_file: the weights, a TorchScript file, or whatever the handler loads.
        model_file: the Python file with the one ``nn.Module`` class of a state dict.
        extra_files: files and folders that go along; a folder keeps its name and what is in it. A mapping says for each
            name in the archive (``data/labels.json``) which file or folder that is.
        requirements_file: what to install for it, in pip's form.
        config_file: a ``model-config.yaml``.
        runtime: ``python``, ``python3`` or ``LSP``.
        overwrite: whether a file that exists is replaced.

    Raises:
        InvalidArgument: a value is not legal, a file does not exist, or two of them would have one name.
        InvalidArchive: what was written would be refused when it is registered; nothing is left of it.
    """
    path = Path(destination)
    if path.exists() and not overwrite:
        raise InvalidArgument("destination", str(path), "a file that does not exist yet, unless overwrite is True")
    if not path.parent.is_dir():
        raise InvalidArgument("destination", str(path), "a file in a folder that exists")
    check_text("model_name", model_name)
    check_text("version", version)
    members = _Members()
    model = {
        "modelName": model_name,
        "modelVersion": version,
        "handler": members.add_handler(handler),
        "serializedFile": members.add_file("serialized_file", serialized_file),
        "modelFile": members.add_file("model_file", model_file),
        "requirementsFile": members.add_file("requirements_file", requirements_file),
        "configFile": members.add_file("config_file", config_file),
    }
    members.add_extras(extra_files)
    manifest = {
        "createdOn": "01/01/1980 00:00:00",  # a true date would be another digest for the same files
        "runtime": runtime,
        "model": {key: value for key, value in model.items() if value is not None},
        "archiverVersion": "0.12.0",  # whose form it has
    }
    return _write(path, manifest, members.files)


def inspect(archive: str | os.PathLike[str]) -> Inspection:
    """Return what is in an archive. Blocks while it is unpacked once; leaves nothing behind; any thread.

    Raises InvalidArchive for one that would be refused when it is registered, SourceNotFound for one that is not there.
    """
    path = Path(archive)
    with _opened(path) as file, tempfile.TemporaryDirectory(prefix="torchmgmt-") as parent:
        size, digest = os.fstat(file.fileno()).st_size, hashlib.sha256()
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
        folder = Path(parent, "unpacked")
        unpack(file, folder, UnpackLimits(), source=str(path))
        manifest = read_manifest(folder, str(path))
        config = read_config(folder, manifest, str(path))
        files = {str(each.relative_to(folder)): each.stat().st_size for each in _files_below(folder)}
    problems = tuple(_problems(manifest, files))
    return Inspection(path, digest.hexdigest(), size, manifest, config, files, problems)


def verify(archive: str | os.PathLike[str]) -> Inspection:
    """Return what is in an archive from which a model can be loaded; as :func:`inspect` otherwise.

    Raises InvalidArchive, too, for one without a manifest or without a file that its manifest names.
    """
    found = inspect(archive)
    if found.problems:
        raise InvalidArchive(str(archive), "; ".join(found.problems))
    return found


class _Members:
    """The files of an archive, by their names in it."""

    def __init__(self) -> None:
        self.files: dict[str, Path] = {}

    def add_handler(self, handler: object) -> str:
        check_text("handler", handler, forbidden="\0")
        text = str(handler)
        name, colon, function = text.rpartition(":")
        file = Path(name if colon else text)
        if file.suffix != ".py" and not file.is_file():
            return text  # shipped, or installed
        if not file.is_file():
            raise InvalidArgument("handler", text, "a Python file that exists, or the name of a shipped handler")
        self._add("handler", file.name, file)
        return f"{file.name}:{function}" if colon else file.name

    def add_file(self, argument: str, file: str | os.PathLike[str] | None) -> str | None:
        if file is None:
            return None
        path = Path(file)
        if not path.is_file():
            raise InvalidArgument(argument, str(path), "a file that exists")
        self._add(argument, path.name, path)
        return path.name

    def add_extras(self, extras: Iterable[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]]) -> None:
        if isinstance(extras, (str, os.PathLike)):
            raise InvalidArgument("extra_files", extras, "a list of files and folders, or a mapping of names to them")
        named = (
            extras.items() if isinstance(extras, Mapping) else [(Path(each).resolve().name, each) for each in extras]
        )
        for name, extra in named:
            self._add_tree(name, Path(extra))

    def _add_tree(self, name: str, path: Path) -> None:
        if path.is_file():
            self._add("extra_files", name, path)
        elif path.is_dir():
            for file in _files_below(path):
                self._add("extra_files", f"{name}/{file.relative_to(path).as_posix()}", file)
        else:
            raise InvalidArgument("extra_files", str(path), "files and folders that exist")

    def _add(self, argument: str, name: str, path: Path) -> None:
        try:
            inside = "/".join(parts_inside(name))
        except Refused as refusal:
            raise InvalidArgument(argument, name, f"a name that stays in the archive: {refusal}") from None
        other = self.files.setdefault(inside, path)
        if inside == MANIFEST_FILE or not other.samefile(path):
            raise InvalidArgument(argument, str(path), f"a file of another name: {inside} stands for {other} already")


def _write(path: Path, manifest: Mapping[str, Any], files: Mapping[str, Path]) -> Packed:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _write_zip(file, manifest, files)
            file.flush()
            os.fsync(file.fileno())
        found = verify(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return Packed(path, found.sha256, found.size_bytes, tuple(sorted(found.files)))


def _write_zip(file: IO[bytes], manifest: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    import zipfile  # a program that only registers models may never need it

    with zipfile.ZipFile(file, "w") as archive:
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        archive.writestr(_member(MANIFEST_FILE), text.encode())
        for name in sorted(files):
            with files[name].open("rb") as source, archive.open(_member(name), "w", force_zip64=True) as target:
                while chunk := source.read(_CHUNK_BYTES):
                    target.write(chunk)


def _member(name: str) -> zipfile.ZipInfo:
    import zipfile

    info = zipfile.ZipInfo(name, _DATE)
    info.create_system = 3  # Unix, wherever it is written
    info.external_attr = _MODE << 16
    is_stored = PurePosixPath(name).suffix.lower() in _STORED
    info.compress_type = zipfile.ZIP_STORED if is_stored else zipfile.ZIP_DEFLATED
    return info


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise SourceNotFound(str(path)) from None
    except OSError as error:
        raise InvalidArchive(str(path), f"it cannot be read: {error.strerror}") from error


def _files_below(folder: Path) -> Iterator[Path]:
    return (each for each in sorted(folder.rglob("*")) if each.is_file())


def _problems(manifest: Manifest | None, files: Mapping[str, int]) -> Iterator[str]:
    if manifest is None:
        yield f"it has no {MANIFEST_FILE}, so whoever registers it must say model_name and handler"
        return
    if not manifest.model_name:
        yield "its manifest has no modelName"
    if not manifest.handler:
        yield "its manifest has no handler"
    handler = (manifest.handler or "").partition(":")[0]
    named = {
        "handler": handler if handler.endswith(".py") else None,  # else it is shipped, installed, or another's habit
        "modelFile": manifest.model_file,
        "serializedFile": manifest.serialized_file,
        "requirementsFile": manifest.requirements_file,
        "configFile": manifest.config_file,
    }
    for key, name in named.items():
        if name and name not in files:
            yield f"its manifest names the {key} {name}, which is not in it"
