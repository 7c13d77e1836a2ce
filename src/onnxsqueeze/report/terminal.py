"""Records → a compact table per backend on stdout, in whatever width there is; plain text where it is no terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from onnxsqueeze.report.summary import Row, Table, run_title, tables
from onnxsqueeze.results import Results

_STYLES = {"faster": "green", "better": "green", "slower": "red", "worse": "red", "unproven": "yellow"}
_ASCII = str.maketrans({"×": "x", "÷": "/", "–": "-", "−": "-", "…": "~", "Δ": "d", "→": ">", "“": '"', "”": '"'})
_GAP = 2  # spaces between columns
_NAME_WIDTHS = (8, 28)  # of the first column: what it gives way to, and the most it takes


@dataclass(frozen=True)
class _Column:
    title: str
    cells: tuple[str, ...]
    rank: int  # the lowest is taken first where not all fit
    number: bool = True

    @property
    def width(self) -> int:
        return max(cell_len(text) for text in (self.title, *self.cells))


def print_summary(results: Sequence[Results], console: Console) -> None:
    """Print `summary` in the console's width; where its encoding is not Unicode, in ASCII."""
    console.print(summary(results, console.width, ascii_only=console.options.ascii_only))


def summary(results: Sequence[Results], width: int, *, ascii_only: bool = False) -> RenderableType:
    """Findings, one table per backend, and notes. Columns that do not fit are left out, no number is ever broken."""
    parts: list[RenderableType] = []
    for run in results:
        parts += [Text(_clean(run_title(run), ascii_only=ascii_only), style="bold")]
        for table in tables(run):
            parts += _backend(table, width, ascii_only=ascii_only)
    return Group(*parts)


def _backend(table: Table, width: int, *, ascii_only: bool) -> list[RenderableType]:
    def line(text: str, style: str = "") -> Text:
        return Text(_clean(text, ascii_only=ascii_only), style=style)

    facts = "; ".join(
        fact for fact in (table.provider, table.shape, table.split and table.measured and f"quality on {table.split}") if fact
    )
    parts: list[RenderableType] = [Text(), line(f"{table.backend}: {facts}")]
    if table.measured:
        parts += [Text(), _grid(table, width, ascii_only=ascii_only), Text()]
    parts += [
        line(f"{f.label} that {table.condition}: {f.row.name}{'' if all(g.proven for g in f.row.gates) else ' (not proven)'}", "bold")
        for f in table.findings
    ]
    if table.measured and not table.findings:
        parts.append(line(f"No target is smaller or faster than the baseline and {table.condition}.", "yellow"))
    parts += [line(text, "red") for text in _grouped((w, row) for row in table.measured for w in row.warnings)]
    parts += [line(text) for text in _grouped((r, row) for row in table.measured for r in row.remarks)]
    parts += [line(text, "yellow") for text in _grouped((f"{row.status}: {row.why}", row) for row in table.unmeasured)]
    return parts


def _grid(table: Table, width: int, *, ascii_only: bool) -> RichTable:
    names = _column(
        "target",
        [f"{row.name} (baseline)" if row.target.baseline else row.name for row in table.measured],
        0,
        ascii_only=ascii_only,
        number=False,
    )
    columns = [_column(title, cells, rank, ascii_only=ascii_only, number=number) for title, cells, rank, number in _cells(table)]
    shortest, longest = _NAME_WIDTHS
    left = width - min(max(names.width, shortest), longest)
    taken = []
    for column in sorted(columns, key=lambda c: c.rank):
        if column.width + _GAP > left:
            break
        left -= column.width + _GAP
        taken.append(column)
    grid = RichTable(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    grid.add_column(names.title, no_wrap=True, overflow="ellipsis" if not ascii_only else "crop", max_width=longest)
    shown = [column for column in columns if column in taken]
    for column in shown:
        grid.add_column(column.title, justify="right" if column.number else "left", no_wrap=True, min_width=column.width)
    for i, row in enumerate(table.measured):
        cells = [Text(column.cells[i], style=_STYLES.get(column.cells[i], "")) for column in shown]
        grid.add_row(Text(names.cells[i], style="red" if row.status == "gate missed" else ""), *cells)
    return grid


def _cells(table: Table) -> list[tuple[str, list[str], int, bool]]:
    """(title, cells, rank, number) in reading order."""
    rows = table.measured

    def of(name: str) -> list[str]:
        return [getattr(row, name) for row in rows]

    return [
        ("MB", of("size"), 1, True),
        ("smaller", of("smaller"), 2, True),
        ("gzip MB", of("gzip"), 11, True),
        ("p50 ms", of("p50"), 5, True),
        ("faster", of("faster"), 3, True),
        ("95 %", of("faster_ci"), 9, True),
        ("speed", of("speed"), 7, False),
        (table.metric, of("metric"), 6, True),
        ("95 %", of("metric_ci"), 10, True),
        ("Δ points", of("delta"), 4, True),
        ("95 %", of("delta_ci"), 8, True),
        ("p", [p.removeprefix("p = ").removeprefix("p ") for p in of("p")], 12, True),
        ("quality", of("quality"), 6, False),
    ]


def _column(title: str, cells: Sequence[str], rank: int, *, ascii_only: bool, number: bool) -> _Column:
    return _Column(_clean(title, ascii_only=ascii_only), tuple(_clean(cell, ascii_only=ascii_only) for cell in cells), rank, number)


def _grouped(notes: Iterable[tuple[str, Row]]) -> list[str]:
    """Each note once, after the names of the targets that it is about."""
    names: dict[str, list[str]] = {}
    for note, row in notes:
        names.setdefault(note, []).append(row.name)
    return [f"{', '.join(who)}: {note}" for note, who in names.items()]


def _clean(text: str, *, ascii_only: bool) -> str:
    """One line without control characters: a record must not steer the reader's terminal."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text.translate(_ASCII).encode("ascii", "replace").decode() if ascii_only else text
