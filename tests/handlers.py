"""Models to test with: the sources of small handlers, folders made of them, and ways to wait for what workers do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import attrs
import psutil
import pytest

from torchmgmt import Model, ModelManager, ProcessBackend
from torchmgmt.archive.shelves import PrivateShelf

T = TypeVar("T")

PATIENCE_S = 20.0
"""How long a test waits for something that should be there at once; only a failure takes that long."""

TOOLS = '''
import os, signal, sys, threading, time

def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.002)

def note(path, text="x"):
    """Append one line; a single small write is atomic, so that workers may share the file."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, (str(text) + "\\n").encode())
    os.close(fd)

def fail(error):
    raise error
'''

EVAL = (
    TOOLS
    + """
def handle(data, context):
    if data is None:
        return None
    return [eval(row["body"], {**globals(), "data": data, "context": context}) for row in data]
"""
)
"""Answers each request with the value of its body, which is a Python expression that is evaluated in the worker."""

ECHO = """
def handle(data, context):
    return data and [row["body"] for row in data]
"""

SIZES = """
def handle(data, context):
    return data and [(row["body"], len(data), position) for position, row in enumerate(data)]
"""
"""Answers with the body, the size of the batch that it was in, and its position there."""


def write_folder(folder: Path, source: str, *, config: str | None = None, **files: str) -> Path:
    """Make a plain model folder with ``handler.py``, a configuration, and other Python files by their stems."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "handler.py").write_text(source)
    if config is not None:
        (folder / "model-config.yaml").write_text(config)
    for stem, text in files.items():
        (folder / f"{stem}.py").write_text(text)
    return folder


def write_manifest(folder: Path, **model: object) -> Path:
    """Give a plain folder the manifest that an archiver would have put into it."""
    (folder / "MAR-INF").mkdir(exist_ok=True)
    manifest = {"runtime": "python", "model": model, "archiverVersion": "0.12.0"}
    (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    return folder


def until(condition: Callable[[], T], what: str = "it", timeout_s: float = PATIENCE_S) -> T:
    """Return what ``condition`` returns as soon as that is true; fail the test if it never is."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not come true within {timeout_s:g} s")
        time.sleep(0.002)
    return value


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody waited for yet has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@attrs.frozen
class Gate:
    """Something that a worker waits for: ``wait_for(gate.path)`` in a handler, :meth:`open` in a test."""

    file: Path

    @property
    def path(self) -> str:
        return str(self.file)

    def open(self) -> None:
        self.file.touch()

    @property
    def expression(self) -> str:
        """A request to EVAL that notes its worker's pid and waits here; it answers None."""
        return f"note({str(self._visitors)!r}, os.getpid()) or wait_for({self.path!r})"

    def reached(self) -> list[int]:
        """The pids of the workers that came here, in that order: their requests have begun."""
        return [int(line) for line in lines_of(self._visitors)]

    @property
    def _visitors(self) -> Path:
        return self.file.with_name(self.file.name + "-reached")


@attrs.define
class Deployer:
    """Writes a handler to a folder of its own and registers that."""

    root: Path
    manager: ModelManager
    count: int = 0
    options: Mapping[str, Any] = attrs.field(factory=dict)
    """What every registration is given unless it says otherwise."""

    def __call__(
        self,
        source: str = EVAL,
        *,
        config: str | None = None,
        model_name: str = "m",
        files: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Model:
        self.count += 1
        folder = write_folder(self.root / f"model{self.count}", source, config=config, **(files or {}))
        options = {"handler": "handler.py", "max_batch_delay": 0, **self.options, **options}
        return self.manager.register(folder, model_name=model_name, **options)


@pytest.fixture
def manager(backend: ProcessBackend) -> Iterator[ModelManager]:
    """A manager whose workers are forked by the session's torch-only process."""
    with ModelManager(backend=backend) as manager:
        yield manager


@pytest.fixture
def deploy(tmp_path: Path, manager: ModelManager) -> Deployer:
    """Registers the source of a handler with ``manager``; requests do not wait for others unless told to."""
    return Deployer(tmp_path, manager)


@pytest.fixture
def swept() -> Iterator[None]:
    """Has what killed programs left removed after the test, as the next program does."""
    yield
    shelf = PrivateShelf()
    shelf.take("", Path.mkdir, lambda: None).give_back()


@pytest.fixture
def gate(tmp_path: Path, manager: ModelManager) -> Iterator[Gate]:
    """A gate that is open before ``manager`` closes, so that nothing waits at it for ever."""
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


@attrs.frozen
class Program:
    """How a program of its own ended."""

    returncode: int
    stdout: str
    stderr: str


def run_program(source: str, *args: object, timeout_s: float = 45, env: Mapping[str, str] | None = None) -> Program:
    """Run a program as ``python - args``, that is without a file and without a ``__main__`` guard."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-", *map(str, args)],
        input=source,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        cwd=Path(__file__).resolve().parent.parent,
        env={**os.environ, **(env or {})},
    )
    return Program(done.returncode, done.stdout, done.stderr)


LIGHT_TORCH = {
    "__init__.py": """
import random
class OutOfMemoryError(RuntimeError): pass
class Generator: pass
class nn:
    class Module: pass
class Tensor:
    def sum(self): return self
def ones(*shape): return Tensor()
def set_num_threads(count): pass
class default_generator:
    seed = staticmethod(random.seed)
    initial_seed = staticmethod(int)
""",
    "multiprocessing.py": "from multiprocessing import get_context\n",
}


@pytest.fixture
def light_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have torch-only processes that a test starts import next to nothing as torch, in place of 2 s worth of it.

    For tests about how processes begin and end, with handlers that compute nothing.
    """
    package = tmp_path / "light" / "torch"
    package.mkdir(parents=True)
    for name, text in LIGHT_TORCH.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    return package.parent
