"""What is over leaves nothing behind: workers that were replaced, requests that were answered, limits that were not reached."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError

import pytest

from tests.forks import in_child
from tests.handlers import ECHO, EVAL, PATIENCE_S, Deployer, until
from torchmgmt import Model, ProcessBackend, WorkerPool
from torchmgmt.answer_future import AnswerFuture
from torchmgmt.backends.child import Child
from torchmgmt.backends.process_worker import ProcessWorker
from torchmgmt.batcher import Batcher
from torchmgmt.channel import Channel
from torchmgmt.dispatcher import Dispatcher
from torchmgmt.errors import DeadlineExceeded, ManagerClosed, ReaderTooSlow
from torchmgmt.exchange import Encoded
from torchmgmt.owned_future import OwnedFuture
from torchmgmt.pool.workers import PoolWorker
from torchmgmt.records import ModelKey, ModelSpec
from torchmgmt.streams import MOST_WAITING_BYTES, AnswerStream

RECYCLED = 40


def counted() -> Counter[str]:
    """How many there are of what a worker or a request needs."""
    gc.collect()
    kinds = (PoolWorker, ProcessWorker, Child, Channel, AnswerFuture)
    return Counter(type(each).__name__ for each in gc.get_objects() if type(each) in kinds)


def settled(before: Counter[str], *, more: int = 0) -> None:
    """Wait until there are no more of them than before."""
    try:
        until(lambda: all(count <= before[kind] + more for kind, count in counted().items()), timeout_s=5)
    except BaseException:
        raise AssertionError(f"{before} before, {counted()} after") from None


def test_workers_that_were_replaced_leave_nothing(deploy: Deployer) -> None:
    """However many were worn out by their requests, as many are known as there are."""
    model = deploy(EVAL, initial_workers=2, max_requests=1)
    pids = {model.predict("os.getpid()") for _ in range(4)}
    until(lambda: [worker.state.name for worker in model.describe().workers] == ["READY"] * 2)
    before = counted()
    while len(pids) < RECYCLED:
        pids.add(model.predict("os.getpid()"))
    until(lambda: [worker.state.name for worker in model.describe().workers] == ["READY"] * 2)
    settled(before, more=2)
    pool = model.manager._catalogue.get("m").pool
    assert len(pool._workers._idle) <= 2
    model.unregister()


def test_workers_that_died_leave_nothing(deploy: Deployer) -> None:
    """Nor do their batches, the errors that these were told, and the timers for both."""
    model = deploy(EVAL)
    assert model.predict("1") == 1
    before = counted()
    for _ in range(10):
        (worker,) = model.describe().workers
        os.kill(worker.pid or 0, signal.SIGKILL)
        assert model.submit("os.getpid()").result(PATIENCE_S) != worker.pid
    settled(before, more=2)


def test_limits_that_are_not_reached_leave_no_timers(deploy: Deployer, backend: ProcessBackend) -> None:
    """1,000 requests with response_timeout, and with limits of their own, need a few timers and keep none for each."""
    model = deploy(ECHO, response_timeout=1000, batches_in_flight=4)
    timers = backend.dispatcher._timers
    before, most = len(timers), 0
    for number in range(500):
        assert model.predict(number) == number
        assert model.predict(number, timeout=1000, wait_timeout=500) == number
        most = max(most, len(timers))
    futures = [model.submit(number, timeout=1000) for number in range(50)]
    assert [future.result(PATIENCE_S) for future in futures] == [*range(50)]
    most = max(most, len(timers))
    assert most <= before + 70


def test_requests_that_were_answered_leave_nothing(deploy: Deployer) -> None:
    """Nor those that failed, were cancelled, or whose futures nobody has looked at."""
    model = deploy(EVAL)

    def ask() -> None:
        assert model.predict("1") == 1
        assert model.submit("1 / 0").exception(PATIENCE_S) is not None
        model.submit("2").cancel()
        model.submit("3")
        with model.stream("4") as stream:
            assert list(stream) == [4]
        assert model.submit("5").result(PATIENCE_S) == 5

    ask()
    settled(before := counted())
    for _ in range(50):
        ask()
    settled(before)


# -- parts that nobody reads -------------------------------------------------------------------------------------------


def stream() -> AnswerStream:
    return AnswerStream(ModelKey("m", "1.0"), None, lambda: None, lambda: None)


def test_tiny_parts_are_counted_with_what_they_cost() -> None:
    """So many bytes are counted for each as it takes at least."""
    parts = 5000
    unread = stream()
    unread.set_running_or_notify_cancel()
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(parts):
        unread.take_part(Encoded([memoryview(bytearray(b"tiny"))]))
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert unread._waiting_bytes >= after - before
    assert sum(1 for _ in range(parts) if unread._take() is not None) == parts
    assert unread._waiting_bytes == 0


def test_empty_parts_that_nobody_reads_come_to_an_end() -> None:
    """A handler that yields nothing for ever fills no memory: its stream ends, and those that came are given."""
    unread = stream()
    unread.set_running_or_notify_cancel()
    parts = 0
    while not unread.done():
        unread.take_part(Encoded([b""]))
        parts += 1
        assert parts * 400 < MOST_WAITING_BYTES
    with pytest.raises(ReaderTooSlow):  # noqa: PT012
        for _ in range(parts):
            unread._take()


# -- limits and second thoughts at the same time -----------------------------------------------------------------------


def test_what_is_late_and_given_up_at_once_ends_once() -> None:
    """At whatever moment the two meet, waiting or running: it has one outcome, is told of once, and makes room."""
    dispatcher = Dispatcher()
    batches = []

    def take() -> None:
        while (batch := batcher.take()) is not None:
            batches.append(batch)

    batcher: Batcher[int, Encoded] = Batcher(
        batch_size=1, max_batch_delay=0, capacity=1000, dispatcher=dispatcher, on_ready=take
    )
    told: Counter[int] = Counter()
    futures: list[OwnedFuture[Encoded]] = []
    try:
        for number in range(400):
            future = AnswerFuture(ModelKey("m", "1.0"))
            future.add_done_callback(lambda _future, number=number: told.update([number]))
            timeout = 0.0005 * (number % 4)
            end: Callable[[], object] = future.abandon if number % 2 else future.cancel
            thread = threading.Thread(target=lambda end=end, timeout=timeout: (time.sleep(timeout), end()))
            thread.start()
            batcher.queue(number, future, timeout, None, 0)
            thread.join()
            futures.append(future)
        for future in futures:
            with pytest.raises((DeadlineExceeded, CancelledError)):
                future.result(PATIENCE_S)
        until(lambda: len(told) == 400)
        assert set(told.values()) == {1}
        until(lambda: len(batcher) == 0)
    finally:
        batcher.drain()
        dispatcher.close()


# -- a forked copy -----------------------------------------------------------------------------------------------------


def test_a_forked_copy_of_a_pool_refuses_and_harms_nothing(deploy: Deployer, backend: ProcessBackend) -> None:
    """In a child it says that it belongs to another process; closing it there does nothing."""
    model: Model = deploy(EVAL)
    spec: ModelSpec = model.describe().spec
    with WorkerPool(spec, workers=1, backend=backend) as pool:
        calls: list[Callable[[], object]] = [
            lambda: pool.run([{"body": "1"}], timeout=5),
            lambda: pool.submit([{"body": "1"}]),
            pool.describe,
            lambda: pool.scale(pool.wanted),
            pool.__enter__,
        ]
        for call in calls:
            said = in_child(call)
            assert said.startswith(ManagerClosed.__name__), said
            assert "fork" in said
        assert in_child(lambda: pool.close().clean) == "True"
        assert pool.run([{"body": "2 + 3"}], timeout=PATIENCE_S) == [5]
