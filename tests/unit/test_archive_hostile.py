"""A corpus of archives made by enemies, opened as a model is: each refused with its reason, nothing outside, nothing left."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.unit.test_archive_unpack import make_tgz, make_tgz_of, make_zip, tar_info, zip_of_kind
from torchmgmt.archive import ModelSources, UnpackLimits
from torchmgmt.archive.names import MAX_DEPTH, MAX_NAME_BYTES, MAX_PART_BYTES, Refused, parts_inside
from torchmgmt.errors import InvalidArchive

MANIFEST = "MAR-INF/MANIFEST.json"
LIMITS = UnpackLimits(max_bytes=8 << 20, max_entries=300, max_ratio=100, ratio_floor_bytes=1 << 20)


def manifest(**model: object) -> bytes:
    return json.dumps({"model": {"modelName": "m", "handler": "h.py", **model}}).encode()


def with_manifest(data: bytes) -> bytes:
    return make_zip([(MANIFEST, data), ("h.py", b"x")])


def with_config(text: str) -> bytes:
    return make_zip([(MANIFEST, manifest()), ("h.py", b"x"), ("model-config.yaml", text.encode())])


def plain_tar() -> bytes:
    return gzip.decompress(make_tgz([("h.py", b"x")]))


def patched(data: bytes, signature: bytes, offset: int, value: bytes) -> bytes:
    at = data.index(signature) + offset
    return data[:at] + value + data[at + len(value) :]


def zip64_end(data: bytes, *, entries: int, size: int, start: int) -> bytes:
    """Give a zip a second end, for large ones, that says something else."""
    at = data.index(b"PK\x05\x06")
    record = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, entries, entries, size, start)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, at, 1)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return data[:at] + record + locator + end


def entry_of_zip64_size(size: int) -> bytes:
    """A zip whose directory gives one entry a size that only fits into the extra field for large ones."""
    data = make_zip([("h.py", b"x = 1")], zipfile.ZIP_STORED)
    at = data.index(b"PK\x01\x02")
    head = bytearray(data[at : at + 46])
    extra = struct.pack("<HHQQ", 1, 16, size, size)
    head[20:28] = b"\xff" * 8
    head[30:32] = struct.pack("<H", len(extra))
    directory = bytes(head) + b"h.py" + extra
    return data[:at] + directory + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, len(directory), at, 0)


def million_entries() -> bytes:
    data = make_zip([("a", b"")])
    at, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entries = data[at:end] * 1_000_000
    return data[:at] + entries + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, len(entries), at, 0)


def million_tar_entries() -> bytes:
    block = tar_info("d", type=tarfile.DIRTYPE, mode=0o755).tobuf()
    return gzip.compress(block * 20_000, 1)


def laughs(tag: str = "") -> str:
    lines = ["a0: &a0 [lol, lol]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))]
    return "\n".join([*lines, tag])


def symlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return tar_info(name, type=tarfile.SYMTYPE, linkname=target), b""


CORPUS: dict[str, tuple[Callable[[], bytes], str]] = {
    "zip-slip": (lambda: make_zip([("../../evil", b"x")]), "'..'"),
    "tar-slip": (lambda: make_tgz([("a/../../evil", b"x")]), "'..'"),
    "absolute": (lambda: make_zip([("/etc/cron.d/evil", b"x")]), "absolute"),
    "absolute-in-tar": (lambda: make_tgz([("/etc/cron.d/evil", b"x")]), "absolute"),
    "drive": (lambda: make_zip([("C:evil", b"x")]), "drive"),
    "backslashes": (lambda: make_zip([("..\\..\\evil", b"x")]), "backslash"),
    "nul": (lambda: make_zip([("h.pyXevil", b"x")]).replace(b"h.pyXevil", b"h.py\0evil"), "NUL"),
    "newline": (lambda: make_zip([("h.py\n2026 ERROR all is lost", b"x")]), "control character"),
    "escape": (lambda: make_tgz([("\x1b[2Jh.py", b"x")]), "control character"),
    "long-part": (lambda: make_zip([("x" * 300, b"x")]), "too long"),
    "long-name": (lambda: make_tgz([("/".join(["y" * 100] * 40), b"x")]), "too long"),
    "link": (lambda: make_tgz_of([symlink("a", "/etc"), (tar_info("a/evil", size=1), b"x")]), "symbolic link"),
    "link-inside": (lambda: make_tgz_of([symlink(MANIFEST, "/etc/passwd")]), "symbolic link"),
    "zip-link": (lambda: zip_of_kind(0o120000), "symbolic link"),
    "hard-link": (
        lambda: make_tgz_of([(tar_info("h", type=tarfile.LNKTYPE, linkname="/etc/passwd"), b"")]),
        "hard link",
    ),
    "device": (lambda: make_tgz_of([(tar_info("d", type=tarfile.BLKTYPE, devmajor=8), b"")]), "device"),
    "pipe": (lambda: make_tgz_of([(tar_info("p", type=tarfile.FIFOTYPE), b"")]), "named pipe"),
    "bomb": (lambda: make_zip([("zeros", bytes(4 << 20))]), "100 times its own"),
    "tar-bomb": (lambda: make_tgz([("zeros", bytes(4 << 20))]), "100 times its own"),
    "bomb-in-pieces": (lambda: make_zip([(f"z{n}", bytes(64 << 10)) for n in range(100)]), "100 times its own"),
    "bomb-of-headers": (
        lambda: make_tgz_of([(tar_info("a", pax_headers={"comment": "x" * (1 << 20)}), b"")]),
        "extended headers are too long",
    ),
    "million-entries": (million_entries, "directory is larger"),
    "million-tar-entries": (million_tar_entries, "too many files and folders"),
    "deep": (lambda: make_zip([("/".join(["d"] * 1001), b"x")]), "too deep"),
    "deep-in-tar": (lambda: make_tgz([("/".join(["d"] * 101), b"x")]), "too deep"),
    "wrong-crc": (
        lambda: make_zip([("h.py", b"0123456789")], zipfile.ZIP_STORED).replace(b"0123456789", b"0123456780"),
        "h.py",
    ),
    "twice": (lambda: make_zip([("h.py", b"good"), ("h.py", b"evil")]), "has it already"),
    "twice-in-tar": (lambda: make_tgz([("h.py", b"good"), ("./h.py", b"evil")]), "has it already"),
    "file-and-folder": (lambda: make_zip([("a", b"x"), ("a/b", b"x")]), "folder where there is a file"),
    "two-names-in-one": (lambda: patched(make_zip([("h.py", b"x")]), b"PK\x03\x04", 30, b"e.py"), "damaged"),
    "encrypted": (
        lambda: patched(patched(make_zip([("h.py", b"x")]), b"PK\x03\x04", 6, b"\x01"), b"PK\x01\x02", 8, b"\x01"),
        "is encrypted",
    ),
    "truncated": (lambda: with_manifest(manifest())[:-10], "damaged"),
    "truncated-tar": (lambda: make_tgz([("h.py", bytes(5000))])[:-20], "damaged"),
    "directory-beyond-the-end": (
        lambda: zip64_end(make_zip([("h.py", b"x")]), entries=1, size=50, start=1 << 62),
        "damaged",
    ),
    "directory-of-2^63": (
        lambda: zip64_end(make_zip([("h.py", b"x")]), entries=1 << 63, size=1 << 63, start=0),
        "damaged",
    ),
    "entry-of-2^60": (lambda: entry_of_zip64_size(1 << 60), "h.py"),
    "bzip2-entries": (lambda: make_zip([("h.py", b"x")], zipfile.ZIP_BZIP2), "only stored and deflated"),
    "plain-tar": (plain_tar, "archives are zip files"),
    "tar-bz2": (lambda: bz2.compress(plain_tar()), "archives are zip files"),
    "tar-xz": (lambda: lzma.compress(plain_tar()), "archives are zip files"),
    "gzip-in-gzip": (lambda: gzip.compress(make_tgz([("h.py", b"x")])), "damaged"),
    "script-before-zip": (lambda: b"#!/bin/sh\nexit\n" + make_zip([("h.py", b"x")]), "archives are zip files"),
    "nothing": (lambda: b"", "it is empty"),
    "enormous-manifest": (
        lambda: with_manifest(manifest(envelope=hashlib.shake_256().hexdigest(600_000))),
        "is larger than the allowed",
    ),
    "deep-manifest": (lambda: with_manifest(b"[" * 200_000 + b"]" * 200_000), "manifest is"),
    "manifest-of-digits": (lambda: with_manifest(b'{"model": ' + b"9" * 100_000 + b"}"), "manifest"),
    "handler-elsewhere": (lambda: with_manifest(manifest(handler="../../etc/evil.py")), "'..'"),
    "weights-elsewhere": (lambda: with_manifest(manifest(serializedFile="/etc/shadow")), "absolute"),
    "config-elsewhere": (lambda: with_manifest(manifest(configFile="../c.yaml")), "'..'"),
    "many-folders": (
        lambda: make_zip([("/".join([f"{n}", *["d"] * 90]), b"x") for n in range(6)]),
        "too many files and folders",
    ),
    "yaml-laughs": (lambda: with_config(laughs()), "aliases written out"),
    "yaml-circle": (lambda: with_config("a: &a [*a]"), "contains itself"),
    "yaml-tag": (lambda: with_config("a: !!python/object/apply:os.system [exit]"), "not plain YAML"),
    "yaml-name": (lambda: with_config("a: !!python/name:os.system"), "not plain YAML"),
    "yaml-merge": (lambda: with_config("<<: &m {<<: *m}\na: 1"), "contains itself"),
    "yaml-deep": (lambda: with_config("[" * 500), "not plain YAML"),
    "yaml-list": (lambda: with_config("- 1"), "must be a mapping"),
    "yaml-large": (lambda: with_config("a: " + "b" * (256 << 10)), "is larger than the allowed"),
}


@pytest.fixture(params=["private", "shared"])
def open_hostile(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[bytes], str]]:
    """Open an archive from a model store, in a world of which everything is looked at afterwards."""
    world = tmp_path / "world"
    for name in ("store", "temp", "cache"):
        (world / name).mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(world / "temp"))
    cache = world / "cache" if request.param == "shared" else None
    sources = ModelSources(world / "store", limits=LIMITS, cache_dir=cache)

    def refusal(archive: bytes) -> str:
        (world / "store" / "m.mar").write_bytes(archive)
        with pytest.raises(InvalidArchive) as caught:
            sources.open("m.mar", trusted=False).release()
        assert [
            path.relative_to(world).as_posix()
            for path in world.rglob("*")
            if not (path.is_dir() or path.suffix == ".locks")
        ] == ["store/m.mar"]
        assert not list((world / "temp").iterdir())
        return str(caught.value)

    yield refusal
    sources.close()


@pytest.mark.parametrize("case", CORPUS)
def test_a_hostile_archive_is_refused_and_leaves_nothing(open_hostile: Callable[[bytes], str], case: str) -> None:
    """The message names the source and the reason, in no more than a few lines."""
    make, reason = CORPUS[case]
    message = open_hostile(make())
    assert message.startswith("m.mar is not a usable model archive: ")
    assert reason in message
    assert len(message) < 1000
    assert all(char.isprintable() or char == "\n" for char in message)


PARTS = st.text(
    st.sampled_from("ab./\\:~\0\x1b\n\x85 \u00e9e\u0301\u2215\uff0f\u202e") | st.characters(), max_size=12
) | st.sampled_from(["..", ".", "...", "C:", "c:x", "x" * MAX_PART_BYTES, "x" * (MAX_PART_BYTES + 1), "\u00e9" * 128])


@given(st.lists(PARTS, max_size=14).map("/".join))
@example("/".join(["x" * 200] * 10))
@example("/".join(["x" * 200] * 11))
def test_a_name_stays_inside_or_is_refused(name: str) -> None:
    """Its parts, joined to any folder on any system, lead to that folder or below it, and can be shown as they are."""
    try:
        parts = parts_inside(name)
    except Refused:
        return
    assert len("/".join(parts).encode()) <= MAX_NAME_BYTES
    assert ".." not in parts
    assert len(parts) <= MAX_DEPTH
    for part in parts:
        assert part not in {"", "."}
        assert 0 < len(part.encode()) <= MAX_PART_BYTES
        assert not set(part) & set("/\\\0\n\r\x1b\x7f")
        assert not (len(part) > 1 and part[1] == ":" and part[0].isascii() and part[0].isalpha())
    assert parts == tuple(each for each in name.split("/") if each not in {"", "."})


def test_a_zip_of_one_content_under_many_names_is_bounded(open_hostile: Callable[[bytes], str]) -> None:
    """Entries that all point at the same data need no room in the archive for what they unpack to."""
    data = make_zip([("f000", bytes(900 << 10))])
    at, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entry = data[at:end]
    entries = b"".join(entry.replace(b"f000", f"f{n:03}".encode()) for n in range(250))
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 250, 250, len(entries), at, 0)
    open_hostile(data[:at] + entries + tail)


def test_an_archive_in_an_archive_is_a_file(tmp_path: Path) -> None:
    """Nothing unpacks what was not asked for: a bomb inside of a file stays one."""
    inner = make_zip([("../evil", b"x"), ("zeros", bytes(4 << 20))])
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("inner.zip", inner)
    (tmp_path / "m.mar").write_bytes(out.getvalue())
    sources = ModelSources(tmp_path, limits=LIMITS)
    with sources.open("m.mar") as folder:
        assert [path.name for path in folder.path.rglob("*")] == ["inner.zip"]
    sources.close()
