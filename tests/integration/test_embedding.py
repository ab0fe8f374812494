"""What a program that embeds torchmgmt may rely on: nothing printed, nothing changed, nothing left."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.handlers import EVAL, Deployer, Gate, is_gone, run_program, until, write_folder
from torchmgmt import CloseReport, ModelManager, ProcessBackend
from torchmgmt.errors import ManagerClosed, TorchmgmtError

HEADER = "import sys\nfrom torchmgmt import ModelManager\n"
REGISTER = 'register(sys.argv[1], model_name="m", handler="handler.py")'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that evaluates what it is sent."""
    return write_folder(tmp_path / "model", EVAL)


def pids_gone(pids: list[int]) -> None:
    for pid in pids:
        until(lambda pid=pid: is_gone(pid), f"process {pid} is gone")


def test_a_program_prints_only_what_it_prints_itself(folder: Path) -> None:
    """Whatever handlers print, log or raise and workers do, nothing appears on the program's stdout and stderr."""
    program = run_program(
        HEADER
        + f"""
from torchmgmt.errors import TorchmgmtError
with ModelManager() as manager:
    model = manager.{REGISTER}
    model.predict("print('loud')")
    model.predict("print('loud', file=sys.stderr)")
    model.predict("__import__('logging').error('loud')")
    model.predict("__import__('warnings').warn('loud')")
    for bad in ("1 / 0", "os._exit(1)", "os.abort()"):
        try:
            model.predict(bad)
        except TorchmgmtError:
            pass
    assert model.predict("1") == 1
""",
        folder,
    )
    assert (program.returncode, program.stdout, program.stderr) == (0, "", "")


@pytest.mark.usefixtures("light_torch")
def test_what_handlers_print_goes_to_logging(folder: Path) -> None:
    """A program that configures logging gets the lines of its workers, with the levels that the handlers gave them."""
    program = run_program(
        HEADER
        + f"""
import logging
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
with ModelManager() as manager:
    model = manager.{REGISTER}
    model.predict("print('100 % printed')")
    model.predict("__import__('logging').getLogger('mine').warning('logged')")
""",
        folder,
    )
    lines = program.stdout.splitlines()
    assert program.returncode == 0, program.stderr
    assert any(line.startswith("INFO torchmgmt.workers") and line.endswith("100 % printed") for line in lines), lines
    assert any(line.startswith("WARNING torchmgmt.workers") and line.endswith("mine: logged") for line in lines), lines


def test_nothing_of_the_program_is_changed(folder: Path) -> None:
    """Signal handlers, environment, working directory, module path, log handlers and torch stay as they were."""
    program = run_program(
        HEADER
        + f"""
import json, logging, os, signal
def state():
    signals = {{n: repr(signal.getsignal(n)) for n in sorted(signal.valid_signals())}}
    handlers = [repr(h) for h in logging.getLogger().handlers]
    return signals, dict(os.environ), os.getcwd(), sys.path[:], handlers, sys.getswitchinterval(), os.umask(0o22)
os.umask(0o22)
before = state()
with ModelManager() as manager:
    model = manager.{REGISTER}
    assert model.predict("1") == 1
    during = state()
    ours = {{name: repr(logging.getLogger(name).handlers) for name in logging.root.manager.loggerDict if name.startswith("torchmgmt")}}
after = state()
heavy = [name for name in ("torch", "numpy", "multiprocessing", "falcon", "requests") if name in sys.modules]
print(json.dumps([before == during, before == after, heavy, ours]))
""",
        folder,
    )
    assert program.returncode == 0, program.stderr
    same_during, same_after, heavy, loggers = json.loads(program.stdout)
    assert (same_during, same_after) == (True, True)
    assert heavy == []
    assert all(handlers == "[]" or "NullHandler" in handlers for handlers in loggers.values()), loggers


@pytest.mark.usefixtures("light_torch")
def test_making_a_manager_starts_nothing(folder: Path) -> None:
    """A new manager has no thread, process or descriptor; versions without workers add the lock on their files alone."""
    program = run_program(
        HEADER
        + """
import os, threading, time
import psutil
def state():
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(psutil.Process().children())
import torchmgmt.manager
before = state()
manager = ModelManager()
made = state()
for name in "mno":
    manager.register(sys.argv[1], model_name=name, handler="handler", initial_workers=0)
deadline = time.monotonic() + 10
while threading.active_count() > made[1] and time.monotonic() < deadline:
    time.sleep(0.01)  # the thread that has registered them goes in a moment
print(before == made, [after - now for after, now in zip(state(), made)], "torch" in sys.modules)
""",
        folder,
    )
    assert (program.stdout, program.stderr, program.returncode) == ("True [1, 0, 0] False\n", "", 0)


def test_a_version_without_workers_costs_nothing_of_its_own(manager: ModelManager, deploy: Deployer) -> None:
    """Fifty versions without workers, and such as had workers, add no thread, process or descriptor."""

    def state() -> tuple[int, int, int]:
        return (
            len(list(Path("/proc/self/fd").iterdir())),
            threading.active_count(),
            len(psutil.Process().children(True)),
        )

    deploy(model_name="first").scale(0)
    until(lambda: len(psutil.Process().children(True)) == 1, "only the torch-only process is there")
    before = state()  # perhaps with what the first one has not closed yet
    models = [deploy(model_name=f"m{number}", initial_workers=0) for number in range(50)]
    assert all(now <= then for now, then in zip(state(), before, strict=True))
    assert len(manager.models()) == 51
    models[0].scale(2)
    assert models[0].predict("1") == 1
    models[0].scale(0)
    until(lambda: all(now <= then for now, then in zip(state(), before, strict=True)), "all is as before")


@pytest.mark.usefixtures("light_torch")
def test_it_works_in_a_thread(folder: Path) -> None:
    """A manager may be made, used and closed in a thread, which may end before its workers do."""
    program = run_program(
        HEADER
        + f"""
import threading
found = []
def first():
    manager = ModelManager()
    found.append(manager.{REGISTER})
thread = threading.Thread(target=first)
thread.start()
thread.join()
print(found[0].predict("'made in a thread'"))
found[0].manager.close()
""",
        folder,
    )
    assert (program.returncode, program.stdout, program.stderr) == (0, "made in a thread\n", "")


def test_async_with_closes_without_blocking_the_loop(folder: Path) -> None:
    """``async with`` closes the manager; the event loop goes on meanwhile, and wrap_future gives awaitable answers."""
    program = run_program(
        HEADER
        + f"""
import asyncio
async def main():
    ticks = 0
    async with ModelManager() as manager:
        model = await asyncio.to_thread(lambda: manager.{REGISTER})
        print(await asyncio.wrap_future(model.submit("'awaited'")))
        slow = model.submit("time.sleep(0.3) or 'finished'")
        async def tick():
            nonlocal ticks
            while not slow.done():
                ticks += 1
                await asyncio.sleep(0.01)
        ticking = asyncio.create_task(tick())
    await ticking
    print(slow.result(), ticks > 3, manager.closed)
asyncio.run(main())
""",
        folder,
    )
    assert (program.stdout, program.stderr) == ("awaited\nfinished True True\n", "")


LEAVING = {
    "with": f"with ModelManager() as manager:\n    model = manager.{REGISTER}\n    print(*pids(model))\n",
    "no close": f"manager = ModelManager()\nmodel = manager.{REGISTER}\nprint(*pids(model))\n",
    "only the model kept": f"model = ModelManager().{REGISTER}\nprint(*pids(model))\nassert model.predict('1') == 1\n",
    "only a future kept": f"future = (lambda model: (print(*pids(model)), model.submit('1'))[1])(ModelManager().{REGISTER})\n"
    "assert future.result() == 1\n",
    "nothing kept": f"print(*pids(ModelManager().{REGISTER}))\n",
    "lone call": f"ModelManager().{REGISTER}\nprint()\n",
    "an exception": f"model = ModelManager().{REGISTER}\nprint(*pids(model))\nraise SystemExit(0)\n",
    "a running request": f"model = ModelManager().{REGISTER}\nprint(*pids(model))\nfuture = model.submit('time.sleep(0.3)')\n",
    "a cycle": f"class Holder: pass\nholder = Holder()\nholder.me = holder\nholder.model = ModelManager().{REGISTER}\n"
    "print(*pids(holder.model))\n",
    "a module global of another module": f"sys.kept = ModelManager().{REGISTER}\nprint(*pids(sys.kept))\n",
    "os._exit": f"import os\nmodel = ModelManager().{REGISTER}\nprint(*pids(model), flush=True)\nos._exit(0)\n",
    "a thread of its own": "import threading\ndef run():\n    model = ModelManager()."
    f"{REGISTER}\n    print(*pids(model), model.predict('os.getpid()'))\nthreading.Thread(target=run).start()\n",
}
PIDS = "import psutil\ndef pids(model):\n    return [process.pid for process in psutil.Process().children(recursive=True)]\n"


@pytest.mark.parametrize("how", LEAVING)
def test_a_program_ends_cleanly_however_it_leaves(folder: Path, how: str, request: pytest.FixtureRequest) -> None:
    """The end of the program, with or without close, says nothing, returns 0, and leaves no process and no file."""
    if how == "os._exit":
        request.getfixturevalue("swept")
    if how != "no close":
        request.getfixturevalue("light_torch")
    program = run_program(HEADER + PIDS + LEAVING[how], folder)
    assert (program.returncode, program.stderr) == (0, "")
    pids = list(map(int, program.stdout.split()))
    assert pids or how == "lone call"
    pids_gone(pids)


@pytest.mark.usefixtures("light_torch")
def test_what_nobody_can_reach_any_more_ends(folder: Path) -> None:
    """Dropping the last reference to manager, models and futures ends workers, threads and the torch-only process."""
    program = run_program(
        HEADER
        + PIDS
        + f"""
import gc, os, tempfile, threading, time
def use():
    model = ModelManager().{REGISTER}
    return model.predict("os.getpid()"), pids(model)
worker, all_of_them = use()
gc.collect()
deadline = time.monotonic() + 15
while time.monotonic() < deadline:
    left = [pid for pid in all_of_them if psutil.pid_exists(pid)], threading.active_count()
    if left == ([], 1):
        break
    time.sleep(0.01)
print(worker in all_of_them, left)
""",
        folder,
    )
    assert (program.stdout, program.stderr) == ("True ([], 1)\n", "")


@pytest.mark.usefixtures("light_torch")
def test_an_answer_comes_although_only_its_future_is_kept(folder: Path) -> None:
    """A future keeps what it needs alive: its answer comes although manager and model were dropped."""
    program = run_program(
        HEADER
        + f"""
import gc
def ask():
    return ModelManager().{REGISTER}.submit("time.sleep(0.3) or 'answered'")
future = ask()
gc.collect()
print(future.result(20))
""",
        folder,
    )
    assert (program.stdout, program.stderr) == ("answered\n", "")


FORK = """
import os, time, threading, warnings
warnings.simplefilter("ignore")
manager = ModelManager()
model = manager.{register}
pid = model.predict("os.getpid()")
child = os.fork()
if child == 0:
    from torchmgmt.errors import ManagerClosed
    said = []
    started = time.monotonic()
    for call in (
        lambda: manager.predict("m", "1"), lambda: model.predict("1"), lambda: manager.describe("m"),
        lambda: manager.scale("m", 2), lambda: manager.unregister("m"), lambda: manager.models(),
        lambda: manager.register(sys.argv[1], model_name="n", handler="handler"), lambda: manager.warm(),
        lambda: manager["m"], lambda: model.wait_ready(), lambda: manager.set_default("m", "1.0"),
        lambda: manager.versions("m"), lambda: list(model.map(["1"])), lambda: manager.__enter__(),
    ):
        try:
            said.append(repr(call()))
        except ManagerClosed as error:
            said.append("fork" in str(error))
    print(set(said), manager.closed, manager.close().clean, model.state.name, flush=True)
    {end}
_, status = os.waitpid(child, 0)
print(status, model.predict("os.getpid()") == pid, model.scale(2).scale.min_workers, flush=True)
"""


@pytest.mark.usefixtures("light_torch")
@pytest.mark.parametrize(
    "end", ["sys.exit(0)", "os._exit(0)", "del manager, model; import gc; gc.collect(); sys.exit(0)"]
)
def test_a_forked_copy_refuses_and_harms_nothing(folder: Path, end: str) -> None:
    """In a forked child the manager raises ManagerClosed that speaks of the fork; the parent's workers serve on."""
    program = run_program(HEADER + FORK.format(register=REGISTER, end=end), folder)
    assert program.stderr == ""
    assert program.stdout.splitlines() == ["{True} True True GONE", "0 True 2"]


def test_a_forked_child_may_have_a_manager_of_its_own(folder: Path) -> None:
    """After a fork the child makes its own manager, and both serve; as a pre-fork server's children would."""
    program = run_program(
        HEADER
        + f"""
import os, warnings
warnings.simplefilter("ignore")
manager = ModelManager()
model = manager.{REGISTER}
child = os.fork()
with ModelManager() as own:
    answer = own.{REGISTER}.predict("'own'")
if child == 0:
    print(answer, flush=True)
    sys.exit(0)
os.waitpid(child, 0)
print(answer, model.predict("'shared'"), flush=True)
""",
        folder,
    )
    assert (program.stdout, program.stderr) == ("own\nown shared\n", "")


@pytest.mark.usefixtures("light_torch")
@pytest.mark.parametrize("call", ["len(manager)", "'m' in manager", "list(manager)", "repr(manager)", "model.state"])
def test_a_forked_copy_never_hangs_on_a_lock(folder: Path, call: str) -> None:
    """No call on a forked copy waits for a lock that another thread of the parent held at the fork."""
    program = run_program(
        HEADER
        + f"""
import os, threading, warnings
warnings.simplefilter("ignore")
manager = ModelManager()
model = manager.register(sys.argv[1], model_name="m", handler="handler", initial_workers=0)
held, over = threading.Event(), threading.Event()
def hold():
    with manager._catalogue._lock:
        held.set()
        over.wait()
threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if child == 0:
    import faulthandler, signal
    signal.alarm(5)
    try:
        {call}
    except Exception:
        pass
    os._exit(0)
_, status = os.waitpid(child, 0)
over.set()
print(status)
""",
        folder,
    )
    assert (program.stdout, program.stderr) == ("0\n", "")


@pytest.mark.usefixtures("light_torch")
def test_two_managers_live_side_by_side(folder: Path) -> None:
    """Two managers have models of one name and version that are strangers; closing one leaves the other alone."""
    with ModelManager() as one, ModelManager() as two:
        both = [manager.register(folder, model_name="m", handler="handler") for manager in (one, two)]
        pids = [model.predict("os.getpid()") for model in both]
        assert pids[0] != pids[1]
        one.close()
        assert both[1].predict("os.getpid()") == pids[1]
        with pytest.raises(ManagerClosed):
            both[0].predict("1")


def test_managers_may_share_a_backend(backend: ProcessBackend, folder: Path) -> None:
    """A backend that was given to two managers is closed with neither."""
    for _ in range(2):
        with ModelManager(backend=backend) as manager:
            assert manager.register(folder, model_name="m", handler="handler").predict("1") == 1


def test_closing_lets_running_requests_finish(manager: ModelManager, deploy: Deployer, gate: Gate) -> None:
    """close refuses new requests, lets running and waiting ones finish, and its report is clean."""
    model = deploy(initial_workers=2)
    running = [model.submit(f"wait_for({gate.path!r}) or 'ran'") for _ in range(2)]
    waiting = [model.submit("'waited'") for _ in range(3)]
    reports: list[CloseReport] = []
    closing = threading.Thread(target=lambda: reports.append(manager.close()))
    closing.start()
    until(lambda: manager.closed, "the manager refuses")
    with pytest.raises(ManagerClosed):
        model.submit("1")
    gate.open()
    closing.join(20)
    assert [future.result(0) for future in running + waiting] == ["ran"] * 2 + ["waited"] * 3
    assert reports[0].clean
    assert reports[0].stopped_workers == 2


def test_closing_without_time_fails_what_runs(manager: ModelManager, deploy: Deployer) -> None:
    """close(0) ends running requests with an error, and the report says what had to be done."""
    model = deploy()
    (worker,) = model.describe().workers
    running = model.submit("threading.Event().wait()")
    waiting = model.submit("1")
    until(running.running, "the request runs")
    report = manager.close(0)
    assert not report.clean
    assert report.failed_requests == 2
    assert list(report.killed_pids) == [worker.pid]
    assert isinstance(running.exception(0), TorchmgmtError)
    assert isinstance(waiting.exception(0), ManagerClosed)


def test_closing_again_does_nothing(manager: ModelManager, deploy: Deployer) -> None:
    """close is idempotent, from any thread: each call returns the report of the one that closed."""
    deploy()
    reports: list[CloseReport] = []
    threads = [threading.Thread(target=lambda: reports.append(manager.close())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(reports) == 4
    assert all(report is reports[0] for report in reports)
    assert manager.close() is reports[0]


def test_a_closed_manager_refuses_everything(manager: ModelManager, deploy: Deployer, tmp_path: Path) -> None:
    """After close every call raises ManagerClosed."""
    model = deploy()
    manager.close()
    calls: list[Callable[[], object]] = [
        lambda: manager.predict("m", 1),
        lambda: manager.submit("m", 1),
        lambda: manager.register(tmp_path, model_name="n", handler="handler"),
        manager.models,
        lambda: manager.describe("m"),
        lambda: manager.versions("m"),
        lambda: manager.scale("m"),
        lambda: manager.unregister("m"),
        lambda: manager.set_default("m", "1.0"),
        lambda: manager["m"],
        manager.__enter__,
        manager.warm,
        lambda: model.predict(1),
        model.describe,
        model.wait_ready,
        model.unregister,
        lambda: list(model.map([1])),
    ]
    for call in calls:
        with pytest.raises(ManagerClosed):
            call()
    assert model.state.name == "GONE"


def test_closing_while_workers_start_is_quick_and_clean(manager: ModelManager, deploy: Deployer, gate: Gate) -> None:
    """A manager that is closed while workers load ends them; it waits for no load."""
    deploy("import threading\nthreading.Event().wait()\n", initial_workers=2, synchronous=False)
    report = manager.close()
    assert report.failed_requests == 0


def test_closing_ends_a_registration_that_waits(manager: ModelManager, deploy: Deployer) -> None:
    """A synchronous registration that waits when the manager is closed raises ManagerClosed."""
    errors: list[BaseException] = []

    def register() -> None:
        try:
            deploy("import threading\nthreading.Event().wait()\n")
        except TorchmgmtError as error:
            errors.append(error)

    thread = threading.Thread(target=register)
    thread.start()
    until(lambda: "m" in manager, "the model is being registered")
    manager.close()
    thread.join(20)
    assert [type(error) for error in errors] == [ManagerClosed]


@pytest.mark.usefixtures("light_torch")
def test_close_ends_what_handlers_started(tmp_path: Path, folder: Path) -> None:
    """After close even the processes that handlers left running are gone."""
    with ModelManager() as manager:
        model = manager.register(folder, model_name="m", handler="handler")
        child = model.predict("__import__('subprocess').Popen(['sleep', '1000'], start_new_session=True).pid")
        assert os.path.exists(f"/proc/{child}")  # noqa: PTH110
    pids_gone([child])


@pytest.mark.usefixtures("light_torch")
def test_interrupting_a_registration_leaves_nothing(folder: Path) -> None:
    """Ctrl-C while a registration waits for its workers raises KeyboardInterrupt and leaves nothing registered."""
    program = run_program(
        HEADER
        + """
import os, signal, threading, pathlib
handler = pathlib.Path(sys.argv[1], "handler.py")
handler.write_text("import threading\\nthreading.Event().wait()\\n")
with ModelManager() as manager:
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    try:
        manager.register(sys.argv[1], model_name="m", handler="handler.py")
    except KeyboardInterrupt:
        print("interrupted", len(manager))
""",
        folder,
    )
    assert (program.stdout, program.stderr) == ("interrupted 0\n", "")


@pytest.mark.usefixtures("light_torch")
def test_a_local_module_cannot_stand_in_for_one_that_workers_need(tmp_path: Path, folder: Path) -> None:
    """Files named like modules of the standard library in the program's folder or the model's break no worker."""
    for name in ("socket", "selectors", "logging", "psutil", "attrs"):
        (folder / f"{name}.py").write_text("raise RuntimeError('not this one')\n")
    program = run_program(
        HEADER + f"with ModelManager() as manager:\n    print(manager.{REGISTER}.predict('1'))\n", folder
    )
    assert (program.stdout, program.stderr) == ("1\n", "")


def test_a_forked_copy_of_a_future_never_waits(folder: Path) -> None:
    """In a forked child the future of a request under way raises ManagerClosed; in the parent it gets its answer."""
    program = run_program(
        HEADER
        + f"""
import os, warnings
from torchmgmt.errors import ManagerClosed
warnings.simplefilter("ignore")
manager = ModelManager()
model = manager.{REGISTER}
future = model.submit("time.sleep(0.5) or 'late'")
child = os.fork()
if child == 0:
    import signal
    signal.alarm(5)
    for wait in (future.result, future.exception):
        try:
            wait()
        except ManagerClosed as error:
            print("fork" in str(error), flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
print(status, future.result(), flush=True)
""",
        folder,
    )
    assert (program.stdout, program.stderr) == ("True\nTrue\n0 late\n", "")
