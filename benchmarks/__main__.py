"""The command line: ``python -m benchmarks [suite ...] [options]``, and ``python -m benchmarks peers install|list``."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

from benchmarks import control, growth, http, machine, memory, pictures, predict, real, scaling, server, startup
from benchmarks.measure import Missing, say
from benchmarks.peers import environments
from benchmarks.peers.environments import DEFAULT, VARIABLE, Environments
from benchmarks.report import Report, Table
from benchmarks.suite import Setup

SUITES: Mapping[str, Callable[[Setup], list[Table]]] = {
    "startup": startup.run,
    "scaling": scaling.run,
    "server": server.run,
    "predict": predict.run,
    "http": http.run,
    "http-memory": http.run_memory,
    "memory": memory.run,
    "control": control.run,
    "growth": growth.run,
    "real": real.run,
}


_INTERRUPTED = 130
"""What a shell says of a command that Ctrl-C ended."""


def main() -> int:
    """Run the suites that the command line names, print their tables, write the files that it asks for."""
    signal.signal(signal.SIGTERM, _stop)
    if sys.argv[1:2] == ["peers"]:
        return environments.main(sys.argv[2:])
    given = _parsed()
    found = Environments.find(given.peers_dir, given.torchserve)
    setup = Setup(given.runs, found, given.device, given.quick)
    suites = dict.fromkeys(given.suites or SUITES)
    facts = {**machine.facts(), **_peers(setup), "load before": machine.load()}
    report = Report(facts, command(list(suites), setup))
    status = 0
    try:
        for name in suites:
            started = time.monotonic()
            report.tables.extend(SUITES[name](setup))
            facts[f"suite {name} took"] = f"{time.monotonic() - started:.0f} s"
    except KeyboardInterrupt:  # what was measured took its time, and is not lost
        facts["ended"] = f"early, in the suite {name}, which is not here"
        status = _INTERRUPTED
    facts["load after"] = machine.load()
    print(report.text())
    return _write(report, given) or status


def _write(report: Report, given: argparse.Namespace) -> int:
    """Write the files that the command line asks for; return the exit status."""
    status = 0
    if given.pictures is not None:
        try:
            _draw(report, given.pictures, given.markdown)
        except Missing as error:
            say(f"no pictures: {error}")
            status = 1
    for file, text in ((given.json, report.json), (given.markdown, report.markdown)):
        if file is not None:
            file.write_text(text(), encoding="utf-8")
            say(f"written: {file}")
    return status


def _draw(report: Report, folder: Path, markdown: Path | None) -> None:
    beside = (markdown or folder).absolute().parent
    for title, files in pictures.draw(report, folder).items():
        report.pictures[title] = [Path(os.path.relpath(file.absolute(), beside)).as_posix() for file in files]
    say(f"written: {sum(map(len, report.pictures.values()))} pictures in {folder}")


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure torchmgmt side by side with peers. `python -m benchmarks peers --help` is about those.",
    )
    parser.add_argument("suites", nargs="*", type=_suite, metavar="suite", help=f"{', '.join(SUITES)}; default: all")
    parser.add_argument(
        "--runs", type=_at_least_one, default=5, help="rounds; each figure is their median (default: 5)"
    )
    parser.add_argument(
        "--peers-dir", type=Path, metavar="DIR", help=f"where `peers install` put the peers (default: {DEFAULT})"
    )
    parser.add_argument(
        "--torchserve",
        type=Path,
        metavar="DIR",
        help="a virtual environment with TorchServe 0.12 that lies elsewhere"
        f" (default: the environment variable {VARIABLE}); it needs Java 11 or later",
    )
    parser.add_argument(
        "--device", default="cpu", help="where models compute, as torch names it: cpu (default), cuda, cuda:1"
    )
    parser.add_argument("--quick", action="store_true", help="small and short: to see that all runs, not to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single value to a file, too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown to a file, too")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="draw the tables that have bars, as SVG")
    given = parser.parse_args()
    if why := lacks(given.device):
        parser.error(f"--device {given.device}: {why}")
    return given


def lacks(device: str) -> str:
    """Why torch cannot compute there; asked in a process of its own, for this one is to stay without torch."""
    if device == "cpu":
        return ""
    code = "import sys, torch; torch.zeros(1, device=sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, device], capture_output=True, text=True, timeout=120, check=False
    )
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def command(suites: list[str], setup: Setup) -> str:
    """Return the command that measures this again."""
    device = "" if setup.device == "cpu" else f" --device {setup.device}"
    return " ".join(["python -m benchmarks", *suites, f"--runs {setup.runs}{device}{' --quick' * setup.is_quick}"])


def _peers(setup: Setup) -> dict[str, str]:
    """The version of each peer, or why it is not measured."""
    versions = {"device": setup.device}
    for name, peer in setup.peers.items():
        try:
            versions[name] = peer.version()
        except Missing as error:
            versions[name] = f"not measured. {error}"
            say(f"{name}: {versions[name]}")
    return versions


def _stop(_number: int, _frame: FrameType | None) -> None:
    """End as at Ctrl-C: what was started is ended on the way out."""
    raise KeyboardInterrupt


def _suite(text: str) -> str:
    if text not in SUITES:
        raise argparse.ArgumentTypeError(f"there is no suite {text!r}; there are {', '.join(SUITES)}")
    return text


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
