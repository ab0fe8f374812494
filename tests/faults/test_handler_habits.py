"""Handlers with bad habits: they fork, start threads, close descriptors, print without end; nothing of it spreads."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from tests.faults.processes import only_pid, states_of
from tests.handlers import EVAL, Deployer, Gate, is_gone, until
from torchmgmt.errors import HandlerFailed, WorkerDied

FORKS = "(lambda pid: pid or [time.sleep(0.01) for _ in iter(int, 1)])(os.fork())"
"""Answers the pid of a forked child that lives for ever."""


def test_what_a_handler_started_dies_with_its_worker(deploy: Deployer) -> None:
    """Processes that a handler started and left running, daemons included, are gone once their worker is."""
    model = deploy()
    child = model.predict("__import__('subprocess').Popen(['sleep', '1000'], start_new_session=True).pid")
    shell = "sleep 1000 & echo $! & sleep 1000 & echo $!"
    run = f"__import__('subprocess').run({shell!r}, shell=True, stdout=-1).stdout.split()"
    # The descriptors stay open in the children, so the output is read no further than the two lines.
    run = f"(lambda p: [p.stdout.readline(), p.stdout.readline()])(__import__('subprocess').Popen({shell!r}, shell=True, stdout=-1))"
    daemons = [int(pid) for pid in model.predict(run)]
    assert not any(map(is_gone, [child, *daemons]))
    os.kill(only_pid(model), signal.SIGKILL)
    for pid in [child, *daemons]:
        until(lambda pid=pid: is_gone(pid), f"process {pid} is gone")


def test_the_children_of_what_a_handler_started_die_too(deploy: Deployer) -> None:
    """Not only a handler's children but theirs, too, are gone once the worker is, without anything else happening."""
    model = deploy()
    script = "sleep 1000 & echo $!; wait"
    start = f"(lambda p: (p.pid, int(p.stdout.readline())))(__import__('subprocess').Popen({script!r}, shell=True, stdout=-1))"
    shell, sleep = model.predict(start)
    os.kill(only_pid(model), signal.SIGKILL)
    until(lambda: is_gone(shell), "the handler's child is gone")
    until(lambda: is_gone(sleep), "its child is gone", timeout_s=5)


def test_what_a_handler_detached_lives_as_long_as_its_worker(deploy: Deployer) -> None:
    """A daemon that a handler started is not ended because a worker of some other model is; only with its own."""
    model, other = deploy(), deploy(model_name="other")
    shell = "setsid sleep 1000 >/dev/null 2>&1 & echo $!"
    daemon = int(model.predict(f"__import__('subprocess').run({shell!r}, shell=True, stdout=-1).stdout"))
    bystander = only_pid(other)
    other.unregister()
    until(lambda: is_gone(bystander), "the other model's worker is gone")
    deploy(model_name="other").unregister()  # by now the end of the first one has been dealt with
    assert not is_gone(daemon)
    os.kill(only_pid(model), signal.SIGKILL)
    until(lambda: is_gone(daemon), "the daemon is gone with its worker")


def test_a_forked_child_of_a_handler_does_not_keep_a_dead_worker_alive(deploy: Deployer) -> None:
    """A worker whose handler forked a child that holds every descriptor is known to be dead at once when it dies."""
    model = deploy()
    fork = "(lambda pid: pid or [time.sleep(0.01) for _ in iter(int, 1)])(os.fork())"
    child = model.predict(fork)
    assert not is_gone(child)
    with pytest.raises(WorkerDied):
        model.predict("os.kill(os.getpid(), signal.SIGKILL)")
    assert model.predict("1") == 1
    until(lambda: is_gone(child), "the forked child is gone")


def test_a_handler_may_run_helpers_in_a_process_pool(deploy: Deployer) -> None:
    """multiprocessing works in a handler, by fork and by spawn, and leaves nothing once the worker is scaled away."""
    helpers = "def double(number):\n    return 2 * number\n"
    source = """
import multiprocessing
from helpers import double
def handle(data, context):
    if data is None:
        return None
    with multiprocessing.get_context(data[0]["body"]).Pool(2) as pool:
        return [pool.map(double, [1, 2, 3])]
"""
    model = deploy(source, files={"helpers": helpers})
    assert model.predict("fork", timeout=30) == [2, 4, 6]
    assert model.predict("spawn", timeout=30) == [2, 4, 6]


def test_a_handler_that_closes_standard_streams_goes_on(deploy: Deployer) -> None:
    """A worker whose handler closed descriptors 0 to 2 still answers."""
    model = deploy()
    pid = only_pid(model)
    assert model.predict("[os.close(fd) for fd in (0, 1, 2)] and 'closed'") == "closed"
    assert model.predict("os.getpid()") == pid
    error = model.submit("print('nobody hears this') or fail(ValueError('still told'))").exception(20)
    assert isinstance(error, HandlerFailed)


def test_a_handler_that_closes_all_descriptors_is_replaced(deploy: Deployer) -> None:
    """A worker whose handler closed every descriptor, its channel included, fails that request and is replaced."""
    model = deploy()
    pid = only_pid(model)
    with pytest.raises(WorkerDied):
        model.predict("os.closerange(0, 4096)", timeout=30)
    until(lambda: is_gone(pid), "the cut off worker is gone")
    assert model.predict("1", timeout=30) == 1


def test_a_worker_that_only_lost_its_channel_is_replaced(deploy: Deployer) -> None:
    """A worker that closed its channel and hangs is found out although it lives, long before response_timeout."""
    model = deploy()
    pid = only_pid(model)
    with pytest.raises(WorkerDied):
        model.predict("[os.closerange(3, 4096), threading.Event().wait()]", timeout=20)
    assert is_gone(pid)
    assert model.predict("1", timeout=30) == 1


def test_a_handler_may_print_without_end(deploy: Deployer) -> None:
    """A flood of output, long lines and bytes that are no text block neither the worker nor its answer."""
    model = deploy()
    flood = "[print('x' * 1000) for _ in range(5000)] and os.write(1, bytes(range(256)) * 1000 + b'\\n') and 'done'"
    assert model.predict(flood, timeout=30) == "done"
    with pytest.raises(HandlerFailed) as caught:
        model.predict("print('the last line') or fail(ValueError())")
    assert caught.value.last_lines[-1] == "the last line"
    assert all(len(line) < 10_000 for line in caught.value.last_lines)


@pytest.mark.parametrize("share_weights", ["auto", "never"], ids=["forked", "alone"])
def test_a_forked_child_holds_no_channel_open(deploy: Deployer, share_weights: str) -> None:
    """A child that a handler forks has no socket of the worker's: its end of the channel is the worker's alone."""
    model = deploy(share_weights=share_weights)
    in_child = "[os.readlink(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{fd}')]"
    told = (
        "(lambda r, w: os.read(r, 65536).decode() if os.fork()"
        f" else (os.write(w, repr({in_child}).encode()), os._exit(0)))(*os.pipe())"
    )
    assert any("socket:" in target for target in model.predict(in_child))
    assert "socket:" not in model.predict(told)
    assert "memfd:torchmgmt-segments" not in model.predict(told)


def test_a_forked_child_that_outlives_its_request_goes_with_its_worker(deploy_both: Deployer) -> None:
    """Children that a handler forks and forgets are ended when their worker is scaled away, and not before."""
    model = deploy_both(initial_workers=1)
    children = [model.predict(FORKS) for _ in range(3)]
    assert not any(map(is_gone, children))
    model.scale(0)
    for pid in children:
        until(lambda pid=pid: is_gone(pid), f"process {pid} is gone")


@pytest.mark.parametrize("daemon", [True, False])
def test_threads_of_a_handler_do_not_hold_up_the_end_of_its_worker(deploy_both: Deployer, daemon: bool) -> None:
    """A worker whose handler has started threads that never end serves on, and ends at once when it is not wanted."""
    model = deploy_both()
    start = f"threading.Thread(target=threading.Event().wait, daemon={daemon}).start()"
    assert model.predict(f"[{start} for _ in range(20)] and threading.active_count()") >= 20
    pid = only_pid(model)
    assert model.predict("os.getpid()") == pid
    report = model.scale(0)
    assert report.workers == ()
    assert is_gone(pid)
    assert model.describe().last_error == ""


def test_a_thread_that_crashes_in_native_code_fails_the_running_batch(deploy_both: Deployer, gate: Gate) -> None:
    """A crash in a thread that a handler had started is told to the request that happened to run."""
    model = deploy_both()
    crash = "threading.Timer(0.1, lambda: __import__('ctypes').string_at(0)).start()"
    with pytest.raises(WorkerDied, match="SIGSEGV"):
        model.predict(f"{crash} or {gate.expression}")
    assert model.predict("1") == 1


@pytest.mark.parametrize("share_weights", ["auto", "never"], ids=["forked", "alone"])
def test_standard_streams_may_be_closed_while_loading(deploy: Deployer, share_weights: str) -> None:
    """A handler that closes descriptors 0 to 2 when it is imported serves; what it prints goes nowhere and harms nothing."""
    model = deploy(f"import os\nfor fd in (0, 1, 2):\n    os.close(fd)\n{EVAL}", share_weights=share_weights)
    model.scale(2)
    ballast = os.urandom(1_000_000)
    for _ in range(4):
        body = "print('nobody hears this', flush=True) or os.write(1, b'nor this') and data[0]['ballast']"
        answer = model.submit(fields={"body": body, "ballast": ballast}).exception(20)
        assert answer is None or isinstance(answer, HandlerFailed)  # Python's own stream may know that it is closed
        answer = model.submit(fields={"body": "os.write(1, b'nor this') and data[0]['ballast']", "ballast": ballast})
        assert bytes(answer.result(20)) == ballast
    assert states_of(model) == ["READY", "READY"]


def test_standard_streams_closed_later_do_not_spoil_payloads(deploy_both: Deployer) -> None:
    """What a handler writes to descriptors 0 to 2 after closing them ends up in no request and no answer."""
    tried = (
        "def tried(call, *arguments):\n    try:\n        return call(*arguments)\n    except OSError:\n        pass\n"
    )
    model = deploy_both(tried + EVAL)
    pid = only_pid(model)
    assert model.predict("[os.close(fd) for fd in (0, 1, 2)] and 'closed'") == "closed"
    ballast = np.frombuffer(os.urandom(1_000_000), dtype=np.uint8)
    scribble = "[tried(os.write, fd, b'spoilt' * 1000) for fd in (0, 1, 2)] and data[0]['ballast']"
    for _ in range(5):
        assert np.array_equal(model.submit(fields={"body": scribble, "ballast": ballast}).result(20), ballast)
    assert only_pid(model) == pid


def test_a_worker_that_prints_without_end_is_still_told_what_to_do(deploy_both: Deployer) -> None:
    """A thread that prints for ever delays no answer for long, fills no memory here, and goes with its worker."""
    model = deploy_both()
    pid = only_pid(model)
    model.predict("threading.Thread(target=lambda: [print('x' * 500) for _ in iter(int, 1)], daemon=True).start()")
    assert [model.predict(str(number), timeout=20) for number in range(20)] == list(range(20))
    with pytest.raises(HandlerFailed) as caught:
        model.predict("1 / 0", timeout=20)
    assert len(caught.value.last_lines) <= 101  # the last of them is not whole yet
    model.scale(0)
    assert is_gone(pid)
