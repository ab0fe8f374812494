"""A thread of the library that ends in spite of all: whatever it owed fails at once, nobody waits for it, and close() returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.handlers import EVAL, is_gone, run_program, until, write_folder

# Every round of the dispatcher fails from a certain moment on, until it gives up.
PROGRAM = """
import json, logging, sys, threading, time
import psutil
from concurrent.futures import wait
from torchmgmt import ModelManager, ProcessBackend
from torchmgmt.errors import ManagerClosed, TorchmgmtError
logging.getLogger("torchmgmt").addHandler(logging.NullHandler())
said = {}

def seconds(call):
    began = time.monotonic()
    try:
        call()
        what = "nothing"
    except TorchmgmtError as error:
        what = "refused"
    return what if time.monotonic() - began < 5 else "late"

def fail(_timeout):
    raise MemoryError("not even for this")

backend = ProcessBackend()
manager = ModelManager(backend=backend)
model = manager.register(sys.argv[1], model_name="m", handler="handler.py", max_batch_delay=0, response_timeout=600)
futures = [model.submit("threading.Event().wait()"), *[model.submit("1") for _ in range(5)]]
stream = model.stream("2")
while not futures[0].running():
    time.sleep(0.01)
calls = [lambda: list(stream), lambda: model.predict("3"), lambda: model.describe(customized=True)]
if sys.argv[2] == "scaled":
    calls.append(lambda: model.scale(2))
came = []
callers = [threading.Thread(target=lambda call=call: came.append(seconds(call)), daemon=True) for call in calls]
for caller in callers:
    caller.start()
while model.describe().queue_length < 7:
    time.sleep(0.01)
said["pids"] = [process.pid for process in psutil.Process().children(recursive=True)]
thread = backend.dispatcher._thread
backend.dispatcher.run_round = fail
try:
    backend.dispatcher.call_soon(lambda: None)
except ManagerClosed:
    pass
thread.join(20)
said["ended"] = not thread.is_alive()
said["not done"] = len(wait(futures, 10).not_done)
said["errors"] = [isinstance(future.exception(0), TorchmgmtError) for future in futures if future.done()]
for caller in callers:
    caller.join(10)
said["came"] = came
later = [
    lambda: model.predict("1"), lambda: model.submit("1").result(10), lambda: list(model.map(["1"])),
    lambda: list(model.stream("1")), lambda: model.scale(3), lambda: model.describe(customized=True),
    lambda: manager.register(sys.argv[1], model_name="n", handler="handler.py"),
]
said["later"] = [seconds(call) for call in later]
said["describe"] = seconds(model.describe)
said["unregister"] = seconds(lambda: model.unregister(timeout=2))
said["close"] = seconds(lambda: manager.close(2))
said["backend"] = seconds(backend.close)
print(json.dumps(said))
"""


@pytest.mark.parametrize("how", ["served", "scaled"])
def test_what_the_dispatcher_owed_fails_at_once(tmp_path: Path, light_torch: Path, how: str) -> None:
    """What runs, what waits and who waits; what comes later is refused, close() returns, and every process ends."""
    program = run_program(PROGRAM, write_folder(tmp_path / "model", EVAL), how)
    assert program.returncode == 0, program.stderr
    said = json.loads(program.stdout)
    pids = said.pop("pids")
    assert said == {
        "ended": True,
        "not done": 0,
        "errors": [True] * 6,
        "came": ["refused"] * (4 if how == "scaled" else 3),
        "later": ["refused"] * 7,
        "describe": "nothing",
        "unregister": "nothing",
        "close": "nothing",
        "backend": "nothing",
    }
    for pid in pids:
        until(lambda pid=pid: is_gone(pid), f"process {pid} is gone")
