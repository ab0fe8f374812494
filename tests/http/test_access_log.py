"""The access log: one line for each request, without secrets, and no request waits for who reads it."""

from __future__ import annotations

import io
import logging
import re
import threading

import pytest

from tests.http.fakes import FakeManager, info_of
from torchmgmt.http import access_log
from torchmgmt.http.access_log import LineFormatter, written_in_background
from torchmgmt.http.masking import masked_query
from torchmgmt.redaction import redacted_text

LINE = re.compile(r'127\.0\.0\.1:\d+ "(?P<request>[A-Z]+ \S+ HTTP/1\.1)" (?P<code>\d{3}) (?P<ms>\d+\.\d) (?P<id>\S+)')


@pytest.fixture
def lines(caplog):
    """The access log's lines so far."""
    caplog.set_level("INFO", "torchmgmt.access")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "torchmgmt.access"]


@pytest.mark.parametrize(
    "method, path, code",
    [
        ("GET", "/models?limit=3", 200),
        ("GET", "/models/nope", 404),
        ("PATCH", "/models", 405),
        ("GET", "/nope", 404),
        ("POST", "/models?batch_size=x", 400),
        ("GET", "/models/a%2Fb", 400),
    ],
)
def test_each_request_is_one_line(client, lines, method, path, code):
    """Client, method, path with query, code, milliseconds, and the id that the caller got, too."""
    response = client(method, path)
    (line,) = lines()
    found = LINE.fullmatch(line)
    assert found, line
    if "%2F" not in path:
        assert found["request"] == f"{method} {path} HTTP/1.1"
    assert int(found["code"]) == response.status_code == code
    assert found["id"] == response.headers["x-request-id"]


def test_the_inference_address_has_the_same_line(serving_inference, lines):
    """One form for both addresses."""
    response = serving_inference(FakeManager()).get("/ping?x=1", headers={"x-request-id": "mine"})
    (line,) = lines()
    found = LINE.fullmatch(line)
    assert found
    assert (found["request"], found["code"], found["id"]) == ("GET /ping?x=1 HTTP/1.1", "200", "mine")
    assert response.status_code == 200


def test_who_is_refused_is_logged_too(client, lines):
    """A request that never reached an endpoint has its line: by the guard, or by the HTTP parser."""
    client.get("/models", headers={"Host": "evil.example"})
    client.raw(b"GET /models?x=1 HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n")
    client.raw(b"nonsense\r\n\r\n")
    assert [LINE.fullmatch(line)["code"] for line in lines()[:1]] == ["401"]
    assert [line.split('" ')[1].split()[0] for line in lines()] == ["401", "400", "400"]


def test_a_request_cannot_forge_a_line(client, lines):
    """Whatever a path holds stays on its line and in its place."""
    client.get('/x%0A127.0.0.1:1%20"GET%20/models%20HTTP/1.1"%20200%0D?a=%0Ab')
    client.get("/" + "x" * 10_000)
    first, second = lines()
    assert "\n" not in first
    assert "\r" not in first
    assert LINE.fullmatch(first)["code"] == "404"
    assert len(second) < 2200


def test_a_log_that_is_off_costs_nothing(client, lines, caplog):
    """Not even the time is taken."""
    caplog.set_level("WARNING", "torchmgmt.access")
    client.get("/models")
    assert lines() == []


@pytest.mark.parametrize(
    "query, logged",
    [
        ("limit=3&next_page_token=2", "limit=3&next_page_token=2"),
        ("url=noop.mar", "url=noop.mar"),
        ("url=https://example.org/a.mar", "url=https://example.org/a.mar"),
        ("url=https%3A%2F%2Fexample.org%2Fa%20b.mar", "url=https%3A%2F%2Fexample.org%2Fa%20b.mar"),
        ("url=https://me:pw@example.org/a.mar", "url=https://***%40example.org/a.mar"),
        ("url=https%3A%2F%2Fme%3Ap%2540w%40example.org%2Fa.mar", "url=https://***%40example.org/a.mar"),
        ("a=1&token=abc&api_key=d", "a=1&token=***&api_key=***"),
        ("tok%65n=abc", "tok%65n=***"),
        (
            "url=https%3A%2F%2Fs3.example%2Fa.mar%3FX-Amz-Signature%3Dabc%26x%3D1",
            "url=https://s3.example/a.mar%3FX-Amz-Signature%3D***%26x%3D1",
        ),
    ],
)
def test_secrets_in_a_query_are_hidden(query, logged):
    """What has no secret is as it came."""
    assert masked_query(query) == logged


@pytest.mark.parametrize(
    "text, shown",
    [
        ("Model not found: a@b", "Model not found: a@b"),
        ("Failed: https://me:pw@example.org/a?x=1: refused", "Failed: https://***@example.org/a?x=1: refused"),
        ("got 'https://a:b@c/d' and https://e@f", "got 'https://***@c/d' and https://***@f"),
        ("https://x/a?sv=1&sig=abc%2B&se=2#sha256=0", "https://x/a?sv=1&sig=***&se=2#sha256=0"),
        ("https://x/a@b?mail=c@d", "https://x/a@b?mail=c@d"),
    ],
)
def test_secrets_in_a_text_are_hidden(text, shown):
    """User and password, and signatures, of every URL in it."""
    assert redacted_text(text) == shown


def test_describe_list_and_errors_hide_secrets(serving, lines):
    """A model that was registered from a URL with a password shows the URL without it."""
    info = info_of("noop")
    manager = FakeManager(info)
    object.__setattr__(info.spec, "url", "https://me:hunter2@example.org/noop.mar?token=hunter2")
    client = serving(manager)
    answers = [
        client.get(path) for path in ("/models", "/models/noop", "/models/noop/all", "/models/noop?customized=1")
    ]
    assert all("https://***@example.org/noop.mar?token=***" in answer.text for answer in answers)
    answers.append(client.post("/models", params={"url": "a", "runtime": "https://me:hunter2@x"}))
    assert answers[-1].status_code == 400
    assert "hunter2" not in "".join(answer.text for answer in answers) + "".join(lines())


class Stuck(logging.Handler):
    """A log whose reader has gone to lunch."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = threading.Event()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert self.reads.wait(30)
        self.lines.append(record.getMessage())


@pytest.fixture
def stuck(monkeypatch):
    handler = Stuck()
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    monkeypatch.setattr(access_log.logger, "level", logging.INFO)
    yield handler
    handler.reads.set()


def test_no_request_waits_for_the_log(stuck, client):
    """With a log that is not read, requests are answered; the lines are there when it is read again."""
    with written_in_background():
        assert [client.get("/models", headers={"x-request-id": str(n)}).status_code for n in range(5)] == [200] * 5
        assert stuck.lines == []
        stuck.reads.set()
    assert [line.split()[-1] for line in stuck.lines] == list("01234")


def test_a_log_that_is_never_read_takes_no_memory(stuck, monkeypatch):
    """Lines beyond the bound are lost, and how many is said."""
    monkeypatch.setattr(access_log, "MOST_WAITING_LINES", 3)
    with written_in_background():
        for n in range(10):
            access_log.log_request(("c", 1), "GET", b"/%d" % n, b"", 200, 0, "id")
        stuck.reads.set()
    lost = int(re.search(r"(\d+) lines of the access log were lost", stuck.lines[-1])[1])
    assert lost in range(4, 8)  # the thread may have taken some
    assert len(stuck.lines) == 10 - lost + 1


def test_lines_that_are_written_together_are_those_that_would_be_written_one_by_one():
    """The program's form of a line, with the time of its request; nothing is lost between."""
    one_by_one, together = io.StringIO(), io.StringIO()
    plain = logging.StreamHandler(one_by_one)
    plain.setFormatter(logging.Formatter(LineFormatter()._fmt))
    quick = logging.StreamHandler(together)
    quick.setFormatter(LineFormatter())
    requests = [(("c", 1), "GET", b"/%d" % n, b"a=1&token=x", 200, n / 1000, f"id{n}") for n in range(300)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [plain, quick])
        patch.setattr(access_log.logger, "level", logging.INFO)
        with written_in_background():
            for request in requests:
                access_log.log_request(*request)
    assert together.getvalue() == one_by_one.getvalue()
    assert together.getvalue().count("\n") == 300
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO torchmgmt.access: c:1", together.getvalue())
