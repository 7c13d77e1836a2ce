"""train-low-bit: weights of one to four bits, whose values are fitted by least squares, trained on those values."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from onnxsqueeze.artifact import Artifact
from onnxsqueeze.nn.settings import FewValuesSettings
from onnxsqueeze.stage import Changed, Context


class TrainLowBit(FewValuesSettings):
    """Every weight of the layers ends on one of few values of its row (or matrix); training moves the weights behind them, beside the teacher.

    The file stays as large as it was until `pack` writes it in few bits; the record states the entropy. Source: `onnxsqueeze.nn.levels`.
    """

    kind: Literal["train-low-bit"] = "train-low-bit"
    method: Literal["binary-greedy", "binary", "ternary", "code-book"] = Field(
        "code-book", description="Sums of one sign and scale a bit, fitted greedily or in the least squares; 0 and ± a scale; or any values"
    )
    bits: int = Field(3, ge=1, le=4, description="Bits a weight; ternary has its own 1.58")
    renew: int = Field(50, ge=1, description="Steps after which the values are fitted again")

    @model_validator(mode="after")
    def _ternary_has_its_own_bits(self) -> Self:
        if self.method == "ternary" and "bits" in self.model_fields_set:
            raise ValueError("bits: ternary weights have three values; leave bits out")
        return self

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:
        """Write the best epoch with every weight on its level; counts the weights that have moved there in the written file.

        Raises StageError where a row of the written file has more values than it may.
        """
        from onnxsqueeze.nn import checkpoint, distillation, few_values, levels, training

        task = context.task
        model, family = checkpoint.load(parent.path, task)
        names = few_values.matrices(self, model, family)
        training.place(model)
        per_row = [self.scope == "row"] * len(names)
        moved = levels.OnLevels(model, names, self.method, self.bits, per_row=per_row)
        lessons = distillation.Distillation(self, model, family, context, parent, teacher)

        def after_step(done: int) -> None:
            if done % self.renew == 0 or done % lessons.steps == 0:  # at an epoch's end, so that its levels are those of its weights
                moved.renew()

        with moved:
            untrained = lessons.score()
            outcome = lessons.train(companion=moved, after_step=after_step)
        moved.cpu().settle()
        checkpoint.save(model, parent.path, out, task)
        allowed = dict.fromkeys(names, 3 if self.method == "ternary" else 2**self.bits)
        found = few_values.written(self, out, task, allowed, per_row)
        details = {**outcome.details(), "score_before_training": untrained, **found, "with_teacher": lessons.taught}
        return Changed(found["weights"], "weights", details)
