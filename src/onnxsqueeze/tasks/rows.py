"""What a task is to everybody else: rows with labels, and what to do with them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """One labelled example. ``label`` is a class index, or a score for regression."""

    text: str
    text_pair: str | None
    label: int | float


@dataclass(frozen=True)
class TaskInfo:
    """What a stage or a measurement must know of a task; no rows.

    ``labels`` are the class names by index; empty for regression (one output, a score).
    ``metrics`` are all that are reported; ``primary`` is the one that decides. ``max_length`` is in tokens.
    """

    name: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    primary: str
    max_length: int = 128
    generated: bool = False
    note: str = ""

    @property
    def kind(self) -> Literal["classification", "regression"]:
        """What the label is: a class, or a score."""
        return "classification" if self.labels else "regression"

    @property
    def outputs(self) -> int:
        """Width of the logits: one per class, or one."""
        return len(self.labels) or 1


@dataclass(frozen=True)
class SplitRows:
    """The rows of one named split, where they came from and the sha256 of that source."""

    name: str
    rows: Sequence[Row]
    source: str  # a file name or "generated": never a path
    sha256: str
    role: Literal["train", "selection", "dev"]
    dropped: int = 0


def rows_sha256(rows: Sequence[Row]) -> str:
    """The sha256 of rows that lie in no file: one JSON array [text, text_pair, label] a line, UTF-8."""
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps([row.text, row.text_pair, row.label], ensure_ascii=False).encode() + b"\n")
    return total.hexdigest()
