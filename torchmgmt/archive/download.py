"""Fetching an archive over HTTP: redirects by hand, each one checked, and nothing believed that a server says of itself."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, cast

from torchmgmt.archive.allowed import Rules, refuse_dots
from torchmgmt.archive.transfer import Transfer, Validators
from torchmgmt.errors import InvalidArgument
from torchmgmt.redaction import redacted

# requests and urllib3 cost 40 ms and 10 MB, which only who downloads pays.
if TYPE_CHECKING:
    import requests
    from requests.adapters import HTTPAdapter

__all__ = ["fetch_http"]

CHUNK_BYTES = 64 << 10
MAX_REDIRECTS = 10
MAX_CONNECT_S = 30.0
# A file that changed twice within a second has one Last-Modified; within a minute clocks may disagree (RFC 9110, 8.8.2.2).
SETTLED_S = 60


def fetch_http(
    transfer: Transfer, into: IO[bytes], rules: Rules | None, known: Validators | None
) -> tuple[str, Validators] | None:
    """Fetch ``transfer.source`` into ``into``; return its SHA-256 and what the server calls this content.

    Blocks within the transfer's limits. Proxies, certificates and ``.netrc`` are taken from the environment as requests
    does.

    Args:
        transfer: what to fetch, within which limits.
        into: an empty file.
        rules: what the caller may fetch from, checked before each request and on each connection; None: anything. What a
            proxy connects to cannot be seen: there the host is checked by what it resolves to here.
        known: what the server called the content that is at hand; None is returned if it is still that.

    Raises:
        SourceNotAllowed: the URL, or one that it redirects to, is not allowed; nothing is asked of that one.
        DownloadFailed: anything else, with the reason.
        InvalidArgument: it is no URL.
        OSError: the disk is full or fails.
    """
    if rules is not None:
        refuse_dots(transfer.source.place, transfer.source.shown)
    url = _prepared(transfer, transfer.source.place)
    with _session() as session:
        for _ in range(MAX_REDIRECTS + 1):
            with _answer(session, transfer, url, rules, known) as answer:
                if answer.status_code == 304 and known:
                    return None
                if not answer.is_redirect:
                    return _receive(transfer, answer, into)
                url = _next_url(session, transfer, answer, url)
    raise transfer.failed(f"it redirects more than {MAX_REDIRECTS} times")


def _session() -> requests.Session:
    import requests

    class Session(requests.Session):
        def get_redirect_target(self, resp: requests.Response) -> None:
            """Say that there is none: told not to follow one, requests still reads the whole of its body into memory."""

    return Session()


def _prepared(transfer: Transfer, url: str) -> str:
    """Return the URL as it is going to be requested: rules must see what the server sees."""
    import requests

    prepared = requests.PreparedRequest()
    try:
        prepared.prepare_url(url, None)
    except (requests.RequestException, ValueError):
        raise InvalidArgument(
            "url", transfer.source.shown, "a URL that can be requested: http(s)://host/path"
        ) from None
    return str(prepared.url)


def _without_user(url: str) -> str:
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


@contextmanager
def _answer(
    session: requests.Session, transfer: Transfer, url: str, rules: Rules | None, known: Validators | None
) -> Iterator[requests.Response]:
    import requests

    bare, shown = _without_user(url), redacted(url)
    if rules is not None:
        rules.check_url(bare, shown)
        rules.check_host(bare, shown)
    transfer.check()

    def on_connected(connection: socket.socket, is_direct: bool) -> None:
        transfer.watch(connection)
        if rules is not None and is_direct:
            rules.check_peer(bare, connection.getpeername()[0], shown)

    adapter = _adapter(on_connected)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    stall_s = transfer.limits.stall_s
    timeout = (min(stall_s, MAX_CONNECT_S), stall_s)
    with contextlib.closing(adapter), _failures(transfer, url):
        try:
            answer = session.get(url, headers=_headers(known), stream=True, allow_redirects=False, timeout=timeout)
        except (requests.RequestException, UnicodeError):
            raise
        except (OSError, ValueError) as error:  # REQUESTS_CA_BUNDLE names no file, or the like
            raise transfer.failed(str(error)) from None
        with answer:
            yield answer


def _headers(known: Validators | None) -> Mapping[str, str]:
    # No compression on the way: the digest is that of the file. A cache on the way must ask the server, too.
    headers = {"Accept-Encoding": "identity", "Cache-Control": "no-cache", "User-Agent": "torchmgmt"}
    if known and known.etag:
        headers["If-None-Match"] = known.etag
    elif known and known.last_modified:
        headers["If-Modified-Since"] = known.last_modified
    return headers


def _next_url(session: requests.Session, transfer: Transfer, answer: requests.Response, url: str) -> str:
    from urllib.parse import urljoin

    import requests

    try:
        target = _prepared(transfer, urljoin(url, requests.Session.get_redirect_target(session, answer) or ""))
    except (ValueError, InvalidArgument):  # the server's mistake, and not the caller's
        raise transfer.failed("it redirects to what is no URL") from None
    if not target.startswith(("http://", "https://")):
        raise transfer.failed(f"it redirects to {redacted(target)}, which is no http(s) URL")
    if url.startswith("https://") and not target.startswith("https://"):
        raise transfer.failed(f"it redirects from https to {redacted(target)}, which anybody on the way could replace")
    return target


def _receive(transfer: Transfer, answer: requests.Response, into: IO[bytes]) -> tuple[str, Validators]:
    if answer.status_code != 200:
        # The reason phrase is the server's own text.
        phrase = http.client.responses.get(answer.status_code, "")
        raise transfer.failed(f"the server answered {answer.status_code} {phrase}".rstrip())
    chunks = answer.raw.stream(CHUNK_BYTES, decode_content=False)
    digest = transfer.store(_only_disk_errors(chunks), into, _length(answer))
    return digest, _validators(answer.headers)


def _only_disk_errors(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Tell the network's errors from those of writing: both are an OSError."""
    import requests

    try:
        yield from chunks
    except Exception as error:
        raise requests.ConnectionError(error) from error


def _length(answer: requests.Response) -> int | None:
    if answer.headers.get("Transfer-Encoding"):
        return None
    text = answer.headers.get("Content-Length", "").strip()
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None  # else nothing that could be told from a lie


def _validators(headers: Mapping[str, str]) -> Validators:
    from email.utils import parsedate_to_datetime

    etag = headers.get("ETag", "").strip()
    if etag and not etag.startswith("W/"):  # a weak one is that of other bytes, too, which mean the same
        return Validators(etag=etag)
    modified = headers.get("Last-Modified", "").strip()
    try:
        age = parsedate_to_datetime(headers.get("Date", "")) - parsedate_to_datetime(modified)
        return Validators(last_modified=modified) if age.total_seconds() >= SETTLED_S else Validators()
    except (TypeError, ValueError):  # one of them missing, no date, or without its zone
        return Validators()


@contextmanager
def _failures(transfer: Transfer, url: str) -> Iterator[None]:
    """Turn what requests raises into our error. Its own texts hold the URL with all that is in it, so they are not used."""
    import requests
    import urllib3

    try:
        yield
    except (requests.RequestException, urllib3.exceptions.HTTPError, UnicodeError) as error:
        transfer.check()  # what we ended ourselves has its own reason
        raise transfer.failed(_reason(transfer, url, error)) from None


def _reason(transfer: Transfer, url: str, error: Exception) -> str:
    import requests
    import urllib3

    chain = list(_chain(error))
    if isinstance(error, requests.ConnectTimeout):
        return f"no connection came about within {min(transfer.limits.stall_s, MAX_CONNECT_S):g} s"
    if any(_is_timeout(each) for each in chain):
        return f"nothing came for {transfer.limits.stall_s:g} s"
    if any(isinstance(each, socket.gaierror) for each in chain):
        return f"the host {_host(url)} is unknown"
    for each in chain:
        if isinstance(each, urllib3.exceptions.IncompleteRead):
            return "the connection ended before all of it came"
        if isinstance(each, ssl.SSLError):
            return f"TLS failed: {each.reason or type(each).__name__}" + _verify_message(each)
        if isinstance(each, OSError) and each.errno and not isinstance(each, requests.RequestException):
            return f"the connection failed: {os.strerror(each.errno)}"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy refused it"
    if isinstance(error, requests.ConnectionError):
        return "the connection ended before all of it came"
    return f"the server's answer makes no sense ({type(error).__name__})"


def _is_timeout(error: BaseException) -> bool:
    import requests
    import urllib3

    # urllib3 counts a refused connection among the timeouts.
    is_refusal = isinstance(error, urllib3.exceptions.NewConnectionError)
    return not is_refusal and isinstance(error, (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError))


def _verify_message(error: ssl.SSLError) -> str:
    message = getattr(error, "verify_message", "")
    return f" ({message})" if message else ""


def _host(url: str) -> str:
    from urllib.parse import urlsplit

    return urlsplit(url).hostname or ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and all that it was raised for: causes, contexts, and what urllib3 hands on as an argument."""
    todo, seen = [error], set[int]()
    while todo:
        found = todo.pop(0)
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        inner = [getattr(found, "reason", None), found.__cause__, found.__context__, *found.args]
        todo += [each for each in inner if isinstance(each, BaseException)]


def _adapter(on_connected: Callable[[Any, bool], None]) -> HTTPAdapter:
    """Return an adapter whose connections are shown to ``on_connected``, with whether they are direct, before any use."""
    from requests.adapters import HTTPAdapter
    from urllib3 import ProxyManager

    class Adapter(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **more: Any) -> None:
            super().init_poolmanager(*args, **more)
            self.poolmanager.pool_classes_by_scheme = _pools(on_connected, is_direct=True)

        def proxy_manager_for(self, *args: Any, **more: Any) -> Any:
            manager = super().proxy_manager_for(*args, **more)
            if isinstance(manager, ProxyManager):  # one for SOCKS, which is none, has connections of its own kind
                manager.pool_classes_by_scheme = _pools(on_connected, is_direct=False)
            return manager

    return Adapter(max_retries=0)


def _pools(on_connected: Callable[[Any, bool], None], *, is_direct: bool) -> Any:
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

    class Plain(HTTPConnection):
        def connect(self) -> None:
            super().connect()
            _show(self, on_connected, is_direct)

    class Secure(HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            _show(self, on_connected, is_direct)

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = cast("Any", Plain)

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = cast("Any", Secure)

    return {"http": PlainPool, "https": SecurePool}


def _show(connection: Any, on_connected: Callable[[Any, bool], None], is_direct: bool) -> None:
    try:
        on_connected(connection.sock, is_direct)
    except BaseException:
        connection.close()
        raise
