"""Classes by name: the task's labels put in the order of a trained model's outputs, or an error where that cannot be proven."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from onnxsqueeze.errors import DataError
from onnxsqueeze.tasks.rows import SplitRows, TaskInfo

_NEW_HEAD = "set force: true on the finetune stage, which trains a new head"


def labels_in_model_order(info: TaskInfo, id2label: Mapping[int, str], *, stated: bool = False) -> tuple[str, ...]:
    """The task's class names in the order of the model's outputs; () for a score.

    Names are compared without regard to case, spaces, hyphens and underscores. Where they do not match, the task's own order
    is taken if the user ``stated`` it (`task: {labels: […]}`) and the number fits; else DataError shows both orders.
    """
    model = [id2label[i] for i in sorted(id2label)]
    if info.kind == "regression":
        if len(model) != 1:
            raise DataError(
                f"task {info.name}: its label is a score (one output), but the model has {len(model)}: {_shown(model)}",
                remedy=f"take a model trained on scores, or {_NEW_HEAD}",
            )
        return ()
    ordered = _match(info.labels, model)
    if ordered:
        return ordered
    if len(model) != len(info.labels):
        raise DataError(
            f"task {info.name}: the task has {len(info.labels)} classes ({_shown(info.labels)}), but the model has {len(model)}"
            f" ({_shown(model)})",
            remedy=f"take a model trained on these classes, or {_NEW_HEAD}",
        )
    if stated:
        return info.labels
    raise DataError(
        f"task {info.name}: which output of the model is which class cannot be proven: the task's classes are {_shown(info.labels)};"
        f" the model's are {_shown(model)}",
        remedy="name the task's classes in the order of the model's outputs (task: {labels: ["
        + ", ".join(info.labels)
        + f"]}} if it is this one), set id2label in the model's config.json, or {_NEW_HEAD}",
    )


def resolve_labels(info: TaskInfo, given: Sequence[str]) -> tuple[str, ...]:
    """The task's own spelling of ``given``, in the order of ``given``. Raises DataError where these are not the task's classes."""
    ordered = _match(info.labels, given)
    if ordered is None:
        raise DataError(
            f"task {info.name}: labels: must be the task's classes ({_shown(info.labels)}) in any order, got {_shown(given)}",
            remedy="correct `task: {labels: […]}`",
        )
    return ordered


def relabel(split: SplitRows, old: Sequence[str], new: Sequence[str]) -> SplitRows:
    """The same rows with class indices that count in ``new`` instead of ``old``; both hold the same names, or none (scores)."""
    if tuple(old) == tuple(new):
        return split
    index = {i: new.index(name) for i, name in enumerate(old)}
    return replace(split, rows=tuple(replace(row, label=index[int(row.label)]) for row in split.rows))


def _match(own: Sequence[str], given: Sequence[str]) -> tuple[str, ...] | None:
    """The names of ``own`` in the order of ``given``, where these are the same names, one by one."""
    if sorted(own) == sorted(given):
        return tuple(given)
    by_name = {_plain(name): name for name in own}
    if len(by_name) < len(own) or sorted(map(_plain, given)) != sorted(by_name):
        return None
    return tuple(by_name[_plain(name)] for name in given)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.casefold())


def _shown(names: Sequence[str]) -> str:
    return ", ".join(f"{i}: {name}" for i, name in enumerate(names))
