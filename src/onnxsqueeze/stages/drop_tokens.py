"""drop-tokens: behind some layers only the tokens go on that the first one attends to most; long rows become fast."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from onnxsqueeze.artifact import Artifact
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn.settings import TaughtSettings
from onnxsqueeze.stage import Changed, Context


class DropTokens(TaughtSettings):
    """Trains the model with fewer and fewer tokens, beside the teacher's logits (its states have no counterpart where tokens are gone); the export drops them by a TopK and a Gather.

    How many stay is a share of the length, so short rows lose few. Nothing of the weights goes. Source: Goyal et al. 2020, "PoWER-BERT" (elimination by the
    attention that a token receives); here by that of the first token, which the head reads, as in Liang et al. 2022, "EViT", section 3.2.
    """

    embeds: ClassVar[bool] = False

    kind: Literal["drop-tokens"] = "drop-tokens"
    keep: dict[int, int] = Field(
        {1: 60, 3: 50},
        min_length=1,
        description="Layer, counted from 0, behind which tokens are dropped → percent of those that reach it which go on; never the last layer",
    )

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:
        """Write the best epoch; counts the percent of token-layers that are not computed any more.

        Raises StageError for layers that the model has not, or shares that are none.
        """
        from onnxsqueeze.nn import checkpoint, distillation, kept_tokens, structure
        from onnxsqueeze.nn import family as families

        model, family = checkpoint.load(parent.path, context.task)
        deep, kept = len(families.layers(model, family)), sorted(self.keep.items())
        wrong = [f"{layer}: {percent}" for layer, percent in kept if not (0 <= layer < deep - 1 and 1 <= percent < 100)]
        if wrong:
            raise StageError(
                f"{self.name}: keep: must map layers from 0 to {deep - 2} to percents from 1 to 99, got {', '.join(wrong)}",
                remedy="name earlier layers, and how much of a hundred goes on",
            )
        if kept_tokens.of(model):
            raise StageError(f"{self.name}: the parent drops tokens already", remedy="name all layers in one stage")
        kept_tokens.attach(model, family, kept)
        structure.note(model, structure.of(model, family))
        lessons = distillation.Distillation(self, model, family, context, parent, teacher)
        untrained = lessons.score()
        outcome = lessons.train()
        checkpoint.save(model, parent.path, out, context.task)
        again, _ = checkpoint.load(out, context.task)
        left, reaching = 1.0, 0.0
        shares = dict(kept_tokens.of(again))
        for layer in range(deep):
            reaching += left
            left *= shares.get(layer, 100) / 100
        gone = round(100 * (1 - reaching / deep))
        details = {
            **outcome.details(),
            "keep": {str(layer): percent for layer, percent in kept},
            "score_before_training": untrained,
            "with_teacher": lessons.taught,
        }
        return Changed(gone, "percent of all token-layers", details)
