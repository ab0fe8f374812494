"""What servers, disks, clocks and neighbours do to a download that nobody planned for."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tests.unit.file_server import FileServer, Respond, answers, redirects, with_etag
from tests.unit.test_archive_download import DIGEST, MAR
from torchmgmt.archive import DownloadLimits, ModelSources
from torchmgmt.archive.cache import UnpackedArchives
from torchmgmt.archive.shelves import SharedShelf
from torchmgmt.archive.transfer import Validators
from torchmgmt.archive.url_memory import Record, SharedMemory
from torchmgmt.archive.urls import Source
from torchmgmt.errors import DownloadFailed, InvalidArgument, TorchmgmtError
from torchmgmt.redaction import redacted


@pytest.fixture(autouse=True)
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of the test's own, and no proxy."""
    folder = tmp_path / "temp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("NO_PROXY", "*")
    return folder


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer().running() as running:
        running.paths["/m.mar"] = answers(MAR)
        yield running


@pytest.fixture
def sources(tmp_path: Path) -> Iterator[ModelSources]:
    sources = ModelSources(None, cache_dir=tmp_path / "cache")
    yield sources
    sources.close()


def send(request: BaseHTTPRequestHandler, raw: bytes) -> None:
    request.wfile.write(raw)


# -------------------------------------------------------------------------------------- odd answers


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "1_0", "\u0665", "12, 12"])
def test_a_length_that_is_none_is_not_believed(sources: ModelSources, server: FileServer, length: str) -> None:
    """Whatever it says: what comes is counted, and what cannot be read ends in our error."""
    raw = f"HTTP/1.0 200 OK\r\nContent-Length: {length}\r\n\r\n".encode() + MAR
    server.paths["/m.mar"] = lambda request: send(request, raw)
    try:
        sources.open(server.url("/m.mar")).release()
    except TorchmgmtError:
        pass


@pytest.mark.parametrize("status", [302, 500])
def test_the_body_of_what_is_no_archive_is_not_read(sources: ModelSources, server: FileServer, status: int) -> None:
    """An endless one would fill the memory before anything is counted."""
    most = 64 << 20  # what the sockets hold is a few megabytes
    sent = 0

    def endless(request: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        answers(b"", status=status, length=None, Location="/m.mar")(request)
        while sent < most:
            sent += request.wfile.write(bytes(1 << 20))

    server.paths["/endless"] = endless
    try:
        sources.open(server.url("/endless")).release()
    except DownloadFailed:
        assert status == 500
    assert sent < most


@pytest.mark.parametrize(
    "target", ["http://[::1", "http://", "https://exa mple/", "http://a:b:c/", "http://x:99999999/"]
)
def test_a_redirect_to_nowhere_is_the_servers_fault(sources: ModelSources, server: FileServer, target: str) -> None:
    """It is a failed download, not an argument that the caller got wrong."""
    server.paths["/r"] = redirects(target)
    with pytest.raises(DownloadFailed):
        sources.open(server.url("/r"))


def test_a_certificate_bundle_that_is_not_there_is_named(
    sources: ModelSources, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no error of the disk that the archive was to be written to."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/bundle.pem")
    with pytest.raises(DownloadFailed, match=r"/nowhere/bundle\.pem"):
        sources.open(server.url("/m.mar").replace("http:", "https:"))


def test_no_limit_is_too_long_to_wait_for(server: FileServer) -> None:
    """What the system's timers cannot hold counts as very long."""
    sources = ModelSources(None, download_limits=DownloadLimits(timeout_s=1e300, stall_s=float("inf")))
    sources.open(server.url("/m.mar")).release()
    sources.close()
    with pytest.raises(InvalidArgument, match="timeout_s"):
        DownloadLimits(timeout_s=float("nan"))


# ------------------------------------------------------------------------------------ what is shown


@pytest.mark.parametrize(
    "url",
    [
        "https://me:hid?den@host/m.mar",
        "https://me:hid#den@host/m.mar",
        " https://me:hid@host/m.mar",
        "https://me:hid@host/\0",
        "s3://me:hid@bucket/m.mar#sha256=1",
    ],
)
def test_a_url_with_a_mistake_still_shows_no_password(sources: ModelSources, url: str) -> None:
    """The error that it is given names it without."""
    with pytest.raises(TorchmgmtError) as caught:
        sources.open(url)
    assert "hid" not in str(caught.value)
    assert "hid" not in repr(caught.value)


@pytest.mark.parametrize(
    "url", ["https://host/a/m.mar?version=3&x=@", "https://host/a@b/m.mar", "file:///a@b/m.mar", "s3://bucket/a@b"]
)
def test_what_is_no_secret_is_shown(url: str) -> None:
    """The rest of a URL is what the model is known by."""
    assert redacted(url) == url


@pytest.mark.parametrize("name", ["X-Amz-Signature", "sig", "api_key", "tok%65n", "GoogleAccessId", "auth_code"])
def test_a_secret_in_a_query_is_hidden_however_it_is_called(name: str) -> None:
    """What clouds and stores call theirs; what only sounds like it is shown."""
    assert redacted(f"https://host/m.mar?design=1&{name}=hid&decode=2#sha256=3") == (
        f"https://host/m.mar?design=1&{name}=***&decode=2#sha256=3"
    )


def test_a_file_may_be_called_as_it_likes() -> None:
    """Only URLs have credentials."""
    assert Source.parse("key=1?token=2.mar").shown == "key=1?token=2.mar"


# ----------------------------------------------------------------------------- what neighbours may do


def test_looking_at_a_kept_archive_disturbs_nobody(tmp_path: Path) -> None:
    """Who unpacks it in this moment must not take it for one that is being written to."""
    memory = SharedMemory(tmp_path, 1 << 20, lambda: None)
    (tmp_path / "m.mar").write_bytes(MAR)
    with memory.turn("k"):
        memory.keep(DIGEST, tmp_path / "m.mar")
    kept = tmp_path / "archives" / DIGEST
    os.utime(kept, ns=(1, 1))
    assert memory.kept(DIGEST) == kept
    assert kept.stat().st_mtime_ns == 1
    assert kept.stat().st_atime_ns > 1


def test_what_was_used_last_is_kept_longest(tmp_path: Path) -> None:
    """Use, and not arrival, decides what goes when there is too much; nothing is kept if nothing may be."""
    memory = SharedMemory(tmp_path, 2 * len(MAR), lambda: None)

    def keep(name: str, memory: SharedMemory = memory) -> None:
        (tmp_path / "new").write_bytes(MAR)
        memory.keep(name, tmp_path / "new")

    def kept() -> list[str]:
        return sorted(path.name for path in (tmp_path / "archives").iterdir())

    with memory.turn("k"):
        for at, name in enumerate(("first", "second")):
            keep(name)
            os.utime(tmp_path / "archives" / name, ns=(at + 1, at + 1))
        memory.kept("first")
        keep("third")
        assert kept() == ["first", "third"]
        keep("fourth", SharedMemory(tmp_path, 0, lambda: None))
    assert kept() == []


def test_a_cache_that_somebody_removed_is_made_again(tmp_path: Path, server: FileServer, sources: ModelSources) -> None:
    """Also in the middle of a program's life."""
    sources.open(server.url("/m.mar")).release()
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    with sources.open(server.url("/m.mar")) as folder:
        assert folder.digest == DIGEST


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"digest": "../../x", "validators": {}, "number": "1"}',
        '{"digest": 3, "validators": {}, "number": "1"}',
        json.dumps({"digest": DIGEST, "validators": {"x": 1}, "number": "1"}),
    ],
)
def test_a_record_that_makes_no_sense_is_none(tmp_path: Path, server: FileServer, text: str) -> None:
    """It is fetched anew, and nothing outside of the cache is looked at."""
    server.paths["/e.mar"] = with_etag(MAR, '"one"')
    cache = tmp_path / "cache"

    def fetch() -> None:
        sources = ModelSources(None, cache_dir=cache)
        sources.open(server.url("/e.mar")).release()
        sources.close()

    fetch()
    (record,) = (cache / "urls").iterdir()
    record.write_text(text)
    fetch()
    assert "if-none-match" not in server.asked[-1][1]
    assert json.loads(record.read_text())["digest"] == DIGEST


def test_a_record_does_not_hold_the_url(tmp_path: Path, server: FileServer, sources: ModelSources) -> None:
    """What opens a store is not written down, neither in the clear nor in a file's name."""
    sources.open(server.url("/m.mar?token=hidden").replace("//", "//me:hidden@")).release()
    found = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not [path for path in found if re.search(rb"hidden|127\.0", path.name.encode() + path.read_bytes())]


def test_one_digest_is_unpacked_once_whoever_asks(tmp_path: Path) -> None:
    """Two owners of a shared shelf in one program see each other's copy, and the last one removes it."""
    (tmp_path / "m.mar").write_bytes(MAR)
    owners = [UnpackedArchives(shelf=SharedShelf(tmp_path / "shelf")) for _ in range(2)]
    leases = [owner.acquire(tmp_path / "m.mar", "m") for owner in owners]
    assert leases[0].folder == leases[1].folder
    known = owners[0].acquire_known(leases[0].digest)
    assert known is not None
    known.release()
    leases[0].release()
    assert (leases[1].folder / "handler.py").exists()
    leases[1].release()
    assert list((tmp_path / "shelf").iterdir()) == []
    assert owners[0].acquire_known(leases[0].digest) is None
    assert list((tmp_path / "shelf").iterdir()) == []
    for owner in owners:
        owner.close()


def test_records_of_two_asks_differ() -> None:
    """That is how one who waited knows that somebody asked meanwhile, though the answer was the same."""
    assert Record(DIGEST, Validators()) != Record(DIGEST, Validators())


def test_last_modified_is_trusted_once_it_has_settled(sources: ModelSources, server: FileServer) -> None:
    """A file that changed within the minute before it was sent may change again without a new date; a weak ETag is no
    name for bytes."""
    dates = {
        "/settled": ("Mon, 02 Mar 2026 10:00:00 GMT", {"If-Modified-Since"}),
        "/fresh": ("Mon, 02 Mar 2026 10:59:30 GMT", set()),
        "/broken": ("yesterday", set()),
    }

    def respond(modified: str) -> Respond:
        head = f'Last-Modified: {modified}\r\nDate: Mon, 02 Mar 2026 11:00:00 GMT\r\nETag: W/"weak"'
        return lambda request: send(request, f"HTTP/1.0 200 OK\r\n{head}\r\n\r\n".encode() + MAR)

    for path, (modified, expected) in dates.items():
        server.paths[path] = respond(modified)
        with sources.open(server.url(path)), sources.open(server.url(path)):
            pass
        asked = set(server.asked[-1][1])
        assert {name for name in ("If-Modified-Since", "If-None-Match") if name.lower() in asked} == expected


def test_what_was_shown_of_a_url_is_no_url(sources: ModelSources, server: FileServer) -> None:
    """A state that was saved, or a description, has no credentials; asking with asterisks would only confuse."""
    for url in (server.url("/m.mar?token=x"), server.url("/m.mar").replace("//", "//me:hidden@")):
        with sources.open(url) as folder, pytest.raises(DownloadFailed, match="give them anew"):
            sources.open(folder.url)
    assert len(server.asked) == 2
