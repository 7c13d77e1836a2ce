"""Records → one Markdown page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from onnxsqueeze.report.details import caveats, overview, run_grids
from onnxsqueeze.report.grid import Column, Grid
from onnxsqueeze.report.summary import Row, Table, origin, run_title, tables
from onnxsqueeze.results import Results

LEGEND = (
    "× smaller and × faster are baseline ÷ target, so above 1 is better; the baseline is the untouched fp32 export on the same backend.",
    "Δ is target − baseline in points (hundredths of the metric), paired on the same rows; square brackets hold 95 % intervals.",
    "“tie” says that no difference was shown, not that there is none; “unproven” says that a latency was not valid, so that its ratio proves nothing. 1 MB is 1,000,000 bytes.",
)
_COLUMNS = "Target|Status|#Size, MB|#× smaller|#gzip, MB|#p50, ms|#× faster [95 %]|Speed|#{metric} [95 %]|#Δ, points [95 %]|#p|Quality"


def markdown(results: Sequence[Results]) -> str:
    """The report of one run, or of several with an overview first. Needs nothing but the records."""
    if len(results) == 1:
        lines = _run(results[0], level=1)
    else:
        lines = [f"# {len(results)} runs of onnxsqueeze", "", *_grid(overview(results), level=2)]
        for run in results:
            lines += _run(run, level=2)
    return "\n".join(lines).rstrip("\n") + "\n"


def _run(results: Results, level: int) -> list[str]:
    hashes = "#" * level
    lines = [f"{hashes} {_text(run_title(results))}", ""]
    lines += [_text(origin(results)), ""]
    lines += _code(results.command)
    lines += [*"\n>\n".join(f"> {_text(sentence)}" for sentence in caveats(results)).split("\n"), ""]
    for table in tables(results):
        lines += _backend(table, level + 1)
    lines += [f"{hashes}# How to read it", "", *(f"- {sentence}" for sentence in LEGEND), ""]
    for grid in run_grids(results):
        lines += _grid(grid, level + 1)
    return lines


def _backend(table: Table, level: int) -> list[str]:
    lines = [f"{'#' * level} Backend {_text(table.backend)}", ""]
    facts = [
        table.provider,
        table.shape and f"latency at {table.shape}",
        f"quality on {table.split}" if table.measured and table.split else "",
    ]
    lines += [_text("; ".join(fact for fact in facts if fact)) + ".", ""]
    for finding in table.findings:
        row = finding.row
        unproven = "" if all(g.proven for g in row.gates) else " (gate not proven)"
        lines.append(
            f"- **{finding.label} that {table.condition}: {_text(row.name)}**{unproven} – {row.size} MB ({row.smaller} smaller), {row.p50} ms "
            f"({row.faster} faster {row.faster_ci}), {row.delta} points {row.delta_ci}"
        )
    if table.measured and not table.findings:
        lines.append(f"- No target is smaller or faster than the baseline and {table.condition}.")
    lines += [""] if table.measured else []
    if table.measured:
        columns = [Column(c.removeprefix("#"), number=c.startswith("#")) for c in _COLUMNS.format(metric=table.metric).split("|")]
        lines += [*_table(columns, (_cells(row) for row in table.measured)), ""]
        lines += [
            f"- {_text(row.name)}: {note}"
            for row in table.measured
            for note in (*(f"**{_text(w)}**" for w in row.warnings), *map(_text, row.remarks))
        ]
        lines += [""]
    if table.unmeasured:
        columns = [Column(title) for title in ("Not measured", "Status", "Reason", "Remedy")]
        lines += [
            *_table(columns, ((row.name, row.status, row.target.reason or "", row.target.remedy or "") for row in table.unmeasured)),
            "",
        ]
    return lines


def _cells(row: Row) -> tuple[str, ...]:
    faster, metric, delta = (
        f"{a} {b}".strip() for a, b in ((row.faster, row.faster_ci), (row.metric, row.metric_ci), (row.delta, row.delta_ci))
    )
    return row.name, row.status, row.size, row.smaller, row.gzip, row.p50, faster, row.speed, metric, delta, row.p, row.quality


def _grid(grid: Grid, level: int) -> list[str]:
    lines = [f"{'#' * level} {_text(grid.title)}", ""]
    lines += [_text(grid.note), ""] if grid.note else []
    return [*lines, *_table(grid.columns, grid.rows), ""]


def _table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> list[str]:
    head = "| " + " | ".join(_text(column.title) for column in columns) + " |"
    rule = "| " + " | ".join("---:" if column.number else "---" for column in columns) + " |"
    return [head, rule, *("| " + " | ".join(_text(cell) for cell in row) + " |" for row in rows)]


def _text(text: str) -> str:
    """Text that stands for itself: no markup, no HTML, no new cell, no second line."""
    text = " ".join(text.split())
    text = re.sub(r"([\\`*\[\]|~])", r"\\\1", text)
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(text: str) -> list[str]:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{fence}text", " ".join(text.split()), fence, ""]
