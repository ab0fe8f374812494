"""Workers that die: the batch that ran says how, everything else goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.faults.processes import SEGFAULT, forkers_of, only_pid, pids_of, wait_for_another, wait_for_others
from tests.handlers import EVAL, TOOLS, Deployer, Gate, is_gone, lines_of, until
from torchmgmt import ModelManager
from torchmgmt.errors import HandlerFailed, NoWorker, WorkerDied, WorkerStartFailed
from torchmgmt.lifecycle import VersionState


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGABRT])
def test_an_idle_worker_that_dies_is_replaced(deploy: Deployer, number: signal.Signals) -> None:
    """A worker that dies while idle fails no request; another one takes its place, and describe says how it died."""
    model = deploy()
    old = only_pid(model)

    os.kill(old, number)

    new = wait_for_another(model, old)
    assert model.predict("os.getpid()") == new
    assert number.name in model.describe().last_error or model.describe().last_error == ""
    assert is_gone(old)


@pytest.mark.parametrize(
    "how, exitcode, words",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, "SIGKILL"),
        (SEGFAULT, -11, "SIGSEGV"),
        ("os.abort()", -6, "SIGABRT"),
        ("os._exit(3)", 3, "status 3"),
        ("os._exit(0)", 0, "status 0"),
        ("sys.exit(4)", 4, "status 4"),
        ("fail(KeyboardInterrupt())", 1, "status 1"),
    ],
)
def test_a_request_whose_worker_dies_says_how(deploy: Deployer, how: str, exitcode: int, words: str) -> None:
    """The request that ran in a worker that died fails with its pid, exit code, cause and last lines; the next works."""
    model = deploy()
    pid = only_pid(model)

    with pytest.raises(WorkerDied) as caught:
        model.predict(f"print('last words') or {how}")

    error = caught.value
    assert (error.name, error.version, error.pid, error.exitcode) == ("m", "1.0", pid, exitcode)
    assert words in error.reason
    assert "last words" in error.last_lines
    assert words in str(error)
    assert model.predict("1 + 1") == 2


def test_a_segfault_leaves_its_stack(deploy: Deployer) -> None:
    """After a crash in native code the Python stack is among the last lines."""
    model = deploy()
    with pytest.raises(WorkerDied) as caught:
        model.predict(SEGFAULT)
    assert any("Segmentation fault" in line for line in caught.value.last_lines)
    assert any("string_at" in line for line in caught.value.last_lines)


def test_only_the_running_batch_fails_when_its_worker_dies(deploy_both: Deployer, gate: Gate) -> None:
    """When a busy worker dies, those that wait are not harmed: the replacement serves them."""
    model = deploy_both()
    running = model.submit(gate.expression)
    until(gate.reached, "the request runs")
    waiting = [model.submit(str(number)) for number in range(10)]

    os.kill(only_pid(model), signal.SIGKILL)

    assert isinstance(running.exception(20), WorkerDied)
    assert [future.result(20) for future in waiting] == list(range(10))


def test_one_dead_worker_does_not_disturb_the_others(deploy: Deployer, gate: Gate) -> None:
    """A worker that dies takes no other one's batch with it."""
    model = deploy(initial_workers=2)
    futures = [model.submit(f"{gate.expression} or os.getpid()") for _ in range(2)]
    until(lambda: len(gate.reached()) == 2, "both requests run")
    dead, alive = pids_of(model)
    os.kill(dead, signal.SIGKILL)
    until(lambda: any(future.done() for future in futures), "one request failed")
    gate.open()
    outcomes = [future.exception(20) or future.result() for future in futures]
    (error,) = (outcome for outcome in outcomes if isinstance(outcome, WorkerDied))
    assert error.pid == dead
    assert alive in outcomes


def test_all_workers_of_a_version_may_die_at_once(deploy_both: Deployer) -> None:
    """After all workers were killed together there are as many as before again, and all is served."""
    model = deploy_both(initial_workers=3)
    old = pids_of(model)
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    futures = [model.submit("os.getpid()") for _ in range(12)]
    answers = [future.exception(20) or future.result() for future in futures]
    assert all(isinstance(answer, WorkerDied) or answer not in old for answer in answers)
    wait_for_others(model, 3, old)


def test_an_end_that_coincides_with_a_start_is_not_overlooked(deploy_own: Deployer) -> None:
    """A worker that dies while the process that forked it is about to fork another is reported like any other."""
    model = deploy_own()
    old = only_pid(model)
    forker = forkers_of(old)[0]
    forker.suspend()
    os.kill(old, signal.SIGKILL)
    model.scale(2, synchronous=False)
    forker.resume()
    wait_for_others(model, 2, [old])


def test_a_hung_worker_is_killed_and_says_where_it_hung(deploy: Deployer) -> None:
    """A batch that runs past response_timeout fails, its worker is replaced, and its Python stack is in the last lines."""
    source = TOOLS + "def stuck_here():\n    threading.Event().wait()\n\n" + EVAL.removeprefix(TOOLS)
    model = deploy(source, response_timeout=1)
    old = only_pid(model)

    with pytest.raises(WorkerDied) as caught:
        model.predict("stuck_here()")

    assert caught.value.pid == old
    assert "response_timeout" in caught.value.reason
    assert "1 s" in caught.value.reason
    assert any("stuck_here" in line for line in caught.value.last_lines), caught.value.last_lines
    assert model.predict("os.getpid()") != old


def test_a_hung_worker_that_ignores_signals_is_killed_too(deploy: Deployer) -> None:
    """Ignoring SIGTERM and SIGUSR2 does not save a worker whose time is over."""
    model = deploy(response_timeout=0.5)
    old = only_pid(model)
    ignore = "[signal.signal(each, signal.SIG_IGN) for each in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)]"
    with pytest.raises(WorkerDied, match="response_timeout"):
        model.predict(f"{ignore} and threading.Event().wait()")
    assert is_gone(old)
    assert model.predict("1") == 1


def test_a_stopped_worker_is_killed_when_its_time_is_over(deploy: Deployer) -> None:
    """A busy worker that somebody suspended (SIGSTOP) is killed and replaced when response_timeout is over."""
    model = deploy(response_timeout=0.5)
    old = only_pid(model)
    with pytest.raises(WorkerDied, match="response_timeout"):
        model.predict("os.kill(os.getpid(), signal.SIGSTOP)")
    assert is_gone(old)
    assert model.predict("1") == 1


@pytest.mark.parametrize("place", ["import", "initialize"])
def test_a_worker_that_does_not_load_in_time_is_killed(deploy: Deployer, manager: ModelManager, place: str) -> None:
    """A worker that is not ready within startup_timeout is killed; the error names the limit and shows the stack."""
    hang = "threading.Event().wait()"
    source = f"{TOOLS}\ndef load_for_ever():\n    {hang}\n" + (
        "load_for_ever()\n"
        if place == "import"
        else "class H:\n    def initialize(self, context):\n        load_for_ever()\n"
    )
    if place == "initialize":
        source += "    def handle(self, data, context):\n        return data\n"
    with pytest.raises(WorkerStartFailed) as caught:
        deploy(source, startup_timeout=0.7)
    assert "startup_timeout" in caught.value.reason
    assert any("load_for_ever" in line for line in caught.value.last_lines), caught.value.last_lines
    assert len(manager) == 0


def test_workers_that_keep_dying_are_given_up(deploy: Deployer, tmp_path: Path) -> None:
    """When replacements fail for longer than the retry time the version is FAILED, refuses, says why; scaling revives."""
    flag = tmp_path / "flag"
    source = f"{TOOLS}\nif os.path.exists({str(flag)!r}):\n    os._exit(7)\n{EVAL}"
    model = deploy(source, config="maxRetryTimeoutInSec: 0\n")
    flag.touch()
    os.kill(only_pid(model), signal.SIGKILL)
    until(lambda: model.state is VersionState.FAILED, "the version failed")
    with pytest.raises(NoWorker) as caught:
        model.predict("1")
    assert "given up" in str(caught.value)
    flag.unlink()
    model.scale(1)
    assert model.predict("1") == 1


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


def test_a_worker_that_only_lost_its_channel_is_replaced(deploy: Deployer, tmp_path: Path) -> None:
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


def test_a_large_request_and_answer_arrive_intact(deploy: Deployer) -> None:
    """50 MB go to a worker and back as they were, as bytes and as a numpy array."""
    import numpy as np

    source = "def handle(data, context):\n    return data and [row['body'] for row in data]\n"
    model = deploy(source)
    data = np.random.default_rng(1).integers(0, 256, 50_000_000, dtype=np.uint8)
    assert model.predict(data.tobytes(), timeout=60) == data.tobytes()
    answer = model.predict(data, timeout=60)
    assert np.array_equal(answer, data)


def test_a_large_request_to_a_worker_that_dies_is_handed_on(deploy: Deployer) -> None:
    """A request of 50 MB to a worker that is killed before it has read it is run by the next one, and blocks nobody."""
    model = deploy()
    old = only_pid(model)
    os.kill(old, signal.SIGSTOP)
    ballast = os.urandom(50_000_000)
    future = model.submit(fields={"body": "data[0]['ballast'], os.getpid()", "ballast": ballast})
    os.kill(old, signal.SIGKILL)
    answer, new = future.result(30)
    assert bytes(answer) == ballast
    assert new not in {0, old}


@pytest.mark.parametrize("share_weights, expected", [("auto", 1), ("never", 5)])
def test_a_worker_is_replaced_after_each_of_many_deaths(
    deploy: Deployer, tmp_path: Path, share_weights: str, expected: int
) -> None:
    """However often a worker dies, the version serves again; each death is one failed request, and only without a
    template one more load."""
    loads = tmp_path / "loads"
    model = deploy(share_weights=share_weights, source=f"{TOOLS}note({str(loads)!r})\n{EVAL}")
    for _ in range(4):
        with pytest.raises(WorkerDied):
            model.predict("os._exit(1)", timeout=30)
        assert model.predict("1", timeout=30) == 1
    assert len(lines_of(loads)) == expected
