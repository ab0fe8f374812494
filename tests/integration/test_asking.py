"""Limits and priorities of requests, bodies that workers read and write, and the asyncio form, through a manager."""

from __future__ import annotations

import asyncio
import io
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.handlers import ECHO, EVAL, PATIENCE_S, Deployer, Gate, run_program, until
from torchmgmt import HttpBody, ModelManager
from torchmgmt.errors import DeadlineExceeded, HandlerFailed, InvalidArgument, ModelNotFound

ROWS = """
def handle(data, context):
    return data and [f"{row!r}" for row in data]
"""
ANSWERS = """
import numpy, torch
def handle(data, context):
    return data and [eval(row["body"]) for row in data]
"""


def test_a_body_is_read_by_its_content_type_in_the_worker(deploy: Deployer) -> None:
    """JSON is parsed, text is str, all else a bytearray, as is what does not parse, and everything without decoding."""
    model = deploy(ROWS)

    def row(content: bytes, content_type: str = "", **more: object) -> str:
        return model.submit(HttpBody(content, content_type, **more)).result(PATIENCE_S).decode()

    assert row(b'{"a": [1]}', "application/json; charset=utf-8") == "{'body': {'a': [1]}}"
    assert row(b'{"a', "application/json") == """{'body': bytearray(b'{"a')}"""
    assert row("ä".encode(), "text/plain; charset=utf-8") == "{'body': 'ä'}"
    assert row(b"\x00\xff", "image/png") == "{'body': bytearray(b'\\x00\\xff')}"
    assert row(b"{}") == "{'body': bytearray(b'{}')}"
    assert row(b"{}", "application/json", decodes=False) == "{'body': bytearray(b'{}')}"


def test_an_answer_is_written_by_its_type_in_the_worker(deploy: Deployer) -> None:
    """str and bytes go out as they are, a tensor as torch.save writes it, the rest as JSON, tensors in it as lists."""
    model = deploy(ANSWERS)

    def answer(expression: str) -> tuple[bytes, str]:
        response = model.submit(HttpBody(expression.encode(), "text/plain")).response(PATIENCE_S)
        return bytes(response.body), response.content_type

    assert answer("'ä'") == ("ä".encode(), "text/plain; charset=utf-8")
    assert answer("b'\\x00'") == (b"\x00", "application/octet-stream")
    assert answer("[1, {'a': None}]") == (b'[1, {"a": null}]', "application/json")
    assert answer("{'t': torch.ones(2), 'n': numpy.float32(1.5)}") == (
        b'{"t": [1.0, 1.0], "n": 1.5}',
        "application/json",
    )
    assert torch.load(io.BytesIO(answer("torch.arange(3)")[0])).tolist() == [0, 1, 2]
    with pytest.raises(HandlerFailed, match="Object of type object is not JSON serializable"):
        answer("object()")


def test_only_a_body_is_answered_with_a_response(deploy: Deployer) -> None:
    """The answer to a Python object has no form for HTTP, and says so."""
    with pytest.raises(TypeError, match="HttpBody"):
        deploy(ECHO).submit("x").response(PATIENCE_S)


def test_a_large_body_travels_as_it_is(deploy: Deployer) -> None:
    """8 MB in and out, byte by byte, as segments of their own."""
    content = np.random.default_rng(1).bytes(8 << 20)
    response = deploy(ECHO).submit(HttpBody(content, "application/octet-stream")).response(PATIENCE_S)
    assert response.body == content


def test_apredict_answers_on_the_loop_and_raises_what_predict_raises(deploy: Deployer, manager: ModelManager) -> None:
    """Many at once, in any order; errors as of predict; the loop goes on meanwhile."""
    model = deploy(EVAL, batch_size=8)

    async def ask() -> list[object]:
        answers = await asyncio.gather(*(model.apredict(f"{number} * 2") for number in range(80)))
        with pytest.raises(HandlerFailed, match="ZeroDivisionError"):
            await model.apredict("1 / 0")
        with pytest.raises(ModelNotFound):
            await manager.apredict("unknown")
        with pytest.raises(DeadlineExceeded):
            await model.apredict("time.sleep(0.3)", timeout=0.05)
        return [*answers, await model.submit("'awaited'")]

    assert asyncio.run(ask()) == [*(number * 2 for number in range(80)), "awaited"]


def test_a_cancelled_task_takes_its_request_back(deploy: Deployer, gate: Gate, tmp_path: Path) -> None:
    """What waited for a worker and is cancelled never runs."""
    model = deploy(EVAL)
    ran = tmp_path / "ran"
    model.submit(gate.expression)
    until(gate.reached)

    async def ask() -> None:
        task = asyncio.create_task(model.apredict(f"note({str(ran)!r})"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(ask())
    gate.open()
    assert model.predict("'next'") == "next"
    assert not ran.exists()


def test_a_request_that_is_given_up_ends_as_cancelled(deploy: Deployer, gate: Gate) -> None:
    """abandon() ends a running request for its caller; the worker's next answers are not mixed up by that."""
    model = deploy(EVAL)
    future = model.submit(gate.expression)
    until(gate.reached)
    assert not future.cancel()
    future.abandon()
    future.abandon()
    with pytest.raises(CancelledError):
        future.result(PATIENCE_S)
    gate.open()
    assert model.predict("7") == 7


def test_torch_is_not_imported_on_the_event_loop() -> None:
    """The first tensor that comes back has torch imported on another thread: the loop goes on meanwhile."""
    source = """
import asyncio, pathlib, sys, tempfile, time
from torchmgmt import ModelManager
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "h.py").write_text("import torch\\ndef handle(data, context):\\n    return data and [torch.ones(2) for _ in data]\\n")

async def main(manager):
    longest, last, task = 0.0, time.monotonic(), asyncio.create_task(manager.apredict("h"))
    while not task.done():
        await asyncio.sleep(0.01)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    return (await task).tolist(), longest

with ModelManager() as manager:
    manager.register(folder, model_name="h", handler="h.py")
    assert "torch" not in sys.modules
    before = time.monotonic()
    answer, longest = asyncio.run(main(manager))
    print(answer, longest < (time.monotonic() - before) / 2)
"""
    program = run_program(source)
    assert (program.stdout, program.stderr) == ("[1.0, 1.0] True\n", "")


@pytest.mark.parametrize("key, named", [("clientTimeoutInMills", 0.2), ("queueTimeoutInMills", 0.2)])
def test_the_archives_limits_hold_for_callers_that_set_none(
    deploy: Deployer, gate: Gate, key: str, named: float
) -> None:
    """A request that waits for longer than the archive allows fails, names the limit, and never runs."""
    model = deploy(EVAL, config=f"{key}: 200\n")
    model.submit(gate.expression, timeout=PATIENCE_S)
    until(gate.reached)
    with pytest.raises(DeadlineExceeded, match=f"{named:g}"):
        model.predict("1")
    assert model.describe().to_dict()[key] == 200


def test_a_limit_for_waiting_does_not_end_what_runs(deploy: Deployer) -> None:
    """wait_timeout is over when the request is begun."""
    assert deploy(EVAL).predict("time.sleep(0.4) or 'done'", wait_timeout=0.2) == "done"


def test_a_higher_priority_goes_first(deploy: Deployer, gate: Gate) -> None:
    """Of what waits, the requests with more priority are begun first."""
    model = deploy(EVAL)
    first = model.submit(gate.expression)
    until(gate.reached)
    now = "time.monotonic_ns()"
    low, middle, high = (model.submit(now, priority=priority) for priority in (-10, 0, 10))
    gate.open()
    assert first.result(PATIENCE_S) is None
    assert high.result(PATIENCE_S) < middle.result(PATIENCE_S) < low.result(PATIENCE_S)


@pytest.mark.parametrize(
    "argument, value",
    [
        ("priority", 11),
        ("priority", 0.5),
        ("priority", False),
        ("wait_timeout", -1),
        ("timeout", "1"),
        ("request_id", 7),
    ],
)
def test_wrong_wishes_are_named(deploy: Deployer, argument: str, value: object) -> None:
    """A wish that is out of its range is an InvalidArgument that names it."""
    model = deploy(ECHO)
    with pytest.raises(InvalidArgument, match=argument):
        model.submit("x", **{argument: value})


def test_a_callers_own_request_id_reaches_the_handler(deploy: Deployer) -> None:
    """context.get_request_id gives the id that submit was given."""
    model = deploy(EVAL)
    assert model.submit("context.get_request_id(0)", request_id="mine").result(PATIENCE_S) == "mine"
    assert model.predict("context.get_request_id(0)") != "mine"
