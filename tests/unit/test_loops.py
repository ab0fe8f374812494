"""The bridge from threads to an event loop: nothing is lost, order is kept, and many posts wake the loop few times."""

from __future__ import annotations

import asyncio
import functools
import gc
import threading
import weakref
from concurrent.futures import Future

from torchmgmt.loops import LoopBridge, bridge_to, settled


def test_all_that_is_posted_runs_once_and_in_order() -> None:
    """Posts of several threads, while the loop runs and takes them."""

    async def collect() -> list[tuple[int, int]]:
        bridge = bridge_to(asyncio.get_running_loop())
        seen: list[tuple[int, int]] = []
        done = asyncio.Event()

        def post(thread: int) -> None:
            for number in range(500):
                bridge.post(functools.partial(seen.append, (thread, number)))
            bridge.post(functools.partial(seen.append, (thread, -1)))
            bridge.post(lambda: done.set() if len(seen) == 4 * 501 else None)

        threads = [threading.Thread(target=post, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        await asyncio.wait_for(done.wait(), 20)
        await asyncio.to_thread(lambda: [thread.join() for thread in threads])
        return seen

    seen = asyncio.run(collect())
    for thread in range(4):
        assert [number for each, number in seen if each == thread] == [*range(500), -1]


def elsewhere(call) -> None:
    """Call on another thread, and block until that is done."""
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def test_what_is_posted_on_the_loop_itself_runs_at_once() -> None:
    """Nothing needs to be woken for it; but it does not go before what waits."""

    async def run() -> list[int]:
        bridge = bridge_to(asyncio.get_running_loop())
        taken: list[int] = []
        bridge.post(lambda: taken.append(1))
        assert taken == [1]
        elsewhere(lambda: bridge.post(lambda: taken.append(2)))
        bridge.post(lambda: taken.append(3))
        assert taken == [1]
        await asyncio.sleep(0)
        return taken

    assert asyncio.run(run()) == [1, 2, 3]


def test_posts_before_the_loop_gets_to_run_wake_it_once() -> None:
    """A batch of answers costs one wake-up."""

    async def wake_ups() -> int:
        loop = asyncio.get_running_loop()
        bridge = LoopBridge(loop)
        count = 0
        call = loop.call_soon_threadsafe

        def counted(callback, *args, **options):
            nonlocal count
            count += 1
            return call(callback, *args, **options)

        loop.call_soon_threadsafe = counted
        taken: list[int] = []
        elsewhere(lambda: [bridge.post(functools.partial(taken.append, number)) for number in range(100)])
        assert taken == []
        await asyncio.sleep(0)
        assert taken == list(range(100))
        elsewhere(lambda: bridge.post(functools.partial(taken.append, 100)))
        await asyncio.sleep(0)
        assert taken[-1] == 100
        return count

    assert asyncio.run(wake_ups()) == 2


def test_a_bridge_to_a_closed_loop_takes_posts_and_does_nothing() -> None:
    """An answer that comes after the loop's end is nobody's."""
    loop = asyncio.new_event_loop()
    bridge = bridge_to(loop)
    loop.close()
    bridge.post(lambda: None)
    bridge.post(lambda: None)


def test_a_bridge_keeps_no_loop_alive() -> None:
    """Programs that make many loops do not grow by them."""
    loop = asyncio.new_event_loop()
    bridge = bridge_to(loop)
    assert bridge_to(loop) is bridge
    loop.close()
    gone = weakref.ref(loop)
    del loop
    gc.collect()
    assert gone() is None
    bridge.post(lambda: None)


def test_a_task_that_no_longer_waits_is_left_alone() -> None:
    """A future that settles after its task was cancelled does no harm."""

    async def wait() -> None:
        future: Future[int] = Future()
        task = asyncio.create_task(settled(future))
        await asyncio.sleep(0)
        task.cancel()
        future.set_result(1)
        await asyncio.sleep(0.01)
        assert task.cancelled()
        await settled(future)

    asyncio.run(wait())
