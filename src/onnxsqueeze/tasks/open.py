"""A task with its rows: training and selection rows at hand, the dev set behind one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from onnxsqueeze.tasks import glue
from onnxsqueeze.tasks.files import OwnFiles
from onnxsqueeze.tasks.labels import labels_in_model_order, relabel, resolve_labels
from onnxsqueeze.tasks.rows import SplitRows, TaskInfo
from onnxsqueeze.tasks.selection import split_training
from onnxsqueeze.tasks.settings import TaskSettings
from onnxsqueeze.tasks.toy import Toy, toy_info


class Source(Protocol):
    """Where rows come from: files, the Hub, a grammar."""

    def train(self) -> SplitRows:
        """Every training row."""

    def dev(self) -> tuple[SplitRows, ...]:
        """The dev splits; the one place where a dev file is opened."""


@dataclass(frozen=True)
class Task:
    """What the run trains on, chooses on and is scored on.

    ``labels_stated`` is True where the user gave the order of the classes. ``source_labels`` is the order in which ``source`` counts.
    """

    info: TaskInfo
    train: SplitRows
    selection: SplitRows
    source: Source
    source_labels: tuple[str, ...]
    labels_stated: bool = False

    def dev(self) -> tuple[SplitRows, ...]:
        """Open and read the dev files, now. For measuring alone, when every choice of the run is made. Raises DataError."""
        return tuple(relabel(split, self.source_labels, self.info.labels) for split in self.source.dev())

    def with_label_order(self, labels: Sequence[str]) -> Task:
        """The same task with its classes in another order, all rows relabelled (dev rows when they are read). Raises DataError."""
        ordered = resolve_labels(self.info, labels)
        train, selection = (relabel(split, self.info.labels, ordered) for split in (self.train, self.selection))
        return replace(self, info=replace(self.info, labels=ordered), train=train, selection=selection)

    def in_order_of(self, id2label: Mapping[int, str]) -> Task:
        """The same task with its classes in the order of a trained model's outputs. Raises DataError where that cannot be proven."""
        return self.with_label_order(labels_in_model_order(self.info, id2label, stated=self.labels_stated))


def open_task(settings: TaskSettings, *, data_dir: Path | None, seed: int) -> Task:
    """Read the training rows and split them; make sure that the dev files exist, without opening them.

    Raises DataError for files that are missing or broken, too few rows, and classes that do not fit.
    """
    source, info = _source(settings, data_dir)
    train, selection = split_training(source.train(), seed, settings.train_rows)
    info = replace(info, compare=settings.compare, pooling=settings.pooling)
    task = Task(info, train, selection, source, info.labels, labels_stated=settings.labels is not None)
    return task if settings.labels is None else task.with_label_order(settings.labels)


def _source(settings: TaskSettings, data_dir: Path | None) -> tuple[Source, TaskInfo]:
    if settings.train is not None and settings.dev is not None:
        own = OwnFiles(settings, settings.train, settings.dev)
        return own, own.info()
    if settings.name == "toy":
        return Toy(), toy_info(settings.max_length)
    found = glue.find(str(settings.name), data_dir)
    return found, found.spec.info(settings.max_length, found.note)
