"""Handlers that truncate the memory which they share with the program, and systems that deny the calls it is made with."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.denied import deny, needs_seccomp
from tests.handlers import EVAL, is_gone, run_program, until, write_folder

TRUNCATING = '''
import os, pathlib

def truncate_all():
    """Truncate whatever file of ours this process has open or mapped; return what was done, and what was refused."""
    done, refused = [], []
    for folder in ("/proc/self/fd", "/proc/self/map_files"):
        for path in pathlib.Path(folder).iterdir():
            try:
                target = os.readlink(path)
                if "torchmgmt" not in target or target.endswith(".py"):
                    continue
                os.truncate(path, 0)
                done.append(target)
            except OSError as error:
                refused.append(type(error).__name__)
    return len(done), len(refused)

def handle(data, context):
    if data is None:
        return None
    return [truncate_all() if row["body"] == "truncate" else row["body"] for row in data]
'''

ASKING = """
import sys
from torchmgmt import ModelManager

def ask():
    with ModelManager() as manager:
        model = manager.register(sys.argv[1], model_name="m", handler="handler.py", batch_size=2)
        large = bytes(1 << 20)
        for _ in range(4):
            assert model.predict(large) == large
        done, refused = model.predict("truncate")
        for _ in range(4):
            assert model.predict(large) == large
        # Its end is told of by the page, too.
        assert [future.result(30) for future in [model.submit(n) for n in range(9)]] == list(range(9))
        print(done)

ask()
"""


@needs_seccomp
@pytest.mark.usefixtures("light_torch")
@pytest.mark.parametrize("calls", [[], ["memfd_create"]], ids=["in memory", "on disk"])
def test_a_handler_that_truncates_shared_memory_harms_nobody(tmp_path: Path, calls: list[str]) -> None:
    """What can be truncated is mapped by nobody: the program goes on, and so does the model."""
    folder = write_folder(tmp_path / "m", TRUNCATING)
    done = run_program(deny(calls, errno.ENOSYS) + ASKING, folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert (int(done.stdout) > 0) is bool(calls)


LIVE = """
import os, signal
import torch
from torchmgmt import ModelManager

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1 << 16))

    def forward(self, batch):
        return batch + self.weight.sum()

with ModelManager() as manager:
    model = manager.register(Net(), model_name="m", initial_workers=2, batch_size=2)
    item = torch.zeros(1 << 18)
    for _ in range(3):
        assert model.predict(item).eq(1 << 16).all()
    first = {worker.pid for worker in model.describe().workers}
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    while first & {worker.pid for worker in model.describe().workers}:
        pass
    assert model.predict(item, timeout=30).eq(1 << 16).all()
    model.unregister()
print("right")
"""


@needs_seccomp
@pytest.mark.parametrize(
    "calls, error",
    [
        (["memfd_create"], errno.EPERM),
        (["pidfd_open", "pidfd_send_signal"], errno.ENOSYS),
        (["pidfd_send_signal"], errno.EPERM),
    ],
)
def test_what_a_container_denies_is_done_in_another_way(calls: list[str], error: int) -> None:
    """A live object answers, large tensors travel, workers that die are replaced, and all of them end."""
    done = run_program(deny(calls, error) + LIVE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "right\n", "")


DYING = """
import json, sys, threading
import psutil
from torchmgmt import ModelManager
manager = ModelManager()
model = manager.register(sys.argv[1], model_name="m", handler="handler.py", initial_workers=2)
futures = [model.submit("threading.Event().wait()") for _ in range(2)]
while not all(future.running() for future in futures):
    pass
print(json.dumps([process.pid for process in psutil.Process().children(recursive=True)]), flush=True)
threading.Event().wait()
"""


@needs_seccomp
@pytest.mark.usefixtures("light_torch", "swept")
def test_without_pidfds_no_process_outlives_the_program(tmp_path: Path) -> None:
    """A program that is killed takes its busy workers with it, though nobody can watch it by a descriptor."""
    source = deny(["pidfd_open", "pidfd_send_signal"], errno.EPERM) + DYING
    command = [sys.executable, "-c", source, write_folder(tmp_path / "m", EVAL)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        pids = json.loads(program.stdout.readline())
        os.kill(program.pid, signal.SIGKILL)
    assert len(pids) >= 3
    until(lambda: all(map(is_gone, pids)), "every process is gone")
