"""A worker waits awake for its next batch only where that is likely to pay."""

from __future__ import annotations

from pathlib import Path

from tests.handlers import ECHO, Deployer, deploy, manager, run_program, until

__all__ = ["deploy", "manager"]

# In a process of its own: the worker's code imports torch, which this one does without.
LOOKS = """
import socket
from torchmgmt.channel import Channel
from torchmgmt.worker import main

ours, theirs = socket.socketpair()
channel = Channel(theirs)

class Looks:
    count = 0
    def poll(self, timeout):
        self.count += 1
        return [1] if self.count >= 3 else []  # something is there when it looks for the third time

def looks(attention, awake_s):
    \"\"\"Wait once, be told of the arrival, and return how often it has looked.\"\"\"
    attention._poll = Looks()
    attention.wait()
    main._AWAKE_S = awake_s
    attention.note_arrival()
    main._AWAKE_S = 60.0
    return attention._poll.count

for may_spin in (True, False):
    attention = main._Attention(channel, may_spin=may_spin)
    print(looks(attention, 60.0), looks(attention, 60.0), looks(attention, 0.0), looks(attention, 60.0))
"""


def test_it_stays_awake_only_where_something_has_come_soon() -> None:
    """The first wait is asleep; after a quick arrival it looks until something is there; after a slow one it sleeps."""
    done = run_program(LOOKS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0 3 3 0", "0 0 0 0"]


def test_an_idle_worker_sleeps(deploy: Deployer) -> None:
    """However quickly it was asked before, a worker that nobody asks waits asleep."""
    model = deploy(ECHO)
    for number in range(200):
        assert model.predict(number) == number
    (worker,) = model.describe().workers
    stat = Path(f"/proc/{worker.pid}/stat")
    until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "S", "the worker sleeps")
    times = stat.read_text().rpartition(")")[2].split()[11:13]
    assert model.describe().workers[0].pid == worker.pid
    assert stat.read_text().rpartition(")")[2].split()[11:13] == times
