"""finetune: train a pretrained encoder on the task. The result is the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from onnxsqueeze.artifact import Artifact
from onnxsqueeze.nn.settings import TrainingSettings
from onnxsqueeze.stage import Changed, Context


class Finetune(TrainingSettings):
    """Trains all weights on the task's loss, with a new head where the checkpoint has none of this width."""

    kind: Literal["finetune"] = "finetune"
    force: bool = Field(default=False, description="Train even where the model brings a trained head")

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:  # noqa: ARG002, needs no teacher
        """Write the best epoch's weights; counts the tensors that differ from the parent's."""
        from torch import Tensor

        from onnxsqueeze.nn import batches, checkpoint, losses, training

        task = context.task
        model, family = checkpoint.load(parent.path, task, new_head_seed=context.seed)

        def loss(batch: training.Batch) -> Tensor:
            return losses.task(model(**batch.inputs).logits, batch.labels, regression=task.kind == "regression")

        outcome = training.train(
            model,
            family,
            self,
            context,
            examples=batches.encode(parent.path, context.train.rows, task.max_length),
            selection=batches.encode(parent.path, context.selection.rows, task.max_length),
            loss=loss,
        )
        checkpoint.save(model, parent.path, out, task)
        return Changed(checkpoint.changed_tensors(parent.path, out), "tensors", outcome.details())
