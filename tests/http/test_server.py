"""The servers themselves: sockets, threads, and how they end."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import requests

from tests.http.conftest import Client
from tests.http.fakes import FakeManager, info_of
from torchmgmt.errors import InvalidArgument
from torchmgmt.http import serve
from torchmgmt.http.server import bind, start_inference, start_management
from torchmgmt.http.tokens import Keys
from torchmgmt.settings import Address, Settings


def test_serve_gives_the_real_port():
    """port=0 lets the system choose; the url says what it chose."""
    with serve(FakeManager()) as server:
        assert server.url.startswith("http://127.0.0.1:")
        assert not server.url.endswith(":0")
        assert requests.get(server.url + "/models", timeout=30).json() == {"models": []}


def test_serve_does_not_use_up_the_address():
    """An address is free again as soon as the block is left."""
    with serve(FakeManager()) as server:
        port = int(server.url.rpartition(":")[2])
        assert requests.get(server.url + "/models", timeout=30).ok
    with serve(FakeManager(), port=port) as again:
        assert again.url == server.url


def test_an_occupied_port_is_an_os_error_of_one_line():
    """It says where, and why not."""
    with serve(FakeManager()) as server:
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(OSError, match=rf"Cannot listen at {server.url}: Address already in use"):
            with serve(FakeManager(), port=port):
                pass


def test_a_port_that_is_only_bound_is_taken():
    """Two servers that start at the same moment do not both get the port."""
    first = bind(Address("http", "127.0.0.1", 0))
    try:
        with pytest.raises(OSError, match="already in use"):
            bind(Address("http", "127.0.0.1", first.getsockname()[1]))
    finally:
        first.close()


@pytest.mark.parametrize("port", [-1, 65536, "8081", None, True])
def test_a_port_out_of_range_is_refused(port):
    """A wrong port names itself."""
    with pytest.raises(InvalidArgument, match="port"), serve(FakeManager(), port=port):
        pass


def test_an_ipv6_address_is_served():
    """The url of an IPv6 address has its brackets."""
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    try:
        with serve(FakeManager(), host="::1") as server:
            assert server.url.startswith("http://[::1]:")
            assert requests.get(server.url + "/models", timeout=30).ok
    except OSError as error:
        pytest.skip(f"this machine has no ::1: {error}")


def test_closing_finishes_a_request_in_flight(manager):
    """A call that waits when the block is left gets its answer."""
    manager.gate.clear()
    answers = []

    def register(url: str) -> None:
        answers.append(requests.post(url + "/models", params={"url": "a.mar"}, timeout=30))

    with serve(manager) as server:
        caller = threading.Thread(target=register, args=(server.url,))
        caller.start()
        assert manager.entered.acquire(timeout=30)
        threading.Timer(0.2, manager.gate.set).start()
    caller.join()
    assert answers[0].status_code == 202
    assert answers[0].headers["Connection"] == "close"


def test_closing_takes_no_new_request(manager):
    """While the last request is finished, nobody else gets in."""
    manager.gate.clear()
    with serve(manager) as server:
        url = server.url
        caller = threading.Thread(target=requests.post, args=(url + "/models?url=a",), kwargs={"timeout": 30})
        caller.start()
        assert manager.entered.acquire(timeout=30)
        assert server.drain(timeout=0.3) is False
        with pytest.raises(requests.ConnectionError):
            requests.get(url + "/models", timeout=30)
        manager.gate.set()
        assert server.drain(timeout=30) is True
    caller.join()


def test_closing_does_not_wait_for_idle_or_silent_connections():
    """A kept connection, one that never spoke and half a request hold nothing up for long."""
    with serve(FakeManager()) as server, requests.Session() as session:
        session.get(server.url + "/models", timeout=30)
        address = Client(server.url).address
        silent, half = socket.create_connection(address), socket.create_connection(address)
        half.sendall(b"GET /models HT")
        time.sleep(0.1)
        begun = time.monotonic()
        assert server.close() is True
        assert time.monotonic() - begun < 5
        silent.close()
        half.close()


def test_closing_has_a_limit(manager):
    """A request that does not end is cut off when the time is over, and close says so."""
    manager.gate.clear()
    failures = []

    def register(url: str) -> None:
        try:
            requests.post(url + "/models?url=a", timeout=30)
        except requests.ConnectionError as error:
            failures.append(error)

    with serve(manager) as server:
        caller = threading.Thread(target=register, args=(server.url,))
        caller.start()
        assert manager.entered.acquire(timeout=30)
        assert server.close(timeout=0.2) is False
    caller.join()
    assert len(failures) == 1
    manager.gate.set()  # its thread ends, which the leak check of every test waits for


def test_closing_an_idle_server_cuts_nobody_off():
    """Even without any time to wait, nothing was lost where nothing was under way."""
    with serve(FakeManager()) as server:
        assert server.close(timeout=0) is True


def test_closing_twice_does_nothing_more():
    """close is idempotent, from any thread."""
    with serve(FakeManager()) as server:
        threads = [threading.Thread(target=server.close) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def test_idle_connections_do_not_silence_the_server():
    """A few hundred half-sent requests leave it answering: waitress' default of 100 connections would not."""
    with serve(FakeManager(info_of("noop"))) as server:
        client = Client(server.url)
        connections = [socket.create_connection(client.address) for _ in range(300)]
        for connection in connections:
            connection.sendall(b"GET /models HTTP/1.1\r\nHost:")
        assert client.get("/models", timeout=5).ok
        for connection in connections:
            connection.close()


def test_the_caller_may_serve_and_close_many_times():
    """Nothing is left over that adds up."""
    for _ in range(10):
        with serve(FakeManager()) as server:
            assert requests.get(server.url + "/models", timeout=30).ok


def test_nothing_is_printed_by_a_refused_request(capfd):
    """An embedded server writes to no stream, even where the program configured no logging."""
    with serve(FakeManager()) as server:
        Client(server.url).raw(b"nonsense\r\n\r\n")
        Client(server.url).post("/models", params={"nope": 1})
    assert capfd.readouterr() == ("", "")


def test_management_and_inference_run_side_by_side():
    """Each has its own socket and threads; closing one leaves the other."""
    manager = FakeManager(info_of("noop", workers=1))
    loopback = Address("http", "127.0.0.1", 0)
    management = start_management(manager, bind(loopback), Settings(), Keys())
    inference = start_inference(manager, bind(loopback), Settings(), Keys())
    try:
        assert requests.get(inference.url + "/ping", timeout=30).json() == {"status": "Healthy"}
        assert inference.close() is True
        assert requests.get(management.url + "/models", timeout=30).ok
    finally:
        inference.close()
        management.close()
