"""What a task is to everybody else: rows with labels, and what to do with them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from onnxsqueeze.errors import StageError


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
    ``positive`` is the class that f1 is of, by name: its index follows the order of ``labels``, which a trained model may turn.
    """

    name: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    primary: str
    max_length: int = 128
    generated: bool = False
    note: str = ""
    positive: str | None = None

    @property
    def kind(self) -> Literal["classification", "regression"]:
        """What the label is: a class, or a score."""
        return "classification" if self.labels else "regression"

    @property
    def outputs(self) -> int:
        """Width of the logits: one per class, or one."""
        return len(self.labels) or 1

    @property
    def positive_index(self) -> int:
        """Index of the class that f1 is of; 1 where ``positive`` names none."""
        return 1 if self.positive is None else self.labels.index(self.positive)


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
    """The sha256 over the rows themselves, in their order: other rows of the same file are other data."""
    total = hashlib.sha256()
    for row in rows:
        total.update(repr((row.text, row.text_pair, row.label)).encode())
    return total.hexdigest()


def spread(rows: Sequence[Row], samples: int) -> list[Row]:
    """``samples`` rows at even distances (all, where there are no more); raises StageError where there are none."""
    if not rows:
        raise StageError("there are no training rows to run the model on", remedy="give the task a training file with at least 50 rows")
    count = min(samples, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]
