"""prune-structure: takes heads and neurons out of the layers, the least important first, while the rest recovers; the file is smaller and faster for it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from onnxsqueeze.artifact import Artifact
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn.settings import TrainingSettings
from onnxsqueeze.stage import Changed, Context

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from onnxsqueeze.nn.budget import Costs
    from onnxsqueeze.nn.gates import Gates
    from onnxsqueeze.nn.losses import Projections
    from onnxsqueeze.nn.structure import Structure

_NOISE = 2.0**-12  # of the largest logit: sums in another order


class Budget(BaseModel):
    """What the layers may cost in the end, as a share of what they cost before."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    measure: Literal["parameters", "multiply-adds"] = Field("parameters", description="What is counted, in the layers' matrices")
    share: float = Field(0.5, gt=0, lt=1, description="What is left of it")
    tokens: int = Field(128, ge=1, description="Tokens a row, for multiply-adds")


class PruneStructure(TrainingSettings):
    """Removes attention heads and feed-forward neurons by importance, a few more with every step of the training; layers may end up unequal.

    Source: importance, `onnxsqueeze.nn.gates`; schedule, Zhu and Gupta 2017, "To prune, or not to prune"; distillation beside pruning of
    structures, Xia et al. 2022, "Structured Pruning Learns Compact and Accurate Models", section 3.2.
    """

    kind: Literal["prune-structure"] = "prune-structure"
    teacher: str | None = Field(
        None, description="Id of the stage above whose result teaches, or 'model'; default: the last finetune above"
    )
    budget: Budget = Field(Budget(), description="What the layers may cost in the end")
    multiple_of: int = Field(32, ge=1, description="Neurons of a layer are a multiple of it: products of odd widths are slow")
    recovery: float = Field(0.5, ge=0, lt=1, description="Last fraction of all steps, trained with the final structure")
    temperature: float = Field(2.0, gt=0, description="Softens the logits of teacher and student")
    alpha_task: float = Field(0.5, ge=0, description="Weight of the loss against the labels, where there is a teacher")
    alpha_logits: float = Field(1.0, ge=0, description="Weight of the loss against the teacher's logits, where there is a teacher")
    alpha_hidden: float = Field(1.0, ge=0, description="Weight of the loss against the teacher's hidden states, where there is a teacher")

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:
        """Write the best epoch with the final structure; counts the heads and neurons that are gone from the written file.

        Raises StageError where the layers cannot become as cheap as the budget asks, or the model without its masked parts says something else.
        """
        from onnxsqueeze.nn import batches, budget, checkpoint, distillation, gates, masks, structure, training
        from onnxsqueeze.nn import family as families

        task = context.task
        model, family = checkpoint.load(parent.path, task)
        examples, selection = (batches.encode(parent.path, rows.rows, task.max_length) for rows in (context.train, context.selection))
        deep = len(families.layers(model, family))
        lessons = distillation.Distillation(
            distillation.Weights(self.alpha_task, self.alpha_logits, self.alpha_hidden, temperature=self.temperature),
            model,
            family,
            examples,
            context,
            precision=self.precision,
            parent=parent.path,
            teacher_folder=teacher.path if teacher else None,
            kept=range(deep),
            of=deep,
        )
        masked = gates.Gates(model, family)
        had = masked.shape
        costs = self._costs(model.config.hidden_size, had)
        full, limit = costs.of(had), self.budget.share * costs.of(had)
        self._require_possible(had, costs, limit)
        total = math.ceil(len(examples) / self.batch_size) * self.epochs
        last = max(1, math.floor(total * (1 - self.recovery)))
        first = min(math.ceil(total * self.warmup), last - 1)
        schedule = masks.cubic_schedule(0.0, 1 - self.budget.share, first, last)

        def after_step(done: int) -> None:
            masked.watch()
            if done in schedule:
                goal = (1 - schedule[done]) * full
                masked.keep(*budget.choose(masked.importance("heads"), masked.importance("neurons"), costs, goal, self.multiple_of))

        outcome = training.train(
            model,
            family,
            self,
            context,
            examples=examples,
            selection=selection,
            loss=lessons.loss,
            companion=_together(masked, lessons.companion),
            after_step=after_step,
            first_epoch_to_keep=math.ceil(last * self.epochs / total),
        )
        training.place(model)
        before = training.predict(model, family, selection)
        masked.release()
        structure.shrink(model, family, masked.kept("heads"), masked.kept("neurons"))
        self._require_same(before, training.predict(model, family, selection))
        checkpoint.save(model, parent.path, out, task)
        left = structure.of(checkpoint.load(out, task)[0], family)
        details = {
            **outcome.details(),
            "heads_before": list(had.heads),
            "heads": list(left.heads),
            "neurons_before": list(had.neurons),
            "neurons": list(left.neurons),
            "share": costs.of(left) / full,
            "with_teacher": lessons.taught,
        }
        gone = sum(had.heads) - sum(left.heads) + sum(had.neurons) - sum(left.neurons)
        return Changed(gone, "heads and neurons", details)

    def _costs(self, hidden: int, shape: Structure) -> Costs:
        from onnxsqueeze.nn import budget

        if self.budget.measure == "parameters":
            return budget.parameters(hidden, shape.head_size)
        return budget.multiply_adds(hidden, shape.head_size, self.budget.tokens)

    def _require_possible(self, had: Structure, costs: Costs, limit: float) -> None:
        least = replace(had, heads=tuple(1 for _ in had.heads), neurons=tuple(min(n, self.multiple_of) for n in had.neurons))
        if costs.of(least) > limit:
            raise StageError(
                f"{self.name}: budget: share: one head and {self.multiple_of} neurons a layer are {costs.of(least) / costs.of(had):.1%} of the"
                f" layers' {self.budget.measure}, more than {self.budget.share:.1%}",
                remedy="raise share, lower multiple_of, or drop layers first (distill)",
            )

    def _require_same(self, masked: NDArray[np.float32], cut: NDArray[np.float32]) -> None:
        import numpy as np

        off, scale = float(np.abs(masked - cut).max()), float(np.abs(masked).max())
        if not off <= _NOISE * scale:  # "not": NaN fails too
            raise StageError(
                f"{self.name}: without its masked parts the model's logits move by {off:.3g}, more than float32 noise explains",
                remedy="report this as a bug",
            )


def _together(masked: Gates, projections: Projections | None) -> nn.Module:
    from torch import nn

    return masked if projections is None else nn.ModuleList([masked, projections])
