"""The server as the first process of a container: it gets the orphans of all others."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import os, subprocess, sys, time
from torchmgmt.http.orphans import OrphanReaper

def child():
    pid = os.fork()
    if not pid:
        os._exit(7)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid

reaper = OrphanReaper()
orphan = child()
awaited = subprocess.Popen([sys.executable, "-c", "raise SystemExit(5)"])
os.waitid(os.P_PID, awaited.pid, os.WEXITED | os.WNOWAIT)
reaper.look()
assert os.waitid(os.P_PID, orphan, os.WEXITED | os.WNOWAIT).si_status == 7, "not at the first look"
assert awaited.wait() == 5
reaper.look()
late = child()
reaper.look()
try:
    os.waitid(os.P_PID, orphan, os.WEXITED | os.WNOHANG | os.WNOWAIT)
except ChildProcessError:
    pass
else:
    raise SystemExit("it is still there")
assert os.waitpid(late, 0)[0] == late
reaper.look()
"""


def test_what_nobody_waits_for_is_reaped() -> None:
    """An orphan that has ended is gone at the second look; who waits for a child of its own gets that one's status."""
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=60)


AS_INIT = """
import os, sys, time
from torchmgmt.http.orphans import OrphanReaper
assert OrphanReaper.is_needed()
OrphanReaper().start()
if not os.fork():
    if not os.fork():
        time.sleep(0.2)
    os._exit(0)
deadline = time.monotonic() + 20
while time.monotonic() < deadline:
    time.sleep(0.1)
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        os._exit(0)
os._exit(1)
"""


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="a process namespace is root's to make")
def test_process_1_has_no_zombies() -> None:
    """Neither its own child, which it forgot, nor that one's stays."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", AS_INIT]
    done = subprocess.run(command, check=False, timeout=60, capture_output=True, text=True)
    if "unshare:" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
