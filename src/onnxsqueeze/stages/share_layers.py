"""share-layers: a few layers, each of which stands in several places; the file holds each once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from onnxsqueeze.artifact import Artifact
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn.settings import StatesTaughtSettings
from onnxsqueeze.stage import Changed, Context


class ShareLayers(StatesTaughtSettings):
    """The layers are as many as before, but only some are different; those are trained in all their places at once, beside the teacher.

    Smaller, not faster. Source: Lan et al. 2020, "ALBERT", section 3.1 (sharing); Takase and Kiyono 2023, "Lessons on Parameter Sharing across Layers
    in Transformers", section 2 (sequence and cycle).
    """

    kind: Literal["share-layers"] = "share-layers"
    distinct: int = Field(2, ge=1, description="How many different layers there are in the end")
    order: Literal["sequence", "cycle"] = Field("sequence", description="aabbcc or abcabc")
    start: Literal["useful", "even"] = Field(
        "useful",
        description="Which layers they are at the start: those without which the loss is highest, or the last of each of equal parts",
    )
    asked_rows: int = Field(512, ge=32, description="Training rows that are asked which layers are useful")

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:
        """Write the best epoch; counts the weights that are gone from the written file.

        Raises StageError where the model has no more layers than ``distinct``, or layers of unequal shape.
        """
        from onnxsqueeze.nn import checkpoint, distillation, importance, structure
        from onnxsqueeze.nn import family as families

        model, family = checkpoint.load(parent.path, context.task)
        deep, had = len(families.layers(model, family)), structure.of(model, family)
        if self.distinct >= deep:
            raise StageError(
                f"{self.name}: distinct: the model has {deep} layers, {self.distinct} different ones share nothing",
                remedy=f"set it below {deep}",
            )
        before = sum(tensor.numel() for tensor in structure.own_state(model).values())
        if self.start == "useful":
            asked = importance.Asked(model, family, parent.path, context, self.asked_rows)
            kept = importance.layers_to_keep(model, family, asked, self.distinct)
        else:
            kept = structure.evenly(self.distinct, deep)
        every = families.layers(model, family)
        places = [i * self.distinct // deep if self.order == "sequence" else i % self.distinct for i in range(deep)]
        first = [places.index(place) for place in places]
        chosen = [every[i] for i in kept]
        for i, place in enumerate(places):
            every[i] = chosen[place]
        structure.share(model, family, first)

        lessons = distillation.Distillation(self, model, family, context, parent, teacher)
        outcome = lessons.train()
        checkpoint.save(model, parent.path, out, context.task)
        again, _ = checkpoint.load(out, context.task)
        weights = sum(tensor.numel() for tensor in structure.own_state(again).values())
        details = {
            **outcome.details(),
            "kept": list(kept),
            "shared": list(structure.of(again, family).shared),
            "shared_before": list(had.shared),
            "weights": weights,
            "weights_before": before,
            "with_teacher": lessons.taught,
        }
        return Changed(before - weights, "weights", details)
