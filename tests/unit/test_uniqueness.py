"""What loading a model makes unique for a process is found and named; what it does that any number may do is not."""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.handlers import write_folder  # noqa: E402 - torch is there
from torchmgmt.handlers.context import Context  # noqa: E402
from torchmgmt.records import ModelKey, ModelSpec  # noqa: E402
from torchmgmt.worker import audit  # noqa: E402
from torchmgmt.worker.loader import Handler, load_handler  # noqa: E402
from torchmgmt.worker.substitutes import Substitutes  # noqa: E402
from torchmgmt.worker.uniqueness import LoadWatch  # noqa: E402

SOURCE = """
import datetime, functools, logging, multiprocessing, os, pathlib, platform, random, secrets, shutil, socket, sqlite3, subprocess, sys
import tarfile, tempfile, threading, time, uuid, zipfile
from os import getpid
from random import randint
import numpy, torch
SAFE = {{"filter": "data"}} if hasattr(tarfile, "data_filter") else {{}}
{top}
class Handler:
    def initialize(self, context):
        {body}
    def handle(self, data, context):
        return data
"""


@attrs.define
class Modules:
    """What is imported, by the names that were there before."""

    before: frozenset[str] = attrs.field(factory=lambda: frozenset(sys.modules))

    def later_names(self) -> set[str]:
        return set(sys.modules) - self.before

    def later(self) -> Iterator[ModuleType]:
        return (sys.modules[name] for name in self.later_names())


@attrs.define
class Loader:
    """Loads handlers under watch, in this process, from folders of their own."""

    root: Path
    library: Path
    count: int = 0

    def __call__(self, body: str = "pass", top: str = "", **files: str) -> list[str]:
        """Return what is found while a handler is loaded."""
        watch, handler = self.load(body, top, **files)
        return watch.findings(handler)

    def load(self, body: str = "pass", top: str = "", **files: str) -> tuple[LoadWatch, Handler]:
        self.count += 1
        source = SOURCE.format(body=body.replace("\n", "\n        "), top=top)
        name = f"handler{self.count}"
        folder = write_folder(self.root / f"model{self.count}", "", **{name: source}, **files)
        spec = ModelSpec(
            key=ModelKey("m", "1.0"), model_dir=str(folder), handler=name, manifest={}, config={"of": "2.5"}
        )
        watch = LoadWatch(spec, Modules())  # type: ignore[arg-type]
        sys.path.insert(0, str(folder))
        before = Path.cwd()
        os.chdir(folder)
        try:
            with watch:
                handler = load_handler(spec, Context.for_model(spec))
        finally:
            sys.path.remove(str(folder))
            os.chdir(before)
        return watch, handler


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loader]:
    """Loads handlers under watch; what is in ``library`` counts as installed."""
    library = tmp_path / "site-packages"
    library.mkdir()
    monkeypatch.syspath_prepend(str(library))
    monkeypatch.setenv("ROOT", str(tmp_path))
    generator = np.random.get_bit_generator()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    modules = set(sys.modules)
    yield Loader(tmp_path, library)
    random.setstate(states[0])
    np.random.set_bit_generator(generator)
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


UNIQUE = {
    # names and folders
    "self.folder = tempfile.mkdtemp(dir=os.environ['ROOT'])": "the folder",
    "self.folder = tempfile.TemporaryDirectory(dir=os.environ['ROOT'])": "the folder",
    "fd, self.name = tempfile.mkstemp(dir=os.environ['ROOT']); os.close(fd)": "the file",
    "self.file = tempfile.NamedTemporaryFile(dir=os.environ['ROOT'])": "the file",
    "self.name = tempfile.mktemp()": "the temporary name",
    "tempfile.mktemp()": "the temporary name",
    "self.name = next(tempfile._get_candidate_names())": "the temporary name",
    "folder = tempfile.mkdtemp(dir=os.environ['ROOT']); os.rmdir(folder); self.folder = folder": "kept in Handler.folder",
    "os.mkdir('own')": "the folder",
    "os.makedirs('own/one')": "the folder",
    "pathlib.Path('own').mkdir()": "the folder",
    "pathlib.Path('own/one').mkdir(parents=True)": "own/one",
    "open('state', 'w').close()": "the file",
    "open('state', 'x').close()": "the file",
    "open('handler', 'a+').close()": "the file",
    "pathlib.Path('state').write_bytes(b'x')": "the file",
    "os.close(os.open('state', os.O_RDWR | os.O_CREAT))": "the file",
    "numpy.save('rows.npy', numpy.ones(3))": "the file",
    "numpy.ones(3).tofile('rows')": "the file",
    "torch.save(torch.ones(3), 'w.pt')": "w.pt",
    "torch.save(torch.ones(3), pathlib.Path('w.pt'))": "w.pt",
    "shutil.copy(__file__, 'copy')": "the file",
    "os.symlink('a', 'b')": "the file",
    "os.link(__file__, 'b')": "the file",
    "os.mkfifo('pipe')": "the file",
    "open('a', 'w').close(); os.replace('a', 'b')": "/b (",
    "open(f'log-{os.getpid()}', 'a').close()": "the file",
    "open(f'log-{time.time():.0f}', 'a').close()": "the file",
    "open(datetime.datetime.now().strftime('log-%Y-%m-%d-%H-%M-%S'), 'a').close()": "the file",
    "os.makedirs(f'out/{os.getpid()}', exist_ok=True)": "the folder",
    "sqlite3.connect('rows.db').close()": "the database rows.db",
    "sqlite3.connect('file:rows.db', uri=True).close()": "the database",
    # what is read that no other process reads
    "self.name = uuid.uuid4()": "uuid.uuid4 in handler",
    "self.name = uuid.uuid1()": "random bytes",
    "self.name = secrets.token_urlsafe()": "secrets.token_urlsafe",
    "self.number = secrets.randbelow(10)": "random bytes",
    "self.number = random.SystemRandom().random()": "random.random",
    "self.bytes = os.urandom(2)": "random bytes",
    "self.bytes = os.getrandom(2)": "random bytes",
    "f = open('/dev/urandom', 'rb'); self.bytes = f.read(2); f.close()": "/dev/urandom",
    "f = open('/proc/sys/kernel/random/uuid'); self.name = f.read(); f.close()": "/proc/sys/kernel/random/uuid",
    "self.draw = numpy.random.default_rng()": "a generator of random numbers",
    "self.draw = numpy.random.Generator(numpy.random.PCG64())": "a generator of random numbers",
    "self.draw = numpy.random.RandomState()": "a generator of random numbers",
    "self.number = numpy.random.RandomState().rand()": "a generator of random numbers",
    "self.number = numpy.random.default_rng().integers(9)": "a generator of random numbers",
    "self.draw = numpy.random.RandomState(None)": "a generator of random numbers",
    "make = lambda seed=None: numpy.random.RandomState(seed)\nself.draw = make()": "a generator of random numbers",
    "self.draw = random.Random()": "a generator of random numbers",
    "self.number = random.random()": "numbers of random",
    "self.number = randint(1, 9)": "numbers of random",
    "self.name = ''.join(random.choices('abc', k=9))": "numbers of random",
    "self.number = numpy.random.rand()": "numbers of numpy.random",
    "self.numbers = numpy.random.randint(9, size=8)": "numbers of numpy.random",
    "self.name = ''.join(numpy.random.choice(list('abc'), 8))": "numbers of numpy.random",
    "numpy.random.set_bit_generator(numpy.random.PCG64())": "a generator of random numbers",
    "random.seed(); self.number = random.random()": "numbers of random",
    "numpy.random.seed(None); self.number = numpy.random.rand()": "numbers of numpy.random",
    "random.seed(os.getpid())": "the id of the process",
    "numpy.random.seed(int(time.time()))": "a time stamp, kept in the seed of numpy.random",
    "torch.manual_seed(int(time.time()))": "a time stamp, kept in the seed of torch",
    "torch.manual_seed(os.getpid())": "kept in the seed of torch",
    "torch.seed()": "torch's global generator",
    "self.generator = torch.Generator(); self.generator.seed()": "a generator with a seed of the system's",
    # ids and stamps that are kept
    "self.pid = os.getpid()": "the id of the process",
    "self.pid = getpid()": "kept in Handler.pid",
    "self.name = f'worker-{os.getpid()}'": "kept in Handler.name",
    "self.names = {'log': [f'/tmp/{os.getpid()}.log']}": "kept in Handler.names",
    "self.thread = threading.get_native_id()": "the id of the process",
    "import psutil; self.process = psutil.Process()": "kept in Handler.process._pid",
    "global PID; PID = os.getpid()": "['PID']",
    "Handler.pid = os.getpid()": "Handler.pid",
    "pid = os.getpid(); self.say = lambda: pid": "the id of the process",
    "self.say = functools.partial(print, os.getpid())": "the id of the process",
    "self.started = time.time()": "a time stamp, kept in Handler.started",
    "self.started = int(time.time() * 1000)": "a time stamp",
    "self.started = time.monotonic()": "a time stamp",
    "self.started = time.perf_counter_ns()": "a time stamp",
    "self.started = datetime.datetime.now()": "a time stamp",
    "self.started = datetime.datetime.utcnow()": "a time stamp",
    "self.started = time.localtime()": "a time stamp",
    "self.started = time.ctime()": "a time stamp",
    "self.started = numpy.float64(time.time())": "a time stamp",
    "self.name = f'run-{time.time()}.txt'": "a time stamp",
    "self.path = pathlib.Path(time.strftime('run_%y%m%d_%H%M%S'))": "a time stamp",
    # what is outside
    "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.close()": "127.0.0.1:0",
    "s = socket.socket(); s.connect_ex(('127.0.0.1', 9)); s.close()": "a connection to 127.0.0.1:9",
    "s = socket.socket(type=socket.SOCK_DGRAM); s.sendto(b'x', ('127.0.0.1', 9)); s.close()": "127.0.0.1:9",
    "subprocess.run(['true'])": "running true",
    "os.system('true')": "running true",
    "os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)": "running /bin/true",
    "os.waitpid(os.fork() or os._exit(0), 0)": "a process of its own",
}


@pytest.mark.parametrize("body", UNIQUE)
@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")
def test_what_is_unique_is_found(load: Loader, body: str) -> None:
    """Whatever two forked workers would have alike, and two that load by themselves would not, is found and named."""
    watch, handler = load.load(body)
    found = watch.findings(handler)
    assert any(UNIQUE[body] in each for each in found), found
    for held in vars(handler.owner).values():
        if isinstance(held, tempfile.TemporaryDirectory):
            held.cleanup()
        elif hasattr(held, "close") and hasattr(held, "name"):
            held.close()


HARMLESS = [
    "pass",
    # what is left where it was
    "open('loads.log', 'a').close()",
    "fd = os.open('loads.log', os.O_WRONLY | os.O_APPEND | os.O_CREAT); os.write(fd, str(os.getpid()).encode()); os.close(fd)",
    "os.makedirs('out/one', exist_ok=True)",
    "pathlib.Path('out').mkdir(exist_ok=True)",
    "pathlib.Path('out/one').mkdir(parents=True, exist_ok=True)",
    "with tempfile.TemporaryDirectory() as folder: open(folder + '/x', 'w').close()",
    "with tempfile.NamedTemporaryFile('w') as file: file.write('x')",
    "with tempfile.TemporaryFile() as file: file.write(b'x')",
    "open('a', 'w').close(); os.remove('a')",
    "with open(os.devnull, 'w') as file: file.write('x')",
    "open(__file__).close()",
    "sqlite3.connect(':memory:').close()",
    "sqlite3.connect('file::memory:?cache=shared', uri=True).close()",
    "open('rows.db', 'a').close(); sqlite3.connect('file:rows.db?mode=ro', uri=True).close()",
    # generators that give the same wherever they are made
    "self.draw = numpy.random.default_rng(7)",
    "self.draw = numpy.random.RandomState(7); isinstance(self.draw, numpy.random.RandomState) or 1 / 0",
    "self.draw = numpy.random.RandomState(seed=7)",
    "make = lambda seed=None: numpy.random.RandomState(seed)\nself.draw = make(7)",
    "self.draws = [numpy.random.RandomState(seed) for seed in range(3)]",
    "class Mine(numpy.random.RandomState): pass\nself.draw = Mine(7)",
    "def of(seed: int | numpy.random.RandomState): pass\nself.kinds = {numpy.random.RandomState: 1}",
    "import functools\nself.draw = functools.partial(numpy.random.RandomState, 7)()",
    "self.draw = numpy.random.Generator(numpy.random.PCG64(7))",
    "self.draw = random.Random(7)",
    "self.draw = torch.Generator()",
    "self.draw = torch.Generator().manual_seed(7)",
    "random.seed(7); self.number = random.random()",
    "numpy.random.seed(7); self.number = numpy.random.rand()",
    "torch.manual_seed(7); self.number = torch.rand(1).item()",
    "random.seed(); numpy.random.seed()",
    "self.net = torch.nn.Linear(3, 3)",
    "numpy.random.rand(1, 3, 224, 224)",
    "numpy.random.rand(1, 4); numpy.random.randint(0, 1000, (1, 16)); numpy.random.normal(size=8)",
    "numpy.random.set_bit_generator(numpy.random.PCG64(7)); self.number = 1",
    # what is read and not kept
    "logging.getLogger('x').warning('pid %s', os.getpid())",
    "import psutil; psutil.Process(os.getpid()).memory_info()",
    "began = time.time(); self.lasted = time.time() - began",
    "self.lasted = time.process_time()",
    "self.today = datetime.date.today()",
    "self.size = os.path.getmtime(__file__)",
    "self.digest = '2f' * 32 + str(os.getpid()); del self.digest",
    "self.vocabulary = {str(number): number for number in range(50_000)}; os.getpid()",
    "platform.processor()",
    "import ctypes.util; ctypes.util.find_library('c')",
    "self.lock = threading.Lock(); self.local = threading.local(); self.log = logging.getLogger('x')",
]


@pytest.mark.parametrize("body", HARMLESS)
def test_what_any_number_may_do_is_not_held_against_it(load: Loader, body: str) -> None:
    """What is gone again, what is shared anyway, what gives the same everywhere, and what is only looked at, spoils nothing."""
    assert load(body) == []


def test_unpacking_an_archive_is_no_finding(load: Loader) -> None:
    """A handler that unpacks what came with it writes what any other worker would write; under a name of its own, it does not."""
    pack = "with zipfile.ZipFile('m.zip', 'a') as z: z.writestr('sub/w.bin', b'x')\nos.chmod('m.zip', 0o444)\n"
    watched = load(pack + "with zipfile.ZipFile('m.zip') as z: z.extractall('here')\nos.remove('m.zip')")
    assert watched == []
    pack = "with tarfile.open('m.tgz', 'w:gz') as t: t.add(__file__, 'sub/w.bin')\n"
    assert load(pack + "with tarfile.open('m.tgz') as t: t.extractall('here', **SAFE)\nos.remove('m.tgz')") == []
    pack = "with zipfile.ZipFile('m.zip', 'a') as z: z.writestr('sub/w.bin', b'x')\n"
    assert load(pack + "shutil.unpack_archive('m.zip', 'here')\nos.remove('m.zip')") == []
    found = load(pack + "with zipfile.ZipFile('m.zip') as z: z.extractall(f'here{os.getpid()}')\nos.remove('m.zip')")
    assert any("here" in each for each in found), found


# -- whose doing it was ------------------------------------------------------------------------------------------------

LIBRARY = """
import os, random, tempfile, uuid
import numpy
SESSION = uuid.uuid4().hex
FOLDER = tempfile.mkdtemp(dir=os.environ["ROOT"])
GENERATOR = numpy.random.default_rng()
NUMBER = random.random()
PID = os.getpid()
def make(): return uuid.uuid4().hex
def lazily(): import liblazy; return liblazy.SESSION
def draw(): return random.randint(0, 9)
def seed(): random.seed(7); numpy.random.seed(7)
TABLE = {random.randint: 1, numpy.random.rand: 2, numpy.random.RandomState: 3}
"""


def test_what_libraries_do_when_they_are_imported_is_not_the_models(load: Loader) -> None:
    """Importing a package that makes a session's id, a folder and a generator for itself says nothing of the model."""
    (load.library / "libwatch.py").write_text(LIBRARY)
    (load.library / "liblazy.py").write_text("import uuid\nSESSION = uuid.uuid4().hex\n")
    assert load(top="import libwatch") == []
    assert load("import libwatch") == []
    assert load("import libwatch; libwatch.lazily()") == []


def test_what_libraries_do_when_they_are_called_is_the_models(load: Loader) -> None:
    """What a function of a library makes unique for who calls it is found, and the caller is named."""
    (load.library / "libcalled.py").write_text(LIBRARY)
    (found,) = load("import libcalled; self.name = libcalled.make()")
    assert "libcalled.make in handler" in found
    (found,) = load("import libcalled; self.number = libcalled.draw()")
    assert "numbers of random" in found


def test_tables_of_functions_that_libraries_keep_are_of_the_real_ones(load: Loader) -> None:
    """A library that is imported meanwhile sees Python's and numpy's own functions, which it will be asked about later."""
    (load.library / "libtable.py").write_text(LIBRARY)
    load.load("import libtable")
    table = sys.modules["libtable"].TABLE  # type: ignore[attr-defined]
    assert table == {random.randint: 1, np.random.rand: 2, np.random.RandomState: 3}


def test_seeds_that_a_library_sets_for_the_model_count(load: Loader) -> None:
    """Whoever calls a library's function to seed all generators has seeded them."""
    (load.library / "libseed.py").write_text(LIBRARY)
    watch, handler = load.load("import libseed; libseed.seed(); self.numbers = random.random(), numpy.random.rand()")
    assert watch.findings(handler) == []
    states = random.getstate(), np.random.rand()
    watch.generators.settle()
    assert random.getstate() == states[0]
    random.seed(7)
    assert handler.owner.numbers[0] == random.random()  # type: ignore[attr-defined]


def test_what_the_models_own_modules_do_when_they_are_imported_is_the_models(load: Loader) -> None:
    """A folder made at the top of the handler's file, or of another one of the archive's, is found where it was made."""
    assert any("line" in each for each in load(top="FOLDER = tempfile.mkdtemp(dir=os.environ['ROOT'])"))
    (found,) = load(top="import helpers_of_mine", helpers_of_mine="import uuid\nSESSION = uuid.uuid4()\n")
    assert "helpers_of_mine.py, line 2" in found


def test_writing_bytecode_is_nobodys(load: Loader) -> None:
    """The folders and files in which Python keeps what it has compiled are no findings."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, False
    try:
        watch, handler = load.load(top="import compiled_helper", compiled_helper="X = 1\n")
    finally:
        sys.dont_write_bytecode = before
    assert watch.findings(handler) == []
    assert list(load.root.glob("model*/__pycache__/compiled_helper*"))


def test_what_a_thread_of_the_models_does_is_found(load: Loader) -> None:
    """A thread that has ended by then has made what it made, whether the model's code is on its stack or a library's alone."""
    run = "thread = threading.Thread(target={}); thread.start(); thread.join()"
    assert "random bytes" in load(run.format("lambda: uuid.uuid4()"))[0]
    assert "random bytes" in load(run.format("uuid.uuid4"))[0]


def test_what_the_model_was_told_is_no_stamp_of_its_own(tmp_path: Path, load: Loader) -> None:
    """A manifest that was written a second ago, and a version that says when, do not make a model unique."""
    body = "self.manifest = {'createdOn': time.strftime('%d/%m/%Y %H:%M:%S')}"
    watch, handler = load.load(body)
    assert watch.findings(handler) != []
    watch._given = [handler.owner.manifest["createdOn"]]  # type: ignore[attr-defined]
    assert watch.findings(handler) == []


# -- afterwards --------------------------------------------------------------------------------------------------------


def attributes() -> dict[str, Any]:
    owners = (os, random, tempfile, uuid, threading, np.random, torch, random.Random, tempfile._RandomNameSequence)  # type: ignore[attr-defined]
    return {
        f"{owner.__name__}.{name}": each for owner in owners for name, each in vars(owner).items() if callable(each)
    }


@pytest.mark.parametrize("body", ["pass", "raise ValueError('no weights')", "raise KeyboardInterrupt"])
def test_every_function_is_what_it_was(load: Loader, body: str) -> None:
    """After loading, and after loading that raised, no function is another one than before."""
    before = attributes()
    try:
        load.load(body)
    except (ValueError, KeyboardInterrupt):
        pass
    assert attributes() == before
    assert audit._looking == []


def test_who_imported_a_function_meanwhile_has_the_real_one(load: Loader) -> None:
    """``from os import getpid`` at the top of a handler's file is Python's own function, once the model is loaded."""
    _, handler = load.load()
    assert vars(handler.module)["getpid"] is os.getpid
    assert vars(handler.module)["randint"] == random.randint


def test_what_a_handler_replaces_stays(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that the model has put in another's place is left there."""
    monkeypatch.setattr(os, "getrandom", os.getrandom)
    _, handler = load.load("os.getrandom = self.handle")
    assert os.getrandom == handler.owner.handle  # type: ignore[attr-defined]


def test_a_substitute_that_was_kept_does_as_the_original(load: Loader) -> None:
    """One that a handler holds in an attribute goes on to work, and notes nothing any more."""
    watch, handler = load.load("self.pid, self.draw = os.getpid, random.random; random.seed(7)")
    assert handler.owner.pid() == os.getpid()  # type: ignore[attr-defined]
    assert 0 <= handler.owner.draw() < 1  # type: ignore[attr-defined]
    assert watch.findings(handler) == []


def test_the_hook_that_stays_does_nothing(load: Loader, tmp_path: Path) -> None:
    """Once the model is loaded, what the process does is not looked at, and nothing is found later."""
    watch, handler = load.load()
    (tmp_path / "later").write_text("x")
    uuid.uuid4()
    assert watch.findings(handler) == []


def test_an_object_that_cannot_be_looked_into_counts_as_a_finding(load: Loader) -> None:
    """Where a handler holds what raises when it is looked at, the model is rather not shared than shared wrongly."""
    body = "class Odd(pathlib.PurePosixPath):\n    def __str__(self): raise ZeroDivisionError\nself.odd = Odd('a')"
    (found,) = load(body)
    assert "could not be looked into" in found


def test_objects_that_do_not_like_questions_are_not_asked(load: Loader) -> None:
    """Proxies, lazy objects and properties run none of their code while what a handler holds is looked through."""
    body = (
        "class Lazy:\n"
        "    __class__ = property(lambda self: 1 / 0)\n"
        "    name = property(lambda self: 1 / 0)\n"
        "    def __getattr__(self, name): raise ZeroDivisionError\n"
        "    def __getattribute__(self, name): raise ZeroDivisionError\n"
        "    def __eq__(self, other): raise ZeroDivisionError\n"
        "    def __hash__(self): raise ZeroDivisionError\n"
        "class Many(dict):\n"
        "    def items(self): raise ZeroDivisionError\n"
        "    def __len__(self): raise ZeroDivisionError\n"
        "self.lazy, self.many = Lazy(), Many(pid=Lazy())\n"
        "self.ring = [self]; self.ring.append(self.ring)\n"
    )
    assert load(body) == []


def test_what_is_large_is_not_gone_through(load: Loader) -> None:
    """A vocabulary and a deep tree of objects cost no time: there are bounds."""
    body = (
        "self.words = {str(n): n for n in range(200_000)}\n"
        "self.tree = None\n"
        "for n in range(200_000): self.tree = {'next': self.tree, 'number': n}\n"
        "self.text = 'x' * 10_000_000\n"
    )
    watch, handler = load.load(body)
    began = os.times().user
    assert watch.findings(handler) == []
    assert os.times().user - began < 0.5
    handler.owner.tree = None  # type: ignore[attr-defined]


def test_substitutes_nest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that stand in for one function are taken away in the order that leaves the original."""
    module = ModuleType("some")
    vars(module)["f"] = original = lambda: 1

    def wrapping(inner: Callable[[], int]) -> Callable[[], int]:
        return lambda: inner() + 1

    first, second = Substitutes(), Substitutes()
    first.put(module, "f", wrapping)
    second.put(module, "f", wrapping)
    assert vars(module)["f"]() == 3
    second.undo()
    first.undo()
    assert vars(module)["f"] is original
    first.put(module, "missing", wrapping)
    assert "missing" not in vars(module)


@pytest.fixture(autouse=True)
def no_rest(tmp_path: Path) -> Iterator[None]:
    """What handlers have made is gone after each test."""
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)
