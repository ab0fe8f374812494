"""The trust rule: what loading a model may leave behind in a process that is forked, and what it may not."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import mmap
import os
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torchmgmt.worker import fitness  # noqa: E402 - it imports torch

Make = Callable[[Path], contextlib.AbstractContextManager[object]]

pytestmark = pytest.mark.skipif(not fitness.can_tell(), reason="only Linux shows what a process has open")


def found_with(make: Make, file: Path) -> list[str]:
    """Return what is found while what ``make`` makes exists."""
    before = fitness.marks()
    with make(file):
        return fitness.findings(before, fitness.marks_after(before))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(256)) * 64)
    return path


@contextlib.contextmanager
def a_thread(_file: Path) -> Iterator[None]:
    over = threading.Event()
    thread = threading.Thread(target=over.wait, name="prefetcher")
    thread.start()
    yield
    over.set()
    thread.join()


@contextlib.contextmanager
def a_timer(_file: Path) -> Iterator[None]:
    timer = threading.Timer(1000, lambda: None)
    timer.start()
    yield
    timer.cancel()
    timer.join()


@contextlib.contextmanager
def a_busy_pool(_file: Path) -> Iterator[None]:
    with ThreadPoolExecutor(1, "loader") as pool:
        pool.submit(int).result()
        yield


@contextlib.contextmanager
def a_pipe(_file: Path) -> Iterator[None]:
    for fd in (fds := os.pipe()):
        assert fd
    yield
    for fd in fds:
        os.close(fd)


@contextlib.contextmanager
def an_eventfd(_file: Path) -> Iterator[None]:
    fd = os.eventfd(0)
    yield
    os.close(fd)


@contextlib.contextmanager
def a_memory_file(_file: Path) -> Iterator[None]:
    fd = os.memfd_create("cache")
    yield
    os.close(fd)


@contextlib.contextmanager
def shared_memory(_file: Path) -> Iterator[None]:
    with mmap.mmap(-1, mmap.PAGESIZE):
        yield


@contextlib.contextmanager
def a_writable_mapping(file: Path) -> Iterator[None]:
    array = np.memmap(file, dtype=np.uint8, mode="r+")
    yield
    del array


@contextlib.contextmanager
def a_tensor_in_shared_memory(_file: Path) -> Iterator[None]:
    tensor = torch.zeros(4096).share_memory_()
    yield
    del tensor


@contextlib.contextmanager
def a_database(file: Path) -> Iterator[None]:
    connection = sqlite3.connect(file.with_suffix(".db"))
    connection.execute("CREATE TABLE rows (name)")
    yield
    connection.close()


@contextlib.contextmanager
def a_read_only_database(file: Path) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(file.with_suffix(".db"))) as connection:
        connection.execute("CREATE TABLE rows (name)")
    connection = sqlite3.connect(f"file:{file.with_suffix('.db')}?mode=ro", uri=True)
    connection.execute("SELECT * FROM rows")
    yield
    connection.close()


@contextlib.contextmanager
def a_child(_file: Path) -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        yield
        process.stdin.close()


@contextlib.contextmanager
def a_locked_file(file: Path) -> Iterator[None]:
    with file.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def a_file_beside_its_mapping(file: Path) -> Iterator[None]:
    with file.open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ):
        yield


@contextlib.contextmanager
def an_event_loop(_file: Path) -> Iterator[None]:
    loop = asyncio.new_event_loop()
    yield
    loop.close()


@contextlib.contextmanager
def a_temporary_file(_file: Path) -> Iterator[None]:
    with tempfile.TemporaryFile():
        yield


@contextlib.contextmanager
def a_device(_file: Path) -> Iterator[None]:
    with Path("/dev/full").open("wb"):
        yield


SHARED: list[tuple[Make, str]] = [
    (a_thread, "the thread 'prefetcher'"),
    (a_timer, "the thread"),
    (a_busy_pool, "the thread 'loader_0'"),
    (lambda _file: socket.socket(), "an open socket"),
    (a_pipe, "an open pipe"),
    (an_eventfd, "an open eventfd"),
    (lambda _file: select.epoll(), "an open eventpoll"),
    (an_event_loop, "an open eventpoll"),
    (a_memory_file, "memfd:cache"),
    (shared_memory, "memory shared for writing"),
    (a_writable_mapping, "memory shared for writing"),
    (a_tensor_in_shared_memory, "shared for writing"),
    (lambda file: file.open("rb"), "weights.bin, in which they would move each other's position"),
    (lambda file: file.open("r+b"), "weights.bin, open for writing"),
    (lambda file: file.with_suffix(".log").open("a"), "weights.log, open for writing"),
    (a_temporary_file, "open for writing"),
    (a_database, "weights.db, open for writing"),
    (a_read_only_database, "weights.db"),
    (a_locked_file, "weights.bin"),
    (a_file_beside_its_mapping, "weights.bin"),
    (a_child, "the child process"),
    (a_device, "the open device /dev/full"),
]


@pytest.mark.parametrize(
    "make, words", SHARED, ids=[str(index) + words[:24] for index, (_, words) in enumerate(SHARED)]
)
def test_what_two_must_not_share_is_found(file: Path, make: Make, words: str) -> None:
    """Whatever a fork would have two workers share is found, and named so that its author knows what is meant."""
    found = found_with(make, file)
    assert any(words in finding for finding in found), found


@contextlib.contextmanager
def a_numpy_memmap(file: Path) -> Iterator[None]:
    array = np.memmap(file, dtype=np.uint8, mode="r")
    assert array[3] == 3
    yield
    del array


@contextlib.contextmanager
def a_mapped_array_file(file: Path) -> Iterator[None]:
    np.save(file.with_suffix(".npy"), np.arange(4096))
    array = np.load(file.with_suffix(".npy"), mmap_mode="r")
    assert array[3] == 3
    yield
    del array


@contextlib.contextmanager
def a_copy_on_write_mapping(file: Path) -> Iterator[None]:
    array = np.memmap(file, dtype=np.uint8, mode="c")
    array[0] = 7
    yield
    del array


@contextlib.contextmanager
def a_mapping_of_a_file_that_was_read(file: Path) -> Iterator[None]:
    with file.open("rb", buffering=0) as source:
        assert source.read(100)
        mapping = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
    with mapping:
        yield


@contextlib.contextmanager
def mapped_weights(file: Path) -> Iterator[None]:
    path = file.with_suffix(".pt")
    torch.save({"weight": torch.arange(4096)}, path)
    state = torch.load(path, mmap=True, weights_only=True)
    assert state["weight"][3] == 3
    yield
    del state


@contextlib.contextmanager
def a_pool_that_has_not_begun(_file: Path) -> Iterator[None]:
    with ThreadPoolExecutor(4):
        yield


@contextlib.contextmanager
def a_thread_that_is_over(_file: Path) -> Iterator[None]:
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
    yield


@contextlib.contextmanager
def a_folder(file: Path) -> Iterator[None]:
    fd = os.open(file.parent, os.O_RDONLY)
    yield
    os.close(fd)


@contextlib.contextmanager
def a_database_in_memory(_file: Path) -> Iterator[None]:
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE rows (name)")
    yield
    connection.close()


@contextlib.contextmanager
def nowhere(_file: Path) -> Iterator[None]:
    with Path(os.devnull).open("w"), Path("/dev/urandom").open("rb"):
        yield


def nothing(_file: Path) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


HARMLESS: list[Make] = [
    a_numpy_memmap,
    a_mapped_array_file,
    a_copy_on_write_mapping,
    a_mapping_of_a_file_that_was_read,
    mapped_weights,
    a_pool_that_has_not_begun,
    a_thread_that_is_over,
    a_folder,
    a_database_in_memory,
    nowhere,
    nothing,
]


@pytest.mark.parametrize("make", HARMLESS)
def test_what_forks_do_not_harm_is_not_held_against_it(file: Path, make: Make) -> None:
    """Read-only mappings, what is over or has not begun, and what belongs to nobody spoil nothing."""
    assert found_with(make, file) == []


def test_what_was_there_before_is_not_held_against_it(file: Path) -> None:
    """A descriptor or a thread that the process had before the model was loaded is not the model's."""
    with file.open("r+b"), socket.socket(), a_thread(file):
        assert found_with(nothing, file) == []


def test_a_descriptor_that_was_replaced_is_found(file: Path) -> None:
    """The same number is not the same thing: a socket in the place of another one is found."""
    first = socket.socket()
    number = first.fileno()
    before = fitness.marks()
    with socket.socket() as second:
        os.dup2(second.fileno(), number)
        found = fitness.findings(before, fitness.marks())
    first.close()
    assert any(f"descriptor {number}" in finding for finding in found), found


class _Lazy:
    """What lazy modules and proxies do: they import, or raise, when asked for their class."""

    @property
    def __class__(self) -> type:  # type: ignore[override]
        raise ReferenceError


def test_objects_that_do_not_like_questions_are_not_asked(file: Path) -> None:
    """Looking for who holds a mapped file asks no object of the handler's anything."""
    lazy = _Lazy()
    assert found_with(a_numpy_memmap, file) == []
    assert lazy is not None


# -- accelerators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda", "xpu", "mtia"])
def test_a_context_on_an_accelerator_is_seen(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A backend of torch that says that it is initialised is named."""
    assert fitness.accelerators_in_use() == []
    monkeypatch.setattr(torch, name, SimpleNamespace(is_initialized=lambda: True))
    assert fitness.accelerators_in_use() == [name]


def test_a_backend_that_cannot_tell_is_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch without a backend, or with one that has no such function, is no error."""
    monkeypatch.setattr(torch, "cuda", SimpleNamespace())
    monkeypatch.delattr(torch, "mtia", raising=False)
    assert fitness.accelerators_in_use() == []


# -- the number of threads ---------------------------------------------------------------------------------------------


def test_a_wish_for_threads_is_noted_and_not_done() -> None:
    """While a template loads nothing changes the number of its threads; what was wished for is known afterwards."""
    before = torch.get_num_threads()
    with fitness.postponed_thread_settings() as wanted:
        torch.set_num_threads(before + 3)
        torch.set_num_threads(np.int64(before + 2))
        assert torch.get_num_threads() == before
    assert wanted == [before + 3, before + 2]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("wrong", ["4", None, 1.5, 0, -1])
def test_a_wrong_wish_for_threads_raises_what_torch_raises(wrong: Any) -> None:
    """A handler's mistake is told to it at once, in torch's own words."""
    with pytest.raises((TypeError, RuntimeError)) as theirs:
        torch.set_num_threads(wrong)
    with fitness.postponed_thread_settings() as wanted, pytest.raises(type(theirs.value)):
        torch.set_num_threads(wrong)
    assert wanted == []


def test_a_function_that_was_imported_by_its_name_works_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """``from torch import set_num_threads`` while loading gives a function that does something afterwards."""
    done: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", done.append)  # torch's own would set it for the other tests, too
    with fitness.postponed_thread_settings() as wanted:
        imported = torch.set_num_threads
        imported(5)
    imported(7)
    assert (wanted, done) == ([5], [7])


def test_the_setting_is_torchs_own_again_after_an_error() -> None:
    """Loading that raises leaves no substitute behind."""
    own = torch.set_num_threads
    with pytest.raises(ValueError, match="weights"), fitness.postponed_thread_settings():
        raise ValueError("weights")
    assert torch.set_num_threads is own


def test_signals_are_not_its_business() -> None:
    """Looking changes nothing in the process: handlers and masks stay as they are."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    fitness.marks()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
