"""Whatever a handler makes for its worker alone, each caller gets the answer to what it sent, and no one else's.

The handlers here pass each request through a place in the outside world and come back for it a moment later, as those do
that run a program on a file. Where two workers have one place, one caller gets what another has sent.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.handlers import PATIENCE_S, TOOLS, Deployer, is_gone, until
from torchmgmt import Model, ModelManager
from torchmgmt.answer_future import AnswerFuture

CALLERS = 60
SOURCE = (
    TOOLS
    + """
import datetime, fcntl, random, secrets, shutil, socket, sqlite3, subprocess, tempfile, uuid
import numpy, torch
ROOT = {root!r}
class Handler:
    def initialize(self, context):
        self.path = None
        {initialize}
    def begin(self):
        {begin}
    def place(self):
        return self.path if os.path.isabs(str(self.path)) else f"{{ROOT}}/{{self.path}}"
    def pass_through(self, body):
        path = self.place()
        with open(path, "w") as file:
            file.write(body)
        time.sleep(0.004)
        with open(path) as file:
            return file.read()
    def handle(self, data, context):
        return [self.pass_through(row["body"]) for row in data]
{more}
"""
)
NUMBERED = "    def place(self): return f'{ROOT}/{self.draw()}'\n"
DATABASE = """
    def pass_through(self, body):
        self.query("DELETE FROM bodies")
        self.query("INSERT INTO bodies VALUES (?)", body)
        time.sleep(0.004)
        return self.query("SELECT body FROM bodies")[0][0]
    def query(self, text, *values):
        rows = sqlite3.connect(self.path)
        try:
            with rows:
                return rows.execute(text, values).fetchall()
        finally:
            rows.close()
"""
OWN = {
    "a temporary folder": ("self.path = tempfile.mkdtemp(dir=ROOT) + '/in'", "the folder"),
    "a temporary file": ("fd, self.path = tempfile.mkstemp(dir=ROOT); os.close(fd)", "the file"),
    "a temporary name": ("self.path = tempfile.mktemp(dir=ROOT)", "the temporary name"),
    "a name from uuid4": ("self.path = uuid.uuid4().hex", "uuid.uuid4"),
    "a name from uuid1": ("self.path = str(uuid.uuid1())", "random bytes"),
    "a token": ("self.path = secrets.token_hex(8)", "secrets.token_hex"),
    "bytes of the system": ("self.path = os.urandom(4).hex()", "random bytes"),
    "a device of random bytes": (
        "f = open('/dev/urandom', 'rb'); self.path = f.read(4).hex(); f.close()",
        "/dev/urandom",
    ),
    "a pid in a name": ("self.path = f'worker{os.getpid()}'", "the id of the process"),
    "a pid as a number": ("self.path = os.getpid()", "the id of the process"),
    "a name of the process": (
        "import multiprocessing; self.path = multiprocessing.current_process().name",
        "the name of",
    ),
    "numpy's generator": ("self.draw = numpy.random.default_rng().random", "a generator of random numbers"),
    "numpy's old generator": ("self.draw = numpy.random.RandomState().rand", "a generator of random numbers"),
    "Python's generator": ("self.draw = random.Random().random", "a generator of random numbers"),
    "torch's generator": (
        "self.g = torch.Generator(); self.g.seed(); self.draw = lambda: torch.rand(1, generator=self.g).item()",
        "a generator with a seed of the system's",
    ),
    "a number of Python's": ("self.path = random.randint(20_000, 60_000)", "numbers of random"),
    "a number of numpy's": ("self.path = numpy.random.randint(20_000, 60_000)", "numbers of numpy.random"),
    "letters of numpy's": ("self.path = ''.join(numpy.random.choice(list('abcdefgh'), 8))", "numbers of numpy.random"),
    "a generator with a seed of the system's": (
        "torch.seed(); self.draw = lambda: torch.rand(1).item()",
        "torch's global generator",
    ),
    "a generator that was seeded by time": (
        "random.seed(time.time()); self.draw = random.random",
        "a time stamp, kept in the seed of random",
    ),
    "a free port": (
        "s = socket.socket(); s.bind(('127.0.0.1', 0)); self.path = s.getsockname()[1]; s.close()",
        "to which it bound a socket",
    ),
    "a time stamp": ("self.path = time.time()", "a time stamp, kept in Handler.path"),
    "a time stamp of nanoseconds": ("self.path = time.time_ns()", "a time stamp"),
    "a reading of a clock": ("self.path = time.perf_counter()", "a time stamp"),
    "a time in a text": ("self.path = f'run-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}'", "a time stamp"),
    "a date": ("self.path = datetime.datetime.now(datetime.timezone.utc)", "a time stamp"),
    "a database": (
        "self.path = f'{ROOT}/{free(os.mkdir)}/rows.db'; self.query('CREATE TABLE bodies (body)')",
        "the database",
    ),
    "what another program says": (
        "self.path = subprocess.run(['mktemp', '-u', ROOT + '/XXXXXX'], stdout=-1, text=True).stdout.strip()",
        "running mktemp",
    ),
    "a number out of a file": (
        "self.path = counted()",
        "the file",
    ),
    "a folder that was free": (
        "self.path = f'{free(os.mkdir)}/in'",
        "the folder",
    ),
    "a file that was free": (
        "self.path = free(lambda path: open(path, 'x').close())",
        "the file",
    ),
}
HELPERS = """
def counted():
    with open(ROOT + "/next", "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        number = int(file.read())
        file.seek(0)
        file.write(str(number + 1))
    return number
def free(make):
    for number in range(99):
        try:
            make(f"{ROOT}/{number}")
            return number
        except FileExistsError:
            pass
"""


def source(root: Path, name: str, *, initialize: str = "pass", begin: str = "pass") -> str:
    more = NUMBERED if "self.draw" in OWN[name][0] else DATABASE if name == "a database" else ""
    return SOURCE.format(root=str(root), initialize=initialize, begin=begin, more=more) + HELPERS


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where the handlers keep what is in their hands."""
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / "next").write_text("1000")
    return folder


def submitted(model: Model, count: int = CALLERS) -> list[AnswerFuture]:
    return [model.submit(f"clip {number:03}") for number in range(count)]


def right(futures: list[AnswerFuture]) -> int:
    """How many callers have got their own answers."""
    answers = [future.exception(PATIENCE_S) or future.result() for future in futures]
    return sum(answer == f"clip {number:03}" for number, answer in enumerate(answers))


@pytest.mark.parametrize("name", OWN)
def test_what_initialize_makes_for_one_worker_is_not_forked(deploy: Deployer, root: Path, name: str) -> None:
    """Each of 60 callers gets its own answer from three workers, none of which is forked, and describe says for what."""
    body, words = OWN[name]
    model = deploy(source(root, name, initialize=body), initial_workers=3)
    assert right(submitted(model)) == CALLERS
    sharing = model.describe().sharing
    assert sharing.is_shared is False
    assert words in sharing.reason
    assert "begin()" in sharing.reason


@pytest.mark.parametrize("name", OWN)
def test_what_begin_makes_is_each_workers_own(deploy: Deployer, root: Path, name: str) -> None:
    """The same made in begin: 60 callers get their own answers, from workers that share what initialize has loaded."""
    body, _ = OWN[name]
    model = deploy(source(root, name, begin=body), initial_workers=3)
    assert right(submitted(model)) == CALLERS
    assert model.describe().sharing.is_shared is True, model.describe().sharing.reason


@pytest.mark.parametrize("name", [name for name in OWN if "process" not in name and "pid" not in name])
def test_threads_have_their_own_things(deploy: Deployer, root: Path, name: str) -> None:
    """Workers that are threads load the model each, so what initialize makes is each one's own; but a pid, the program's."""
    body, _ = OWN[name]
    model = deploy(source(root, name, initialize=body), initial_workers=3, backend="thread")
    assert right(submitted(model)) == CALLERS


def test_the_number_that_a_server_gave_is_not_forked(deploy: Deployer, root: Path, registry: int) -> None:
    """What initialize was told over a connection that it closed again may be for it alone."""
    ask = f"s = socket.create_connection(('127.0.0.1', {registry})); self.path = s.recv(99).decode(); s.close()"
    OWN["a number from a server"] = (ask, "")
    try:
        model = deploy(source(root, "a number from a server", initialize=ask), initial_workers=3)
    finally:
        del OWN["a number from a server"]
    assert right(submitted(model)) == CALLERS
    assert f"a connection to 127.0.0.1:{registry}" in model.describe().sharing.reason


@pytest.fixture
def registry() -> Iterator[int]:
    """The port of a server that tells each who connects another number."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for number in range(1, 100):
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.sendall(b"%d" % number)

    thread = threading.Thread(target=serve)
    thread.start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


class Folder:
    """A live handler with a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def initialize(self, context: Any) -> None:
        self.path = Path(tempfile.mkdtemp(dir=self.root), "in")

    def handle(self, data: Any, context: Any) -> list[str]:
        answers = []
        for row in data:
            self.path.write_text(row["body"])
            time.sleep(0.004)
            answers.append(self.path.read_text())
        return answers


def test_what_a_live_handler_makes_is_not_forked(manager: ModelManager, root: Path) -> None:
    """Objects of the program's are watched as the code of archives is."""
    model = manager.register(Folder(root), model_name="m", initial_workers=3)
    assert right(submitted(model)) == CALLERS
    assert "test_own_things.py, line" in model.describe().sharing.reason


def test_always_means_in_spite_of_what_was_made_unique(deploy: Deployer, root: Path) -> None:
    """With share_weights=always the finding is named and not heeded, and workers need not prove that they can compute."""
    body, words = OWN["a temporary folder"]
    count = "def pass_through(self, body):\n        return len(os.listdir('/proc/self/task'))\n"
    text = source(root, "a temporary folder", initialize=body).replace("def pass_through(self, body):", count)
    model = deploy(text, share_weights="always", threads_per_worker=2)
    assert model.describe().sharing.is_shared is True
    assert words in model.describe().sharing.reason
    assert model.predict("") == 2, "its first thread, and the one that watches its parent"


# -- whatever becomes of processes and batches -------------------------------------------------------------------------

IN_BEGIN = {"begin": OWN["a temporary folder"][0]}
IN_INITIALIZE = {"initialize": OWN["a temporary folder"][0]}
WAYS = {"shared": IN_BEGIN, "separate": IN_INITIALIZE}


@pytest.mark.parametrize("way", WAYS)
def test_workers_of_a_template_that_died_keep_to_themselves(deploy: Deployer, root: Path, way: str) -> None:
    """When the process dies that workers were forked from, those that live on and those that come mix nothing up."""
    model = deploy(source(root, "a temporary folder", **WAYS[way]), initial_workers=2)
    futures = submitted(model)
    parents = {psutil.Process(worker.pid).parent() for worker in model.describe().workers if worker.pid}
    if way == "shared":
        (template,) = parents
        assert template is not None
        template.kill()
        until(lambda: is_gone(template.pid), "the template is gone")
    model.scale(3, synchronous=False)
    assert right(futures) == CALLERS
    model.wait_ready(PATIENCE_S)
    assert right(submitted(model)) == CALLERS


@pytest.mark.parametrize("way", WAYS)
def test_workers_that_take_the_place_of_dead_ones_keep_to_themselves(deploy: Deployer, root: Path, way: str) -> None:
    """A worker that dies costs its own callers their answers at most; nobody gets another's."""
    model = deploy(source(root, "a temporary folder", **WAYS[way]), initial_workers=3)
    futures = submitted(model)
    os.kill(model.describe().workers[0].pid or 0, signal.SIGKILL)
    answers = [future.exception(PATIENCE_S) or future.result() for future in futures]
    wrong = [answer for number, answer in enumerate(answers) if answer != f"clip {number:03}"]
    assert not [answer for answer in wrong if isinstance(answer, str)]
    assert right(submitted(model)) == CALLERS


@pytest.mark.parametrize("way", WAYS)
def test_batches_that_are_handed_on_are_answered_by_one(deploy: Deployer, root: Path, way: str) -> None:
    """Batches that are taken back from a slow worker, and run by another, reach their own callers."""
    more = (
        "\n    def handle(self, data, context):\n"
        "        [time.sleep(0.4) for row in data if row['body'] == 'clip 000']\n"
        "        return [self.pass_through(row['body']) for row in data]\n"
    )
    text = source(root, "a temporary folder", **WAYS[way]).replace(HELPERS, more + HELPERS)
    model = deploy(text, initial_workers=3, batches_in_flight=8)
    assert right(submitted(model)) == CALLERS


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_batches_that_are_run_again_reach_their_own_callers(deploy: Deployer, root: Path, kind: str) -> None:
    """With isolate_errors each of a failed batch's requests is answered by what it sent, with its own id and headers."""
    more = (
        "\n    def handle(self, data, context):\n"
        "        if len(data) > 1 and data[0]['body'].endswith('0'): raise ValueError(data)\n"
        "        for at, row in enumerate(data):\n"
        "            context.set_response_header(at, 'of', row['body'])\n"
        "        return [self.pass_through(row['body']) for row in data]\n"
    )
    text = source(root, "a temporary folder", **IN_BEGIN).replace(HELPERS, more + HELPERS)
    model = deploy(text, initial_workers=3, batch_size=4, max_batch_delay=20, isolate_errors=True, backend=kind)
    futures = submitted(model)
    assert right(futures) == CALLERS
    for number, future in enumerate(futures):
        properties = future.response_properties()
        assert properties is not None
        assert properties.headers == {"of": f"clip {number:03}"}


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_streams_reach_their_own_callers(deploy: Deployer, root: Path, kind: str) -> None:
    """Parts of many answers at a time, of batches that are generated by turns, each come to who asked, and in order."""
    more = (
        "\n    def handle(self, data, context):\n"
        "        return [self.parts(row['body']) for row in data]\n"
        "    def parts(self, body):\n"
        "        for number in range(5):\n"
        "            yield self.pass_through(f'{body} {number}')\n"
    )
    text = source(root, "a temporary folder", **IN_BEGIN).replace(HELPERS, more + HELPERS)
    model = deploy(text, initial_workers=3, batch_size=4, max_batch_delay=20, backend=kind)
    got: dict[int, list[object]] = {}

    def listen(caller: int) -> None:
        got[caller] = list(model.stream(f"clip {caller}"))

    callers = [threading.Thread(target=listen, args=(number,)) for number in range(20)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(PATIENCE_S)
    assert got == {caller: [f"clip {caller} {number}" for number in range(5)] for caller in range(20)}


# -- seeds -------------------------------------------------------------------------------------------------------------

DRAWS = """
import random
import numpy, torch
class Handler:
    def initialize(self, context):
        {seeds}
    def handle(self, data, context):
        return [(torch.rand(1).item(), float(numpy.random.rand()), random.random()) for _ in data]
"""
SEEDS = "torch.manual_seed(7); numpy.random.seed(7); random.seed(7)"


def drawn_first(model: Model, workers: int) -> list[tuple[float, ...]]:
    """Return what each worker draws first: each answers its first request in a process that was ended since."""
    drawn = []
    for _ in range(workers):
        (worker,) = model.describe().workers
        drawn.append(tuple(model.predict(0, timeout=PATIENCE_S)))
        os.kill(worker.pid or 0, signal.SIGKILL)
        until(lambda old=worker.id: [each.id for each in model.describe().workers] not in ([], [old]), "it is replaced")
        model.wait_ready(PATIENCE_S)
    return drawn


@pytest.mark.parametrize(
    "seeds",
    [
        SEEDS,
        f"{SEEDS}; torch.rand(9); numpy.random.rand(700); [random.random() for _ in range(700)]",
        "from random import seed; seed(3); torch.random.manual_seed(3); numpy.random.set_state(numpy.random.RandomState(3).get_state())",
        "torch.manual_seed(-1); numpy.random.seed(seed=5); random.setstate(random.Random(5).getstate())",
        "torch.manual_seed(1); numpy.random.set_bit_generator(numpy.random.PCG64(5)); random.seed('text')",
    ],
    ids=["seeded", "seeded and drawn from", "by other names", "by state", "another generator"],
)
def test_seeds_stay_as_the_handler_set_them(deploy: Deployer, seeds: str) -> None:
    """Each forked worker goes on where initialize has left the generators that it seeded, as one that loads by itself does."""
    shared = deploy(DRAWS.format(seeds=seeds))
    assert shared.describe().sharing.is_shared is True, shared.describe().sharing.reason
    forked = drawn_first(shared, 3)
    alone = drawn_first(deploy(DRAWS.format(seeds=seeds), share_weights="never", model_name="alone"), 1)
    assert set(forked) == set(alone)


def test_what_was_not_seeded_is_each_workers_own(deploy: Deployer) -> None:
    """Of three generators, those that the handler has not seeded, or has seeded from the system, differ from worker to worker."""
    one = drawn_first(deploy(DRAWS.format(seeds="torch.manual_seed(7); torch.rand(3)")), 3)
    assert [len(set(column)) for column in zip(*one, strict=True)] == [1, 3, 3]
    other = drawn_first(deploy(DRAWS.format(seeds="random.seed(7); numpy.random.seed()"), model_name="other"), 3)
    assert [len(set(column)) for column in zip(*other, strict=True)] == [3, 3, 1]
    third = drawn_first(deploy(DRAWS.format(seeds="numpy.random.seed(7); random.seed()"), model_name="third"), 3)
    assert [len(set(column)) for column in zip(*third, strict=True)] == [3, 1, 3]


def test_seeds_hold_in_the_worker_that_was_a_template(deploy: Deployer) -> None:
    """A process that loaded the model, and became a worker since it may not be forked, keeps what the handler seeded."""
    model = deploy(DRAWS.format(seeds=f"{SEEDS}; import os; self.pipe = os.pipe()"))
    alone = deploy(DRAWS.format(seeds=SEEDS), share_weights="never", model_name="alone")
    assert model.describe().sharing.is_shared is False
    assert model.predict(0) == alone.predict(0)
