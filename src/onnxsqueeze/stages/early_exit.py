"""early-exit: heads after earlier layers, trained with the rest, so that easy rows need not go through all of it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from onnxsqueeze.artifact import Artifact
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn.settings import StatesTaughtSettings
from onnxsqueeze.stage import Changed, Context


class EarlyExit(StatesTaughtSettings):
    """Adds exit heads and trains them on the labels and on what the last head says, with the whole model or alone.

    The export then has one output more per exit; `branch-exits` makes one .onnx of it that stops where it is sure. Source: Teerapittayanon et al. 2016,
    "BranchyNet" (joint training); Phuong and Lampert 2019, "Distillation-Based Training for Multi-Exit Architectures" (exits learn from the last).
    """

    embeds: ClassVar[bool] = False

    kind: Literal["early-exit"] = "early-exit"
    after: tuple[int, ...] = Field((1, 3), min_length=1, description="Behind which layers, counted from 0, a head is put; never the last")
    train: Literal["all", "exits"] = Field("all", description="Train the whole model, or leave it as it is and train the exits alone")
    alpha_exits: float = Field(1.0, gt=0, description="Weight of the exits' loss, the mean over them, beside the last head's")

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:
        """Write the best epoch, by the mean score of all heads; counts the weights of the exits in the written file.

        Raises StageError for layers that the model has not, and for a task of scores: they have no confidence.
        """
        import numpy as np
        import torch

        from onnxsqueeze.nn import checkpoint, distillation, exits, losses, structure, training
        from onnxsqueeze.nn import family as families

        task = context.task
        if task.kind == "regression":
            raise StageError(
                f"{self.name}: the task {task.name} asks for a score, which has no confidence to leave by", remedy="use it for classes"
            )
        model, family = checkpoint.load(parent.path, task)
        deep = len(families.layers(model, family))
        if list(self.after) != sorted(set(self.after)) or self.after[0] < 0 or self.after[-1] >= deep - 1:
            raise StageError(
                f"{self.name}: after: must be rising indices from 0 to {deep - 2}, the layer before the last, got {list(self.after)}",
                remedy="name earlier layers",
            )
        exits.attach(model, self.after, context.seed)
        structure.note(model, structure.of(model, family))
        if self.train == "exits":
            for name, parameter in model.named_parameters():
                parameter.requires_grad = name.startswith(f"{exits.ATTRIBUTE}.")
        lessons = distillation.Distillation(self, model, family, context, parent, teacher)

        def loss(batch: training.Batch) -> torch.Tensor:
            own = lessons.run(batch, states=True)
            last = own.logits.detach()
            parts = [
                losses.task(found, batch.labels, regression=False)
                + losses.logits(found, last, temperature=self.temperature, regression=False)
                for found in exits.of(model, own.hidden_states)
            ]
            return lessons.loss_of(own, batch) + self.alpha_exits * torch.stack(parts).mean()

        def scores() -> list[float]:
            training.place(model)
            return [context.select(logits) for logits in exits.predict(model, family, lessons.selection)]

        def mean_score() -> float:
            return float(np.mean(scores()))

        outcome = lessons.train(loss=loss, scored=mean_score)
        reached = scores()
        checkpoint.save(model, parent.path, out, task)
        again, _ = checkpoint.load(out, task)
        weights = sum(p.numel() for name, p in again.named_parameters() if name.startswith(f"{exits.ATTRIBUTE}."))
        details = {**outcome.details(), "after": list(self.after), "scores": reached, "with_teacher": lessons.taught}
        return Changed(weights, "weights of exits", details)
