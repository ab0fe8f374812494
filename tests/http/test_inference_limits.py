"""What bounds predictions over HTTP: the queue, deadlines, sizes, clients that leave, and the end of the server."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from tests.handlers import until
from torchmgmt.http.limits import Limits
from torchmgmt.settings import Settings

ASK = b"POST /predictions/model HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%b"
ONE_BY_ONE = {"batch_size": 1, "max_batch_delay": 0, "batches_in_flight": 1}


def waiting(made) -> int:
    return made.manager.describe("model").queue_length


def test_a_full_queue_is_503_at_once(predicting, gate):
    """It says that it is full, which setting that is, and when to come back; nobody waits for that."""
    made = predicting(config="jobQueueSize: 1\n", **ONE_BY_ONE)
    with ThreadPoolExecutor() as threads:
        running = threads.submit(made.ask, gate.expression)
        until(gate.reached)
        queued = threads.submit(made.ask, "'queued'")
        until(lambda: waiting(made) == 1)
        refused = made.ask("1")
        assert (refused.status_code, refused.json()["type"]) == (503, "ServiceUnavailableException")
        assert int(refused.headers["Retry-After"]) >= 1
        assert "is full" in refused.json()["message"]
        assert "job_queue_size" in refused.json()["message"]
        gate.open()
        assert (running.result().status_code, queued.result().text) == (200, "queued")


def test_a_model_without_workers_is_503_that_says_so(predicting):
    """And does not speak of a queue."""
    made = predicting(initial_workers=0, max_workers=0)
    response = made.ask("1")
    assert (response.status_code, response.json()["type"]) == (503, "ServiceUnavailableException")
    assert "full" not in response.json()["message"]
    assert made.client.get("/ready/model").status_code == 503


@pytest.mark.parametrize("by_config", [False, True])
def test_a_request_past_its_deadline_is_504_and_never_run(predicting, gate, tmp_path, by_config):
    """The caller's header says it, or clientTimeoutInMills of the model."""
    made = predicting(config="clientTimeoutInMills: 100\n" if by_config else None, **ONE_BY_ONE)
    headers = {} if by_config else {"X-Request-Timeout-Ms": "100"}
    noted = tmp_path / "noted"
    with ThreadPoolExecutor() as threads:
        running = threads.submit(made.ask, gate.expression, **{"X-Request-Timeout-Ms": "30000"})
        until(gate.reached)
        late = made.ask(f"note({str(noted)!r})", **headers)
        assert (late.status_code, late.json()["type"]) == (504, "RequestTimeoutException")
        gate.open()
        assert running.result().status_code == 200
    assert made.ask("1", **{"X-Request-Timeout-Ms": "30000"}).json() == 1
    assert not noted.exists()


@pytest.mark.parametrize(
    "name, value",
    [
        ("X-Priority", "11"),
        ("X-Priority", "-11"),
        ("X-Priority", "high"),
        ("X-Priority", "1.5"),
        ("X-Request-Timeout-Ms", "0"),
        ("X-Request-Timeout-Ms", "soon"),
        ("X-Request-Timeout-Ms", "9" * 30),
        ("Inference-Header-Content-Length", "-1"),
    ],
)
def test_a_wrong_header_is_named(serving_inference, manager, name, value):
    """What was given, and what is allowed."""
    path = "/v2/models/noop/infer" if name.startswith("Inference") else "/predictions/noop"
    response = serving_inference(manager).post(path, headers={name: value})
    message = response.json()["message"]
    assert (response.status_code, name in message, value in message) == (400, True, True)


def test_priority_and_timeout_reach_the_library(serving_inference, manager):
    """As they were sent."""
    serving_inference(manager).post("/predictions/noop", headers={"X-Priority": "-3", "X-Request-Timeout-Ms": "1500"})
    (call,) = [kwargs for name, _, kwargs in manager.calls if name == "stream"]
    assert (call["priority"], call["timeout"]) == (-3, 1.5)


BAD_TARGETS = [
    b"GET http://localhost?x HTTP/1.1",
    b"GET http://localhost HTTP/1.1",
    b"GET http://localhost:99999999/ping HTTP/1.1",
    b"CONNECT localhost:443 HTTP/1.1",
]


@pytest.mark.parametrize("line", BAD_TARGETS)
@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_target_that_cannot_be_read_is_refused_in_its_turn(predicting, line, before):
    """Requests that came before it on the connection have their own answers, in order, and it has the last."""
    made = predicting(batch_size=1)
    bodies = [b"time.sleep(0.2) or %d" % number for number in range(before)]
    sent = b"".join(ASK % (len(body), body) for body in bodies) + line + b"\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(made.client.address, timeout=20) as connection:
        connection.sendall(sent)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    answers = received.split(b"HTTP/1.1 ")[1:]
    assert [answer[:3] for answer in answers] == [b"200"] * before + [b"400"]
    assert [answer.rpartition(b"\r\n\r\n")[2] for answer in answers[:-1]] == [b"%d" % n for n in range(before)]
    assert b'"type"' in answers[-1]


def test_priority_goes_first(predicting, gate, tmp_path):
    """What was asked later, but matters more, is run before."""
    made = predicting(**ONE_BY_ONE)
    order = tmp_path / "order"
    with ThreadPoolExecutor() as threads:
        threads.submit(made.ask, gate.expression)
        until(gate.reached)
        low = threads.submit(made.ask, f"note({str(order)!r}, 'low')", **{"X-Priority": "-10"})
        until(lambda: waiting(made) == 1)
        high = threads.submit(made.ask, f"note({str(order)!r}, 'high')", **{"X-Priority": "10"})
        until(lambda: waiting(made) == 2)
        gate.open()
        assert [low.result().status_code, high.result().status_code] == [200, 200]
    assert order.read_text().split() == ["high", "low"]


def test_a_caller_that_leaves_is_dropped_from_the_queue(predicting, gate, tmp_path):
    """Its request never runs, and makes room for others at once."""
    made = predicting(**ONE_BY_ONE)
    noted = tmp_path / "noted"
    body = f"note({str(noted)!r})".encode()
    with ThreadPoolExecutor() as threads:
        running = threads.submit(made.ask, gate.expression)
        until(gate.reached)
        with socket.create_connection(made.client.address, timeout=30) as connection:
            connection.sendall(ASK % (len(body), body))
            until(lambda: waiting(made) == 1)
        until(lambda: waiting(made) == 0)
        gate.open()
        assert running.result().status_code == 200
    assert made.ask("1").json() == 1
    assert not noted.exists()


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_request_that_is_too_large_is_413(predicting, is_chunked):
    """Before it is read, if it says how large it is; the setting is named, and the server goes on."""
    made = predicting(settings=Settings(max_request_size=100))
    data = iter([b"x" * 60] * 2) if is_chunked else b"x" * 101
    response = made.client.post("/predictions/model", data=data)
    assert (response.status_code, response.json()["type"]) == (413, "RequestEntityTooLargeException")
    assert "max_request_size" in response.json()["message"]
    assert made.ask("1").json() == 1


def test_an_answer_that_is_too_large_is_413_and_hurts_no_worker(predicting):
    """It does not leave the worker; the others of its batch get theirs, and the worker goes on."""
    made = predicting(settings=Settings(max_response_size=1000))
    pid = made.ask("os.getpid()").json()
    for answer in ("'x' * 1001", "['x' * 1001]", "b'x' * (1 << 24)"):
        response = made.ask(answer)
        assert (response.status_code, response.json()["type"]) == (413, "RequestEntityTooLargeException")
        assert "max_response_size" in response.json()["message"]
    assert len(made.ask("'x' * 1000").content) == 1000
    assert made.ask("os.getpid()").json() == pid


def test_large_bodies_come_back_as_they_went(predicting):
    """Through shared memory, both ways."""
    made = predicting(
        "def handle(data, context):\n    return data and [row['body'] for row in data]\n",
        settings=Settings(max_request_size=1 << 25, max_response_size=1 << 25),
    )
    sent = bytes(range(256)) * (1 << 16)
    assert made.client.post("/predictions/model", data=sent).content == sent


def test_a_client_that_sends_too_slowly_is_ended(predicting):
    """The route for predictions has the server's limits: 408, and the connection is closed."""
    made = predicting(limits=Limits(head_s=0.3, body_s=0.3, idle_s=5, linger_s=0.3))
    answer = made.client.raw(b"POST /predictions/model HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nabc")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert made.ask("1").json() == 1


def test_the_end_of_the_server_answers_all_that_it_accepted(predicting, gate):
    """What runs and what waits; then the connections are closed."""
    made = predicting(**ONE_BY_ONE)
    with ThreadPoolExecutor() as threads:
        asked = [threads.submit(made.ask, gate.expression)]
        until(gate.reached)
        asked += [threads.submit(made.ask, "7") for _ in range(3)]
        until(lambda: waiting(made) == 3)
        closing = threads.submit(made.server.close, 30)
        gate.open()
        assert closing.result() is True
        assert [future.result().text for future in asked] == ["null", "7", "7", "7"]


def test_a_server_that_may_not_wait_says_that_it_cut_something_off(predicting, gate):
    """What runs has no answer then, and its connection is closed; what waited is not run."""
    made = predicting(**ONE_BY_ONE)
    with ThreadPoolExecutor() as threads:
        asked = [threads.submit(made.ask, gate.expression)]
        until(gate.reached)
        asked.append(threads.submit(made.ask, "7"))
        until(lambda: waiting(made) == 1)
        assert made.server.close(0) is False
        until(lambda: waiting(made) == 0)
        gate.open()
        assert [type(future.exception()) for future in asked] == [requests.ConnectionError] * 2


def test_readiness_falls_while_the_server_drains(predicting, gate):
    """A connection that is still answered hears of it, while what was accepted goes on."""
    made = predicting(**ONE_BY_ONE)
    body = gate.expression.encode()
    with socket.create_connection(made.client.address, timeout=30) as connection, ThreadPoolExecutor() as threads:
        connection.sendall(ASK % (len(body), body) + b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(gate.reached)
        draining = threads.submit(made.server.drain, 30)
        until(lambda: is_refused(made.client.address))
        gate.open()
        received = b""
        while part := connection.recv(65536):
            received += part
        assert draining.result() is True
    first, _, second = received.partition(b"HTTP/1.1 503 ")
    assert first.startswith(b"HTTP/1.1 200 ")
    assert json.loads(second.partition(b"\r\n\r\n")[2])["status"] == "Draining"


def is_refused(address) -> bool:
    try:
        with socket.create_connection(address, timeout=0.1) as connection:
            connection.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return not connection.recv(1)
    except OSError:
        return True
