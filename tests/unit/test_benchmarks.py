"""What the benchmarks' figures rest on: peers that are missing are named, and what was started is ended."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import __main__ as program
from benchmarks import control, pictures, wrk
from benchmarks.__main__ import command, lacks
from benchmarks.http import beside
from benchmarks.measure import Missing, Result, Sample, Series, interleave
from benchmarks.peers import environments
from benchmarks.peers.deployment import Deployment
from benchmarks.peers.environments import VARIABLE, Environments
from benchmarks.peers.scripted import bare_uvicorn
from benchmarks.processes import descendant_above, end_session, tree
from benchmarks.report import Bar, Goal, Report, Row, Table
from benchmarks.servers import Launch, Server, ServerFailed, free_ports
from benchmarks.suite import Setup
from benchmarks.wrk import Load

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

RECORDED = """\
Running 20s test @ http://127.0.0.1:34337/
  1 threads and 4 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency    42.96ms    5.93ms  45.31ms   98.00%
    Req/Sec    91.48     18.59   121.00     71.43%
  Latency Distribution
     50%   43.89ms
     75%  926.23ms
     90%  980.11ms
     99%    1.03s{gap}
  200 requests in 20.00s, 22.61KB read
{more}Requests/sec:     10.00
Transfer/sec:      1.13KB
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


def test_torchserve_can_lie_elsewhere_and_the_message_says_how_to_name_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(Missing, match=f"--torchserve DIR or {VARIABLE}"):
        Environments.find(tmp_path, None).program("torchserve", "python")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "variable"))
    assert Environments.find(tmp_path, None).path("torchserve") == tmp_path / "variable"
    assert Environments.find(tmp_path, tmp_path / "option").path("torchserve") == tmp_path / "option"
    assert Environments.find(tmp_path, None).path("mosec") == tmp_path / "mosec"


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


@pytest.mark.parametrize(
    "text, load",
    [
        (
            RECORDED.format(gap=" ", more="  Non-2xx or 3xx responses: 29\n"),
            Load(requests=200, rate=10.0, p50_s=0.04389, p99_s=1.03, errors=29),
        ),
        (
            RECORDED.format(gap=" ", more="  Socket errors: connect 1, read 20, write 300, timeout 4000\n"),
            Load(requests=200, rate=10.0, p50_s=0.04389, p99_s=1.03, errors=4321),
        ),
    ],
)
def test_a_report_of_wrk_is_read_with_all_kinds_of_errors(text: str, load: Load) -> None:
    assert wrk.parse(text) == load


@given(
    requests=st.integers(0, 10**9),
    rate=st.integers(0, 10**9),
    percentiles=st.lists(
        st.tuples(st.integers(0, 99_999), st.sampled_from(["us", "ms", "s", "m", "h"])), min_size=2, max_size=2
    ),
    errors=st.integers(0, 10**9),
)
def test_whatever_wrk_measured_is_read_as_it_was(
    requests: int, rate: int, percentiles: list[tuple[int, str]], errors: int
) -> None:
    # wrk keeps room for a unit of two letters behind the number.
    shown = [f"{hundredths / 100:8.2f}{unit:2}" for hundredths, unit in percentiles]
    report = f"  Latency Distribution\n     50% {shown[0]}\n     75%    1.00ms\n     99% {shown[1]}\n"
    report += f"  {requests} requests in 3.00s, 1.13KB read\n"
    report += f"  Non-2xx or 3xx responses: {errors}\n" if errors else ""
    report += f"Requests/sec: {rate / 100:9.2f}\nTransfer/sec:      1.13KB\n"
    load = wrk.parse(report)
    seconds = {"us": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
    wanted = [hundredths / 100 * seconds[unit] for hundredths, unit in percentiles]
    assert (load.requests, load.errors) == (requests, errors)
    assert [load.rate, load.p50_s, load.p99_s] == pytest.approx([rate / 100, *wanted])


@pytest.mark.parametrize("cut", ["  200 requests in", "Requests/sec", "     99%"])
def test_what_is_no_whole_report_of_wrk_is_refused_and_shown(cut: str) -> None:
    whole = RECORDED.format(gap=" ", more="")
    with pytest.raises(ValueError, match=r"wrk --latency: .*Running 20s"):
        wrk.parse(whole[: whole.index(cut)])


def test_without_wrk_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Missing, match="apt-get install wrk"):
        wrk.run("http://127.0.0.1:1/", 1, 1)


def test_figures_of_errors_or_of_no_answer_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A wrk that prints a report stands for one that has measured it."""
    program = tmp_path / "wrk"
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    whole = RECORDED.format(gap=" ", more="")
    for report, why in (
        (RECORDED.format(gap=" ", more="  Non-2xx or 3xx responses: 29\n"), "29 of 200 answers"),
        (whole.replace("  200 requests", "  0 requests"), "nothing was answered"),
    ):
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{report}END\n")
        program.chmod(0o755)
        with pytest.raises(Missing, match=why):
            wrk.run("http://127.0.0.1:1/", 1, 1)
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{whole}END\n")
    assert wrk.run("http://127.0.0.1:1/", 1, 1) == wrk.parse(whole)


def test_variants_take_turns_and_warm_up_first() -> None:
    """A B A B A B, so that whatever else the machine does hits all alike."""
    order: list[str] = []

    def variant(name: str) -> Callable[[], Sample]:
        def measure() -> Sample:
            order.append(name)
            return {"place": float(len(order))}

        return measure

    result = interleave("test", {name: variant(name) for name in "ABC"}, 3, warm_ups=2, at_most={"C": 1})
    assert "".join(order) == "ABC" * 3 + "AB" * 2
    assert result.series("B", "place", "").values == [8.0, 11.0, 13.0]


def _result() -> Result:
    rates = {"torchmgmt": (4000.0, 5000.0), "TorchServe": (1000.0, 1000.0), "mosec": (8000.0, 5000.0)}
    samples = {f"{name}, 16": [{"rate": rate} for rate in each] for name, each in rates.items()}
    return Result(samples, {"LitServe, 16": "it is not installed"})


def test_ours_is_judged_beside_torchserve_and_each_other_peer_is_compared_with_ours() -> None:
    goal = Goal(4, at_least=True, of_ratio=True)
    names = ["torchmgmt", "TorchServe", "LitServe", "mosec"]
    rows = beside(_result(), names, ", 16", "rate", "/s", "16 connections", goal)
    assert [row.what for row in rows] == [f"{name}: 16 connections" for name in ("torchmgmt", "TorchServe", "mosec")]
    assert [row.verdict for row in rows] == ["ok", "", ""]
    assert [row.ratio.median if row.ratio else None for row in rows] == [4.5, None, 1.5]
    alone = beside(_result(), ["torchmgmt", "mosec"], ", 16", "rate", "/s", "16 connections", goal)
    assert [row.verdict for row in alone] == ["", ""], "a goal beside TorchServe is not judged without it"


def test_pictures_have_each_group_and_each_peer_and_are_named_in_the_markdown(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = beside(_result(), ["torchmgmt", "TorchServe", "mosec"], ", 16", "rate", "/s", "16 connections")
    rows.append(Row("latency", Series("ms", [0.5]), bar=Bar("1 connection", "torchmgmt")))
    tables = [Table("HTTP, no-op", rows), Table("Without bars", [Row("ours", Series("s", [1.0]))])]
    report = Report({}, "command", tables)
    files = pictures.draw(report, tmp_path / "pictures")
    assert {title: [file.name for file in each] for title, each in files.items()} == {
        "HTTP, no-op": ["http-no-op-s.svg", "http-no-op-ms.svg"]
    }
    text = files["HTTP, no-op"][0].read_text(encoding="utf-8")
    for part in ("HTTP, no-op", "16 connections", "torchmgmt", "TorchServe", "mosec", "4,500"):
        assert part in text, part
    again = pictures.draw(report, tmp_path / "again")
    assert again["HTTP, no-op"][0].read_text(encoding="utf-8") == text, "the same figures make the same file"
    report.pictures["HTTP, no-op"] = ["pictures/http-no-op-s.svg"]
    assert report.markdown().count("![HTTP, no-op](pictures/http-no-op-s.svg)") == 1


def test_a_table_without_rows_says_why() -> None:
    report = Report({}, "command", [Table("HTTP", [], ["Not measured. wrk is not installed."])])
    for text in (report.text(), report.markdown()):
        assert "Not measured. wrk is not installed." in text
        assert "median" not in text


@pytest.mark.parametrize("name", environments.NAMES)
def test_a_peer_that_is_not_installed_is_missing_and_the_message_says_how_to_install_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    peers = Setup(1, Environments.find(tmp_path, None)).peers
    title = next(each for each in peers if each.lower() == name)
    with pytest.raises(Missing, match=rf"no .*{name}/bin/.*: python -m benchmarks peers install {name}"):
        peers[title].version()
    deployment = Deployment("noop", tmp_path, "json")
    with pytest.raises(Missing, match="peers install"), peers[title].deploy(deployment):
        pass


def test_peers_list_names_each_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert environments.main(["--peers-dir", str(tmp_path), "list"]) == 0
    assert [line.split(": not there. There is no ")[0] for line in capsys.readouterr().out.splitlines()] == list(
        environments.NAMES
    )


@pytest.mark.parametrize("name", environments.NAMES)
def test_each_peer_is_pinned_with_the_torch_that_we_are_measured_with(name: str) -> None:
    root = Path(environments.__file__).parents[2]
    pins = [line for line in (root / "benchmarks/peers" / f"{name}.txt").read_text().splitlines() if line[0] != "#"]
    (torch,) = [line for line in (root / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    assert all("==" in pin for pin in pins)
    assert pins[0].startswith(f"{name}==")
    assert torch in pins


def test_a_server_that_a_script_makes_takes_large_bodies_and_is_gone_at_the_end(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    body = b"x" * 1_000_000
    with bare_uvicorn().deploy(Deployment("noop", tmp_path, "raw")) as endpoint:
        with urlopen(endpoint.url, data=body, timeout=20) as answer:
            assert answer.read() == body
        assert endpoint.server.pss_mb() > 0
    with pytest.raises(OSError, match="refused"):
        urlopen(endpoint.url, data=body, timeout=20)


class FakeControl:
    """Knows what is registered, and notes how many there were at each call."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.seen: dict[str, set[int]] = {"describe": set(), "list": set()}

    def register(self, name: str) -> None:
        assert name not in self.names
        self.names.add(name)

    def describe(self, name: str) -> None:
        assert name in self.names
        self.seen["describe"].add(len(self.names))

    def list(self, start: int) -> None:
        assert 0 <= start < len(self.names)
        self.seen["list"].add(len(self.names))

    def unregister(self, name: str) -> None:
        self.names.remove(name)

    def weigh_mb(self) -> float:
        return 100 + 0.05 * len(self.names)


def test_the_control_plane_is_measured_at_each_size_and_what_is_added_to_measure_is_taken_away() -> None:
    fake = FakeControl()
    sample = control.grown(fake, (1, 20, 300))
    more = 20
    assert fake.seen == {"describe": {1 + more, 20 + more, 300 + more}, "list": {1 + more, 20 + more, 300 + more}}
    assert len(fake.names) == 300
    assert sample["kB each"] == pytest.approx(50)
    assert {
        f"{figure} {size}" for figure in ("register", "describe", "list", "unregister") for size in (1, 20, 300)
    } < {*sample}


def test_quick_suites_say_so_in_the_command_of_their_report(tmp_path: Path) -> None:
    setup = Setup(2, Environments(tmp_path), "cuda:1", is_quick=True)
    assert command(["http", "memory"], setup) == "python -m benchmarks http memory --runs 2 --device cuda:1 --quick"


def test_a_device_that_is_not_there_is_refused_with_what_torch_says() -> None:
    assert not lacks("cpu")
    assert "nothing_such" in lacks("nothing_such")


def test_what_was_measured_before_it_was_ended_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The suites that were whole, and which one was not; the exit status is that of Ctrl-C."""

    def ended(_setup: Setup) -> list[Table]:
        raise KeyboardInterrupt

    whole = Table("whole", [Row("a", Series("s", [1.0]))], [])
    monkeypatch.setattr(program, "SUITES", {"first": lambda _setup: [whole], "second": ended})
    monkeypatch.setattr(sys, "argv", ["benchmarks", "first", "second", "--markdown", str(tmp_path / "r.md")])
    monkeypatch.setattr(signal, "signal", lambda *_args: None)
    assert program.main() == 130
    assert "| ended | early, in the suite second, which is not here |" in (tmp_path / "r.md").read_text("utf-8")
    assert "### whole" in (tmp_path / "r.md").read_text("utf-8")
    assert "whole" in capsys.readouterr().out
