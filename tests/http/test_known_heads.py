"""A head that came before is recognized, and nothing else is different from a server that parses every one."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from typing import Any

import attrs
import pytest
import requests
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.server import ServerState

from tests.http.fakes import FakeManager, info_of
from torchmgmt.http import known_heads
from torchmgmt.http.exchange import Exchange
from torchmgmt.http.limits import Limits
from torchmgmt.http.tokens import Key, KeyName, Keys
from torchmgmt.http.uvicorn_parts import LimitedProtocol, Serving
from torchmgmt.settings import Settings

ASK = b"POST /predictions/%b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"

REQUEST_ID = re.compile(rb"x-request-id: [^\r]*")


class Transport(asyncio.Transport):
    """Keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__({"sockname": ("127.0.0.1", 8080), "peername": ("127.0.0.1", 50000)})
        self.written: list[bytes] = []
        self.is_closed = False

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def can_write_eof(self) -> bool:
        return False


@attrs.define(eq=False)
class Echo:
    """Answers with what it was asked, and keeps that in ``asked``; where that begins with a w, only later."""

    asked: list[tuple[Any, ...]]
    scope: dict[str, Any]
    waiting: list[Callable[[], object]] = attrs.field(factory=list)
    max_body_bytes: int = 1 << 20

    def serve(self, content: bytes, exchange: Exchange) -> None:
        told = {name: self.scope[name] for name in ("method", "path", "raw_path", "query_string", "http_version")}
        self.asked.append((told, list(self.scope["headers"]), self.scope["client"], bytes(content)))

        def answer() -> None:
            exchange.respond(200, "", [(b"content-length", b"%d" % len(content))], content)

        if content.startswith(b"w"):
            self.waiting.append(answer)
        else:
            answer()

    def again(self, scope: dict[str, Any]) -> Echo:
        return Echo(self.asked, scope, self.waiting)


class Parsed:
    """Counts how much a connection's parser was fed."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser
        self.chunks = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)

    def feed_data(self, data: bytes) -> None:
        self.chunks += 1
        self._parser.feed_data(data)


async def no_app(_scope: Any, _receive: Any, _send: Any) -> None:
    """What is called in a task: nothing."""


class Protocol(LimitedProtocol):
    """Notes what would have been served in a task, which this loop, that does not run, has not."""

    asked: list[tuple[Any, ...]]

    def _start_task(self, cycle: Any, app: Any) -> None:
        self.asked.append(("in a task", cycle.scope["path"], bytes(cycle.body)))


def serving_of(asked: list[tuple[Any, ...]], waiting: list[Callable[[], object]]) -> Serving:
    return Serving(lambda scope: Echo(asked, scope, waiting), lambda _code: None, lambda app: app)


class Connection:
    """A connection of a server that echoes."""

    def __init__(self, asked: list[tuple[Any, ...]], serving: Serving | None = None) -> None:
        config = uvicorn.Config(no_app, lifespan="off", log_config=None)
        config.load()
        self.serving = serving or serving_of(asked, [])
        self.protocol = Protocol(config, ServerState(), Limits(), lambda: None, 1.0, self.serving)
        self.transport = Transport()
        self.protocol.connection_made(self.transport)
        self.protocol.asked = asked
        self.parsed = self.protocol.parser = Parsed(self.protocol.parser)

    def send(self, *chunks: bytes) -> bytes:
        """Have these come in, and return what was answered."""
        for chunk in chunks:
            if not self.transport.is_closed:
                self.protocol.data_received(chunk)
        return b"".join(self.transport.written)


@pytest.fixture(autouse=True)
def loop() -> Iterator[None]:
    """uvicorn's protocols belong to the loop of their thread."""
    made = asyncio.new_event_loop()
    asyncio.set_event_loop(made)
    yield
    asyncio.set_event_loop(None)
    made.close()


def test_a_head_is_parsed_once():
    """On whatever connection it comes again, with another body of that size; of another size it is another head."""
    asked: list[tuple[Any, ...]] = []
    first = Connection(asked)
    first.send(ASK % (b"a", 2, b"11"))
    assert first.parsed.chunks == 1
    first.send(ASK % (b"a", 2, b"22"))
    assert first.parsed.chunks == 1
    second = Connection(asked, first.serving)
    second.send(ASK % (b"a", 2, b"33"))
    assert second.parsed.chunks == 0
    second.send(ASK % (b"a", 3, b"444"), ASK % (b"b", 2, b"55"))
    assert second.parsed.chunks == 2
    assert [(one[0]["path"], one[-1]) for one in asked] == [
        ("/predictions/a", b"11"),
        ("/predictions/a", b"22"),
        ("/predictions/a", b"33"),
        ("/predictions/a", b"444"),
        ("/predictions/b", b"55"),
    ]


@pytest.mark.parametrize(
    "chunks",
    [
        [b"POST / HTTP/1.1\r\nConnection: close\r\nContent-Length: 1\r\n\r\na"],
        [b"POST / HTTP/1.0\r\nContent-Length: 1\r\n\r\na"],
        [b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"],
        [b"POST / HTTP/1.1\r\nContent-Length: 1\r\n\r\n", b"a"],
        [b"\r\n\r\nPOST / HTTP/1.1\r\nContent-Length: 1\r\n\r\na"],
        [b"POST / HTTP/1.1\r\nContent-Length: 01\r\n\r\na"],
        [b"POST / HTTP/1.1\r\nContent-Length: 1\r\nX: " + known_heads.LONGEST * b"x" + b"\r\n\r\na"],
    ],
    ids=["last", "old", "chunked", "in two", "blank lines first", "leading zero", "long"],
)
def test_what_cannot_be_told_by_its_head_is_parsed(chunks):
    """As is what would keep much memory."""
    asked: list[tuple[Any, ...]] = []
    serving = None
    for _ in range(2):
        connection = Connection(asked, serving)
        connection.send(*chunks)
        assert connection.parsed.chunks == len(chunks)
        serving = connection.serving
    assert [one[-1] for one in asked] == [b"a", b"a"]


def test_few_heads_are_kept(monkeypatch):
    """The oldest goes first."""
    monkeypatch.setattr(known_heads, "MOST", 2)
    sent = [ASK % (name, 1, b"x") for name in (b"a", b"b", b"c")]
    connection = Connection([])
    heads = connection.serving.known_heads
    connection.send(*sent)
    assert [heads.find(one) is not None for one in sent] == [False, True, True]


def test_the_end_of_one_request_is_no_part_of_the_next_head():
    """Where both come in one piece, and their bodies are of one size."""
    connection = Connection([])
    mixed = b"ab" + ASK % (b"b", 4, b"1234")
    connection.send((ASK % (b"a", 4, b"12ab"))[:-2], mixed)
    assert connection.serving.known_heads.find(mixed) is None


def test_a_known_head_within_another_is_no_request():
    """As the parser says of it."""
    connection = Connection([])
    known = ASK % (b"a", 1, b"x")
    assert connection.send(known).count(b"HTTP/1.1 200 ") == 1
    assert b"HTTP/1.1 400 " in connection.send(b"POST /predictions/b HTTP/1.1\r\nHost: localhost\r\n", known)


KNOWN = [ASK % (name, size, size * b"w") for name in (b"a", b"b?x=1") for size in range(3)]
MESSAGES = st.one_of(
    st.sampled_from(KNOWN),
    st.sampled_from(KNOWN),
    st.builds(
        lambda name, body, more: (
            b"POST /predictions/%b HTTP/1.1\r\nHost: localhost\r\n%bContent-Length: %d\r\n\r\n%b"
            % (name, more, len(body), body)
        ),
        st.sampled_from([b"a", b"b?x=1", b"%61"]),
        st.binary(max_size=3) | st.just(b"\r\n\r\n"),
        st.sampled_from([b"", b"", b"Connection: close\r\n", b"X-Request-Id: one\r\n"]),
    ),
    st.just(
        b"POST /predictions/a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"
    ),
    st.just(b"\r\n"),
    st.just(b"POST /predictions/a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n"),
    st.just(b"nonsense\r\n\r\n"),
)


@given(messages=st.lists(MESSAGES, max_size=8), cuts=st.lists(st.integers(0, 300), max_size=3), joined=st.booleans())
def test_nobody_can_tell_whether_a_head_was_known(messages: Sequence[bytes], cuts: Sequence[int], joined: bool):
    """Whatever comes, and in whatever pieces: the same is asked, and the same answered, with and without known heads."""
    whole = b"".join(messages)
    edges = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    chunks = [whole[start:end] for start, end in pairwise(edges)] if joined else list(messages)
    outcomes = []
    for knows in (True, False):
        asked: list[tuple[Any, ...]] = []
        waiting: list[Callable[[], object]] = []
        serving = serving_of(asked, waiting)
        for message in KNOWN:
            Connection(asked, serving).send(message)
        waiting.clear()
        if not knows:
            serving.known_heads._by_head.clear()
            serving.known_heads.add = lambda *_: None  # type: ignore[method-assign]
        connection = Connection(asked, serving)
        for place, chunk in enumerate(chunks):
            connection.send(chunk)
            if place % 2:
                while waiting:
                    waiting.pop(0)()
        outcomes.append((asked, REQUEST_ID.sub(b"", connection.send()), connection.transport.is_closed))
    assert outcomes[0] == outcomes[1]


def test_a_key_is_asked_for_whether_the_head_is_known_or_not(serving_inference):
    """Who had a valid key, and sends it again when it has expired, is refused."""
    now = [datetime(2026, 1, 1, tzinfo=timezone.utc)]
    key = Key("inference-key", expires=now[0] + timedelta(hours=1))
    keys = Keys({KeyName.INFERENCE: key}, now=lambda: now[0])
    settings = Settings(disable_token_authorization=False)
    client = serving_inference(FakeManager(info_of("noop", workers=1)), settings=settings, keys=keys)
    with requests.Session() as session:
        session.headers["Authorization"] = "Bearer inference-key"
        codes = []
        for _ in range(6):
            codes.append(session.post(f"{client.url}/predictions/noop", data=b"x", timeout=30).status_code)
            now[0] += timedelta(minutes=20)
    assert codes == [200, 200, 200, 401, 401, 401]
