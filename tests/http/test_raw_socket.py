"""What comes over a socket that no client would send: on both sides, waitress' and uvicorn's.

Whatever it is, the server says what is wrong or ends the connection; it says 5xx to nothing that it serves, shows nothing
of its own code, keeps nothing, and answers others meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import resource
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.handlers import until
from tests.http.conftest import Client
from tests.http.fakes import FakeManager, info_of
from torchmgmt.http.addresses import BoundAddress, Role
from torchmgmt.http.limits import Limits
from torchmgmt.http.server import start_server
from torchmgmt.http.sockets import bind
from torchmgmt.http.tokens import Keys
from torchmgmt.settings import Address, Settings

SIDES = {"waitress": {Role.MANAGEMENT}, "uvicorn": {Role.MANAGEMENT, Role.INFERENCE}}
ANSWER = re.compile(rb"^HTTP/1\.[01] (\d{3}) ", re.MULTILINE)
QUICK = Limits(head_s=0.4, body_s=0.4, idle_s=0.6, write_s=2, linger_s=0.3, connections=2000)
GOOD = b"GET /models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@contextlib.contextmanager
def running(side: str, limits: Limits) -> Iterator[Client]:
    sock = bind(Address("http", "127.0.0.1", 0))
    manager = FakeManager(info_of("noop", workers=1))
    bound = BoundAddress(frozenset(SIDES[side]), sock)
    server = start_server(manager, bound, Settings(enable_model_api=True), Keys(), limits=limits)
    try:
        yield Client(server.url)
    finally:
        assert server.close(20)


@pytest.fixture(params=SIDES)
def quick(request) -> Iterator[Client]:
    """A server whose patience is short."""
    with running(request.param, QUICK) as client:
        yield client


@pytest.fixture(scope="module", params=SIDES)
def patient(request) -> Iterator[Client]:
    """A server that is asked many times."""
    with running(request.param, Limits(linger_s=0.3)) as client:
        yield client


def talk(client: Client, sent: bytes, *, ends: bool = False) -> bytes:
    """Send, end our side if ``ends``, and return all that comes until the other side ends, too.

    uvicorn answers nobody who has ended its side: asyncio ends the other one at once.
    """
    received = b""
    with socket.create_connection(client.address, timeout=30) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(sent)
        if ends:
            connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(65536):
            received += part
    return received


def codes(received: bytes) -> list[int]:
    return [int(code) for code in ANSWER.findall(received)]


def is_sound(received: bytes) -> bool:
    """No 5xx but 501, which is true of what we do not serve; no word of our code."""
    return all(code < 500 or code == 501 for code in codes(received)) and b"Traceback" not in received


@pytest.mark.parametrize(
    "sent, code",
    [
        (b"GET /models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400),
        (b"POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nContent-Length: 5\r\n\r\nabcde", 400),
        (
            b"POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        (b"POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1e3\r\n\r\n", 400),
        (b"POST /models HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"0" * 5000 + b"2\r\n\r\nab", 400),
        (b"GET http://[x HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /models HTTP/9.9\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /models HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n", 400),
        (b"GET /models HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431),
        (
            b"GET /models?" + b"&".join(b"a%d=1" % n for n in range(10_000)) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
            431,
        ),
    ],
    ids=lambda value: repr(value[:70]) if isinstance(value, bytes) else "",
)
def test_what_is_no_request_is_refused(patient, sent, code):
    """With the code that says why, and nothing is taken for a second request."""
    received = talk(patient, sent)
    assert codes(received) == [code]
    assert b'"type"' in received


@pytest.mark.parametrize(
    "line, length, said",
    [
        (b"GET http://[x HTTP/1.1", b"0", b"URL"),
        (b"GET http://[::1/models HTTP/1.1", b"0", b"URL"),
        (b"POST /models HTTP/1.1", b"0" * 5000 + b"2", b"Content-Length"),
    ],
    ids=["no bracket", "address without its end", "length"],
)
def test_it_says_what_cannot_be_read(patient, line, length, said):
    """Of the target and the length, both of which Python's own parsers refuse."""
    received = talk(patient, line + b"\r\nHost: localhost\r\nContent-Length: " + length + b"\r\n\r\n")
    assert codes(received) == [400]
    assert said in received.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize(
    "sent",
    [
        b"GET http://evil.example/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET http://evil.example HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET http://evil.example:99999999/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n",
        b"GET /models/%ff%00%zz?%zz=%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET /models HTTP/1.1\nHost: localhost\nConnection: close\n\n",
        b"GET /models/" + b"%2e%2e/" * 100 + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"POST /models HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        b"POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 3\r\n\r\n\xff\xfe[",
        b"POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nabc",
        b"GET /mod\0els HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"",
    ],
    ids=lambda value: repr(value[:60]),
)
def test_odd_requests_get_sound_answers(patient, sent):
    """What may be read in more than one way is served, refused or ended; never a 5xx, and the next caller is served."""
    assert is_sound(talk(patient, sent, ends=True))
    assert codes(talk(patient, GOOD)) == [200]


def test_requests_sent_ahead_are_answered_in_their_order(patient):
    """Pipelining: each answer to its request, none lost."""
    asked = [b"/models", b"/models/noop", b"/models/nope", b"/models"]
    sent = b"".join(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path for path in asked[:-1]) + GOOD
    assert codes(talk(patient, sent)) == [200, 200, 404, 200]


def test_who_asks_before_sending_is_told_to_go_on(patient):
    """Expect: 100-continue."""
    with socket.create_connection(patient.address, timeout=30) as connection:
        head = b"PUT /models/noop HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nExpect: 100-continue\r\n"
        connection.sendall(head + b"Connection: close\r\nContent-Type: application/json\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 100")
        connection.sendall(b"{}")
        received = b""
        while part := connection.recv(65536):
            received += part
    assert codes(received) == [202]


MUTATED = st.tuples(
    st.sampled_from(
        [
            GOOD,
            b'PUT /models/noop?min_worker=2 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 13\r\n\r\n{"timeout": 1}',
            b"POST /models HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nurl\r\n0\r\n\r\n",
        ]
    ),
    st.integers(0, 2**32),
    st.integers(1, 6),
)


def mutated(base: bytes, seed: int, count: int) -> bytes:
    chance = random.Random(seed)
    data = bytearray(base)
    for _ in range(count):
        where = chance.randrange(len(data))
        how = chance.randrange(4)
        if how == 0:
            data[where] = chance.randrange(256)
        elif how == 1:
            del data[where : where + chance.randrange(1, 9)]
        elif how == 2:
            data[where:where] = chance.randbytes(chance.randrange(1, 9))
        else:
            data[where:where] = data[: chance.randrange(1, 40)]
        data = data or bytearray(b" ")
    return bytes(data)


@given(chosen=MUTATED)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_requests_get_sound_answers(patient, chosen):
    """Any few bytes changed, left out or put in."""
    assert is_sound(talk(patient, mutated(*chosen), ends=True))


def test_a_flood_of_nonsense_leaves_nothing(patient):
    """Neither descriptors nor threads nor memory, and others are answered in between."""
    process = psutil.Process(os.getpid())

    def nonsense(seed: int) -> None:
        assert is_sound(talk(patient, mutated(GOOD, seed, 20), ends=True))

    def flood(begin: int) -> None:
        with ThreadPoolExecutor(8) as callers:
            list(callers.map(nonsense, range(begin, begin + 300)))
        assert codes(talk(patient, GOOD)) == [200]
        gc.collect()

    flood(0)  # what is made once is made
    descriptors, threads, memory = process.num_fds(), process.num_threads(), process.memory_info().rss
    for begin in (1000, 2000):
        flood(begin)
    until(lambda: process.num_fds() <= descriptors + 2, "the connections are closed")
    assert process.num_threads() <= threads + 1
    assert process.memory_info().rss - memory < 20e6


@pytest.mark.parametrize(
    "sent, code",
    [
        (b"", None),
        (b"GET /models HT", 408),
        (b"GET /models HTTP/1.1\r\nHost: local", 408),
        (b"POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nabc", 408),
    ],
)
def test_a_request_that_does_not_arrive_is_ended(quick, sent, code):
    """Silence and half requests hold a connection for a while and no longer."""
    assert codes(talk(quick, sent)) == ([code] if code else [])


def test_a_kept_connection_is_let_go(quick):
    """After its answer a connection may idle for a while."""
    with socket.create_connection(quick.address, timeout=30) as connection:
        connection.sendall(b"GET /models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = b""
        while part := connection.recv(65536):
            received += part
    assert codes(received) == [200]


def test_slow_clients_hold_up_nobody(quick):
    """While clients send byte by byte and others say nothing, the next one is answered; then all of them are ended."""
    with contextlib.ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(quick.address, timeout=30))

        silent, slow = [connect() for _ in range(200)], [connect() for _ in range(20)]
        ended = time.monotonic() + 0.3
        for byte in b"GET /models HTTP/1.1\r\nHost: loc":
            for connection in slow:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(bytes([byte]))
            if time.monotonic() > ended:
                break
            time.sleep(0.01)  # it is what a slow client does
        assert codes(talk(quick, GOOD)) == [200]
        for connection in (*silent, *slow):
            with contextlib.suppress(ConnectionError):
                while connection.recv(65536):
                    pass


@pytest.mark.parametrize("side", SIDES)
def test_a_thousand_idle_connections_silence_nobody(side):
    """They cost a descriptor each, and go when their time is over."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
    try:
        with running(side, Limits(connections=1500)) as client, contextlib.ExitStack() as stack:
            for _ in range(1000):
                stack.enter_context(socket.create_connection(client.address, timeout=30))
            assert codes(talk(client, GOOD)) == [200]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
