"""AnswerStream by itself: what is a Future to who answers is, to who reads, the parts of one answer."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from concurrent.futures import CancelledError, Future, InvalidStateError
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from torchmgmt import AnswerStream
from torchmgmt.channel import encode
from torchmgmt.errors import HandlerFailed
from torchmgmt.exchange import Encoded
from torchmgmt.records import ModelKey


class Told:
    """A stream, and what it told of."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        note = self.calls.append
        self.stream = AnswerStream(ModelKey("m", "1"), None, lambda: note("stop working"), lambda: note("taken back"))


def body(text: bytes = b"answer") -> Encoded:
    return Encoded([text], content_type="text/plain")


def test_an_answer_that_comes_at_once_is_whole():
    """It is read without waiting, and is one part to who reads parts."""
    told = Told()
    told.stream.set_result(body())
    whole = told.stream.whole_body()
    assert whole is not None
    assert bytes(whole.body) == b"answer"
    assert told.stream.is_complete
    other = Told()
    other.stream.set_result(encode([1, 2]))
    assert list(other.stream) == [[1, 2]]


def test_what_comes_in_parts_is_not_whole():
    """Nothing is taken then; the parts are read one by one, and what the handler returned last."""
    stream = Told().stream
    stream.take_part(encode("a"))
    stream.set_result(encode("b"))
    assert stream.whole_body() is None
    assert list(stream) == ["a", "b"]
    empty = Told().stream
    empty.set_result(Encoded([]))
    assert empty.whole_body() is None
    assert list(empty) == []


def test_who_waits_is_woken_once():
    """By the first part, or by the end; who asks when something is there is told so and not woken."""
    stream, woken = Told().stream, []
    assert not stream.when_due(lambda: woken.append("first"))
    stream.take_part(encode("a"))
    stream.set_result(encode("b"))
    assert woken == ["first"]
    assert stream.when_due(lambda: woken.append("never"))
    assert woken == ["first"]


def test_taking_back_tells_those_who_may_stop():
    """What was not begun never runs; what runs is stopped; what has ended is left alone."""
    waiting, running, ended = Told(), Told(), Told()
    assert running.stream.set_running_or_notify_cancel()
    ended.stream.set_result(body())
    for told in (waiting, running, ended):
        told.stream.close()
        told.stream.close()
    assert waiting.calls == ["taken back"]
    assert running.calls == ["taken back", "stop working"]
    assert ended.calls == []
    assert waiting.stream.cancelled()
    assert not waiting.stream.set_running_or_notify_cancel()
    assert running.stream.done()
    assert not running.stream.cancelled()
    assert list(running.stream) == []


def test_an_error_is_raised_after_the_parts_and_keeps_nothing_alive():
    """It goes when its reader has let go of it, though it refers to the frames in which it was raised."""
    stream = Told().stream
    stream.take_part(encode("a"))
    stream.set_exception(HandlerFailed("m", "1", "it failed"))
    assert next(stream) == "a"
    gc.disable()
    try:
        error = _error_of(stream)
        assert isinstance(error, HandlerFailed)
        gone = weakref.ref(error)
        del error
        assert gone() is None
        assert list(stream) == []
    finally:
        gc.enable()


def _error_of(stream: AnswerStream) -> Exception | None:
    try:
        next(stream)
    except Exception as error:
        return error
    return None


def test_a_stream_without_a_reader_goes_at_once():
    """Neither who waits nor who is told of the end keeps it, once that was told."""
    gc.disable()
    try:
        stream = Told().stream
        stream.add_done_callback(lambda _stream, mine=stream: mine.done())
        stream.when_due(stream.close)
        gone = weakref.ref(stream)
        stream.set_result(body())
        del stream
        assert gone() is None
    finally:
        gc.enable()


OPERATIONS = ("begin", "answer", "fail", "take back")


@given(st.lists(st.sampled_from(OPERATIONS), max_size=6))
def test_to_who_answers_it_is_a_future(operations):
    """It refuses, and says of itself, what a concurrent.futures.Future does, whatever it is asked in which order."""
    stream, future = Told().stream, Future[Any]()
    for operation in operations:
        assert _do(operation, stream) == _do(operation, future), operation
        for question in ("running", "done"):
            assert getattr(stream, question)() == getattr(future, question)()


def _do(operation: str, promise: Any) -> object:
    """What came of it: an answer, or the class of an error."""
    if operation == "take back":
        if isinstance(promise, AnswerStream):
            promise.close()
        elif not promise.cancel() and not promise.done():
            promise.set_exception(CancelledError())
        return None
    if operation == "begin" and (promise.done() or promise.running()):
        return None  # of these a Future writes to the log
    act = {
        "begin": promise.set_running_or_notify_cancel,
        "answer": lambda: promise.set_result(body()),
        "fail": lambda: promise.set_exception(ValueError()),
    }[operation]
    try:
        return act()
    except InvalidStateError as error:
        return type(error)


def test_a_thread_reads_while_another_writes():
    """No part is lost or out of order, however the two fall together."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(50):
            stream = Told().stream
            writer = threading.Thread(target=_write, args=(stream, 20))
            writer.start()
            assert list(stream) == list(range(20))
            writer.join()
    finally:
        sys.setswitchinterval(interval)


def _write(stream: AnswerStream, count: int) -> None:
    stream.set_running_or_notify_cancel()
    for number in range(count - 1):
        stream.take_part(encode(number))
    stream.set_result(encode(count - 1))
