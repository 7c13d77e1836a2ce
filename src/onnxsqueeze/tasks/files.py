"""A user's own task: rows from CSV, TSV, JSONL or Parquet files."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from onnxsqueeze.errors import DataError, nearest
from onnxsqueeze.tasks.rows import Row, SplitRows, TaskInfo
from onnxsqueeze.tasks.settings import CORRELATIONS, TaskSettings
from onnxsqueeze.tasks.tables import SUFFIXES, Faults, read_bytes, read_table

# Line, text, second text, label as a class name or a score.
_Parsed = tuple[int, str, str | None, str | float]


@dataclass(frozen=True)
class OwnFiles:
    """The files of ``settings``; classes are those of the training file, or the ones that ``settings.labels`` names.

    Making it checks that both files are there; the dev file is opened by `dev` alone.
    """

    settings: TaskSettings
    train_file: Path
    dev_file: Path

    def __post_init__(self) -> None:
        for path in (self.train_file, self.dev_file):
            if not path.is_file():
                raise DataError(
                    f"{path}: there is no such file",
                    remedy="correct `train:` and `dev:` of the task; paths in a recipe are relative to the recipe",
                )
            if path.suffix not in SUFFIXES:
                raise DataError(
                    f"{path}: unknown ending {path.suffix!r}{nearest(path.suffix, SUFFIXES)}", remedy=f"use one of {', '.join(SUFFIXES)}"
                )

    def info(self) -> TaskInfo:
        """Name (the training file's), classes and metrics; f1 is of the second class. Raises DataError where classes and metric do not fit."""
        metrics = self.settings.metric
        positive = self._labels[1] if "f1" in metrics else None
        return TaskInfo(self.train_file.stem, self._labels, metrics, metrics[0], self.settings.max_length, positive=positive)

    def train(self) -> SplitRows:
        """Every training row. Raises DataError."""
        return self._split("train", self.train_file, self._train_data, self._train_rows, "train")

    def dev(self) -> tuple[SplitRows, ...]:
        """The dev rows, read now. Raises DataError, also for a class that the training file does not have."""
        data = read_bytes(self.dev_file)
        return (self._split("validation", self.dev_file, data, list(self._parsed(self.dev_file, data)), "dev"),)

    @cached_property
    def _train_data(self) -> bytes:
        return read_bytes(self.train_file)

    @cached_property
    def _train_rows(self) -> list[_Parsed]:
        return list(self._parsed(self.train_file, self._train_data))

    @property
    def _scored(self) -> bool:
        return bool(CORRELATIONS.intersection(self.settings.metric))

    @cached_property
    def _labels(self) -> tuple[str, ...]:
        if self._scored:
            return ()
        found = sort_labels({str(label) for *_, label in self._train_rows})
        labels = self.settings.labels or found
        if len(labels) < 2:
            raise DataError(
                f"{self.train_file}: every row has the label {labels[0]!r}; a task needs two classes",
                remedy="check the column that `label:` names",
            )
        if "f1" in self.settings.metric and len(labels) != 2:
            raise DataError(
                f"{self.train_file}: metric f1 needs two classes, got {len(labels)}: {', '.join(labels)}", remedy="use accuracy or matthews"
            )
        return labels

    def _parsed(self, path: Path, data: bytes) -> Iterator[_Parsed]:
        settings, faults = self.settings, Faults(path)
        columns = [settings.text, settings.label, *([settings.text_pair] if settings.text_pair else [])]
        empty = True
        for line, (text, label, *pair) in read_table(path, data, columns, faults):
            empty = False
            fault = next(
                (
                    f"{column}: {why}"
                    for column, value in zip([columns[0], *columns[2:]], [text, *pair], strict=True)
                    if (why := _text_fault(value))
                ),
                None,
            )
            parsed = _score(label) if self._scored else _class_name(label)
            if fault:
                faults.add(line, fault)
            elif not text.strip() and not any(part.strip() for part in pair):
                faults.add(line, "has no text")
            elif parsed is None:
                faults.add(
                    line,
                    f"{settings.label}: must be {'a finite number' if self._scored else 'a class name or a whole number'}, got {label!r}",
                )
            else:
                yield line, text, pair[0] if pair else None, parsed
        faults.raise_any()
        if empty:
            raise DataError(f"{path}: holds no rows", remedy="write the file again")

    def _split(self, name: str, path: Path, data: bytes, parsed: Sequence[_Parsed], role: Literal["train", "dev"]) -> SplitRows:
        index, faults, rows = {label: i for i, label in enumerate(self._labels)}, Faults(path), []
        for line, text, pair, label in parsed:
            if isinstance(label, float):
                rows.append(Row(text, pair, label))
            elif label in index:
                rows.append(Row(text, pair, index[label]))
            else:
                faults.add(line, f"unknown class {label!r}; allowed: {', '.join(index)}")
        faults.raise_any("correct these rows, or name every class in `task: {labels: […]}`")
        return SplitRows(name, tuple(rows), path.name, hashlib.sha256(data).hexdigest(), role)


def sort_labels(names: set[str]) -> tuple[str, ...]:
    """Class names in natural order: whole numbers as numbers, else letter by letter with digits as numbers ("step 2" before "step 10")."""
    if all(re.fullmatch(r"-?\d+", name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(
        sorted(
            names,
            key=lambda name: ([(not piece.isdecimal(), int(piece) if piece.isdecimal() else 0, piece) for piece in _pieces(name)], name),
        )
    )


def _pieces(name: str) -> list[str]:
    return [piece for piece in re.split(r"(\d+)", name.casefold()) if piece]


def _text_fault(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"must be a text, got {value!r}"
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        return "holds half of a surrogate pair (a broken \\u escape)"
    return None


def _class_name(label: Any) -> str | None:
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, (int, str)):
        return str(label).strip() or None
    return None


def _score(label: Any) -> float | None:
    if isinstance(label, bool) or not isinstance(label, (int, float, str)):
        return None
    try:
        value = float(label)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
