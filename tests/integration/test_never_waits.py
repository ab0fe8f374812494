"""Describing and listing never wait for a worker that starts or for a batch that runs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.handlers import ECHO, EVAL, TOOLS, Deployer, Gate, until
from torchmgmt import ModelManager
from torchmgmt.errors import HandlerFailed, NoWorker, TorchmgmtError, WorkerDied
from torchmgmt.lifecycle import VersionState

DESCRIBES = (
    TOOLS
    + """
class Handler:
    def initialize(self, context):
        self.context = context
    def handle(self, data, context):
        return [eval(row["body"]) for row in data]
    def describe_handle(self):
        return {body}
"""
)


def promptly(call: Any) -> Any:
    """Return what ``call`` returns, on a thread of its own; fail if it waits."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result(5)


def look_at_everything(manager: ModelManager) -> list[Any]:
    return promptly(
        lambda: [
            manager.describe("m").to_dict(),
            [info.to_dict() for info in manager.models()],
            [info.to_dict() for info in manager.versions("m")],
            repr(manager),
            "m" in manager,
            len(manager),
            list(manager),
            manager["m"].state,
        ]
    )


@pytest.mark.parametrize("where", ["import", "initialize"])
def test_nothing_waits_for_a_worker_that_loads(
    deploy: Deployer, manager: ModelManager, gate: Gate, tmp_path: Path, where: str
) -> None:
    """While a worker is held up in loading, everything that only looks answers at once, and shows it as LOADING."""
    started = tmp_path / "started"
    hold = f"note({str(started)!r}); wait_for({gate.path!r})"
    source = (
        f"{TOOLS}\n{hold}\n{ECHO}"
        if where == "import"
        else (
            f"{TOOLS}\nclass H:\n    def initialize(self, context):\n        {hold}\n    def handle(self, data, context):\n"
            "        return [row['body'] for row in data]\n"
        )
    )
    model = deploy(source, synchronous=False)
    until(lambda: started.exists() and model.describe().workers[0].pid, "the worker loads")
    item = look_at_everything(manager)[0]
    assert item["state"] == "LOADING"
    assert [(worker["status"], worker["pid"] > 0) for worker in item["workers"]] == [("LOADING", True)]
    gate.open()
    assert model.predict("x", timeout=20) == "x"
    assert look_at_everything(manager)[0]["state"] == "READY"


def test_nothing_waits_for_a_batch_that_runs(deploy: Deployer, manager: ModelManager, gate: Gate) -> None:
    """While batches run and requests wait, everything that only looks answers at once, and counts those that wait."""
    model = deploy()
    running = model.submit(f"wait_for({gate.path!r})")
    until(running.running, "the request runs")
    waiting = [model.submit("1") for _ in range(7)]
    item = look_at_everything(manager)[0]
    assert item["jobQueueStatus"] == {"remainingCapacity": 93, "pendingRequests": 7}
    assert [worker["status"] for worker in item["workers"]] == ["READY"]
    gate.open()
    assert [future.result(20) for future in [running, *waiting]] == [None] + [1] * 7


def test_nothing_waits_for_an_unregistration(deploy: Deployer, manager: ModelManager, gate: Gate) -> None:
    """While a version drains before it goes, the others are registered, described, served and unregistered."""
    model = deploy()
    running = model.submit(f"wait_for({gate.path!r}) or 'drained'")
    until(running.running, "the request runs")
    going = threading.Thread(target=model.unregister)
    going.start()
    until(lambda: "m" not in manager, "the model is withdrawn")
    with promptly(lambda: deploy(ECHO, model_name="other")) as other:
        assert promptly(lambda: other.predict(1)) == 1
        assert list(manager) == ["other"]
    gate.open()
    going.join(20)
    assert running.result(0) == "drained"


def test_a_registration_that_waits_holds_up_no_other(deploy: Deployer, manager: ModelManager, gate: Gate) -> None:
    """While one registration waits for its workers, other models are registered and served."""
    slow = threading.Thread(target=lambda: deploy(f"{TOOLS}\nwait_for({gate.path!r})\n{ECHO}"))
    slow.start()
    until(lambda: "m" in manager and manager["m"].state is VersionState.LOADING, "the slow one loads")
    other = promptly(lambda: deploy(ECHO, model_name="other"))
    assert promptly(lambda: other.predict(1)) == 1
    gate.open()
    slow.join(20)
    assert manager.predict("m", 2) == 2


def test_memory_is_measured_soon(deploy: Deployer) -> None:
    """The memory of a worker is above 0 within seconds of its start."""
    model = deploy()
    until(lambda: all(worker.memory_bytes > 0 for worker in model.describe().workers), "memory is known")


def test_customized_runs_the_handlers_own_description(deploy: Deployer) -> None:
    """``customized`` adds what describe_handle says, run in a worker whose handler is initialised."""
    model = deploy(DESCRIBES.format(body="{'mine': self.context.model_name, 'numbers': [1, 2.5, None]}"))
    info = model.describe(customized=True)
    assert info.customized_metadata == {"mine": "m", "numbers": [1, 2.5, None]}
    assert info.to_dict()["customizedMetadata"] == info.customized_metadata
    assert "customizedMetadata" not in model.describe().to_dict()


def test_customized_of_a_handler_without_description_is_empty(deploy: Deployer) -> None:
    """A handler that has no describe_handle has nothing to say: an empty object."""
    assert deploy(EVAL).describe(customized=True).customized_metadata == {}


def test_customized_fails_as_a_request_does(deploy: Deployer) -> None:
    """When describe_handle raises, or its worker dies, the caller is told as for a request; the worker serves on."""
    model = deploy(DESCRIBES.format(body="fail(ValueError('not today'))"))
    with pytest.raises(HandlerFailed, match="ValueError: not today") as caught:
        model.describe(customized=True)
    assert "describe_handle" in caught.value.traceback
    assert model.predict("1") == 1
    other = deploy(DESCRIBES.format(body="os._exit(1)"), model_name="other")
    with pytest.raises(WorkerDied):
        other.describe(customized=True)
    assert other.predict("1") == 1


def test_customized_without_worker_is_refused(deploy: Deployer) -> None:
    """``customized`` of a version scaled to zero says that it has no worker; without it, describe answers."""
    model = deploy(initial_workers=0)
    with pytest.raises(NoWorker):
        model.describe(customized=True)
    assert model.describe().workers == ()


def test_customized_waits_no_longer_than_response_timeout(deploy: Deployer) -> None:
    """``customized`` of a describe_handle that hangs ends when response_timeout is over, with an error of our own."""
    model = deploy(DESCRIBES.format(body="threading.Event().wait()"), response_timeout=0.5)
    with pytest.raises((TorchmgmtError, TimeoutError)) as caught:
        promptly(lambda: model.describe(customized=True))
    assert isinstance(caught.value, TorchmgmtError), repr(caught.value)
    assert model.predict("1") == 1


def test_customized_of_a_version_that_loads_for_long_ends(deploy: Deployer, gate: Gate) -> None:
    """``customized`` of a version without a ready worker ends, too, when response_timeout is over."""
    model = deploy(f"{TOOLS}\nwait_for({gate.path!r})\n{ECHO}", response_timeout=0.3, synchronous=False)
    with pytest.raises((TorchmgmtError, TimeoutError)) as caught:
        promptly(lambda: model.describe(customized=True))
    assert isinstance(caught.value, TorchmgmtError), repr(caught.value)
