"""finetune: train a pretrained encoder on the task. The result is the teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from onnxsqueeze.artifact import Artifact
from onnxsqueeze.nn.settings import TrainingSettings
from onnxsqueeze.stage import Changed, Context

if TYPE_CHECKING:
    from torch import Tensor, nn

    from onnxsqueeze.nn.soup import Soup
    from onnxsqueeze.nn.training import Outcome

_SEED_STEP = 100_003  # between the orders of two runs: no seed that a user counts up to


class Finetune(TrainingSettings):
    """Trains all weights on the task's loss, with a new head where the checkpoint has none of this width.

    With ``runs``, several times in other orders of the rows. Source: Wortsman et al. 2022, "Model soups" (averages of fine-tunings that
    start alike); Devlin et al. 2019, section 4.1 (restarts, of which the best on held-out rows is kept).
    """

    kind: Literal["finetune"] = "finetune"
    force: bool = Field(default=False, description="Train even where the model brings a trained head")
    runs: int = Field(
        1,
        ge=1,
        le=20,
        description="Trainings from the same start, each with the rows in another order; kept is the best by the selection split, averaged with those that make it no worse",
    )

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:  # noqa: ARG002, needs no teacher
        """Write the weights that score best on the selection rows; counts the tensors that differ from the parent's."""
        from onnxsqueeze.nn import batches, checkpoint, losses, soup, training

        task = context.task
        examples, selection = (batches.encode(parent.path, rows.rows, task.max_length) for rows in (context.train, context.selection))

        def trained(run: int) -> tuple[training.Outcome, soup.Weights]:
            model.load_state_dict(start)
            return training.train(
                model, family, self, self._context(context, run), examples=examples, selection=selection, loss=loss
            ), _copied(model)

        def loss(batch: training.Batch) -> Tensor:
            return losses.task(model(**batch.inputs).logits, batch.labels, regression=task.kind == "regression")

        def score(weights: soup.Weights) -> float:
            model.load_state_dict(weights)
            reached = training.score(model, family, selection, context)
            return -math.inf if reached is None else reached

        model, family = checkpoint.load(parent.path, task, new_head_seed=context.seed)
        start = _copied(model)
        outcomes, weights = zip(*(trained(run) for run in range(self.runs)), strict=True)
        found = soup.greedy(weights, [outcome.best_score for outcome in outcomes], score)
        model.load_state_dict(found.weights)
        checkpoint.save(model, parent.path, out, task)
        return Changed(checkpoint.changed_tensors(parent.path, out), "tensors", _details(outcomes, found))

    def _context(self, context: Context, run: int) -> Context:
        """The same for one run, which has its own order and its own way back after a kill."""
        if self.runs == 1:
            return context
        place = context.checkpoint / f"run-{run + 1}"
        place.mkdir(exist_ok=True)

        def progress(done: int, total: int, note: str = "") -> None:
            context.progress(run * total + done, self.runs * total, f"run {run + 1}/{self.runs}, {note}")

        return replace(context, seed=context.seed + run * _SEED_STEP, checkpoint=place, progress=progress)


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _details(outcomes: Sequence[Outcome], found: Soup) -> dict[str, Any]:
    """What the record says: of one run its epochs; of several those of the best, which runs were averaged, and the average's score."""
    best = outcomes[found.members[0]].details()
    if len(outcomes) == 1:
        return best
    again = [(run, outcome) for run, outcome in enumerate(outcomes, start=1) if outcome.resumed_at_epoch or outcome.restarted]
    return best | {
        "runs": [{"history": list(outcome.history), "best_epoch": outcome.best_epoch} for outcome in outcomes],
        "averaged_runs": [run + 1 for run in found.members],
        "averaged_score": found.score,
        **({"resumed_in_run": again[-1][0], **again[-1][1].again()} if again else {}),
    }
