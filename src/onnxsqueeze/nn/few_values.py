"""Weights on few values: a model whose matrices count as something else while it is trained, and what they hold in the written file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn
from torch.nn import functional

from onnxsqueeze.errors import StageError
from onnxsqueeze.nn import checkpoint
from onnxsqueeze.nn import family as families
from onnxsqueeze.nn.family import Family
from onnxsqueeze.nn.settings import FewValuesSettings
from onnxsqueeze.tasks.rows import TaskInfo


def matrices(settings: FewValuesSettings, model: nn.Module, family: Family) -> list[str]:
    """Names of the matrices that the settings are about."""
    return [*families.linear_weights(model, family), *(families.embedding_weights(model, family) if settings.embeddings else ())]


class Replaced(nn.Module):
    """While entered, the named matrices of a model count as what `value` says; the state dict stays what it was.

    ``per_row``: each row of a matrix is by itself, else all of it is one row; said of all, or of each.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], *, per_row: bool | Sequence[bool]) -> None:
        super().__init__()
        self._model, self._names = [model], list(names)  # in a list, so that it is no part of this module
        self._per_row = [per_row] * len(names) if isinstance(per_row, bool) else list(per_row)
        self._forwards: list[tuple[nn.Module, Any]] = []

    def value(self, i: int, weight: Tensor) -> Tensor:
        """What the ``i``-th matrix counts as, in its shape; gradients go where they shall."""
        raise NotImplementedError

    def _weights(self) -> list[nn.Parameter]:
        return [self._model[0].get_parameter(name) for name in self._names]

    def _rows(self, i: int, weight: Tensor) -> Tensor:
        return weight if self._per_row[i] else weight.reshape(1, -1)

    def __enter__(self) -> Self:
        for i, name in enumerate(self._names):
            module = self._model[0].get_submodule(name.removesuffix(".weight"))
            self._forwards.append((module, module.forward))
            module.forward = self._forward(i, module)
        return self

    def __exit__(self, *_: object) -> None:
        for module, forward in self._forwards:
            module.forward = forward
        self._forwards.clear()

    def _forward(self, i: int, module: nn.Module) -> Any:
        def forward(given: Tensor) -> Tensor:
            weight = self.value(i, module.get_parameter("weight"))
            if isinstance(module, nn.Embedding):
                return functional.embedding(given, weight, module.padding_idx)
            assert isinstance(module, nn.Linear)  # noqa: S101  # no other module has a matrix
            return functional.linear(given, weight, module.bias)

        return forward


def written(
    settings: FewValuesSettings, folder: Path, task: TaskInfo, allowed: Mapping[str, int], per_row: Sequence[bool]
) -> dict[str, Any]:
    """What a written checkpoint's matrices hold: how many weights, their entropy in bits, how many levels all rows have together.

    ``allowed``: by a matrix's name, how many values a row may have; ``per_row``: whether it is a row of the matrix, or all of it. Raises StageError where one has more.
    """
    model, _ = checkpoint.load(folder, task)
    weights, levels, entropy = 0, 0, 0.0
    for (name, most_allowed), rowwise in zip(allowed.items(), per_row, strict=True):
        weight = model.get_parameter(name).detach()
        counts = [row.unique(return_counts=True)[1].tolist() for row in (weight if rowwise else weight.reshape(1, -1))]
        most = max(map(len, counts))
        if most > most_allowed:
            raise StageError(
                f"{settings.name}: {name}: a {'row' if rowwise else 'matrix'} of the written file has {most} values, {most_allowed} are allowed",
                remedy="report this as a bug",
            )
        weights, levels, entropy = weights + weight.numel(), levels + sum(map(len, counts)), entropy + _entropy_bits(counts)
    return {"weights": weights, "entropy_bits_per_weight": entropy / weights, "levels": levels}


def _entropy_bits(counts: Sequence[Sequence[int]]) -> float:
    """The order-0 entropy of a matrix's codes, each row with its own levels, ranked; in bits for all its weights."""
    by_rank: dict[int, int] = {}
    for row in counts:
        for code, count in enumerate(row):
            by_rank[code] = by_rank.get(code, 0) + count
    total = sum(by_rank.values())
    return -sum(count * math.log2(count / total) for count in by_rank.values())
