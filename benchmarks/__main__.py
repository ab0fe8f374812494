"""The command line: ``python -m benchmarks [suite ...] [--runs 5] [--torchserve DIR] [--json FILE] [--markdown FILE]``."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

from benchmarks import growth, machine, predict, scaling, server, startup
from benchmarks.measure import Missing, say
from benchmarks.peers.torchserve import VARIABLE, TorchServe
from benchmarks.report import Report, Table

SUITES: Mapping[str, Callable[[int, TorchServe], list[Table]]] = {
    "startup": lambda runs, _peer: startup.run(runs),
    "scaling": scaling.run,
    "server": server.run,
    "predict": lambda runs, _peer: predict.run(runs),
    "growth": lambda runs, _peer: growth.run(runs),
}


def main() -> int:
    """Run the suites that the command line names, print their tables, write the files that it asks for."""
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, _stop)
    torchserve = TorchServe.find(arguments.torchserve)
    suites = dict.fromkeys(arguments.suites or SUITES)
    command = " ".join(["python -m benchmarks", *suites, f"--runs {arguments.runs}"])
    facts = {**machine.facts(), "torchserve": _version(torchserve), "load before": machine.load()}
    report = Report(facts, command)
    for name in suites:
        started = time.monotonic()
        report.tables.extend(SUITES[name](arguments.runs, torchserve))
        facts[f"suite {name} took"] = f"{time.monotonic() - started:.0f} s"
    facts["load after"] = machine.load()
    print(report.text())
    for file, text in ((arguments.json, report.json), (arguments.markdown, report.markdown)):
        if file is not None:
            file.write_text(text(), encoding="utf-8")
            say(f"written: {file}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure torchmgmt side by side with peers."
    )
    parser.add_argument("suites", nargs="*", type=_suite, metavar="suite", help=f"{', '.join(SUITES)}; default: all")
    parser.add_argument(
        "--runs", type=_at_least_one, default=5, help="rounds; each figure is their median (default: 5)"
    )
    parser.add_argument(
        "--torchserve",
        type=Path,
        metavar="DIR",
        help="a virtual environment with TorchServe 0.12, measured beside it in the suites scaling and server"
        f" (default: the environment variable {VARIABLE}); it needs Java 11 or later",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single value to a file, too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown to a file, too")
    return parser


def _version(torchserve: TorchServe) -> str:
    try:
        return torchserve.version()
    except Missing as error:
        return f"not measured. {error}"


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
