"""Rows as token ids, and the order in which training sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxsqueeze.tasks.rows import Row
from onnxsqueeze.tokens import Encoded, Encoder

_BATCHES_A_BUCKET = 50  # sorted by length together: little padding, and still a random order; transformers' group_by_length takes 50, too


@dataclass(frozen=True)
class Examples:
    """Encoded rows and their labels, in the rows' order."""

    encoded: Sequence[Encoded]
    labels: Sequence[float]
    pad_id: int

    def __len__(self) -> int:
        return len(self.encoded)


def encode(folder: Path, rows: Sequence[Row], max_length: int) -> Examples:
    """``rows`` as the tokenizer of the model in ``folder`` reads them."""
    encoder = Encoder(folder, max_length)
    return Examples(encoder.encode(*_columns(rows)), [row.label for row in rows], encoder.pad_id)


def cut_otherwise(folder: Path, other: Path, rows: Sequence[Row], max_length: int) -> int:
    """How many of ``rows`` the tokenizers of two model folders cut at different places, so that their tokens do not stand for each other."""
    files = [at / "tokenizer.json" for at in (folder, other)]
    if files[0].read_bytes() == files[1].read_bytes():
        return 0
    spans = [Encoder(at, max_length).spans(*_columns(rows)) for at in (folder, other)]
    return sum(a != b for a, b in zip(*spans, strict=True))


def epoch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row indices of each batch of one epoch: rows of like length together, batches in random order. A function of its arguments."""
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    bucket = batch_size * _BATCHES_A_BUCKET
    batches = []
    for start in range(0, len(order), bucket):
        part = sorted(order[start : start + bucket].tolist(), key=lambda i: lengths[i])
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def _columns(rows: Sequence[Row]) -> tuple[list[str], list[str | None]]:
    return [row.text for row in rows], [row.text_pair for row in rows]


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row indices of batches from the shortest rows to the longest, for work whose order does not matter."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
