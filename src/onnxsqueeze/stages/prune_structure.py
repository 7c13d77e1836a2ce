"""prune-structure: takes heads, neurons, hidden units and layers out, the least important first, while the rest recovers; the file is smaller and faster for it."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from onnxsqueeze.artifact import Artifact
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn.settings import StatesTaughtSettings
from onnxsqueeze.stage import Changed, Context
from onnxsqueeze.stages.structure_budget import Budget, Chooser

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from onnxsqueeze.nn.family import Family

_NOISE = 2.0**-12  # of the largest logit: sums in another order


class PruneStructure(StatesTaughtSettings):
    """Removes attention heads and feed-forward neurons by importance, a few more with every step of the training; layers may end up unequal.

    Whole layers and hidden units, where asked for, go before the training starts. A choice by milliseconds is measured anew where a training is killed
    right behind it: alone among the trainings it may then end in other bytes. Source: importance, `onnxsqueeze.nn.gates` and
    `onnxsqueeze.nn.importance`; schedule, Zhu and Gupta 2017, "To prune, or not to prune"; distillation beside it, Xia et al. 2022,
    "Structured Pruning Learns Compact and Accurate Models", section 3.2.
    """

    tools: ClassVar[tuple[str, ...]] = (
        *StatesTaughtSettings.tools,
        "onnx",
        "onnxruntime",
        "optimum",
        "optimum-onnx",
    )  # the last four measure

    embeds: ClassVar[bool] = False

    kind: Literal["prune-structure"] = "prune-structure"
    budget: Budget | None = Field(Budget(), description="What heads and neurons may cost in the end; null: they all stay")
    importance: Literal["taylor", "magnitude", "gates"] = Field(
        "taylor", description="Of a head or neuron: the loss's gradient by it, the size of its weights, or a gate that is learned"
    )
    layers: int | None = Field(None, ge=1, description="Whole layers to keep: those without which the loss is highest; default: all")
    hidden: int | None = Field(None, ge=1, description="Units of the hidden states to keep, in embeddings, layers and head; default: all")
    asked_rows: int = Field(512, ge=32, description="Training rows that are asked which layers and hidden units matter")
    multiple_of: int = Field(32, ge=1, description="Neurons of a layer are a multiple of it: products of odd widths are slow")
    recovery: float = Field(0.5, ge=0, lt=1, description="Last fraction of all steps, trained with the final structure")

    @model_validator(mode="after")
    def _prunes_something(self) -> Self:
        if self.budget is None and self.layers is None and self.hidden is None:
            raise ValueError("budget: null leaves nothing to prune: give a budget, layers or hidden")
        return self

    @property
    def _measures(self) -> bool:
        return self.budget is not None and self.budget.measure == "milliseconds"

    def machine_bound(self) -> bool:
        """True where it is trained in bf16, or times decide."""
        return super().machine_bound() or self._measures

    def timed(self) -> bool:
        """True where times decide."""
        return self._measures

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:
        """Write the best epoch with the final structure; counts the heads, neurons, hidden units and layers that are gone from the written file.

        Raises StageError where the layers cannot become as cheap as the budget asks, or the model without its masked parts says something else.
        """
        from onnxsqueeze.nn import checkpoint, distillation, structure, training
        from onnxsqueeze.nn import family as families
        from onnxsqueeze.stages.layer_times import LayerTimes

        model, family = checkpoint.load(parent.path, context.task)
        structure.require_none(model, family, self.name, "shared", "exits", "kept_tokens")
        had, had_hidden = structure.of(model, family), int(model.config.hidden_size)
        deep, asked = len(families.layers(model, family)), self.budget or Budget()
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            times = LayerTimes(parent.path, Path(scratch), asked.backend, context) if asked.measure == "milliseconds" else None
            full = asked.cost(model, family, times)
            kept = self._cut_whole(model, family, parent, context)
            lessons = distillation.Distillation(self, model, family, context, parent, teacher, kept=kept, of=deep)
            total = lessons.steps * self.epochs
            chooser = Chooser.of(self, model, family, full, total, times)
            masked = chooser.masked

            def loss(batch: training.Batch) -> Any:
                extra = masked.penalty()
                return lessons.loss(batch) if extra is None else lessons.loss(batch) + extra

            first = math.ceil(chooser.last * self.epochs / total)
            outcome = lessons.train(loss=loss, companion=masked, after_step=chooser.after_step, first_epoch_to_keep=first)
            training.place(model)
            before = training.predict(model, family, lessons.selection)
            masked.release()
            structure.shrink(model, family, masked.kept("heads"), masked.kept("neurons"))
            self._require_same(before, training.predict(model, family, lessons.selection))
            cost = asked.cost(model, family, times)
        checkpoint.save(model, parent.path, out, context.task)
        again, _ = checkpoint.load(out, context.task)
        left, hidden = structure.of(again, family), int(again.config.hidden_size)
        gone = had_hidden - hidden + deep - len(kept) + sum(had.heads) - sum(left.heads) + sum(had.neurons) - sum(left.neurons)
        details = {
            **outcome.details(),
            "layers": list(kept),
            "hidden": hidden,
            "hidden_before": had_hidden,
            "heads": list(left.heads),
            "heads_before": list(had.heads),
            "neurons": list(left.neurons),
            "neurons_before": list(had.neurons),
            asked.measure: cost,
            f"{asked.measure}_before": full,
            "with_teacher": lessons.taught,
        }
        return Changed(gone, "heads, neurons, hidden units and layers", details)

    def _cut_whole(self, model: PreTrainedModel, family: Family, parent: Artifact, context: Context) -> tuple[int, ...]:
        """Take out layers and hidden units; the layers that are left."""
        from onnxsqueeze.nn import family as families
        from onnxsqueeze.nn import importance, structure

        deep, wide = len(families.layers(model, family)), int(model.config.hidden_size)
        for field, wanted, available in (("layers", self.layers, deep), ("hidden", self.hidden, wide)):
            if wanted is not None and wanted > available:
                raise StageError(
                    f"{self.name}: {field}: the model has {available}, {wanted} cannot be kept", remedy=f"set it to {available} or less"
                )
        kept = tuple(range(deep))
        if self.layers is None and self.hidden is None:
            return kept
        asked = importance.Asked(model, family, parent.path, context, self.asked_rows)
        if self.layers is not None:
            kept = importance.layers_to_keep(model, family, asked, self.layers)
            structure.keep_layers(model, family, kept)
        if self.hidden is not None:
            best = importance.hidden_units(model, asked).argsort(descending=True, stable=True)[: self.hidden]
            structure.narrow(model, family, sorted(best.tolist()))
        return kept

    def _require_same(self, masked: NDArray[np.float32], cut: NDArray[np.float32]) -> None:
        import numpy as np

        off, scale = float(np.abs(masked - cut).max()), float(np.abs(masked).max())
        if not off <= _NOISE * scale:  # "not": NaN fails too
            raise StageError(
                f"{self.name}: without its masked parts the model's logits move by {off:.3g}, more than float32 noise explains",
                remedy="report this as a bug",
            )
