"""Workers that are forked from one process that has loaded the model: what they share, what not, and when not at all."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import attrs
import numpy as np
import psutil
import pytest
import torch

from tests.handlers import TOOLS, Deployer, Gate, is_gone, lines_of, until
from torchmgmt import Model, ModelManager
from torchmgmt.errors import WorkerStartFailed
from torchmgmt.lifecycle import VersionState

HANDLER = (
    TOOLS
    + """
{imports}

class Handler:
    def initialize(self, context):
        note({loads!r}, os.getpid())
        {body}

    def handle(self, data, context):
        return [eval(row["body"], {{**globals(), "self": self}}) for row in data]
"""
)


@attrs.frozen
class Loading:
    """Deploys a handler that does ``body`` in initialize, and knows which processes did."""

    deploy: Deployer
    file: Path

    def __call__(self, body: str = "pass", imports: str = "", **options: object) -> Model:
        source = HANDLER.format(imports=imports, loads=str(self.file), body=body.replace("\n", "\n        "))
        return self.deploy(source, **options)

    @property
    def pids(self) -> list[int]:
        """Of the processes that loaded the model, one for each time."""
        return [int(line) for line in lines_of(self.file)]


@pytest.fixture
def loading(deploy: Deployer, tmp_path: Path) -> Loading:
    return Loading(deploy, tmp_path / "loads")


def pids(model: Model) -> list[int]:
    return [worker.pid or 0 for worker in model.describe().workers]


def from_each(model: Model, expression: str) -> dict[int, object]:
    """Return what ``expression`` is in each worker, by their pids: each is asked while all others are busy with it."""
    workers = len(model.describe().workers)
    answers: dict[int, object] = {}

    def ask() -> bool:
        futures = [model.submit(f"(time.sleep(0.01), os.getpid(), {expression})[1:]") for _ in range(2 * workers)]
        answers.update(future.result(20) for future in futures)
        return len(answers) >= workers

    until(ask, "each worker has answered")
    return answers


def reason(model: Model) -> str:
    return str(model.describe().sharing.reason)


# -- once for all ------------------------------------------------------------------------------------------------------


def test_the_model_is_loaded_once_for_all_workers(loading: Loading) -> None:
    """However many workers there are and come later, the model is loaded once, by a process that is none of them."""
    model = loading(initial_workers=2)
    model.scale(4)
    assert len(loading.pids) == 1
    assert not set(loading.pids) & set(pids(model))
    assert len(set(from_each(model, "1"))) == 4
    item = model.describe().to_dict()
    assert (item["weightsShared"], item["shareWeights"]) == (True, "auto")
    assert "left nothing behind" in item["weightsSharedReason"]


def test_a_worker_that_dies_is_replaced_without_loading_again(loading: Loading) -> None:
    """The template lives on when its workers die."""
    model = loading()
    (old,) = pids(model)
    os.kill(old, signal.SIGKILL)
    until(lambda: pids(model) not in ([old], [], [0]), "the worker is replaced")
    assert model.predict("os.getpid()", timeout=30) != old
    assert len(loading.pids) == 1


def test_a_template_that_dies_takes_no_worker_with_it(loading: Loading) -> None:
    """Workers answer on when their template is killed; the next one that is needed loads the model again."""
    model = loading(initial_workers=2)
    (template,) = loading.pids
    before = set(pids(model))
    os.kill(template, signal.SIGKILL)
    until(lambda: is_gone(template), "the template is gone")
    assert set(from_each(model, "1")) == before
    until(lambda: psutil.Process(min(before)).ppid() != template, "the workers have another parent")
    model.scale(3)
    assert len(loading.pids) == 2
    os.kill(min(before), signal.SIGKILL)
    until(lambda: len(set(pids(model)) - {0, min(before)}) == 3, "an orphan's end is noticed, and it is replaced")


def test_the_log_says_which_way_and_why(loading: Loading, caplog: pytest.LogCaptureFixture) -> None:
    """For each way that may be taken there is one line of log that names it and its reason."""
    caplog.set_level("INFO", "torchmgmt")
    loading(model_name="shared")
    loading("import socket; self.socket = socket.socket()", model_name="separate")
    loading(share_weights="never", model_name="told")
    text = caplog.text
    assert "Workers of shared:1.0 are forked from a template and share its weights" in text
    assert "Workers of separate:1.0 load the model by themselves: loading it left behind an open socket" in text
    assert "Workers of told:1.0 load the model by themselves: share_weights=never" in text


def test_memory_is_there_once(loading: Loading) -> None:
    """Four workers of a model of 40 MB hold its weights once: each has far less of its own."""
    size = 40 << 20
    body = f"import torch\nself.weights = torch.ones({size // 4})"
    model = loading(body, initial_workers=4)
    assert set(from_each(model, "float(self.weights.sum())").values()) == {float(size // 4)}
    facts = [psutil.Process(pid).memory_full_info() for pid in pids(model)]
    assert all(each.uss < size / 2 for each in facts), [each.uss >> 20 for each in facts]
    assert all(each.rss > size for each in facts)
    alone = loading(body, share_weights="never", model_name="alone")
    assert psutil.Process(pids(alone)[0]).memory_full_info().uss > size


def test_what_is_loaded_is_frozen(loading: Loading) -> None:
    """A collection in a worker does not visit, and so copy, what the template has loaded."""
    model = loading("self.rows = [[number] for number in range(100_000)]", imports="import gc")
    assert model.predict("gc.get_freeze_count()") > 100_000
    assert model.predict("gc.isenabled()") is True


# -- what a worker has of its own --------------------------------------------------------------------------------------


def test_random_numbers_differ_between_workers(loading: Loading) -> None:
    """torch's, numpy's and Python's own global generators give each worker numbers of its own, unless the handler seeded them."""
    model = loading("torch.rand(2000)", imports="import random, numpy, torch", initial_workers=3)
    expression = "(torch.rand(1).item(), numpy.random.rand(), random.random(), os.urandom(4).hex())"
    answers = from_each(model, expression).values()
    for numbers in zip(*answers, strict=True):  # type: ignore[call-overload]
        assert len(set(numbers)) == 3, numbers


def test_the_environment_is_the_programs(loading: Loading, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the template needs otherwise is in its workers as the program has it: set, or not set."""
    model = loading(initial_workers=2)
    names = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PYTORCH_NVML_BASED_CUDA_CHECK"]
    expected = [os.environ.get(name) for name in names]
    for values in from_each(model, f"[os.environ.get(name) for name in {names!r}]").values():
        assert values == expected


def test_what_a_handler_sets_in_the_environment_holds(loading: Loading) -> None:
    """A variable that initialize sets is so in the workers, also one that the template had for itself."""
    model = loading("os.environ['OMP_NUM_THREADS'] = '3'; os.environ['MINE'] = 'x'", initial_workers=2)
    for values in from_each(model, "(os.environ['OMP_NUM_THREADS'], os.environ['MINE'])").values():
        assert values == ("3", "x")


def test_the_number_of_threads_that_a_handler_sets_holds(loading: Loading) -> None:
    """``torch.set_num_threads`` in initialize, by whatever name, is what workers compute with, and spoils no sharing."""
    imports = "import torch\nfrom torch import set_num_threads"
    model = loading("set_num_threads(3); torch.ones(1 << 20).sum()", imports=imports, threads_per_worker=2)
    assert model.predict("torch.get_num_threads()") == 3
    assert model.predict("(set_num_threads(2), torch.get_num_threads())[1]") == 2
    assert model.describe().sharing.is_shared is True


@pytest.mark.parametrize("body", ["pass", "torch.ones(1 << 20).sum(); torch.rand(300, 300) @ torch.rand(300, 300)"])
def test_operations_with_several_threads_work(loading: Loading, body: str) -> None:
    """A worker computes with several threads, also if its template has computed before it was forked."""
    model = loading(body, imports="import torch", initial_workers=2, threads_per_worker=4)
    answers = from_each(model, "(torch.get_num_threads(), (torch.rand(400, 400) @ torch.rand(400, 400)).shape[0])")
    assert set(answers.values()) == {(4, 400)}
    assert model.describe().sharing.is_shared is True


def test_a_handlers_signal_handlers_hold(loading: Loading) -> None:
    """What initialize wants to happen at SIGCHLD and SIGTERM is so in a forked worker."""
    body = "signal.signal(signal.SIGCHLD, on_signal); signal.signal(signal.SIGTERM, on_signal)"
    model = loading(body, imports="def on_signal(number, frame): pass", initial_workers=2)
    expression = "[signal.getsignal(each).__name__ for each in (signal.SIGCHLD, signal.SIGTERM)]"
    assert set(map(tuple, from_each(model, expression).values())) == {("on_signal", "on_signal")}  # type: ignore[arg-type]


# -- what initialize does to its process -------------------------------------------------------------------------------

ODDITIES = {
    "stdout is closed": "sys.stdout.close()",
    "stdout is none": "sys.stdout = sys.stderr = None",
    "stdout is another": "sys.stdout = __import__('io').StringIO()",
    "SIGCHLD is blocked": "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])",
    "SIGCHLD is ignored": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "the folder is another": "os.chdir('/')",
    "the environment is empty": "os.environ.clear()",
    "the path is empty": "sys.path.clear()",
    "nothing is collected": "__import__('gc').disable()",
    "modules are forgotten": "[sys.modules.pop(name) for name in list(sys.modules) if name.startswith('torchmgmt')]",
    "it has forked": "(os.waitpid(os.fork() or os._exit(0), 0))",
    "a pool was used": "with __import__('multiprocessing').get_context('fork').Pool(1) as pool: pool.map(abs, [1])",
    "a logger was set up": "__import__('logging').basicConfig(force=True, level='DEBUG')",
    "threads were used": "with __import__('concurrent.futures').futures.ThreadPoolExecutor(3) as p: list(p.map(int, '12'))",
}


@pytest.mark.parametrize("name", ODDITIES)
def test_whatever_initialize_does_its_workers_come_and_go(loading: Loading, name: str) -> None:
    """Workers are forked, serve, are replaced when they die, and end when told to, whatever the handler did before."""
    model = loading(ODDITIES[name], initial_workers=2)
    first, second = pids(model)
    assert model.predict("6 * 7", timeout=20) == 42
    os.kill(first, signal.SIGKILL)
    until(lambda: len(set(pids(model)) - {0, first}) == 2, "the dead worker is replaced")
    model.scale(1)
    assert model.predict("6 * 7", timeout=20) == 42
    assert model.unregister().killed_pids == ()
    assert is_gone(second)


# -- when not ----------------------------------------------------------------------------------------------------------

FINDINGS = {
    "the thread 'prefetch'": "threading.Thread(target=threading.Event().wait, name='prefetch', daemon=True).start()",
    "an open socket": "self.thing = __import__('socket').socket()",
    "an open pipe": "self.thing = os.pipe()",
    "an open eventpoll": "self.thing = __import__('asyncio').new_event_loop()",
    "app.log, open for writing": "self.thing = open('app.log', 'w')",
    "words.txt, in which they would move": "open('words.txt', 'w').close(); self.thing = open('words.txt')",
    "cache.db, open for writing": "self.thing = __import__('sqlite3').connect('cache.db')",
    "the child process": "self.thing = __import__('subprocess').Popen(['sleep', '1000'])",
    "memory shared for writing": "self.thing = __import__('mmap').mmap(-1, 4096)",
    "torch_": "self.thing = __import__('torch').zeros(4096).share_memory_()",
    "a context on an accelerator (cuda)": "__import__('torch').cuda.is_initialized = lambda: True",
}


@pytest.mark.parametrize("words", FINDINGS)
def test_what_must_not_be_shared_makes_workers_load_by_themselves(loading: Loading, words: str) -> None:
    """The finding is named, each worker loads the model, and none in vain: what was to be the template is the first."""
    model = loading(FINDINGS[words], initial_workers=2)
    item = model.describe().to_dict()
    assert item["weightsShared"] is False
    assert words in item["weightsSharedReason"]
    model.scale(3)
    assert sorted(loading.pids) == sorted(pids(model))
    assert len(set(from_each(model, "1"))) == 3


def test_a_worker_that_was_to_be_a_template_is_a_worker_like_others(loading: Loading, tmp_path: Path) -> None:
    """It has its threads, its output and its end as all have, and what it started goes with it."""
    sharing_nothing = "import torch\nself.thing = __import__('socket').socket()\ntorch.set_num_threads(3)"
    model = loading(sharing_nothing, imports="import subprocess, torch", threads_per_worker=2)
    (pid,) = loading.pids
    assert model.predict("(os.getpid(), torch.get_num_threads())") == (pid, 3)
    assert model.predict("torch.rand(600, 600).matmul(torch.rand(600, 600)).shape[0]", timeout=20) == 600
    child = model.predict("subprocess.Popen(['sleep', '1000'], start_new_session=True).pid")
    with pytest.raises(Exception, match="SIGKILL") as caught:
        model.predict("print('last words', flush=True) or os.kill(os.getpid(), signal.SIGKILL)", timeout=20)
    assert "last words" in caught.value.last_lines  # type: ignore[attr-defined]
    until(lambda: is_gone(child), "what it started is gone")
    assert model.predict("os.getpid()", timeout=30) != pid
    model.unregister()


def test_strays_are_ended_after_the_first_worker_has_died(loading: Loading) -> None:
    """When the worker that was to be a template is gone, what later workers leave behind is still ended with them."""
    model = loading("self.thing = __import__('socket').socket()", imports="import subprocess")
    os.kill(pids(model)[0], signal.SIGKILL)
    second = model.predict("os.getpid()", timeout=30)
    child = model.predict("subprocess.Popen(['sleep', '1000'], start_new_session=True).pid")
    os.kill(second, signal.SIGKILL)
    until(lambda: is_gone(child), "what it started is gone")


def test_never_means_never(loading: Loading) -> None:
    """With share_weights=never each worker loads the model, and there is no further process."""
    model = loading(share_weights="never", initial_workers=2)
    assert sorted(loading.pids) == sorted(pids(model))
    assert (model.describe().sharing.is_shared, reason(model)) == (False, "share_weights=never")


def test_always_means_in_spite_of_what_is_found(loading: Loading) -> None:
    """With share_weights=always a finding is named and not heeded."""
    model = loading("self.thing = open('app.log', 'w')", share_weights="always", initial_workers=2)
    assert len(loading.pids) == 1
    assert model.describe().sharing.is_shared is True
    assert "in spite of" in reason(model)
    assert "app.log" in reason(model)


def test_not_even_always_forks_an_accelerator(loading: Loading) -> None:
    """No context on an accelerator survives a fork, whatever the handler's author vouches for."""
    model = loading("import torch; torch.cuda.is_initialized = lambda: True", share_weights="always")
    assert model.describe().sharing.is_shared is False
    assert "accelerator (cuda)" in reason(model)
    assert loading.pids == pids(model)


@pytest.mark.parametrize("device", ["gpu", "GPU", "cuda", "neuron"])
def test_a_model_for_an_accelerator_is_not_tried(loading: Loading, device: str) -> None:
    """Where the archive says that it runs on an accelerator each worker loads by itself, without a try."""
    model = loading(config=f"deviceType: {device}\n", initial_workers=2)
    assert sorted(loading.pids) == sorted(pids(model))
    assert device in reason(model)


@pytest.mark.parametrize("config", ["deviceType: cpu\n", "deviceType: CPU\n", "deviceType: 5\n", None])
def test_a_model_for_the_processor_is_shared(loading: Loading, config: str | None) -> None:
    """The processor, and what is no device, keep nothing from being shared."""
    assert loading(config=config).describe().sharing.is_shared is True


@pytest.mark.parametrize(
    "body",
    [
        "self.rows = numpy.memmap(__file__, dtype='uint8', mode='r')",
        "self.rows = numpy.load({folder!r} + '/rows.npy', mmap_mode='r')",
        "self.rows = torch.load({folder!r} + '/w.pt', mmap=True)",
        "with open(__file__, 'rb') as f: f.read(5); self.rows = __import__('mmap').mmap(f.fileno(), 0, access=1)",
    ],
)
def test_mapped_files_spoil_nothing(loading: Loading, tmp_path: Path, body: str) -> None:
    """Files that are mapped to be read, by numpy, torch or mmap, are shared as anything else is."""
    np.save(tmp_path / "rows.npy", np.arange(9999))
    torch.save(torch.ones(9999), tmp_path / "w.pt")
    body = body.replace("{folder!r}", repr(str(tmp_path)))
    model = loading(body, imports="import numpy, torch", initial_workers=2)
    assert model.describe().sharing.is_shared is True, reason(model)
    assert model.predict("len(self.rows) > 0") is True


# -- a fork that does not work -----------------------------------------------------------------------------------------


def test_a_worker_that_hangs_after_the_fork_ends_the_forking(loading: Loading, monkeypatch: pytest.MonkeyPatch) -> None:
    """What shows no sign of life in time is killed, and from then on workers load by themselves and say why."""
    monkeypatch.setattr("torchmgmt.backends.process_worker.FORK_LIMIT_S", 0.5)
    model = loading(
        "os.register_at_fork(after_in_child=threading.Event().wait)",
        synchronous=False,
        initial_workers=2,
    )
    assert model.predict("os.getpid()", timeout=40) in loading.pids
    until(lambda: len(set(pids(model)) - {0}) == 2, "both workers are there")
    model.wait_ready(20)
    assert model.describe().sharing.is_shared is False
    assert "hung" in reason(model)
    (template, *_) = loading.pids
    until(lambda: is_gone(template), "the template is gone")


def test_a_fork_that_lost_computing_threads_is_found_out(loading: Loading, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that has computed with several threads, and is to be forked nonetheless, leaves no worker that hangs."""
    monkeypatch.setattr("torchmgmt.backends.process_worker.FORK_LIMIT_S", 1)
    body = "torch._C.set_num_threads(2); torch.ones(1 << 20).sum()"
    model = loading(body, imports="import torch", share_weights="always", threads_per_worker=2, synchronous=False)
    assert model.predict("torch.ones(1 << 20).sum().item()", timeout=40) == 1 << 20
    model.wait_ready(20)
    assert model.describe().sharing.is_shared is False
    assert "hung" in reason(model)


def test_threads_that_come_after_loading_are_found_out(loading: Loading, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that has lost nothing yet when it has loaded, and makes threads before it is forked, leaves no worker that hangs."""
    monkeypatch.setattr("torchmgmt.backends.process_worker.FORK_LIMIT_S", 1)
    imports = "import torch\ndef compute(*_): torch._C.set_num_threads(2); torch.ones(1 << 20).sum()"
    body = "signal.signal(signal.SIGALRM, compute); signal.setitimer(signal.ITIMER_REAL, 0.5)"
    model = loading(body, imports=imports, initial_workers=1, threads_per_worker=2)
    assert model.describe().sharing.is_shared is True
    (template,) = loading.pids
    until(lambda: len([*Path(f"/proc/{template}/task").iterdir()]) > 1, "the template has computed")
    model.scale(2, 2, synchronous=False)
    until(lambda: len(set(pids(model)) - {0}) == 2 and len(loading.pids) == 2, "the second has loaded by itself")
    assert from_each(model, "torch.ones(1 << 20).sum().item()").keys() == set(pids(model))
    assert "hung" in reason(model)


def test_a_worker_makes_no_computing_threads_before_it_needs_them(loading: Loading) -> None:
    """A forked worker has its first thread and the one that watches its parent: more are made at the first operation."""
    model = loading(imports="import torch", threads_per_worker=2)
    threads = "len(os.listdir('/proc/self/task'))"
    assert model.predict(threads) == 2
    assert model.predict(f"(torch.ones(1 << 20).sum(), {threads})[1]") == 3


# -- at rest -----------------------------------------------------------------------------------------------------------


def test_from_zero_and_back_nothing_is_loaded(loading: Loading) -> None:
    """A version that was scaled to zero and is needed again is served by what its template has loaded."""
    model = loading(initial_workers=0, max_workers=1)
    assert loading.pids == []
    assert model.predict("1", timeout=30) == 1
    (template,) = loading.pids
    model.scale(1, 1)
    model.scale(0, 1, timeout=0)
    until(lambda: model.describe().workers == () or model.scale(0, 1), "the workers are gone", 5)
    assert not is_gone(template)
    assert model.predict("2", timeout=30) == 2
    assert loading.pids == [template]


def test_an_idle_template_goes_after_its_time_and_comes_back(loading: Loading) -> None:
    """After template_idle_timeout without a worker nothing of the version is left, and its next request is served."""
    model = loading(initial_workers=0, max_workers=1, scale_down_delay=0, template_idle_timeout=0.3)
    assert model.predict("1", timeout=30) == 1
    (template,) = loading.pids
    until(lambda: not model.describe().workers, "the idle worker is gone")
    until(lambda: is_gone(template), "the idle template is gone")
    assert model.describe().sharing.is_shared is None
    assert model.predict("2", timeout=30) == 2
    assert len(loading.pids) == 2


def test_an_idle_timeout_of_zero_loses_no_request(loading: Loading) -> None:
    """With no idle time at all each request may meet a template that goes; all are served and none is an error."""
    model = loading(initial_workers=0, max_workers=1, scale_down_delay=0, template_idle_timeout=0)
    for number in range(4):
        assert model.predict(str(number), timeout=30) == number
        if number % 2:
            until(lambda: not model.describe().workers, "the idle worker is gone")
    assert model.describe().last_error == ""


def test_zero_workers_for_good_give_the_template_up(loading: Loading) -> None:
    """Where no worker may be nothing is kept loaded; scaled up again the model is loaded again."""
    model = loading()
    (template,) = loading.pids
    model.scale(0, 0)
    until(lambda: is_gone(template), "the template is gone")
    model.scale(1)
    assert len(loading.pids) == 2
    assert model.predict("1") == 1


def test_unregistering_leaves_no_template(loading: Loading, manager: ModelManager) -> None:
    """When unregister returns the template is gone as the workers are."""
    model = loading(initial_workers=2)
    everything = [*loading.pids, *pids(model)]
    model.unregister()
    assert all(map(is_gone, everything))
    assert len(manager) == 0


@pytest.mark.parametrize("end", ["scale", "unregister", "close"])
def test_a_template_that_loads_is_not_waited_for(loading: Loading, manager: ModelManager, gate: Gate, end: str) -> None:
    """Scaling to zero, unregistering and closing while the model is being loaded end that at once."""
    model = loading(f"wait_for({gate.path!r})", synchronous=False, initial_workers=3)
    until(lambda: loading.pids, "loading has begun")
    ways: dict[str, Callable[[], object]] = {
        "scale": lambda: model.scale(0),
        "unregister": lambda: model.unregister(timeout=0),
        "close": lambda: manager.close(0),
    }
    ways[end]()
    until(lambda: is_gone(loading.pids[0]), "the template is gone", 5)
    if end == "scale":
        gate.open()
        model.scale(1)
        assert model.predict("1") == 1


def test_one_of_several_that_wait_may_go(loading: Loading, gate: Gate) -> None:
    """Scaling down while the model is being loaded lets the others of those that wait for it have it."""
    model = loading(f"wait_for({gate.path!r})", synchronous=False, initial_workers=4)
    until(lambda: loading.pids, "loading has begun")
    model.scale(2, synchronous=False)
    gate.open()
    model.wait_ready(20)
    assert len(pids(model)) == 2
    assert len(loading.pids) == 1
    assert model.describe().last_error == ""


# -- failing and coming back -------------------------------------------------------------------------------------------

BROKEN = "if os.path.exists({flag!r}): raise RuntimeError('the weights are gone')"


def test_what_was_mended_on_disk_comes_back_by_itself(loading: Loading, tmp_path: Path) -> None:
    """While starts are tried again a model that is mended is found mended."""
    flag = tmp_path / "flag"
    flag.touch()
    model = loading(BROKEN.format(flag=str(flag)), synchronous=False, initial_workers=2)
    until(lambda: "the weights are gone" in model.describe().last_error, "loading failed")
    future = model.submit("42")
    flag.unlink()
    assert future.result(30) == 42
    model.wait_ready(20)
    assert model.describe().sharing.is_shared is True


def test_what_has_failed_comes_back_by_scaling(loading: Loading, tmp_path: Path) -> None:
    """A version that is FAILED says why, keeps no process, and serves again once it is mended and scaled."""
    flag = tmp_path / "flag"
    flag.touch()
    body = BROKEN.format(flag=str(flag))
    model = loading(body, synchronous=False, initial_workers=2, config="maxRetryTimeoutInSec: 0\n")
    until(lambda: model.state is VersionState.FAILED, "it was given up")
    assert "the weights are gone" in model.describe().last_error
    assert all(map(is_gone, loading.pids))
    with pytest.raises(WorkerStartFailed):
        model.wait_ready(5)
    flag.unlink()
    model.scale(2)
    assert model.predict("42") == 42


def test_several_workers_that_wait_for_one_bad_load_are_one_failure(loading: Loading) -> None:
    """Eight workers of a model that cannot be loaded load it once for each attempt, not eight times."""
    with pytest.raises(WorkerStartFailed, match="no such weights") as caught:
        loading("raise OSError('no such weights')", initial_workers=8)
    assert "raise OSError" in caught.value.traceback
    assert len(loading.pids) <= 2


def test_a_load_past_its_time_names_the_limit_for_all_that_wait(loading: Loading, gate: Gate) -> None:
    """When the template has had startup_timeout to load, those that wait for it fail by that, and it is gone."""
    with pytest.raises(WorkerStartFailed, match="startup_timeout") as caught:
        loading(f"wait_for({gate.path!r})", initial_workers=3, startup_timeout=0.5)
    assert any("initialize" in line for line in caught.value.last_lines), caught.value.last_lines
    until(lambda: all(map(is_gone, loading.pids)), "nothing of it is left")
