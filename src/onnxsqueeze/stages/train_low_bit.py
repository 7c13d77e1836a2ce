"""train-low-bit: weights of one to four bits, whose values are fitted by least squares, trained on those values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from onnxsqueeze.artifact import Artifact
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn.settings import StatesTaughtSettings
from onnxsqueeze.stage import Changed, Context

if TYPE_CHECKING:
    from torch import Tensor


class TrainLowBit(StatesTaughtSettings):
    """Every weight of the layers ends on one of few values of its row (or matrix); training moves the weights behind them, beside the teacher.

    The file stays as large as it was until `pack` writes it in few bits; the record states the entropy. Source: `onnxsqueeze.nn.levels`.
    """

    kind: Literal["train-low-bit"] = "train-low-bit"
    method: Literal["binary-greedy", "binary", "ternary", "code-book"] = Field(
        "code-book", description="Sums of one sign and scale a bit, fitted greedily or in the least squares; 0 and ± a scale; or any values"
    )
    bits: int = Field(3, ge=1, le=4, description="Bits a weight; ternary has its own 1.58")
    scope: Literal["row", "matrix"] = Field("row", description="Who shares values: the weights of one output, or of one matrix")
    embeddings: bool = Field(default=False, description="The tables of words, positions and token types, too")
    renew: int = Field(50, ge=1, description="Steps after which the values are fitted again")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.method == "ternary" and "bits" in self.model_fields_set:
            raise ValueError("bits: ternary weights have three values; leave bits out")
        if self.embeddings and self.freeze_embeddings:
            raise ValueError("embeddings and freeze_embeddings exclude each other: what is moved must be trained")
        return self

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:
        """Write the best epoch with every weight on its level; counts the weights that have moved there in the written file.

        Raises StageError where a row of the written file has more values than it may.
        """
        from onnxsqueeze.nn import checkpoint, distillation, levels, training
        from onnxsqueeze.nn import family as families

        task = context.task
        model, family = checkpoint.load(parent.path, task)
        names = list(families.linear_weights(model, family)) + (list(families.embedding_weights(model, family)) if self.embeddings else [])
        training.place(model)
        moved = levels.OnLevels(model, names, self.method, self.bits, per_row=self.scope == "row")
        lessons = distillation.Distillation(self, model, family, context, parent, teacher)

        def after_step(done: int) -> None:
            if done % self.renew == 0 or done % lessons.steps == 0:  # at an epoch's end, so that its levels are those of its weights
                moved.renew()

        with moved:
            untrained = lessons.score()
            outcome = lessons.train(companion=moved, after_step=after_step)
        moved.cpu().settle()
        checkpoint.save(model, parent.path, out, task)
        again, _ = checkpoint.load(out, task)
        rows = {name: self._rows(again.get_parameter(name).detach()) for name in names}
        self._require_few(rows)
        weights = sum(values.numel() for values in rows.values())
        bits = sum(_entropy_bits(values) for values in rows.values())
        details = {
            **outcome.details(),
            "score_before_training": untrained,
            "weights": weights,
            "entropy_bits_per_weight": bits / weights,
            "levels": sum(len(row.unique()) for values in rows.values() for row in values),
            "with_teacher": lessons.taught,
        }
        return Changed(weights, "weights", details)

    def _rows(self, weight: Tensor) -> Tensor:
        return weight if self.scope == "row" else weight.reshape(1, -1)

    def _require_few(self, rows: Mapping[str, Tensor]) -> None:
        allowed = 3 if self.method == "ternary" else 2**self.bits
        for name, values in rows.items():
            most = max(len(row.unique()) for row in values)
            if most > allowed:
                raise StageError(
                    f"{self.name}: {name}: a row of the written file has {most} values, {allowed} are allowed",
                    remedy="report this as a bug",
                )


def _entropy_bits(rows: Tensor) -> float:
    """The order-0 entropy of a matrix's codes, each row with its own levels, ranked; in bits for all its weights."""
    import torch

    counts: dict[int, int] = {}
    for row in rows:
        for code, count in enumerate(torch.unique(row, return_counts=True)[1].tolist()):
            counts[code] = counts.get(code, 0) + count
    total = sum(counts.values())
    return -sum(count * math.log2(count / total) for count in counts.values())
