"""The state file: one holder, whole or not at all, and a disk that fails does not stop anything."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import torchmgmt
from torchmgmt.errors import InvalidArgument, InvalidStateFile, StateFileInUse
from torchmgmt.records import ModelKey, Scale
from torchmgmt.state import DesiredState, StoredModel, StoredVersion, to_json
from torchmgmt.state_file import MOST_LINES_BYTES, StateFile, StateKeeper


def state(*names: str) -> DesiredState:
    versions = [StoredVersion(key=ModelKey(name, "1"), url=f"{name}.mar", scale=Scale(1, 1)) for name in names]
    return DesiredState(tuple(StoredModel("1", (version,)) for version in versions))


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(torchmgmt.__file__).parent.parent)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, env=environment, check=False)


def test_what_is_written_is_there_for_the_next_one(tmp_path: Path) -> None:
    """The folder is made, nobody else may read the file, nothing but the lock lies beside it."""
    path = tmp_path / "a" / "b" / "state.json"
    file = StateFile(path)
    assert file.read() is None
    file.write(state("m"))
    file.write(state("m", "n"))
    file.close()
    again = StateFile(path)
    assert again.read() == state("m", "n")
    again.close()
    assert path.stat().st_mode & 0o777 == 0o600
    assert sorted(each.name for each in path.parent.iterdir()) == ["state.json", "state.json.lock"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """What it points to is replaced."""
    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to(target)
    file = StateFile(link)
    file.write(state("m"))
    file.close()
    assert link.is_symlink()
    assert target.read_bytes() == to_json(state("m"))


@pytest.mark.parametrize("path", ["", 1, "a\0b", "."])
def test_what_is_no_file_is_refused(path: object) -> None:
    """With the reason, before anything is made."""
    with pytest.raises(InvalidArgument, match="state_file"):
        StateFile(path)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [b"", b"{", b'{"format": 99, "models": []}', b"\xff"])
def test_what_cannot_be_read_is_left_alone(tmp_path: Path, text: bytes) -> None:
    """The error names the file, and the file is what it was."""
    path = tmp_path / "state.json"
    path.write_bytes(text)
    file = StateFile(path)
    with pytest.raises(InvalidStateFile, match="left untouched"):
        file.read()
    file.close()
    assert path.read_bytes() == text


def test_two_cannot_use_one_file(tmp_path: Path) -> None:
    """Here and in another process; the error says who has it. Closing, or the end of the process, lets the next one."""
    path = tmp_path / "state.json"
    use = "import sys\nfrom torchmgmt.state_file import StateFile\nfile = StateFile(sys.argv[1])"
    file = StateFile(path)
    with pytest.raises(StateFileInUse, match=f"in use by process {os.getpid()};"):
        StateFile(path)
    assert f"in use by process {os.getpid()};" in python(use, path).stderr
    file.close()
    assert python(use, path).returncode == 0
    StateFile(path).close()


def test_a_forked_copy_does_not_hold_it(tmp_path: Path) -> None:
    """What the holder forks may live on after it."""
    code = """
import os, sys
from torchmgmt.state_file import StateFile
file = StateFile(sys.argv[1])
read, write = os.pipe()
if os.fork() == 0:
    os.close(write)
    os.read(read, 1)  # until the parent is done
    os._exit(0)
file.close()
StateFile(sys.argv[1]).close()
os.close(write)
os.wait()
print("free")
"""
    assert python(code, tmp_path / "state.json").stdout == "free\n"


KILLED = """
import json, os, signal, sys
from torchmgmt import state_file
from torchmgmt.state import from_json, to_json

path, old, new = sys.argv[1], *(from_json(text.encode()) for text in sys.argv[2:4])
is_line = sys.argv[4] == "line"

def write_and_die(step):
    whole = os.write
    os.write = lambda fd, text: whole(fd, text[: max(1, len(text) // 3)])  # as a disk that takes it bit by bit
    file, left = state_file.StateFile(path), step
    if is_line:
        file.write(old)
    def at_line(frame, event, _arg):
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return at_line
    sys.settrace(lambda frame, *_: at_line if frame.f_code.co_filename == state_file.__file__ else None)
    file.write(new)
    sys.settrace(None)
    os._exit(0)

found, step = [], 0
while True:
    step += 1
    before = state_file.StateFile(path)
    before.write(old)
    before.close()
    child = os.fork()
    if child == 0:
        write_and_die(step)
    _, status = os.waitpid(child, 0)
    after = state_file.StateFile(path)
    found.append({to_json(old): "old", to_json(new): "new"}[to_json(after.read())])
    after.write(old)  # what was left over is in nobody's way
    after.close()
    if not os.WIFSIGNALED(status):
        break
print(json.dumps([found, os.listdir(os.path.dirname(path))]))
"""


@pytest.mark.parametrize("how", ["whole", "line"])
def test_a_kill_at_any_step_leaves_the_old_state_or_the_new_one(tmp_path: Path, how: str) -> None:
    """A real process is killed with SIGKILL before each line of the write, of the whole state or of a change: first the
    old state is there, then the new."""
    old, new = to_json(state("m")).decode(), to_json(state("m", "n")).decode()
    done = python(KILLED, tmp_path / "s.json", old, new, how)
    assert done.returncode == 0, done.stderr
    found, left = json.loads(done.stdout)
    assert found == sorted(found, reverse=True)
    assert found.count("old") > 10
    assert found.count("new") > 3
    assert sorted(left) == ["s.json", "s.json.lock"]


def added_by(file: StateFile, wanted: DesiredState) -> int:
    """How many bytes the file is longer after a write."""
    before = file.path.stat().st_size
    file.write(wanted)
    return file.path.stat().st_size - before


def test_a_change_writes_itself_and_not_all_the_rest(tmp_path: Path) -> None:
    """What a change adds to the file does not depend on how many versions there are, and nobody else is rewritten."""
    added = []
    for count in (1, 500):
        names = [f"m{number:03}" for number in range(count)]
        file = StateFile(tmp_path / f"{count}.json")
        file.write(state(*names))
        inode = file.path.stat().st_ino
        more = state(*names, "new!")
        added.append((added_by(file, more), added_by(file, state(*names))))
        assert file.path.stat().st_ino == inode
        assert file.read() == state(*names)
        file.close()
    assert added[0] == added[1]


def test_changes_do_not_pile_up(tmp_path: Path) -> None:
    """When they are longer than the state that they change, it is written whole again."""
    file = StateFile(tmp_path / "s.json")
    sizes = []
    for number in range(1500):
        file.write(state("m", f"n{number % 2}"))
        sizes.append(file.path.stat().st_size)
    assert file.read() == state("m", "n1")
    file.close()
    assert max(sizes) <= MOST_LINES_BYTES + len(to_json(state("m", "n1")))
    assert sum(after < before for before, after in itertools.pairwise(sizes)) in range(2, 20)


@pytest.mark.parametrize("rest", [b'{"mod', b'{"models": [], "removed": []}', b"\0" * 40 + b"\n"])
def test_half_a_change_does_not_count(tmp_path: Path, rest: bytes) -> None:
    """What somebody was killed over, and so nobody was told of, is read over, and is gone after the next write."""
    path = tmp_path / "s.json"
    with contextlib.closing(StateFile(path)) as file:
        file.write(state("m"))
        file.write(state("m", "n"))
    path.write_bytes(path.read_bytes() + rest)
    with contextlib.closing(StateFile(path)) as file:
        assert file.read() == state("m", "n")
        file.write(state("n"))
        assert file.read() == state("n")
        assert path.read_bytes() == to_json(state("n"))


def test_a_file_that_was_cleaned_away_or_changed_is_written_whole(tmp_path: Path) -> None:
    """A line is added only to what this program has written there."""
    path = tmp_path / "s.json"
    with contextlib.closing(StateFile(path)) as file:
        file.write(state("m"))
        path.unlink()
        file.write(state("m", "n"))
        assert path.read_bytes() == to_json(state("m", "n"))
        path.write_text("something else")
        file.write(state("m"))
        assert path.read_bytes() == to_json(state("m"))


def test_a_line_that_failed_is_followed_by_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk may have taken half of a line: no other is written after it."""
    path = tmp_path / "s.json"

    def half(fd: int, text: memoryview) -> int:
        whole(fd, text[:7])
        raise OSError(28, "No space left on device")

    whole = os.write
    with contextlib.closing(StateFile(path)) as file:
        file.write(state("m"))
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space"):
            file.write(state("m", "n"))
        monkeypatch.undo()
        assert file.read() == state("m")
        file.write(state("m", "n"))
        assert path.read_bytes() == to_json(state("m", "n"))


class Disk:
    """A state file that counts, waits and fails as told."""

    path = Path("somewhere")

    def __init__(self) -> None:
        self.written: list[DesiredState] = []
        self.fails = False
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.may_end.set()

    def read(self) -> DesiredState | None:
        return None

    def write(self, wanted: DesiredState) -> None:
        self.begun.set()
        assert self.may_end.wait(20)
        if self.fails:
            raise OSError(28, "No space left on device")
        self.written.append(wanted)

    def close(self) -> None:
        pass


def test_a_burst_is_written_at_once() -> None:
    """Changes that come while one is written share the next write; each call returns only when its own is written."""
    disk = Disk()
    keeper = StateKeeper(disk)  # type: ignore[arg-type]
    lock = threading.Lock()
    names: list[str] = []
    missed: list[str] = []

    def change(name: str) -> None:
        with lock:
            names.append(name)
        keeper.record(lambda: state(*names))
        if name not in [model.name for model in disk.written[-1].models]:
            missed.append(name)

    waiting = threading.Semaphore(0)

    class Counted(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            waiting.release()
            return super().wait(timeout)

    keeper._changed = Counted(keeper._lock)
    disk.may_end.clear()
    threads = [threading.Thread(target=change, args=(f"m{number}",)) for number in range(20)]
    threads[0].start()
    assert disk.begun.wait(20)
    for thread in threads[1:]:
        thread.start()
    for _ in threads[1:]:
        assert waiting.acquire(timeout=20)
    disk.may_end.set()
    for thread in threads:
        thread.join(20)
    assert missed == []
    assert len(disk.written) == 2


def test_a_disk_that_fails_is_told_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """No call fails for it, and the next change writes everything."""
    disk = Disk()
    keeper = StateKeeper(disk)  # type: ignore[arg-type]
    disk.fails = True
    keeper.record(lambda: state("a"))
    keeper.record(lambda: state("a", "b"))
    (told,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "somewhere could not be written: No space left on device" in told.getMessage()
    disk.fails = False
    keeper.record(lambda: state("a", "b"))
    assert disk.written == [state("a", "b")]
    keeper.record(lambda: state("a", "b"))
    assert len(disk.written) == 1, "nothing has changed"


def test_nothing_is_written_after_closing() -> None:
    """A change that comes too late is none."""
    disk = Disk()
    keeper = StateKeeper(disk)  # type: ignore[arg-type]
    keeper.close()
    keeper.record(lambda: state("a"))
    assert disk.written == []


def test_a_disk_that_hangs_holds_up_nobody_who_closes(caplog: pytest.LogCaptureFixture) -> None:
    """It is waited for no longer than said; those who wait to have theirs written go on, and the file is let go of at last."""
    closed = threading.Event()
    disk = Disk()
    disk.close = closed.set  # type: ignore[method-assign]
    keeper = StateKeeper(disk)  # type: ignore[arg-type]
    disk.may_end.clear()
    threads = [threading.Thread(target=keeper.record, args=(lambda: state("a"),)) for _ in range(2)]
    for thread in threads:
        thread.start()
        assert disk.begun.wait(20)
    keeper.close(timeout=0.05)
    assert "is still being written after 0.05 s" in caplog.text
    assert not closed.is_set(), "its lock is still that of who writes"
    threads[1].join(20)
    assert not threads[1].is_alive()
    disk.may_end.set()
    threads[0].join(20)
    assert closed.is_set()
    assert len(disk.written) == 1
