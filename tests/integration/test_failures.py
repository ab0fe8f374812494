"""Requests that go wrong: each fails alone, with all that the worker had to say."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import CancelledError
from concurrent.futures import wait as wait_all
from pathlib import Path
from typing import Any

import pytest

from tests.handlers import ECHO, EVAL, TOOLS, Deployer, Gate, lines_of, until
from torchmgmt import ModelManager, ProcessBackend, Settings
from torchmgmt.errors import DeadlineExceeded, HandlerFailed, InvalidArgument, QueueFull, TorchmgmtError


class Unpicklable:
    """Refuses to be pickled."""

    def __reduce__(self) -> Any:
        raise RuntimeError("not for you")


class PoisonPill:
    """Can be pickled, but not unpickled: its pickle raises."""

    def __reduce__(self) -> Any:
        return int, ("poison",)


def test_what_the_handler_raises_arrives(deploy: Deployer) -> None:
    """An exception of the handler fails the request with its type, message, traceback and the last lines."""
    source = TOOLS + "def innermost():\n    raise LookupError('where?')\n" + EVAL.removeprefix(TOOLS)
    model = deploy(source)
    with pytest.raises(HandlerFailed) as caught:
        model.predict("print('heard of it') or innermost()")
    error = caught.value
    assert (error.name, error.version, error.error_type) == ("m", "1.0", "LookupError")
    assert error.reason == "LookupError: where?"
    assert "in innermost" in error.traceback
    assert "torchmgmt/" not in error.traceback
    assert error.last_lines[-1] == "heard of it"
    assert (error.error_code, error.out_of_memory) == (None, False)
    assert model.predict("1") == 1
    assert len(model.describe().workers) == 1


def test_an_error_survives_pickling(deploy: Deployer) -> None:
    """What a request failed with can be sent to another process, fields and text included."""
    model = deploy()
    error = model.submit("1 / 0").exception(20)
    assert isinstance(error, HandlerFailed)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.traceback, copy.last_lines) == (str(error), error.traceback, error.last_lines)


@pytest.mark.parametrize("answers, got", [("[]", 0), ("[1]", 1), ("[1, 2, 3, 4]", 4)])
def test_a_wrong_number_of_answers_names_both_numbers(deploy: Deployer, gate: Gate, answers: str, got: int) -> None:
    """When a batch of 3 is answered with another number, all of it fails with an error that names both numbers."""
    source = f"{TOOLS}\ndef handle(data, context):\n    if data is None:\n        return\n"
    source += f"    wait_for(data[0]['body'])\n    return {answers} if len(data) == 3 else data\n"
    model = deploy(source, batch_size=3)
    first = model.submit(gate.path)
    until(first.running, "the first request runs")
    futures = [model.submit("/") for _ in range(3)]
    gate.open()
    for future in futures:
        error = future.exception(20)
        assert isinstance(error, HandlerFailed)
        assert f"{got} answers" in str(error)
        assert "batch of 3" in str(error)


@pytest.mark.parametrize("answer, words", [("None", "None"), ("{'a': 1}", "dict"), ("'text'", "str"), ("5", "int")])
def test_an_answer_that_is_no_list_is_refused(deploy: Deployer, answer: str, words: str) -> None:
    """A handler that answers with something else than a list fails the request, and the error says what it was."""
    model = deploy(f"def handle(data, context):\n    return data and {answer}\n")
    with pytest.raises(HandlerFailed, match=words):
        model.predict(1)


def test_an_answer_that_cannot_be_sent_fails_alone(deploy: Deployer, gate: Gate) -> None:
    """An answer that cannot be pickled fails its request and no other one of the batch."""
    source = EVAL.replace("return [eval", "wait_for(data[0]['wait'])\n    return [eval")
    model = deploy(source, batch_size=3)
    first = model.submit(fields={"body": "0", "wait": gate.path})
    until(first.running, "the first request runs")
    futures = [model.submit(fields={"body": body, "wait": "/"}) for body in ("1", "lambda: 1", "3")]
    gate.open()
    assert futures[0].result(20) == 1
    assert futures[2].result(20) == 3
    error = futures[1].exception(20)
    assert isinstance(error, HandlerFailed)
    assert "pickle" in str(error).lower()


def test_an_answer_that_only_the_worker_knows_is_an_error_of_ours(deploy: Deployer) -> None:
    """An answer of a class that the program cannot import is a HandlerFailed that names it, for result and predict."""
    model = deploy(EVAL + "\nclass OnlyHere:\n    pass\n")
    with pytest.raises(HandlerFailed, match="handler"):
        model.predict("OnlyHere()")


def test_a_request_that_cannot_be_sent_is_refused_at_once(deploy: Deployer) -> None:
    """Data that cannot be pickled is an InvalidArgument with the cause, raised where it was submitted."""
    model = deploy(ECHO)
    for data in (lambda: None, Unpicklable(), threading.Lock(), [threading.Lock()]):
        with pytest.raises(InvalidArgument, match="pickl") as caught:
            model.submit(data)
        assert caught.value.argument == "data"
    with pytest.raises(InvalidArgument, match="not for you") as caught:
        model.submit(fields={"body": Unpicklable()})
    assert caught.value.argument == "fields"


def test_a_request_that_cannot_be_read_fails_alone(deploy: Deployer, gate: Gate) -> None:
    """A row that the worker cannot unpickle fails its own request; the others of the batch are answered, in place."""
    source = "import os, time\ndef handle(data, context):\n    while data and not os.path.exists(data[0].get('wait', '/')):\n"
    source += "        time.sleep(0.002)\n    return data and [row['body'] for row in data]\n"
    model = deploy(source, batch_size=3)
    first = model.submit(fields={"body": 0, "wait": gate.path})
    until(first.running, "the first request runs")
    futures = [model.submit(1), model.submit(PoisonPill()), model.submit(3)]
    alone = model.submit(PoisonPill())
    gate.open()
    assert futures[0].result(20) == 1
    assert futures[2].result(20) == 3
    for future in (futures[1], alone):
        error = future.exception(20)
        assert isinstance(error, HandlerFailed)
        assert "poison" in str(error)


def test_a_prediction_exception_carries_its_code(deploy: Deployer) -> None:
    """TorchServe's PredictionException gives its message and the code that it asks for."""
    model = deploy("from ts.utils.util import PredictionException\n" + EVAL)
    with pytest.raises(HandlerFailed, match="no such label") as caught:
        model.predict("fail(PredictionException('no such label', 422))")
    assert caught.value.error_code == 422


@pytest.mark.parametrize(
    "raised",
    [
        "MemoryError()",
        "__import__('torch').OutOfMemoryError('CUDA out of memory')",
        "RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`')",
    ],
)
def test_running_out_of_memory_is_told_apart(deploy: Deployer, raised: str) -> None:
    """MemoryError, torch's own error of that kind and errors of CUDA are marked, and the worker serves on."""
    model = deploy()
    with pytest.raises(HandlerFailed) as caught:
        model.predict(f"fail({raised})")
    assert caught.value.out_of_memory
    assert model.predict("1") == 1


@pytest.mark.parametrize(
    "raised",
    [
        "type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})()",
        "type('Odd', (Exception,), {'__str__': lambda self: None})()",
        "UnicodeDecodeError('utf-8', b'x', 0, 1, 'because')",
        "ValueError('\\ud800 and \\x00')",
        "ValueError('one', 2, [3])",
        "type('Odd', (Exception,), {'error_code': 'text'})('hm')",
        "StopIteration()",
    ],
)
def test_odd_exceptions_are_told_like_others(deploy: Deployer, raised: str) -> None:
    """An exception that cannot be shown, or shows oddly, fails its request alone and never its worker."""
    model = deploy()
    pid = model.predict("os.getpid()")
    error = model.submit(f"fail({raised})").exception(20)
    assert isinstance(error, HandlerFailed)
    assert str(error)
    assert model.predict("os.getpid()") == pid


def test_a_full_queue_says_so(backend: ProcessBackend, tmp_path: Path) -> None:
    """The request beyond job_queue_size is refused at once with QueueFull, which is not NoWorker; room is used again."""
    with ModelManager(backend=backend, settings=Settings(job_queue_size=2)) as manager:
        model = Deployer(tmp_path, manager)()
        gate = Gate(tmp_path / "gate")
        running = model.submit(f"wait_for({gate.path!r})")
        until(running.running, "the request runs")
        waiting = [model.submit("1"), model.submit("2")]
        with pytest.raises(QueueFull) as caught:
            model.submit("3")
        assert caught.value.capacity == 2
        assert caught.value.retry_after_s > 0
        assert "job_queue_size" in str(caught.value)
        assert waiting[0].cancel()
        waiting.append(model.submit("4"))
        gate.open()
        assert [future.result(20) for future in waiting[1:]] == [2, 4]


def test_a_request_that_is_late_fails_and_never_runs(deploy: Deployer, gate: Gate, tmp_path: Path) -> None:
    """A request that is not started before its time is over fails with DeadlineExceeded and is never run."""
    trace = tmp_path / "trace"
    model = deploy()
    running = model.submit(f"wait_for({gate.path!r})")
    until(running.running, "the request runs")
    with pytest.raises(DeadlineExceeded) as caught:
        model.predict(f"note({str(trace)!r}, 'late')", timeout=0.05)
    assert caught.value.limit_s == 0.05
    assert isinstance(caught.value, TimeoutError)
    gate.open()
    model.predict(f"note({str(trace)!r}, 'next')")
    assert lines_of(trace) == ["next"]


def test_a_request_that_runs_too_long_fails_but_its_worker_does_not(deploy: Deployer, gate: Gate) -> None:
    """The caller of a request that runs past its own timeout is told at once; the worker finishes and serves on."""
    model = deploy()
    pid = model.predict("os.getpid()")
    with pytest.raises(DeadlineExceeded):
        model.predict(f"wait_for({gate.path!r})", timeout=0.05)
    gate.open()
    assert model.predict("os.getpid()") == pid


def test_no_time_at_all_is_too_late(deploy: Deployer) -> None:
    """A request with timeout 0 fails with DeadlineExceeded and leaves nothing in the queue."""
    model = deploy(max_batch_delay=50, batch_size=4)
    with pytest.raises(DeadlineExceeded):
        model.predict("1", timeout=0)
    assert model.describe().queue_length == 0


def test_a_cancelled_request_never_runs(deploy: Deployer, gate: Gate, tmp_path: Path) -> None:
    """Future.cancel takes a waiting request back, and refuses for one that runs."""
    trace = tmp_path / "trace"
    model = deploy()
    running = model.submit(f"wait_for({gate.path!r}) or 'ran'")
    until(running.running, "the request runs")
    waiting = [model.submit(f"note({str(trace)!r}, {number})") for number in range(3)]
    assert waiting[1].cancel()
    assert not running.cancel()
    with pytest.raises(CancelledError):
        waiting[1].result(0)
    assert model.describe().queue_length == 2
    gate.open()
    assert running.result(20) == "ran"
    wait_all([waiting[0], waiting[2]], timeout=20)
    assert lines_of(trace) == ["0", "2"]


def test_callbacks_of_a_future_may_call_the_manager(deploy: Deployer) -> None:
    """A done-callback runs once, may submit another request, and one that raises harms nothing."""
    model = deploy()
    chained: list[Any] = []
    done = threading.Event()

    def again(future: Any) -> None:
        chained.append(future.result())
        if len(chained) < 3:
            model.submit("1").add_done_callback(again)
        else:
            done.set()

    model.submit("0").add_done_callback(again)
    assert done.wait(20)
    assert chained == [0, 1, 1]


def test_requests_that_fail_do_not_count_against_the_worker(deploy: Deployer) -> None:
    """However many requests the handler fails, its worker stays and describe shows no error of the version's."""
    model = deploy()
    pid = model.predict("os.getpid()")
    futures = [model.submit("1 / 0") for _ in range(50)]
    assert all(isinstance(future.exception(20), HandlerFailed) for future in futures)
    assert model.predict("os.getpid()") == pid
    assert model.describe().last_error == ""


def test_headers_that_are_odd_harm_no_other_request(deploy: Deployer, gate: Gate) -> None:
    """Whatever one caller passes as headers, the others of its batch are answered."""
    source = "import os, time\ndef handle(data, context):\n    while data and not os.path.exists(data[0].get('wait', '/')):\n"
    source += "        time.sleep(0.002)\n    return data and [row['body'] for row in data]\n"
    model = deploy(source, batch_size=2)
    first = model.submit(fields={"body": 0, "wait": gate.path})
    until(first.running, "the first request runs")
    try:
        model.submit(1, headers={5: 5})  # type: ignore[dict-item]
    except TorchmgmtError:
        pass
    good = model.submit(2)
    gate.open()
    assert good.result(20) == 2
