"""What a run found: tables for people (text, Markdown) and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import field, frozen

from benchmarks.measure import Series

_COLUMNS = ("what", "median", "min", "max", "unit", "runs", "ratio", "goal", "")


@frozen
class Goal:
    """A limit that a median has to keep."""

    limit: float
    at_least: bool = False
    of_ratio: bool = False
    """Whether it is the ratio that has to keep it."""

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}{' x' if self.of_ratio else ''}"

    def is_met(self, value: float) -> bool:
        """Return whether ``value`` keeps it."""
        return value >= self.limit if self.at_least else value <= self.limit


@frozen
class Bar:
    """Where a figure stands in the picture of its table."""

    group: str
    """The figures that stand together."""
    who: str
    """Whose it is; it has one colour throughout."""


@frozen
class Row:
    """One figure, and how it stands to another row of the same table."""

    what: str
    series: Series
    base: Row | None = None
    goal: Goal | None = None
    short: str = ""
    """What rows call it that are compared with it; default: ``what``."""
    bar: Bar | None = None
    """None: it is in no picture."""

    @property
    def name(self) -> str:
        """What rows call it that are compared with it."""
        return self.short or self.what

    @property
    def ratio(self) -> Series | None:
        """The ratio to ``base``, round by round."""
        return self.series.over(self.base.series) if self.base else None

    @property
    def verdict(self) -> str:
        """``ok`` or ``MISSED``; nothing where there is no goal."""
        if self.goal is None:
            return ""
        judged = self.ratio if self.goal.of_ratio else self.series
        return "ok" if judged is not None and self.goal.is_met(judged.median) else "MISSED"


@frozen
class Table:
    """Rows that belong together, and what one has to know to read them."""

    title: str
    rows: Sequence[Row]
    notes: Sequence[str] = ()


@frozen
class Report:
    """All tables of a run, with the machine that they are from."""

    machine: Mapping[str, str]
    command: str
    tables: list[Table] = field(factory=list)
    pictures: dict[str, list[str]] = field(factory=dict)
    """The addresses of the pictures of a table, by its title, as the Markdown file is to name them."""

    def text(self) -> str:
        """Return it for a terminal."""
        facts = [f"{name}: {value}" for name, value in self.machine.items()]
        return "\n\n".join(["\n".join(facts), *map(_text, self.tables)])

    def markdown(self) -> str:
        """Return it for a document."""
        facts = ["| machine | |", "|---|---|", *(f"| {name} | {value} |" for name, value in self.machine.items())]
        command = f"```sh\n{self.command}\n```"
        return (
            "\n\n".join(
                [
                    command,
                    "\n".join(facts),
                    *(_markdown(table, self.pictures.get(table.title, ())) for table in self.tables),
                ]
            )
            + "\n"
        )

    def json(self) -> str:
        """Return it with every single value, not the medians alone."""
        tables = [
            {"title": table.title, "rows": [_row_json(row) for row in table.rows], "notes": list(table.notes)}
            for table in self.tables
        ]
        whole = {"command": self.command, "machine": dict(self.machine), "tables": tables}
        return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    series, ratio = row.series, ""
    if row.ratio is not None and row.base is not None:
        ratio = f"{number(row.ratio.median)} x {row.base.name}"
    figures = (number(series.median), number(series.least), number(series.most), series.unit)
    return (row.what, *figures, str(len(series.values)), ratio, str(row.goal or ""), row.verdict)


def number(value: float) -> str:
    """Write three digits that count, without an exponent."""
    size = abs(value)
    return (
        f"{value:,.0f}"
        if size >= 100
        else f"{value:.1f}"
        if size >= 10
        else f"{value:.2f}"
        if size >= 0.1
        else f"{value:.3f}"
    )


def _text(table: Table) -> str:
    if not table.rows:
        return "\n".join([f"== {table.title}", *(f"* {note}" for note in table.notes)])
    cells = [_COLUMNS, *map(_cells, table.rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_COLUMNS))]
    right = range(1, 4)
    lines = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join([f"== {table.title}", lines[0], rule, *lines[1:], *(f"* {note}" for note in table.notes)])


def _markdown(table: Table, pictures: Sequence[str]) -> str:
    if not table.rows:
        return "\n".join([f"### {table.title}", "", *(f"- {note}" for note in table.notes)])
    head = [f"| {' | '.join(_COLUMNS)} |", "|---|--:|--:|--:|---|--:|---|---|---|"]
    rows = [f"| {' | '.join(_cells(row))} |" for row in table.rows]
    notes = ["", *(f"- {note}" for note in table.notes)] if table.notes else []
    images = [f"![{table.title}]({picture})\n" for picture in pictures]
    return "\n".join([f"### {table.title}", "", *images, *head, *rows, *notes])


def _row_json(row: Row) -> dict[str, Any]:
    series, ratio = row.series, row.ratio
    return {
        "what": row.what,
        "unit": series.unit,
        "median": series.median,
        "min": series.least,
        "max": series.most,
        "values": list(series.values),
        "ratio": None if ratio is None or row.base is None else {"to": row.base.what, "median": ratio.median},
        "goal": None if row.goal is None else {"limit": str(row.goal), "verdict": row.verdict},
    }
