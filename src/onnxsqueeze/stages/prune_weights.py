"""prune-weights: set the smallest weights to zero, a few more with every training step, and let the rest recover."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from onnxsqueeze.artifact import Artifact
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn.settings import TrainingSettings
from onnxsqueeze.stage import Changed, Context

_TOLERANCE = 0.001  # of the weights: equal magnitudes at the threshold fall together


class PruneWeights(TrainingSettings):
    """Unstructured magnitude pruning while training: zeros make a file smaller where it is packed, and make nothing faster.

    Source: Zhu and Gupta 2017, "To prune, or not to prune" (schedule); Sanh et al. 2020, "Movement Pruning", section 4 (a dense
    start and a recovery at the final sparsity, and distillation beside pruning).
    """

    kind: Literal["prune-weights"] = "prune-weights"
    teacher: str | None = Field(
        None, description="Id of the stage above whose result teaches, or 'model'; default: the last finetune above"
    )
    sparsity: float = Field(0.5, gt=0, lt=1, description="Share of the pruned matrices' weights that is zero in the end")
    scope: Literal["global", "layer"] = Field("global", description="Compare magnitudes over all matrices, or within each")
    embeddings: bool = Field(default=False, description="Prune the embeddings, too")
    recovery: float = Field(0.34, ge=0, lt=1, description="Last fraction of all steps, trained at the final sparsity")
    temperature: float = Field(2.0, gt=0, description="Softens the logits of teacher and student")
    alpha_task: float = Field(0.5, ge=0, description="Weight of the loss against the labels, where there is a teacher")
    alpha_logits: float = Field(1.0, ge=0, description="Weight of the loss against the teacher's logits, where there is a teacher")

    @model_validator(mode="after")
    def _prunes_nothing_frozen(self) -> Self:
        if self.embeddings and self.freeze_embeddings:
            raise ValueError("embeddings and freeze_embeddings exclude each other: what is pruned must be trained")
        return self

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:
        """Write the best epoch at the final sparsity; counts the zeros that the written file has more than the parent.

        Raises StageError where the parent is already sparser, or the written file misses the sparsity.
        """
        from torch import Tensor

        from onnxsqueeze.nn import batches, checkpoint, losses, masks, training
        from onnxsqueeze.nn import family as families
        from onnxsqueeze.nn import teacher as teachers

        task, regression = context.task, context.task.kind == "regression"
        model, family = checkpoint.load(parent.path, task)
        names = list(families.linear_weights(model, family)) + (list(families.embedding_weights(model, family)) if self.embeddings else [])
        pruned = masks.MagnitudeMasks(model, names, self.scope)
        weights, zeros_before = pruned.total(), pruned.zeros()
        before = zeros_before / weights
        if before >= self.sparsity:
            raise StageError(
                f"{self.name}: sparsity: {before:.1%} of the parent's weights are zero already", remedy=f"ask for more than {before:.3f}"
            )

        examples = batches.encode(parent.path, context.train.rows, task.max_length)
        known = None
        if teacher is not None and self.alpha_logits > 0:
            master = teachers.load(teacher.path, context)
            known = teachers.logits(master, self.precision, context)
            del master
        total = math.ceil(len(examples) / self.batch_size) * self.epochs
        last = max(1, math.floor(total * (1 - self.recovery)))
        first = min(math.ceil(total * self.warmup), last - 1)
        schedule = masks.cubic_schedule(before, self.sparsity, first, last)

        def loss(batch: training.Batch) -> Tensor:
            own = model(**batch.inputs).logits
            against_labels = losses.task(own, batch.labels, regression=regression)
            if known is None:
                return against_labels
            softened = losses.logits(own, known[batch.index], temperature=self.temperature, regression=regression)
            return self.alpha_task * against_labels + self.alpha_logits * softened

        def after_step(done: int) -> None:
            if done in schedule:
                pruned.update(schedule[done])
            pruned.apply_()

        outcome = training.train(
            model,
            family,
            self,
            context,
            examples=examples,
            selection=batches.encode(parent.path, context.selection.rows, task.max_length),
            loss=loss,
            companion=pruned,
            after_step=after_step,
            first_epoch_to_keep=math.ceil(last * self.epochs / total),
        )
        checkpoint.save(model, parent.path, out, task)
        zeros = checkpoint.count_zeros(out, names)
        if abs(zeros / weights - self.sparsity) > _TOLERANCE:
            raise StageError(
                f"{self.name}: {zeros / weights:.2%} of the written weights are zero, not {self.sparsity:.2%}",
                remedy="report this as a bug",
            )
        details = {**outcome.details(), "weights": weights, "zeros": zeros, "sparsity": zeros / weights, "with_teacher": known is not None}
        return Changed(zeros - zeros_before, "weights", details)
