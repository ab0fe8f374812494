"""Downloads from a real server on this machine: what is allowed, bounded, believed, remembered, shown and left behind."""

from __future__ import annotations

import hashlib
import io
import logging
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tests.unit.file_server import FileServer, answers, redirects, with_etag
from torchmgmt.archive import DownloadLimits, ModelSources, copying, pristine
from torchmgmt.archive.allowed import Rules
from torchmgmt.archive.urls import Source
from torchmgmt.errors import DownloadFailed, InvalidArchive, InvalidArgument, ManagerClosed, SourceNotAllowed
from torchmgmt.events import DownloadProgress, Event


def archive(text: str = "x = 1\n") -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as zipped:
        zipped.writestr("handler.py", text)
    return packed.getvalue()


MAR = archive()
DIGEST = hashlib.sha256(MAR).hexdigest()


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


@pytest.fixture(params=["private", "shared"])
def cache_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "cache" if request.param == "shared" else None


@pytest.fixture
def open_sources() -> Iterator[Callable[..., ModelSources]]:
    opened: list[ModelSources] = []

    def make(**more: object) -> ModelSources:
        opened.append(ModelSources(None, **more))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for sources in opened:
        sources.close()


def left(*folders: Path | None) -> list[str]:
    """What lies in the folders, kept archives, records of URLs and the file of locks aside."""
    found = [
        path
        for folder in folders
        if folder and folder.exists()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".locks"
    ]
    return [str(path) for path in found if path.parent.name != "archives" and path.suffix != ".json"]


# ---------------------------------------------------------------------------------------- what comes


def test_an_archive_is_fetched_and_gone_when_released(open_sources, server, cache_dir, temp) -> None:
    """Its digest is known; nothing but what a persistent cache keeps is left after the last release."""
    with open_sources(cache_dir=cache_dir).open(server.url("/m.mar")) as folder:
        assert (folder.path / "handler.py").read_text() == "x = 1\n"
        assert folder.digest == DIGEST
    assert left(temp, cache_dir) == []
    assert not list(temp.iterdir())


def test_a_url_is_asked_again_and_never_stale(open_sources, server, cache_dir) -> None:
    """Unchanged content in use is not sent twice; changed content is in new folders, and the old one stays as it was."""
    server.paths["/e.mar"] = with_etag(MAR, '"one"')
    sources = open_sources(cache_dir=cache_dir)
    with sources.open(server.url("/e.mar")) as first, sources.open(server.url("/e.mar")) as again:
        assert again.digest == first.digest
        assert again.path != first.path
        assert server.asked[-1][1]["if-none-match"] == '"one"'
        server.paths["/e.mar"] = with_etag(archive("x = 2\n"), '"two"')
        with sources.open(server.url("/e.mar")) as changed:
            assert (changed.path / "handler.py").read_text() == "x = 2\n"
            assert (first.path / "handler.py").read_text() == "x = 1\n"


def test_a_server_that_names_no_content_is_fetched_from_each_time(open_sources, server, cache_dir) -> None:
    """Without ETag or settled Last-Modified nothing tells whether it changed."""
    sources = open_sources(cache_dir=cache_dir)
    with sources.open(server.url("/m.mar")):
        server.paths["/m.mar"] = answers(archive("x = 2\n"))
        with sources.open(server.url("/m.mar")) as changed:
            assert (changed.path / "handler.py").read_text() == "x = 2\n"


def test_a_persistent_cache_outlives_its_program(open_sources, server, tmp_path) -> None:
    """The next one asks the server and need not fetch what is unchanged; a damaged file in the cache is not used."""
    server.paths["/e.mar"] = with_etag(MAR, '"one"')
    cache = tmp_path / "cache"
    open_sources(cache_dir=cache).open(server.url("/e.mar")).release()
    with open_sources(cache_dir=cache).open(server.url("/e.mar")) as folder:
        assert folder.digest == DIGEST
    assert server.asked[-1][1]["if-none-match"] == '"one"'
    (cache / "archives" / DIGEST).write_bytes(b"damaged")
    with open_sources(cache_dir=cache).open(server.url("/e.mar")) as folder:
        assert folder.digest == DIGEST
    assert "if-none-match" not in server.asked[-1][1]


def test_kept_archives_are_bounded(open_sources, server, tmp_path) -> None:
    """The one not used for longest goes first."""
    sources = open_sources(cache_dir=tmp_path / "cache", max_cache_bytes=len(MAR))
    server.paths["/2.mar"] = answers(archive("x = 2\n"))
    for path in ("/m.mar", "/2.mar"):
        sources.open(server.url(path)).release()
    kept = [path.name for path in (tmp_path / "cache" / "archives").iterdir()]
    assert kept == [hashlib.sha256(archive("x = 2\n")).hexdigest()]


def test_two_at_once_fetch_once(open_sources, server, cache_dir) -> None:
    """Who comes second waits and has the same content."""
    arrived = threading.Event()

    def slow(request: BaseHTTPRequestHandler) -> None:
        arrived.set()
        server.released.wait(30)
        answers(MAR)(request)

    server.paths["/slow.mar"] = slow
    sources = open_sources(cache_dir=cache_dir)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(sources.open, server.url("/slow.mar"))
        assert arrived.wait(30)
        second = pool.submit(sources.open, server.url("/slow.mar"))
        while sources._downloads._turns[next(iter(sources._downloads._turns))].users < 2:  # no event tells of it
            assert not second.done()
        server.released.set()
        with first.result(30) as one, second.result(30) as two:
            assert one.digest == two.digest
            assert (two.path / "handler.py").read_text() == "x = 1\n"
    assert len(server.asked) == 1


# ------------------------------------------------------------------------------------------- pinning


def test_a_pinned_digest_is_required(open_sources, server, cache_dir, temp) -> None:
    """Of URLs and files alike; a URL whose content is at hand by its digest needs no server."""
    sources = open_sources(cache_dir=cache_dir)
    with pytest.raises(DownloadFailed, match=f"its SHA-256 is {DIGEST}, but #sha256={'0' * 64} was asked for"):
        sources.open(server.url("/m.mar") + "#sha256=" + "0" * 64)
    assert left(temp, cache_dir) == []
    with sources.open(server.url("/m.mar") + "#sha256=" + DIGEST.upper()) as folder:
        assert folder.digest == DIGEST
        asked = len(server.asked)
        sources.open(server.url("/m.mar") + "#sha256=" + DIGEST).release()
        assert len(server.asked) == asked


def test_a_file_with_another_digest_is_refused(open_sources, tmp_path) -> None:
    """And a folder has none."""
    (tmp_path / "m.mar").write_bytes(MAR)
    sources = open_sources()
    with pytest.raises(InvalidArchive, match="was asked for"):
        sources.open(f"{tmp_path}/m.mar#sha256={'0' * 64}")
    sources.open(f"{tmp_path}/m.mar#sha256={DIGEST}").release()
    with pytest.raises(InvalidArchive, match="it is a folder"):
        sources.open(f"{tmp_path}#sha256={DIGEST}")


@pytest.mark.parametrize("end", ["#sha256=", "#sha256=12", "#sha256=" + "g" * 64, "#md5=1", "#x"])
def test_half_a_digest_is_an_invalid_argument(open_sources, end) -> None:
    """It is never dropped unchecked."""
    with pytest.raises(InvalidArgument, match="64 hexadecimal digits"):
        open_sources().open("http://127.0.0.1:1/m.mar" + end)


# -------------------------------------------------------------------------------------------- limits


def _trickle(server: FileServer) -> Callable[[BaseHTTPRequestHandler], None]:
    def respond(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        while not server.released.wait(0.01):
            request.wfile.write(b"x")

    return respond


def _stall(server: FileServer) -> Callable[[BaseHTTPRequestHandler], None]:
    def respond(request: BaseHTTPRequestHandler) -> None:
        answers(b"xx", length=10)(request)
        server.released.wait(30)

    return respond


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda _: answers(b"", status=404), "the server answered 404 Not Found"),
        (lambda _: answers(b"x" * 3000, length=None), "it is larger; allowed are 2000 bytes"),
        (lambda _: answers(b"x", length=3000), "it has 3000 bytes; allowed are 2000 bytes"),
        (lambda _: answers(MAR, sent=50), "the connection ended before all of it came"),
        (_trickle, "longer than 0.5 s in all"),
        (_stall, "nothing came for 0.2 s"),
        (lambda server: redirects(server.url("/bad")), "it redirects more than 10 times"),
        (lambda _: redirects("file:///etc/passwd"), "which is no http(s) URL"),
    ],
    ids=["status", "large", "said-large", "cut", "trickle", "stall", "circle", "redirect-to-file"],
)
def test_a_failed_download_says_why_and_leaves_nothing(open_sources, server, cache_dir, temp, make, reason) -> None:
    """The text begins as the contract has it."""
    server.paths["/bad"] = make(server)
    limits = DownloadLimits(max_bytes=2000, timeout_s=0.5, stall_s=0.2)
    with pytest.raises(DownloadFailed) as caught:
        open_sources(cache_dir=cache_dir, download_limits=limits).open(server.url("/bad"))
    assert str(caught.value).startswith(f"Failed to download archive from: {server.url('/bad')}: ")
    assert reason in str(caught.value)
    assert left(temp, cache_dir) == []


def test_nobody_there(open_sources, server) -> None:
    """A port that nobody listens on, and a name that nobody has."""
    with pytest.raises(DownloadFailed, match="Connection refused"):
        open_sources().open("http://127.0.0.1:1/m.mar")
    with pytest.raises(DownloadFailed, match=r"the host nowhere.invalid is unknown"):
        open_sources().open("http://nowhere.invalid/m.mar")


def test_a_hostile_archive_from_a_server_leaves_nothing(open_sources, server, cache_dir, temp) -> None:
    """It is neither unpacked nor kept."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as zipped:
        zipped.writestr("../../out.py", "x")
    server.paths["/slip.mar"] = answers(packed.getvalue())
    with pytest.raises(InvalidArchive, match=r"\.\./\.\./out\.py"):
        open_sources(cache_dir=cache_dir).open(server.url("/slip.mar"))
    assert left(temp, cache_dir) == []
    assert cache_dir is None or not list((cache_dir / "archives").iterdir())


def test_closing_ends_a_download(open_sources, server, cache_dir, temp) -> None:
    """At once, whatever the limits are."""
    arrived = threading.Event()

    def hang(request: BaseHTTPRequestHandler) -> None:
        answers(b"x", length=10)(request)
        arrived.set()
        server.released.wait(30)

    server.paths["/hang"] = hang
    sources = open_sources(cache_dir=cache_dir)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(sources.open, server.url("/hang"))
        assert arrived.wait(30)
        sources.close()
        with pytest.raises(ManagerClosed):
            waiting.result(30)
    assert left(temp, cache_dir) == []


# ------------------------------------------------------------------------------------ what is allowed


def test_who_may_fetch(open_sources, server) -> None:
    """By default a caller on this machine or with a key; what is refused is not asked for."""
    sources = open_sources()
    with pytest.raises(SourceNotAllowed, match=r"does not match any allowed URL.*allowed_urls"):
        sources.open(server.url("/m.mar"), trusted=False)
    assert not server.asked
    sources.open(server.url("/m.mar"), trusted=False, may_fetch=True).release()


def test_patterns_are_about_the_whole_url(open_sources, server) -> None:
    """They decide alone: a caller who may fetch gets no further, one who may not gets as far."""
    sources = open_sources(allowed_urls=[server.url("/m") + r"\.mar"])
    sources.open(server.url("/m.mar"), trusted=False).release()
    asked = len(server.asked)
    for path in ("/m.mar?x=1", "/m.mar2", "/x/../m.mar", "/%2e%2e/m.mar"):
        with pytest.raises(SourceNotAllowed):
            sources.open(server.url(path), trusted=False, may_fetch=True)
    assert len(server.asked) == asked


@pytest.mark.parametrize(
    "target", ["http://169.254.169.254/latest", "http://[::ffff:169.254.1.1]/", "http://[fe80::1]/"]
)
def test_no_redirect_leads_to_a_link_local_host(open_sources, server, target) -> None:
    """Nor does a first request; the library may go anywhere."""
    server.paths["/r"] = redirects(target)
    for url in (target, server.url("/r")):
        with pytest.raises(SourceNotAllowed, match="link-local"):
            open_sources().open(url, trusted=False, may_fetch=True)


def test_a_redirect_is_checked_before_it_is_followed(open_sources, server) -> None:
    """By the patterns, too."""
    server.paths["/r"] = redirects("/m.mar")
    sources = open_sources(allowed_urls=[server.url("/r")])
    with pytest.raises(SourceNotAllowed):
        sources.open(server.url("/r"), trusted=False)
    assert [path for path, _ in server.asked] == ["/r"]
    sources.open(server.url("/r")).release()


def test_a_name_that_resolves_to_a_link_local_address_is_refused(monkeypatch) -> None:
    """Before it is connected to; and after, for a name that had another address a moment ago."""
    monkeypatch.setattr("socket.getaddrinfo", lambda *_a, **_k: [(2, 1, 6, "", ("169.254.169.254", 0))])
    rules, named = Rules(None, may_fetch=True), Rules([r"http://meta\.test/.*"])
    for check in (rules.check_host, lambda url, shown: rules.check_peer(url, "169.254.169.254", shown)):
        with pytest.raises(SourceNotAllowed, match="link-local"):
            check("http://meta.test/x", "shown")
    named.check_host("http://meta.test/x", "shown")
    with pytest.raises(SourceNotAllowed):
        Rules([".*"]).check_host("http://meta.test/x", "shown")


# -------------------------------------------------------------------------------- secrets and progress


def test_credentials_are_used_but_not_shown(open_sources, server, caplog) -> None:
    """In no log, event, error or description."""
    caplog.set_level(logging.DEBUG)
    events: list[Event] = []
    url = server.url("/m.mar?X-Amz-Signature=hidden1&v=1").replace("//", "//me:hidden2@")
    sources = open_sources(listener=events.append)
    with sources.open(url) as folder:
        assert folder.url.endswith("/m.mar?X-Amz-Signature=***&v=1")
        assert "***@127.0.0.1" in folder.url
    assert server.asked[0][1]["authorization"].startswith("Basic ")
    server.paths["/m.mar"] = answers(b"", status=403)
    with pytest.raises(DownloadFailed) as caught:
        sources.open(url)
    with pytest.raises(SourceNotAllowed) as refused:
        sources.open(url, trusted=False)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("torchmgmt")]
    assert "hidden" not in " ".join(
        [str(caught.value), str(refused.value), repr(Source.parse(url)), *ours, *map(str, events)]
    )


def test_progress_is_told(open_sources, server, monkeypatch, caplog) -> None:
    """As events and in the log: on the way, and at the end."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("torchmgmt.archive.transfer.PROGRESS_S", 0.0)
    events: list[Event] = []
    open_sources(listener=events.append).open(server.url("/m.mar")).release()
    told = [event for event in events if isinstance(event, DownloadProgress)]
    assert len(told) >= 2
    assert {event.total_bytes for event in told} == {len(MAR)}
    assert told[-1].received_bytes == len(MAR)
    assert "Downloading" in caplog.text
    assert "Downloaded" in caplog.text


# ------------------------------------------------------------------------------------- further schemes


def test_other_schemes_come_through_fsspec(open_sources, cache_dir) -> None:
    """Asked for with the extra; callers over HTTP need a pattern."""
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.pipe("/models/m.mar", MAR)
    try:
        sources = open_sources(cache_dir=cache_dir)
        with sources.open("memory://models/m.mar") as folder:
            assert folder.digest == DIGEST
        with pytest.raises(DownloadFailed, match="nothing is there"):
            sources.open("memory://models/none.mar")
        with pytest.raises(SourceNotAllowed, match="allowed_urls"):
            sources.open("memory://models/m.mar", trusted=False, may_fetch=True)
    finally:
        memory.rm("/models", recursive=True)


def test_without_fsspec_the_error_says_what_to_install(open_sources, monkeypatch) -> None:
    """Word for word what can be typed."""
    monkeypatch.setitem(__import__("sys").modules, "fsspec.core", None)
    with pytest.raises(DownloadFailed) as caught:
        open_sources().open("s3://bucket/m.mar")
    assert "pip install torchmgmt[remote]" in str(caught.value)


def test_what_a_version_wrote_over_is_fetched_again(open_sources, server, cache_dir, monkeypatch) -> None:
    """A URL's content of which the only copy was lent to a version that wrote to it is not what the next version gets."""
    monkeypatch.setattr(pristine, "LARGE_BYTES", 1)
    for module in (copying, pristine):
        monkeypatch.setattr(module, "is_write_protected", lambda path: False)
    server.paths["/e.mar"] = with_etag(MAR, '"one"')
    sources = open_sources(cache_dir=cache_dir)
    with sources.open(server.url("/e.mar")) as first:
        (first.path / "handler.py").write_text("x = 3\n")
        with sources.open(server.url("/e.mar")) as second, sources.open(server.url("/e.mar")) as third:
            assert [(each.path / "handler.py").read_text() for each in (second, third)] == ["x = 1\n"] * 2
            assert (first.path / "handler.py").read_text() == "x = 3\n"
