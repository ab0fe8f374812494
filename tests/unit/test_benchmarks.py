"""What the benchmarks' figures rest on: peers that are missing are named, and what was started is ended."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from benchmarks.measure import Missing, Result, Sample, Series, interleave
from benchmarks.peers.torchserve import VARIABLE, TorchServe
from benchmarks.processes import descendant_above, end_session, tree
from benchmarks.report import Goal, Report, Row, Table
from benchmarks.servers import Launch, Server, ServerFailed, free_ports

# A launcher as TorchServe's: its child is the server. Here the child has one, too, and neither heeds SIGTERM.
DEAF = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
depth = int(sys.argv[2])
if depth:
    subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[1], str(depth - 1)])
else:
    print("all", flush=True)
time.sleep(600)
"""


def _never() -> Sample:
    raise Missing("it is not installed")


def test_a_variant_that_is_missing_is_named_with_its_reason_and_the_others_are_measured() -> None:
    variants: dict[str, Callable[[], Sample]] = {"ours": lambda: {"time": 1.0}, "theirs": _never, "others": _never}
    result = interleave("test", variants, 3)
    assert result.has("ours")
    assert result.series("ours", "time", "s").values == [1.0, 1.0, 1.0]
    assert not result.has("theirs")
    assert result.notes == ["Not measured: theirs; others. it is not installed."]


def test_a_variant_that_becomes_missing_does_not_count_with_the_rounds_before() -> None:
    calls = iter([True, False])

    def sometimes() -> Sample:
        return {"time": 1.0} if next(calls) else _never()

    result = interleave("test", {"theirs": sometimes}, 2, warm_ups=0)
    assert result == Result({}, {"theirs": "it is not installed"})


def test_no_round_is_begun_when_the_time_is_over_but_one_is_always_run() -> None:
    assert len(interleave("test", {"ours": lambda: {"time": 1.0}}, 5, budget_s=-1).samples["ours"]) == 1


def test_a_ratio_names_its_base_and_a_goal_judges_the_ratio() -> None:
    base = Row("the bare loop with a long name", Series("/s", [100.0, 200.0]), short="bare loop")
    row = Row("ours", Series("/s", [96.0, 180.0]), base, Goal(0.95, at_least=True, of_ratio=True))
    assert row.verdict == "MISSED"
    assert "0.93 x bare loop" in Report({}, "command", [Table("title", [row])]).text()


def test_without_an_environment_torchserve_is_missing_and_the_message_says_how_to_name_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(Missing, match=f"--torchserve DIR, or {VARIABLE}"):
        TorchServe.find(None).version()
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(Missing, match=r"There is no .*python"):
        TorchServe.find(None).version()


def test_free_ports_are_different_ones() -> None:
    assert len(set(free_ports(5))) == 5


def test_a_server_that_ends_instead_of_serving_fails_with_its_last_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('first'); print('no such model store'); raise SystemExit(3)"]
    inference, management = free_ports(2)
    with pytest.raises(ServerFailed, match="exit status 3: no such model store"):
        Server(Launch(command, inference, management, tmp_path)).__enter__()


def test_ending_a_session_ends_all_of_it_whoever_ignores_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.processes._GRACE_S", 0.2)
    command = [sys.executable, "-c", DEAF, DEAF, "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"all\n"
    started = tree(process.pid)
    assert len(started) == 3
    assert descendant_above(started[-1].pid).pid == process.pid
    end_session(process, started[1:2])
    process.stdout.close()
    assert not [each for each in started if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def test_what_is_gone_has_no_tree() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert tree(process.pid) == []
