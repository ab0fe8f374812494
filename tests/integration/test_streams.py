"""Answers in parts, with workers of both kinds: what comes when, and what stops a handler that nobody listens to."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.handlers import ECHO, PATIENCE_S, TOOLS, Deployer, Gate, lines_of, until
from torchmgmt import HttpBody, Model, ModelManager, ProcessBackend, streams
from torchmgmt.errors import HandlerFailed, ReaderTooSlow

COUNTING = (
    TOOLS
    + """
def count(body):
    for number in range(body["parts"]):
        note(body["log"], number)
        if number == body.get("wait_at"):
            wait_for(body["gate"])
        if number == body.get("fail_at"):
            raise ValueError("no more")
        yield {"part": number}
    if "end" in body:
        return body["end"]

def handle(data, context):
    return data and [count(row["body"]) if isinstance(row["body"], dict) else row["body"] for row in data]
"""
)
"""Answers each request that is a dictionary with a generator of so many parts, and others with their bodies."""

SENDING = (
    TOOLS
    + """
def handle(data, context):
    if data is None:
        return
    if data[0]["body"].startswith("/"):
        wait_for(data[0]["body"])
    context.set_response_status(203, "Partly", 0)
    for number in range(3):
        context.send_intermediate([f"{row['body']}{number};" for row in data])
    return [f"{row['body']}!" for row in data]
"""
)
"""Answers each request in parts; one that is a path waits for that file first."""
YIELDING = """
def handle(data, context):
    global loaded
    if data is None:
        loaded = True
        return
    yield [loaded for row in data]
    yield [len(data) for row in data]
"""


@pytest.fixture(params=["process", "thread"])
def deploy_each(request: pytest.FixtureRequest, tmp_path: Path, backend: ProcessBackend) -> Iterator[Deployer]:
    with ModelManager(backend=backend) as manager:
        yield Deployer(tmp_path, manager, options={"backend": request.param})


@pytest.fixture
def model(deploy_each: Deployer) -> Model:
    return deploy_each(COUNTING)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_what_a_handler_yields_comes_in_parts_and_what_it_returns_last(model: Model, log: Path) -> None:
    """The parts of a generator are given in order, then what it returns; an answer that is none is one part."""
    assert list(model.stream({"parts": 3, "log": str(log)})) == [{"part": 0}, {"part": 1}, {"part": 2}]
    assert list(model.stream({"parts": 1, "log": str(log), "end": "x"})) == [{"part": 0}, "x"]
    assert list(model.stream("plain")) == ["plain"]


def test_a_part_is_there_before_the_next_one_is_made(model: Model, log: Path, tmp_path: Path) -> None:
    """A part is given while the handler computes the next one."""
    gate = tmp_path / "gate"
    with model.stream({"parts": 2, "log": str(log), "wait_at": 1, "gate": str(gate)}) as stream:
        assert next(stream) == {"part": 0}
        assert not gate.exists()
        gate.touch()
        assert list(stream) == [{"part": 1}]
        assert stream.is_complete


def test_who_takes_an_answer_whole_gets_the_list_of_its_parts(model: Model, log: Path) -> None:
    """predict of a handler that answers in parts returns all of them; over HTTP they are one body."""
    assert model.predict({"parts": 2, "log": str(log), "end": "x"}) == [{"part": 0}, {"part": 1}, "x"]
    assert model.predict({"parts": 0, "log": str(log)}) == []
    body = HttpBody(b'{"parts": 2, "log": "%s"}' % str(log).encode(), "application/json")
    answer = model.submit(body).response(PATIENCE_S)
    assert (bytes(answer.body), answer.content_type) == (b'{"part": 0}{"part": 1}', "application/json")


def test_an_error_comes_after_the_parts_before_it_and_is_its_own_requests_alone(model: Model, log: Path) -> None:
    """A generator that raises ends its own answer with that; nothing is run again."""
    stream = model.stream({"parts": 3, "log": str(log), "fail_at": 1})
    assert next(stream) == {"part": 0}
    with pytest.raises(HandlerFailed, match="no more"):
        next(stream)
    assert lines_of(log) == ["0", "1"]
    assert model.predict("still there") == "still there"


def test_what_is_sent_between_goes_to_each_request_of_the_batch(deploy_each: Deployer, tmp_path: Path) -> None:
    """send_intermediate sends a part to each request; status and headers that were set by then come with the first."""
    model = deploy_each(SENDING, batch_size=2)
    gate = Gate(tmp_path / "gate")
    first = model.submit(gate.path)  # meanwhile the others come together
    until(first.running)
    streams = [model.stream(HttpBody(name, "text/plain")) for name in (b"a", b"b")]
    gate.open()
    assert first.result(PATIENCE_S)[-1] == f"{gate.path}!"

    async def bodies() -> list[list[tuple[int, bytes]]]:
        found = []
        for stream in streams:
            parts = []
            while (part := await stream.next_body()) is not None:
                parts.append((part.status, bytes(part.body)))
            found.append(parts)
        return found

    one, other = asyncio.run(bodies())
    assert [body for _, body in one] == [b"a0;", b"a1;", b"a2;", b"a!"]
    assert [body for _, body in other] == [b"b0;", b"b1;", b"b2;", b"b!"]
    assert (one[0][0], other[0][0]) == (203, 200)


def test_a_handler_that_is_a_generator_itself_sends_a_part_to_each_request(deploy_each: Deployer) -> None:
    """``handle`` may yield lists with a part for each request; its first call, without data, runs as well."""
    assert list(deploy_each(YIELDING).stream("x")) == [True, 1]


def test_a_stream_that_is_closed_stops_its_handler(model: Model, log: Path) -> None:
    """A handler whose parts nobody takes any more does not go on."""
    endless = {"parts": 10**9, "log": str(log)}
    with model.stream(endless) as stream:
        next(stream)
    assert model.predict("free again") == "free again"
    assert list(stream) == []


def test_a_task_that_is_cancelled_stops_its_handler_though_it_takes_the_answer_whole(model: Model, log: Path) -> None:
    """apredict that is cancelled ends a handler that answers in parts, at the next one."""

    async def ask() -> object:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(model.apredict({"parts": 10**9, "log": str(log)}), 0.2)
        return await model.apredict("free again")

    assert asyncio.run(ask()) == "free again"


def test_a_deadline_stops_a_handler_at_its_next_part(model: Model, log: Path) -> None:
    """A stream past its timeout fails with DeadlineExceeded, and the worker is free."""
    with pytest.raises(TimeoutError):
        list(model.stream({"parts": 10**9, "log": str(log)}, timeout=0.2))
    assert model.predict("free again") == "free again"


def test_one_of_a_batch_that_leaves_does_not_stop_the_others(deploy_each: Deployer, tmp_path: Path) -> None:
    """While anybody waits for a batch, all of it goes on."""
    model = deploy_each(COUNTING, batch_size=2)
    logs = [tmp_path / "log0", tmp_path / "log1"]
    before, gate = Gate(tmp_path / "before"), Gate(tmp_path / "gate")
    model.submit({"parts": 1, "log": str(tmp_path / "log"), "wait_at": 0, "gate": before.path})
    leaving, staying = (model.stream({"parts": 3, "log": str(log), "wait_at": 2, "gate": gate.path}) for log in logs)
    before.open()  # and only now these two begin, together
    assert next(leaving) == {"part": 0}
    leaving.close()
    gate.open()
    assert list(staying) == [{"part": 0}, {"part": 1}, {"part": 2}]


def test_each_part_gives_a_handler_its_time_anew(deploy_each: Deployer) -> None:
    """A stream may take longer in all than response_timeout: it counts from part to part."""
    slow = "import time\ndef parts():\n    for each in range(6):\n        time.sleep(0.25)\n        yield each\n"
    model = deploy_each(
        slow + "def handle(data, context):\n    return data and [parts() for _ in data]\n", response_timeout=1
    )
    assert list(model.stream("x")) == [0, 1, 2, 3, 4, 5]


def test_a_worker_that_dies_ends_the_streams_that_it_had_begun(deploy: Deployer, tmp_path: Path) -> None:
    """The parts that came are given, then WorkerDied is raised."""
    source = "import os\ndef parts():\n    yield 1\n    os._exit(3)\ndef handle(data, context):\n    return data and [parts()]\n"
    stream = deploy(source).stream("x")
    assert next(stream) == 1
    with pytest.raises(Exception, match="exit"):
        next(stream)


def test_a_reader_that_waits_is_woken_when_its_stream_is_closed_elsewhere(
    model: Model, log: Path, tmp_path: Path
) -> None:
    """close() from another thread ends an iteration that waits."""
    gate = Gate(tmp_path / "gate")
    stream = model.stream({"parts": 1, "log": str(log), "wait_at": 0, "gate": gate.path})
    found: list[object] = []
    reader = threading.Thread(target=lambda: found.extend([list(stream)]))
    reader.start()
    until(lambda: lines_of(log))
    stream.close()
    gate.open()
    reader.join(PATIENCE_S)
    assert found == [[]]


def test_parts_that_nobody_reads_are_bounded(model: Model, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that falls behind by too much loses the rest: what waits is given, then the error; the handler stops."""
    monkeypatch.setattr(streams, "MOST_WAITING_BYTES", 1000)
    stream = model.stream({"parts": 10**9, "log": str(log)})
    assert model.predict("free again") == "free again"  # though the first one would never end
    parts: list[object] = []
    with pytest.raises(ReaderTooSlow, match="more than 1000"):
        parts.extend(stream)
    assert parts == [{"part": number} for number in range(len(parts))]
    assert parts


def test_an_answer_is_gone_with_its_last_reference(deploy: Deployer) -> None:
    """Nothing refers to itself: what was answered, and the shared memory that it lies in, waits for no garbage collection."""
    model = deploy(ECHO)
    list(model.stream(HttpBody(b"x")))
    gc.collect()
    gc.disable()
    try:
        stream = model.stream(HttpBody(b"x"))
        parts = list(stream)
        gone = weakref.ref(stream)
        del stream
        assert gone() is None
        assert parts == [b"x"]
    finally:
        gc.enable()
