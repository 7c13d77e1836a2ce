"""What a task is to everybody else: rows with labels, and what to do with them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from onnxsqueeze.errors import StageError

UNLABELLED = -100  # the label of a row that has none: torch's cross entropy leaves it out


@dataclass(frozen=True)
class Row:
    """One example. ``label`` is a class index, a score for regression, or `UNLABELLED`."""

    text: str
    text_pair: str | None
    label: int | float


@dataclass(frozen=True)
class TaskInfo:
    """What a stage or a measurement must know of a task; no rows.

    ``labels`` are the class names by index; empty for regression (one output, a score).
    ``metrics`` are all that are reported; ``primary`` is the one that decides. ``max_length`` is in tokens.
    ``positive`` is the class that f1 is of, by name: its index follows the order of ``labels``, which a trained model may turn.
    ``compare`` is how the vectors of a pair's texts become its score, where the model embeds; ``pooling`` how it makes them.
    """

    name: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    primary: str
    max_length: int = 128
    generated: bool = False
    note: str = ""
    positive: str | None = None
    compare: Literal["cosine"] | None = None
    pooling: Literal["mean", "first"] = "mean"

    @property
    def embeds(self) -> bool:
        """Whether the model reads single texts and gives vectors."""
        return self.compare is not None

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


def as_read(info: TaskInfo, split: SplitRows) -> SplitRows:
    """The rows as the model reads them: for one that embeds the single texts, without labels.

    The first and the second of each pair stand one behind the other; on training rows each text once.
    """
    if not info.embeds:
        return split
    texts = [text for row in split.rows for text in (row.text, row.text_pair or "")]
    return replace(split, rows=tuple(Row(text, None, UNLABELLED) for text in (dict.fromkeys(texts) if split.role == "train" else texts)))


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
