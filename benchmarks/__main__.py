"""The command line: ``python -m benchmarks [suite ...] [--runs 5] [--json FILE] [--markdown FILE]``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks import machine, predict, scaling, startup
from benchmarks.measure import say
from benchmarks.report import Report

SUITES = {"startup": startup.run, "scaling": scaling.run, "predict": predict.run}


def main() -> int:
    """Run the suites that the command line names, print their tables, write the files that it asks for."""
    arguments = _parser().parse_args()
    suites = dict.fromkeys(arguments.suites or SUITES)
    command = " ".join(["python -m benchmarks", *suites, f"--runs {arguments.runs}"])
    facts = {**machine.facts(), "load before": machine.load()}
    report = Report(facts, command)
    for name in suites:
        started = time.monotonic()
        report.tables.extend(SUITES[name](arguments.runs))
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single value to a file, too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown to a file, too")
    return parser


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
