"""Pictures of tables: bars of the medians, with the least and the most as a line. Needs the extra ``bench``."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Missing
from benchmarks.report import Report, Row, Table, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"torchmgmt": "#0b6e99", "TorchServe": "#e07b39", "LitServe": "#6c9a3b", "mosec": "#8d5a97"}
_OTHERS = ("#7f7f7f", "#c9a227", "#5fa3c4", "#b0b0b0")
_SETTINGS: Any = {"svg.hashsalt": "torchmgmt", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}
_ROW_INCHES = 0.23


def draw(report: Report, folder: Path) -> dict[str, list[Path]]:
    """Draw each table that has bars into ``folder`` as SVG; return the files by the table's title.

    Raises Missing if matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise Missing("matplotlib is not installed: pip install 'torchmgmt[bench]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_SETTINGS):
        return {table.title: _draw(table, folder) for table in report.tables if _with_bars(table)}


def _with_bars(table: Table) -> list[Row]:
    return [row for row in table.rows if row.bar is not None]


def _draw(table: Table, folder: Path) -> list[Path]:
    """One picture for each unit: bars of different ones cannot stand beside each other."""
    rows = _with_bars(table)
    units = list(dict.fromkeys(row.series.unit for row in rows))
    files = []
    for unit in units:
        suffix = f"-{_slug(unit)}" if len(units) > 1 else ""
        files.append(folder / f"{_slug(table.title)}{suffix}.svg")
        _draw_unit(table.title, unit, [row for row in rows if row.series.unit == unit], files[-1])
    return files


def _draw_unit(title: str, unit: str, rows: Sequence[Row], file: Path) -> None:
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(row.bar.group for row in rows if row.bar))
    figure = Figure(figsize=(7.5, 0.9 + _ROW_INCHES * (len(rows) + len(groups))), layout="constrained")
    axes = figure.add_subplot()
    _bars(axes, rows)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    figure.savefig(file, metadata={"Date": None})


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    """Horizontal bars from top to bottom, a gap between groups, the median beside each."""
    others = itertools.cycle(_OTHERS)
    colours = {who: _COLOURS.get(who) or next(others) for who in dict.fromkeys(row.bar.who for row in rows if row.bar)}
    places: dict[str, list[float]] = {}
    place = 0.0
    for row in rows:
        if row.bar is None:
            continue
        if row.bar.group not in places:
            place += 1
        series, label = row.series, row.bar.who
        spread: Any = [[series.median - series.least], [series.most - series.median]]
        shown = "_" if any(label == text for text in axes.get_legend_handles_labels()[1]) else ""
        axes.barh(place, series.median, 0.9, color=colours[label], label=shown + label, xerr=spread, ecolor="#333333")
        axes.annotate(f" {number(series.median)}", (series.most, place), va="center", fontsize=7)
        places.setdefault(row.bar.group, []).append(place)
        place += 1
    axes.set_yticks([sum(each) / len(each) for each in places.values()], list(places))
    axes.invert_yaxis()
    if len(colours) > 1:
        axes.legend(loc="best", fontsize=7, frameon=False)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
