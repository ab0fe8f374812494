"""Warm-up inputs of model-config.yaml run in the worker before it is ready."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.handlers import TOOLS, Deployer, lines_of
from torchmgmt.errors import WorkerStartFailed

NOTES = (
    TOOLS
    + """
ROWS = []
def handle(data, context):
    if data is None:
        context.metrics.add_counter("Loaded", 1)
        return
    ROWS.append((data, os.getpid(), dict(context.request_ids)))
    for row in data:
        if row.get("body") == "fail":
            raise ValueError("cold")
    return [ROWS[:-1] for row in data]
"""
)
CONFIG = """
warmup:
  - body: [1.0, 2.0]
  - data: {file: nested/note.txt}
    target: 3
  - settings.json
  - [{body: 1}, picture.bin]
"""


@pytest.mark.parametrize("share_weights", ["auto", "never"])
def test_inputs_are_run_by_each_worker_before_it_is_ready(deploy: Deployer, tmp_path: Path, share_weights: str) -> None:
    """Rows, files by their types, and batches, in order, in the worker itself, forked from a template or not."""
    folder = tmp_path / "model1"
    (folder / "nested").mkdir(parents=True)
    (folder / "nested" / "note.txt").write_text("hä")
    (folder / "settings.json").write_text('{"a": 1}')
    (folder / "picture.bin").write_bytes(b"\xff\x00")
    served = deploy(NOTES, config=CONFIG, share_weights=share_weights)
    run = served.predict("now")
    assert [rows for rows, _, _ in run] == [
        [{"body": [1.0, 2.0]}],
        [{"data": "hä", "target": 3}],
        [{"body": {"a": 1}}],
        [{"body": 1}, {"body": bytearray(b"\xff\x00")}],
    ]
    assert {pid for _, pid, _ in run} == {served.describe().workers[0].pid}
    assert run[-1][2] == {0: "warmup-0", 1: "warmup-1"}


def test_threads_warm_up_too(deploy: Deployer) -> None:
    """A worker that is a thread has run its inputs when it is ready."""
    served = deploy(NOTES, config="warmup: [{body: 1}]", backend="thread")
    assert len(served.predict("now")) == 1
    with pytest.raises(WorkerStartFailed, match=r"warm-up input 1 failed: ValueError: cold"):
        deploy(NOTES, config="warmup: [{body: fail}]", backend="thread", model_name="cold")


@pytest.mark.parametrize(
    "warmup, says",
    [
        ("[{body: 1}, {body: fail}]", "warm-up input 2 failed: ValueError: cold"),
        ("[none.jpg]", "warm-up input 1 (none.jpg) cannot be used"),
        ("['../handler.py']", "outside the model's folder"),
        ("{body: 1}", "must be a list of inputs"),
        ("[5]", "it has 5"),
        ("[[]]", "warm-up input 1 is an empty batch"),
    ],
)
def test_a_warm_up_that_fails_fails_the_start(deploy: Deployer, warmup: str, says: str) -> None:
    """The error says which input and why, with the handler's own traceback where it has one."""
    with pytest.raises(WorkerStartFailed) as caught:
        deploy(NOTES, config=f"warmup: {warmup}")
    assert says in caught.value.reason
    if "cold" in says:
        assert "raise ValueError" in caught.value.traceback


def test_a_long_warm_up_is_not_taken_for_a_bad_fork(
    deploy: Deployer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forked worker has shown that it lives before its warm-up begins; that has the time of startup_timeout."""
    monkeypatch.setattr("torchmgmt.backends.process_worker.FORK_LIMIT_S", 0.5)
    calls = tmp_path / "calls"
    source = (
        NOTES
        + f"\ndef warm(data, context):\n    note({str(calls)!r})\n    time.sleep(data and 1.0 or 0)\n    return data\n"
    )
    served = deploy(source, config="warmup: [{body: 1}]", handler="handler:warm")
    assert served.describe().sharing.is_shared
    assert len(lines_of(calls)) == 2
