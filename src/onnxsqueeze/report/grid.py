"""A titled table of text, which Markdown and HTML draw alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A column's heading, and whether it holds numbers (set flush right)."""

    title: str
    number: bool = False


@dataclass(frozen=True)
class Grid:
    """A titled table of text. ``secondary`` grids are folded away where the form can."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    secondary: bool = False


def grid(title: str, columns: str, rows: Iterable[tuple[str, ...]], *, note: str = "", secondary: bool = False) -> Grid:
    """``columns`` are parted by ``|``; one that begins with ``#`` holds numbers."""
    heads = tuple(Column(name.removeprefix("#"), number=name.startswith("#")) for name in columns.split("|"))
    return Grid(title, heads, tuple(rows), note, secondary)


def joined(*parts: str, between: str = " ") -> str:
    """The parts that are not empty."""
    return between.join(part for part in parts if part)
