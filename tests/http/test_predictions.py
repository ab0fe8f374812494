"""Predictions over HTTP: how a body reaches the handler, how its answer goes out, and what an error says."""

from __future__ import annotations

import asyncio
import http.client
import io
import socket

import pytest
import torch

from tests.http.conftest import Client, parse_raw
from tests.http.fakes import FakeStream
from torchmgmt import Response
from torchmgmt.http import create_inference_app
from torchmgmt.http.addresses import BoundAddress, Role
from torchmgmt.http.server import bind, start_server
from torchmgmt.http.tokens import fixed_keys
from torchmgmt.settings import Address, Settings

ROWS = "def handle(data, context):\n    return data and [repr(row) for row in data]\n"
TEXT = {"Content-Type": "text/plain"}


@pytest.fixture
def rows(predicting):
    """A model that answers with the rows that it gets."""
    return predicting(ROWS).client


@pytest.fixture
def evaluating(predicting):
    """A model that evaluates its text, with ``context`` at hand."""
    return predicting()


@pytest.mark.parametrize(
    "content_type, sent, row",
    [
        (None, b"\xff\x00", {"body": bytearray(b"\xff\x00")}),
        ("image/png", b"png", {"body": bytearray(b"png")}),
        ("application/json", b'{"a": [1, null]}', {"body": {"a": [1, None]}}),
        ("Application/JSON; charset=utf-8", b"[1]", {"body": [1]}),
        ("application/json", b"{no json", {"body": bytearray(b"{no json")}),
        ("text/plain", "käse".encode(), {"body": "käse"}),
        ("text/csv", b"\xff", {"body": bytearray(b"\xff")}),
        ("application/x-www-form-urlencoded", b"a=1&b=x%20y&a=2", {"a": bytearray(b"2"), "b": bytearray(b"x y")}),
    ],
)
def test_a_body_reaches_the_handler_as_its_content_type_says(rows, content_type, sent, row):
    """JSON is parsed, text is a str, a form has fields, the rest is bytes; what cannot be parsed is bytes, too."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    assert eval(rows.post("/predictions/model", data=sent, headers=headers).text) == row


def test_a_body_may_come_in_many_pieces(rows):
    """However small they are: the handler gets all of them, in their order."""
    sent = bytes(range(256)) * 5
    pieces = (sent[at : at + 1] for at in range(len(sent)))
    assert eval(rows.post("/predictions/model", data=pieces).text) == {"body": sent}


def test_the_parts_of_a_multipart_body_are_fields(rows):
    """Files are read as bodies of their content type are, other parts are bytes; no byte of them is touched."""
    data = b"\r\n--x\x00\xff\r\n"
    files = {
        "raw": ("a.bin", data, "application/octet-stream"),
        "item": ("a.json", b'{"a": 1}', "application/json"),
        "words": ("a.txt", b"words", "text/plain"),
        "plain": (None, "1"),
    }
    expected = {"raw": bytearray(data), "item": {"a": 1}, "words": "words", "plain": bytearray(b"1")}
    assert eval(rows.post("/predictions/model", files=files).text) == expected


@pytest.mark.parametrize(
    "content_type, sent, said",
    [
        ("multipart/form-data", b"x", "must name its boundary"),
        ("multipart/form-data; boundary=b", b"no form", "not valid multipart/form-data"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1',
            "last boundary",
        ),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Type: text/plain\r\n\r\n1\r\n--b--\r\n", "has no name"),
        ("application/x-www-form-urlencoded", b"a=1&" * 2000, "more than 1000 fields"),
    ],
)
def test_a_broken_form_is_refused(rows, content_type, sent, said):
    """It is the caller's fault, and the message says what is wrong with it."""
    response = rows.post("/predictions/model", data=sent, headers={"Content-Type": content_type})
    assert (response.status_code, response.json()["type"]) == (400, "BadRequestException")
    assert said in response.json()["message"]


def test_the_fields_of_a_query_are_in_the_row(rows):
    """For a GET they are all there is; PUT is as POST."""
    assert eval(rows.get("/predictions/model?a=1&b=%C3%A4").text) == {
        "a": bytearray(b"1"),
        "b": bytearray("ä".encode()),
        "body": bytearray(),
    }
    assert eval(rows.put("/predictions/model?a=1", data=b"x").text) == {"a": bytearray(b"1"), "body": bytearray(b"x")}


def test_nothing_is_parsed_where_the_setting_says_so(predicting):
    """decode_input_request=false leaves bytes."""
    client = predicting(ROWS, settings=Settings(decode_input_request=False)).client
    assert eval(client.post("/predictions/model", json=[1]).text) == {"body": bytearray(b"[1]")}


@pytest.mark.parametrize(
    "answer, content_type, body",
    [
        ("'text'", "text/plain; charset=utf-8", b"text"),
        ("b'bytes'", "application/octet-stream", b"bytes"),
        ("{'a': [1]}", "application/json", b'{"a": [1]}'),
        ("__import__('torch').ones(2).tolist()", "application/json", b"[1.0, 1.0]"),
    ],
)
def test_an_answer_goes_out_as_what_it_is(evaluating, answer, content_type, body):
    """str and bytes as they are, the rest as JSON."""
    response = evaluating.ask(answer)
    assert (response.headers["Content-Type"], response.content) == (content_type, body)


def test_a_tensor_goes_out_as_torch_saves_it(evaluating):
    """As TorchServe sends it."""
    response = evaluating.ask("__import__('torch').ones(2)")
    assert torch.equal(torch.load(io.BytesIO(response.content)), torch.ones(2))


def test_status_phrase_headers_and_content_type_are_the_handlers(evaluating):
    """What is set for one request is in its answer; the server's own headers give way, those of the connection do not."""
    sets = (
        "[context.set_response_status(418, 'Short and stout', 0), context.set_response_content_type(0, 'image/x'),"
        " context.set_response_header(0, 'X-Tea', 'green'), context.set_response_header(0, 'Pragma', 'cache'),"
        " context.set_response_header(0, 'Content-Length', '1'), 'tea'][-1]"
    )
    connection = http.client.HTTPConnection(*evaluating.client.address, timeout=30)
    connection.request("POST", "/predictions/model", sets, {**TEXT, "x-request-id": "7"})
    response = connection.getresponse()
    assert (response.status, response.reason, response.read()) == (418, "Short and stout", b"tea")
    assert [response.headers[name] for name in ("X-Tea", "Content-Type", "Pragma", "x-request-id")] == [
        "green",
        "image/x",
        "cache",
        "7",
    ]
    connection.close()


@pytest.mark.parametrize(
    "sets",
    [
        "context.set_response_status(42, '', 0)",
        "context.set_response_status(200, 'two\\nlines', 0)",
        "context.set_response_header(0, 'X-A', 'b\\r\\nSet-Cookie: c')",
        "context.set_response_header(0, 'X A', 'b')",
        "context.set_response_content_type(0, 'text/plain\\r\\nSet-Cookie: c')",
    ],
)
def test_what_http_does_not_have_is_an_error_that_says_so(evaluating, sets):
    """A handler cannot write another header, or another answer, into its own."""
    response = evaluating.ask(f"[{sets}, 'x'][-1]")
    assert (response.status_code, "Set-Cookie" in response.headers) == (500, False)
    assert response.json()["message"].startswith("The handler has set")


def test_an_answer_without_a_body_has_none(evaluating):
    """204 is followed by the next answer on the same connection."""
    connection = http.client.HTTPConnection(*evaluating.client.address, timeout=30)
    for _ in range(2):
        connection.request("POST", "/predictions/model", "[context.set_response_status(204, '', 0), 'x'][-1]", TEXT)
        response = connection.getresponse()
        assert (response.status, response.read()) == (204, b"")
    connection.close()


def test_the_handler_knows_id_and_headers(evaluating):
    """Under their names in any case; the id is the one that the answer has."""
    response = evaluating.ask(
        "[context.get_request_id(0), context.get_request_header(0, 'X-Own')]", **{"X-Own": "1", "X-Request-Id": "me"}
    )
    assert (response.json(), response.headers["x-request-id"]) == (["me", "1"], "me")
    own = evaluating.ask("context.get_request_id(0)")
    assert own.text == own.headers["x-request-id"]


def test_explanations_ask_the_handler_to_explain(evaluating):
    """The header that BaseHandler looks at is there, on that path alone."""
    for path, said in (("/explanations/model", "True"), ("/predictions/model", "None")):
        for version in ("", "/1.0"):
            response = evaluating.client.post(
                path + version, data="str(context.get_request_header(0, 'explain'))", headers=TEXT
            )
            assert response.text == said


def test_a_path_names_the_version(predicting):
    """Without one it is the default; one that is not there is 404."""
    made = predicting("def handle(d, c):\n    return d and ['one'] * len(d)\n")
    made.register("model", "def handle(d, c):\n    return d and ['two'] * len(d)\n", version="2")
    assert [made.client.post(f"/predictions/model{more}").text for more in ("", "/1.0", "/2")] == ["one", "one", "two"]
    missing = made.client.post("/predictions/model/3")
    assert (missing.status_code, missing.json()["type"]) == (404, "ModelVersionNotFoundException")
    missing = made.client.post("/predictions/nope")
    assert (missing.status_code, missing.json()["message"]) == (404, "Model not found: nope")


def test_invocations_find_their_model(predicting):
    """The query names it, or SageMaker's header; else it is the only one, and with two that is asked for."""
    made = predicting(ROWS)
    assert made.client.post("/invocations", data=b"x").status_code == 200
    made.register("other", ROWS)
    refused = made.client.post("/invocations", data=b"x")
    assert (refused.status_code, refused.json()["type"]) == (400, "BadRequestException")
    assert refused.json()["message"].startswith("Parameter model_name is required.")
    assert made.client.post("/invocations?model_name=other", data=b"x").status_code == 200
    named = {"X-Amzn-SageMaker-Custom-Attributes": "a=b,model_name=other"}
    assert made.client.post("/invocations", data=b"x", headers=named).status_code == 200
    assert made.client.post("/models/other/invoke", data=b"x").status_code == 200


def test_paths_and_methods_are_checked(rows):
    """An encoded slash names nothing, a trailing one changes nothing, and other methods are refused with those that are served."""
    assert rows.post("/predictions/model%2F1.0").status_code == 400
    assert rows.post("/predictions/model/", data=b"x").status_code == 200
    refused = rows.delete("/predictions/model")
    assert (refused.status_code, refused.json()["type"]) == (405, "MethodNotAllowedException")
    assert set(refused.headers["Allow"].split(", ")) == {"POST", "PUT", "GET", "OPTIONS"}
    assert set(rows("OPTIONS", "/predictions/model").headers["Allow"].split(", ")) >= {"POST", "GET"}
    assert rows.post("/predictions").status_code == 404


@pytest.mark.parametrize(
    "raised, code, type_name, said",
    [
        ("ValueError('bad\\nsecond')", 503, "InternalServerException", "ValueError: bad"),
        ("MemoryError('none left')", 507, "InternalServerException", "none left"),
        (
            "__import__('ts.utils.util', fromlist=['x']).PredictionException('so', 513)",
            513,
            "InternalServerException",
            "so",
        ),
        (
            "__import__('ts.utils.util', fromlist=['x']).PredictionException('not so', 404)",
            404,
            "ResourceNot",
            "not so : 404",
        ),
        ("type('E', (Exception,), {'error_code': 7})('x')", 503, "InternalServerException", "x"),
    ],
)
def test_what_a_handler_raises_is_one_line(evaluating, raised, code, type_name, said):
    """Its code where it has one; a message, but no traceback and nothing that was printed."""
    response = evaluating.ask(f"[print('secret'), fail({raised})]")
    item = response.json()
    assert (response.status_code, item["code"]) == (code, code)
    assert item["type"].startswith(type_name)
    assert said in item["message"]
    assert not any(word in item["message"] for word in ("Traceback", "secret", "second", "\n"))


def test_a_setting_shows_all_that_is_known(predicting):
    """show_handler_errors is for those who develop a handler."""
    client = predicting(settings=Settings(show_handler_errors=True)).client
    response = client.post("/predictions/model", data="fail(ValueError('bad'))", headers=TEXT)
    assert "Traceback" in response.json()["message"]


def test_a_worker_that_dies_is_500_in_one_line(evaluating):
    """The next request is answered by another one."""
    response = evaluating.ask("[print('secret', flush=True), os._exit(3)]")
    assert (response.status_code, response.json()["type"]) == (500, "InternalServerException")
    assert "secret" not in response.json()["message"]
    assert evaluating.ask("1", **{"X-Request-Timeout-Ms": "20000"}).json() == 1


def test_keys_guard_predictions(serving_inference, manager):
    """The inference key opens them, and nothing else does; readiness of one model is open as that of all is."""
    settings = Settings(disable_token_authorization=False)
    keys = fixed_keys({"TORCHMGMT_INFERENCE_KEY": "inference-key"})
    client = serving_inference(manager, settings=settings, keys=keys)
    refused = client.post("/predictions/noop")
    assert (refused.status_code, refused.json()["type"]) == (401, "InvalidKeyException")
    assert "WWW-Authenticate" in refused.headers
    assert client.post("/predictions/noop", headers={"Authorization": "Bearer inference-key"}).text == "answer"
    assert [client.get(path).status_code for path in ("/ready/noop", "/v2/health/ready", "/v2/models/noop")] == [
        200,
        200,
        401,
    ]


@pytest.mark.parametrize("framing", [b"Content-Length: 6000000", b"Transfer-Encoding: chunked"])
def test_who_may_not_ask_need_not_send(serving_inference, manager, framing):
    """A large body is not waited for where its sender is refused."""
    settings = Settings(disable_token_authorization=False)
    keys = fixed_keys({"TORCHMGMT_INFERENCE_KEY": "inference-key"})
    client = serving_inference(manager, settings=settings, keys=keys)
    with socket.create_connection(client.address, timeout=30) as connection:
        connection.sendall(b"POST /predictions/noop HTTP/1.1\r\nHost: localhost\r\n" + framing + b"\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")


def test_a_page_may_ask_if_the_settings_let_it(serving_inference, manager):
    """Preflight and answer have what a browser wants to see, for that origin alone."""
    client = serving_inference(manager, settings=Settings(cors_allowed_origin=("https://a.example",)))
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    preflight = client("OPTIONS", "/predictions/noop", headers=asked)
    assert preflight.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
    answer = client.post("/predictions/noop", headers={"Origin": "https://a.example"})
    assert (answer.headers["Access-Control-Allow-Origin"], answer.headers["Vary"]) == ("https://a.example", "Origin")
    refused = client.post("/predictions/noop", headers={"Origin": "https://b.example"})
    assert (refused.status_code, "Access-Control-Allow-Origin" in refused.headers) == (403, False)


def test_one_address_serves_both_apis_below_one_segment(predicting):
    """/models is management's, its /invoke is not; /v2 is inference's, its repository is not."""
    client = predicting(ROWS, roles=frozenset({Role.MANAGEMENT, Role.INFERENCE})).client
    assert client.get("/models/model").json()[0]["modelName"] == "model"
    assert client.post("/models/model/invoke", data=b"x").text == repr({"body": bytearray(b"x")})
    assert client.post("/v2/repository/index").json()[0]["name"] == "model"
    assert client.get("/v2/models/model/ready").json() == {"name": "model", "ready": True}


def test_a_defect_is_answered_in_json(serving_inference, manager):
    """Its text stays in the log, under the request's id."""
    manager.error = RuntimeError("our own fault")
    response = serving_inference(manager).post("/predictions/noop")
    assert (response.status_code, response.json()["type"]) == (500, "InternalServerException")
    assert "fault" not in response.text


def test_requests_that_are_sent_ahead_are_answered_in_order(rows):
    """Pipelined on one connection, each by its own answer."""
    head = b"POST /predictions/model HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n"
    answers = rows.raw(head + b"\r\n1" + head + b"Connection: close\r\n\r\n2").split(b"HTTP/1.1 200")
    assert [answer[-5:] for answer in answers[1:]] == [b"'1')}", b"'2')}"]


def test_a_client_that_asks_before_it_sends_is_told_to(rows):
    """Expect: 100-continue is answered, and then the request."""
    head = b"POST /predictions/model HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 1\r\n"
    assert rows.raw(head + b"Connection: close\r\n\r\n1").startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")


def test_a_client_that_asks_before_it_sends_too_much_is_refused(predicting):
    """Without being told to send, and on a connection that ends: who knows whether it sends all the same."""
    client = predicting(ROWS, settings=Settings(max_request_size=10)).client
    head = b"POST /predictions/model HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 11\r\n\r\n"
    code, headers, _ = parse_raw(client.raw(head))
    assert (code, headers["connection"]) == (413, "close")


def test_a_head_has_no_body(rows):
    """Whatever it is answered."""
    head = b"HEAD /predictions/model HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    first, _, body = rows.raw(head).partition(b"\r\n\r\n")
    assert (first.startswith(b"HTTP/1.1 405 "), body) == (True, b"")


def test_an_error_in_a_raw_answer_has_the_headers_of_all(rows):
    """No-cache, the id, and the connection's end where the client wants that."""
    code, headers, item = parse_raw(
        rows.raw(b"POST /predictions/x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    )
    assert (code, item["code"], headers["connection"], headers["pragma"]) == (404, 404, "close", "no-cache")


def scope_of(path: str) -> dict:
    return {
        "type": "http",
        "method": "POST",
        "http_version": "1.1",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
        "client": ("127.0.0.1", 1),
    }


def test_any_asgi_server_can_serve_them(manager):
    """With what ASGI has: a whole answer, and the end of the request when the client goes."""
    app = create_inference_app(manager)

    async def ask(stream, *messages) -> list[dict]:
        manager.stream = lambda *_args, **_more: stream
        waiting, sent = list(messages), []

        async def receive() -> dict:
            return waiting.pop(0) if waiting else await asyncio.Event().wait()

        async def send(message: dict) -> None:
            sent.append(message)

        await app(scope_of("/predictions/noop"), receive, send)
        return sent

    class Endless(FakeStream):
        async def next_body(self):
            await asyncio.Event().wait()

    body = {"type": "http.request", "body": b"x", "more_body": False}
    start, end = asyncio.run(ask(FakeStream(Response(body=b"answer")), body))
    assert (start["status"], end["body"]) == (200, b"answer")
    endless = Endless()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(ask(endless, body, {"type": "http.disconnect"}))
    assert endless.is_closed


def test_each_answer_is_counted_once(manager):
    """Whether it goes out at once, in parts or as an error."""
    codes: list[int] = []
    bound = BoundAddress(frozenset({Role.INFERENCE}), bind(Address("http", "127.0.0.1", 0)))
    server = start_server(manager, bound, Settings(), on_response=codes.append)
    try:
        client = Client(server.url)
        for path in ("/predictions/noop", "/predictions/nope", "/nope"):
            client.post(path)
        client.post("/predictions/noop", headers={"Accept": "text/event-stream"})
    finally:
        server.close()
    assert codes == [200, 404, 404, 200]
