"""Answers in parts over HTTP: sent as they come, as chunks or as events; an error in the middle is seen; who leaves stops it."""

from __future__ import annotations

import logging
import socket

import pytest
import requests

from tests.handlers import TOOLS, until
from torchmgmt.settings import Settings

STREAM = (
    TOOLS
    + """
def handle(data, context):
    return data and [run(row["body"], context) for row in data]

def run(body, context):
    for step in body.split(","):
        if step.startswith("wait "):
            wait_for(step[5:])
        elif step.startswith("fail"):
            raise ValueError("failed in the middle")
        elif step.startswith("note "):
            note(step[5:])
        else:
            yield step
"""
)
SENDS = """
from ts.handler_utils.utils import send_intermediate_predict_response

def handle(data, context):
    if data is None:
        return None
    for part in ("a", "b"):
        send_intermediate_predict_response([part] * len(data), context.request_ids, "ok", 200, context)
    return ["c"] * len(data)
"""
TEXT = {"Content-Type": "text/plain"}
EVENTS = {**TEXT, "Accept": "text/event-stream"}


@pytest.fixture
def streaming(predicting):
    """A model whose text says what it does: send a part, wait, fail."""
    return predicting(STREAM).client


def ask(client, text: str, headers=TEXT) -> requests.Response:
    return client.post("/predictions/model", data=text, headers=headers, stream=True)


def test_parts_come_as_they_are_made(streaming, gate):
    """The first is there while the handler waits to make the second."""
    with ask(streaming, f"one,wait {gate.path},two") as response:
        parts = response.iter_content(None)
        assert next(parts) == b"one"
        assert response.headers["Transfer-Encoding"] == "chunked"
        gate.open()
        assert list(parts) == [b"two"]


def test_parts_that_are_sent_come_before_the_rest(predicting):
    """send_intermediate_predict_response, then what is returned."""
    with ask(predicting(SENDS).client, "x") as response:
        assert b"".join(response.iter_content(None)) == b"abc"


def test_events_are_for_clients_that_ask_for_them(streaming):
    """One for each part, its lines as lines, and an end that a client can tell from a lost connection."""
    with ask(streaming, "one\nmore,two", EVENTS) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        assert response.content == b"data: one\ndata: more\n\ndata: two\n\nevent: end\ndata: \n\n"


def test_a_whole_answer_is_one_event(predicting):
    """Who asks for events need not know how a handler answers."""
    client = predicting("def handle(data, context):\n    return data and [[1]] * len(data)\n").client
    assert ask(client, "x", EVENTS).content == b"data: [1]\n\nevent: end\ndata: \n\n"


def test_an_error_after_the_first_part_is_seen(streaming):
    """The chunks do not end well, so that nobody takes the half for the whole."""
    with ask(streaming, "one,fail") as response:
        assert response.status_code == 200
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            list(response.iter_content(None))
    assert ask(streaming, "fine,two").content == b"finetwo"


def test_an_error_among_events_is_one(streaming):
    """It has the JSON of any error."""
    content = ask(streaming, "one,fail", EVENTS).content
    assert content.startswith(b"data: one\n\nevent: error\ndata: {")
    assert b"failed in the middle" in content
    assert b"event: end" not in content


def test_an_error_before_the_first_part_is_a_plain_one(streaming):
    """With its code, whatever the client accepts."""
    assert ask(streaming, "fail", EVENTS).status_code == 503
    assert ask(streaming, "fail").json()["type"] == "InternalServerException"


@pytest.mark.parametrize("headers", [TEXT, EVENTS])
def test_a_client_that_leaves_stops_the_handler(streaming, gate, tmp_path, caplog, headers):
    """It goes no further than its next part."""
    went_on = tmp_path / "went-on"
    with caplog.at_level(logging.INFO, logger="torchmgmt.access"):
        with ask(streaming, f"one,wait {gate.path},two,three,note {went_on}", headers) as response:
            assert next(response.iter_content(4))
        until(lambda: caplog.records)  # the line of a request is written at its end
        gate.open()
        assert ask(streaming, "other").text == "other"
    assert not went_on.exists()


def test_a_client_without_chunks_gets_the_whole(streaming):
    """HTTP/1.0 has none."""
    answer = streaming.raw(
        b"POST /predictions/model HTTP/1.0\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: 7\r\n\r\none,two"
    )
    head, _, body = answer.partition(b"\r\n\r\n")
    assert body == b"onetwo"
    assert b"chunked" not in head.lower()


MANY = """
def handle(data, context):
    return data and [many() if row["body"] == "many" else "one" for row in data]

def many():
    for _ in range(30):
        yield b"x" * 500_000
"""


@pytest.mark.parametrize("size", [100_000_000, 1_000_000])
def test_parts_that_have_to_be_put_together_are_bounded(predicting, size):
    """A client of HTTP/1.0 gets no more at once than a whole answer may have; others get each part."""
    made = predicting(MANY, settings=Settings(max_response_size=size))
    head = b"Host: localhost\r\nConnection: close\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\n"
    sent = b"POST /predictions/model HTTP/%b\r\n" + head + b"many"
    old = made.client.raw(sent % b"1.0")
    assert (b" 413 " in old[:20], len(old) > 15_000_000) == (size == 1_000_000, size != 1_000_000)
    assert len(made.client.raw(sent % b"1.1")) > 15_000_000


def test_a_slow_client_holds_up_nobody(predicting):
    """Others are answered while one takes nothing of an answer that is larger than the connection holds."""
    client = predicting(MANY).client
    head = b"POST /predictions/model HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: text/plain\r\n"
    with socket.create_connection(client.address, timeout=30) as slow:
        slow.sendall(head + b"Content-Length: 4\r\n\r\nmany")
        received = len(slow.recv(1))
        assert ask(client, "one").text == "one"
        while part := slow.recv(1 << 20):
            received += len(part)
    assert received > 30 * 500_000
