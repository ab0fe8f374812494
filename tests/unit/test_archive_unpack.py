"""Unpacking: what is in an archive lands in its folder and nowhere else, and what should not be in one is refused."""

from __future__ import annotations

import gzip
import io
import os
import stat
import struct
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from torchmgmt.archive.unpack import UnpackLimits, unpack
from torchmgmt.errors import InvalidArchive, InvalidArgument

Files = list[tuple[str, bytes]]
GOOD: Files = [("model.py", b"x = 1\n"), ("sub/data.bin", bytes(range(256)) * 40), ("empty", b"")]


def make_zip(files: Files, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in files:
            info = zipfile.ZipInfo("x")
            info.filename = name  # the constructor would mend some names
            info.compress_type = method
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # names that stand there twice
                archive.writestr(info, data)
    return out.getvalue()


def make_tgz(files: Files) -> bytes:
    return make_tgz_of([(tar_info(name, size=len(data)), data) for name, data in files])


def make_tgz_of(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def tar_info(name: str, **attributes: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


def zip_of_kind(kind: int) -> bytes:
    info = zipfile.ZipInfo("odd")
    info.create_system = 3
    info.external_attr = (kind | 0o644) << 16
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("model.py", b"x")
        archive.writestr(info, b"/etc/passwd")
    return out.getvalue()


MAKERS: dict[str, Callable[[Files], bytes]] = {"zip": make_zip, "tgz": make_tgz}
both = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "inner" / "target"


def run(archive: bytes, target: Path, **limits: int) -> dict[str, bytes]:
    target.parent.mkdir(exist_ok=True, parents=True)
    unpack(io.BytesIO(archive), target, UnpackLimits(**limits), source="m.mar")
    return {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}


def refusal(archive: bytes, target: Path, **limits: int) -> str:
    with pytest.raises(InvalidArchive) as caught:
        run(archive, target, **limits)
    assert caught.value.source == "m.mar"
    assert [path.name for path in target.parent.iterdir() if path != target] == []
    return caught.value.reason


# ---------------------------------------------------------------------------------- what is fine


@both
def test_what_was_packed_comes_out(make: Callable[[Files], bytes], target: Path) -> None:
    """Names, folders and contents are those of the archive, empty files included."""
    assert run(make(GOOD), target) == dict(GOOD)


def test_stored_entries_are_fine(target: Path) -> None:
    """An archive made with --archive-format zip-store unpacks like any other."""
    assert run(make_zip(GOOD, zipfile.ZIP_STORED), target) == dict(GOOD)


@both
def test_dots_and_double_slashes_are_tidied(make: Callable[[Files], bytes], target: Path) -> None:
    """``./a//b``, as tar writes it after ``tar c .``, is ``a/b``."""
    assert run(make([("./a//b", b"1")]), target) == {"a/b": b"1"}


def test_folders_may_stand_twice_or_after_their_files(target: Path) -> None:
    """Only files are unique; a folder is there once, however often it is named."""
    folder = tar_info("sub", type=tarfile.DIRTYPE)
    root = tar_info("./", type=tarfile.DIRTYPE)
    file = tar_info("sub/f", size=1)
    assert run(make_tgz_of([(root, b""), (file, b"1"), (folder, b""), (folder, b"")]), target) == {"sub/f": b"1"}


def test_zip64_is_fine(target: Path) -> None:
    """An archive with the headers for files over 4 GiB is an archive."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive, archive.open("big", "w", force_zip64=True) as member:
        member.write(b"12345")
    assert run(out.getvalue(), target) == {"big": b"12345"}


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names_are_fine(tar_format: int, target: Path) -> None:
    """Names that need extended headers, in both of tar's ways, come out whole."""
    name = "/".join(["ordner-mit-ümlaut"] * 12) + "/模型.bin"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", format=tar_format) as archive:
        archive.addfile(tar_info(name, size=2), io.BytesIO(b"ok"))
    assert run(out.getvalue(), target) == {name: b"ok"}


@both
def test_only_the_executable_bit_is_kept(make: Callable[[Files], bytes], target: Path) -> None:
    """A mode from outside decides between 644 and 755, less the umask; setuid never comes in."""
    odd = tar_info("tool", size=1, mode=0o6711)
    if make is make_zip:
        info = zipfile.ZipInfo("tool")
        info.external_attr = (stat.S_IFREG | 0o6711) << 16
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr(info, b"1")
            archive.writestr("plain", b"1")
        data = out.getvalue()
    else:
        data = make_tgz_of([(odd, b"1"), (tar_info("plain", size=1, mode=0o600), b"1")])
    before = os.umask(0o027)
    try:
        run(data, target)
    finally:
        os.umask(before)
    assert stat.S_IMODE((target / "tool").stat().st_mode) == 0o750
    assert stat.S_IMODE((target / "plain").stat().st_mode) == 0o640


# ------------------------------------------------------------------------------------- hostile names

ESCAPES = {
    "../evil": "'..'",
    "a/../../evil": "'..'",
    "a/..": "'..'",
    "/tmp/evil": "absolute",
    "//evil": "absolute",
    "C:/evil": "drive",
    "a/C:evil": "drive",
    "..\\evil": "backslash",
    "a\\b": "backslash",
    "x" * 256: "too long",
    "/".join(["z" * 200] * 11): "too long",
}


@both
@pytest.mark.parametrize("name", ESCAPES)
def test_a_name_that_leaves_is_refused(make: Callable[[Files], bytes], name: str, target: Path) -> None:
    """No way of writing a name leads out of the folder; the message says which and why."""
    reason = refusal(make([("model.py", b"x"), (name, b"evil")]), target)
    assert ESCAPES[name] in reason
    assert repr(name)[:60] in reason


def test_a_nul_in_a_name_is_refused(target: Path) -> None:
    """zipfile would cut the name there; what is checked must be what was written."""
    archive = make_zip([("model.pyXevil", b"x")]).replace(b"model.pyXevil", b"model.py\0evil")
    assert "NUL" in refusal(archive, target)
    # What tar keeps in an extended header may hold one, too.
    info = tar_info("plain", size=1)
    info.pax_headers = {"path": "a\0b"}
    assert "NUL" in refusal(make_tgz_of([(info, b"1")]), target.parent.parent / "again" / "target")


def test_bytes_that_are_no_text_are_refused(target: Path) -> None:
    """A name that is no UTF-8 could not be shown, logged or compared."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        archive.addfile(tar_info("caf\xe9", size=1), io.BytesIO(b"1"))
    assert "UTF-8" in refusal(out.getvalue(), target)


# Code points that separators, drives, normalisation and encodings make something of.
NAMES = st.text(
    st.sampled_from("ab./\\:~\0 \n\u00e9e\u0301\u2215\uff0f\u202e") | st.characters(exclude_categories=["Cs"]),
    min_size=1,
    max_size=40,
) | st.lists(st.sampled_from(["..", ".", "", "a", "b", "C:", "~", "..."]), min_size=1).map("/".join)


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=200)
@given(names=st.lists(NAMES, min_size=1, max_size=4, unique=True), zipped=st.booleans())
@example(names=["a", "a/b"], zipped=True)
@example(names=["a/b", "a"], zipped=False)
def test_any_name_lands_inside_or_is_refused(names: list[str], zipped: bool) -> None:
    """Whatever an entry is called: it is a file below the folder, or the archive is refused."""
    files = [(name, str(index).encode()) for index, name in enumerate(names)]
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch, "inner", "target")
        try:
            found = run((make_zip if zipped else make_tgz)(files), target)
        except InvalidArchive:
            pass
        else:
            # A zip entry is a folder by its name, a tar entry by its type: these are all files.
            assert len(found) == sum(not (zipped and name.endswith("/")) for name in names)
        everything = [path for path in Path(scratch).rglob("*") if path != target.parent]
        assert all(path == target or target in path.parents for path in everything)


# -------------------------------------------------------------------------------------- hostile kinds


@pytest.mark.parametrize(
    "kind, called",
    [
        (stat.S_IFLNK, "symbolic link"),
        (stat.S_IFCHR, "device"),
        (stat.S_IFBLK, "device"),
        (stat.S_IFIFO, "pipe"),
        (stat.S_IFSOCK, "socket"),
        (stat.S_IFDIR, "folder by its mode"),
    ],
)
def test_a_zip_holds_files_and_folders_only(kind: int, called: str, target: Path) -> None:
    """An entry whose mode says anything else is refused by its name."""
    reason = refusal(zip_of_kind(kind), target)
    assert called in reason
    assert "'odd'" in reason
    assert "only files and folders are allowed" in reason


@pytest.mark.parametrize(
    "attributes, called",
    [
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "symbolic link"),
        ({"type": tarfile.SYMTYPE, "linkname": "model.py"}, "symbolic link"),
        ({"type": tarfile.LNKTYPE, "linkname": "model.py"}, "hard link"),
        ({"type": tarfile.CHRTYPE}, "device"),
        ({"type": tarfile.BLKTYPE}, "device"),
        ({"type": tarfile.FIFOTYPE}, "pipe"),
        ({"type": tarfile.GNUTYPE_SPARSE}, "unknown kind"),
        ({"type": b"V"}, "unknown kind"),
    ],
)
def test_a_tar_holds_files_and_folders_only(attributes: dict[str, object], called: str, target: Path) -> None:
    """Links are refused even if they stay inside: what they lead to could be replaced later."""
    members = [(tar_info("model.py", size=1), b"x"), (tar_info("odd", **attributes), b"")]
    reason = refusal(make_tgz_of(members), target)
    assert called in reason
    assert "'odd'" in reason


def test_writing_through_a_link_is_impossible(target: Path) -> None:
    """The classic: a link out of the folder, then a file below it."""
    link = tar_info("out", type=tarfile.SYMTYPE, linkname="..")
    reason = refusal(make_tgz_of([(link, b""), (tar_info("out/evil", size=1), b"x")]), target)
    assert "symbolic link" in reason


@both
@pytest.mark.parametrize(
    "names",
    [
        ["a", "a"],
        ["a", "./a"],
        ["a/b", "a//b"],
        ["caf\u00e9", "cafe\u0301"],
        ["a", "a/b"],
        ["a/b", "a"],
    ],
    ids=repr,
)
def test_two_entries_in_one_place_are_refused(make: Callable[[Files], bytes], names: list[str], target: Path) -> None:
    """Which of two would win is nobody's guess, however differently their names are written."""
    reason = refusal(make([(name, b"x") for name in names]), target)
    assert "already" in reason


def test_a_file_system_that_ignores_case_is_no_way_around(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system says that the file is there already, the archive is to blame."""
    real = os.open

    def ignores_case(path: Path, flags: int, mode: int = 0o777) -> int:
        return real(path.with_name(path.name.lower()), flags, mode)

    monkeypatch.setattr(os, "open", ignores_case)
    assert "already" in refusal(make_zip([("README", b"1"), ("readme", b"2")]), target)


# ------------------------------------------------------------------------------------------- bombs


@both
def test_the_total_is_counted(make: Callable[[Files], bytes], target: Path) -> None:
    """Files may be as large as the limit together, and not a byte more."""
    archive = make([("a", b"1" * 60), ("b", b"2" * 40)])
    assert len(run(archive, target, max_bytes=100)) == 2
    assert "allowed 99 bytes" in refusal(archive, target.parent.parent / "again" / "target", max_bytes=99)


@both
def test_a_bomb_stops_at_its_ratio(make: Callable[[Files], bytes], target: Path) -> None:
    """An archive of zeros stops soon after the limit, not when the disk is full."""
    archive = make([("zeros", bytes(32 << 20))])
    reason = refusal(archive, target, ratio_floor_bytes=1 << 20, max_ratio=10)
    assert "over 10 times" in reason
    assert (target / "zeros").stat().st_size <= 3 << 20


@both
def test_small_archives_may_be_of_any_ratio(make: Callable[[Files], bytes], target: Path) -> None:
    """Freshly initialised weights compress a thousandfold and are no bomb."""
    archive = make([("zeros", bytes(8 << 20))])
    assert len(archive) < 20_000
    assert run(archive, target) == {"zeros": bytes(8 << 20)}


def test_a_declared_size_is_not_believed(target: Path) -> None:
    """A header that promises 10 bytes does not let the rest pass uncounted."""
    archive = bytearray(make_zip([("a", bytes(1 << 20))]))
    for at in (archive.find(b"PK\x03\x04") + 22, archive.find(b"PK\x01\x02") + 24):
        archive[at : at + 4] = struct.pack("<I", 10)
    assert "damaged" in refusal(bytes(archive), target, max_bytes=100)
    assert (target / "a").stat().st_size <= 100


@both
def test_entries_are_counted(make: Callable[[Files], bytes], target: Path) -> None:
    """Folders count, those included that only stand in a file's name."""
    archive = make([("a/b/c", b""), ("d", b"")])
    assert set(run(archive, target, max_entries=4)) == {"a/b/c", "d"}
    assert "at most 3 are allowed" in refusal(archive, target.parent.parent / "again" / "target", max_entries=3)


def test_a_million_entries_are_refused_before_they_are_read(target: Path) -> None:
    """zipfile keeps half a kilobyte for each; the directory's size is looked at first."""
    start, entry, _end = _cut(make_zip([("a", b"")]))
    size = len(entry) * 1_000_000
    # The end says one entry: what counts is how large the directory is.
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, size, len(start), 0)
    assert "directory is larger" in refusal(start + entry * 1_000_000 + end, target)
    assert not list(target.iterdir())


def _cut(archive: bytes) -> tuple[bytes, bytes, bytes]:
    """Cut a zip into its files, its directory and its end."""
    directory, end = archive.find(b"PK\x01\x02"), archive.find(b"PK\x05\x06")
    return archive[:directory], archive[directory:end], archive[end:]


def test_many_zip_entries_are_refused_before_one_is_written(target: Path) -> None:
    """What the directory shows needs no unpacking to be counted."""
    archive = make_zip([(f"f{index}", b"") for index in range(50)])
    assert "50 entries" in refusal(archive, target, max_entries=49)
    assert not list(target.iterdir())


def test_a_long_extended_header_is_refused_before_it_is_read(target: Path) -> None:
    """tarfile would read a header of a gigabyte, which gzip makes of a megabyte, into memory."""
    header = tar_info("x", type=tarfile.XHDTYPE, size=1 << 30).tobuf(tarfile.USTAR_FORMAT)
    assert "extended headers are too long" in refusal(gzip.compress(header), target)


def test_many_extended_headers_are_refused(target: Path) -> None:
    """None of them too long, and yet too many of them."""
    members = []
    for index in range(600):
        info = tar_info(f"f{index}", size=0)
        info.pax_headers = {"comment": "x" * 12_000}
        members.append((info, b""))
    assert "extended headers are too long" in refusal(make_tgz_of(members), target)


def test_a_negative_size_does_not_go_round_in_circles(target: Path) -> None:
    """tarfile followed such a header backwards for ever (CVE-2025-8194)."""
    block = bytearray(tar_info("x", size=0).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 10 + b"\xfc\x00"  # -1024 in base 256
    block[148:156] = b"        "
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    refusal(gzip.compress(bytes(block) + bytes(1024)), target)


def test_endless_zeros_after_the_end_are_refused(target: Path) -> None:
    """What follows the last entry is no place to hide gigabytes either."""
    archive = gzip.decompress(make_tgz(GOOD))
    assert "follow the end" in refusal(gzip.compress(archive + bytes(4 << 20)), target)


# ------------------------------------------------------------------------------------------ damage


@both
@settings(max_examples=60)
@given(data=st.data())
def test_a_truncated_archive_is_refused(make: Callable[[Files], bytes], data: st.DataObject) -> None:
    """Cut off at any byte: never taken for a smaller archive."""
    archive = make(GOOD)
    size = data.draw(st.integers(0, len(archive) - 1))
    with tempfile.TemporaryDirectory() as scratch:
        refusal(archive[:size], Path(scratch, "inner", "target"))


@both
@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_archive_is_refused_or_harmless(make: Callable[[Files], bytes], data: st.DataObject) -> None:
    """A flipped byte ends in our own error or in files inside the folder, in nothing else."""
    archive = bytearray(make(GOOD))
    at = data.draw(st.integers(0, len(archive) - 1))
    archive[at] ^= data.draw(st.integers(1, 255))
    with tempfile.TemporaryDirectory() as scratch:
        try:
            run(bytes(archive), Path(scratch, "inner", "target"))
        except InvalidArchive:
            pass
        assert [path.name for path in Path(scratch).iterdir()] == ["inner"]
        assert [path.name for path in Path(scratch, "inner").iterdir()] in (["target"], [])


@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_tar_below_its_gzip_is_refused_or_harmless(data: st.DataObject) -> None:
    """The same for headers whose compression is intact: made by an enemy, not by a bad disk."""
    archive = bytearray(gzip.decompress(make_tgz(GOOD))[:16384])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 511) | st.integers(0, len(archive) - 1))
        archive[at] = data.draw(st.integers(0, 255))
    block = archive[:512]
    block[148:156] = b"        "
    archive[148:156] = f"{sum(block):06o}\0 ".encode()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            run(gzip.compress(bytes(archive), 1), Path(scratch, "inner", "target"))
        except InvalidArchive:
            pass
        assert [path.name for path in Path(scratch).iterdir()] == ["inner"]


def test_a_wrong_checksum_is_refused(target: Path) -> None:
    """A file whose content is not what was packed is named."""
    archive = make_zip([("weights.pt", b"0123456789")], zipfile.ZIP_STORED)
    assert "weights.pt" in refusal(archive.replace(b"0123456789", b"0123456780"), target)
    bad = bytearray(make_tgz(GOOD))
    bad[-8:-4] = struct.pack("<I", zlib.crc32(bytes(bad[-8:-4])))
    assert "CRC" in refusal(bytes(bad), target.parent.parent / "again" / "target")


def test_a_damaged_header_is_not_taken_for_the_end(target: Path) -> None:
    """tarfile ends without a word at a header that is none; half a model is worse than none."""
    archive = bytearray(gzip.decompress(make_tgz([("a", b"1"), ("b", b"2")])))
    archive[1024 + 148] ^= 0x07
    assert "next entry" in refusal(gzip.compress(bytes(archive)), target)


def test_an_encrypted_entry_is_refused(target: Path) -> None:
    """Nobody could give the password."""
    archive = bytearray(make_zip([("a", b"1")]))
    archive[archive.find(b"PK\x03\x04") + 6] |= 1
    archive[archive.find(b"PK\x01\x02") + 8] |= 1
    assert "'a' is encrypted" in refusal(bytes(archive), target)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(method: int, target: Path) -> None:
    """lzma lets a header ask for gigabytes of memory; the archiver writes neither of them."""
    assert "only stored and deflated" in refusal(make_zip(GOOD, method), target)


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it begins with b'vers'"),
        (b"<!DOCTYPE html>", "zip files"),
        (b"PK\x03\x04 but no more", "damaged"),
        (gzip.compress(b""), "damaged"),
        (gzip.compress(b"no tar at all" * 100), "damaged"),
        (gzip.compress(bytes(10240)), "no files"),
        (b"\x1f\x8b\x08 but no more", "damaged"),
    ],
    ids=["empty", "git-lfs", "html", "cut zip", "gzip of nothing", "gzip of text", "gzip of zeros", "cut gzip"],
)
def test_what_is_no_archive_is_refused(content: bytes, expected: str, target: Path) -> None:
    """The message says what was found instead."""
    assert expected in refusal(content, target)


@both
def test_an_archive_without_files_is_refused(make: Callable[[Files], bytes], target: Path) -> None:
    """Folders alone are no model."""
    assert "no files" in refusal(make([]), target)


# -------------------------------------------------------------------------------------------- edges


def test_an_error_of_the_disk_is_no_fault_of_the_archive(target: Path) -> None:
    """A full or broken disk shows as what it is."""

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 100:
                raise OSError(5, "Input/output error")
            return super().read(min(size or 0, 50) if size and size > 0 else size)

    target.parent.mkdir()
    with pytest.raises(OSError, match="Input/output"):
        unpack(Broken(make_tgz(GOOD)), target, source="m.mar")


def test_unpacking_ends_when_told(target: Path) -> None:
    """What keep_on raises comes through as it is."""

    def keep_on() -> Iterator[None]:
        raise KeyError("closed")

    target.parent.mkdir()
    file: IO[bytes] = io.BytesIO(make_zip(GOOD))
    with pytest.raises(KeyError, match="closed"):
        unpack(file, target, source="m.mar", keep_on=keep_on)


@pytest.mark.parametrize("name", ["max_bytes", "max_entries", "max_ratio", "ratio_floor_bytes"])
@pytest.mark.parametrize("value", [-1, 1.5, "10", True, None])
def test_limits_are_whole_numbers(name: str, value: object) -> None:
    """A wrong limit is an error that names it, not an open door."""
    with pytest.raises(InvalidArgument) as caught:
        UnpackLimits(**{name: value})  # type: ignore[arg-type]
    assert caught.value.argument == name
