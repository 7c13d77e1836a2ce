"""prune-structure: takes heads, neurons, hidden units and layers out, the least important first, while the rest recovers; the file is smaller and faster for it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from onnxsqueeze.artifact import Artifact
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn.settings import TaughtSettings
from onnxsqueeze.stage import Changed, Context

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from onnxsqueeze.nn.budget import Costs
    from onnxsqueeze.nn.family import Family
    from onnxsqueeze.nn.gates import Gates, Kept
    from onnxsqueeze.nn.structure import Structure
    from onnxsqueeze.stages.layer_times import LayerTimes

_NOISE = 2.0**-12  # of the largest logit: sums in another order
_OVER = 1.02  # a measured time may be this much above its limit
_TRIES = 4  # to come below it, each with a limit lowered by what was too much


class Budget(BaseModel):
    """What the heads and neurons of all layers may cost in the end: a share of what they cost the parent, or so much."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    measure: Literal["parameters", "multiply-adds", "milliseconds"] = Field(
        "parameters",
        description="Weights of the layers' matrices; multiply-adds of one row; milliseconds of one call of the whole model, measured",
    )
    share: float | None = Field(None, gt=0, lt=1, description="What is left of it; 0.5 where there is no `limit` either")
    limit: float | None = Field(None, gt=0, description="How much of it may be left")
    tokens: int = Field(128, ge=1, description="Tokens of the row, for multiply-adds")
    backend: str = Field("cpu", description="Where milliseconds are measured, at the call that the recipe measures, in float32")

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if self.share is not None and self.limit is not None:
            raise ValueError("share and limit exclude each other: say what is left as a part, or how much")
        return self

    def of(self, full: float) -> float:
        """The limit, where all heads and neurons cost ``full``."""
        return self.limit if self.limit is not None else (self.share or 0.5) * full


class PruneStructure(TaughtSettings):
    """Removes attention heads and feed-forward neurons by importance, a few more with every step of the training; layers may end up unequal.

    Whole layers and hidden units, where asked for, go before the training starts. Source: importance, `onnxsqueeze.nn.gates` and
    `onnxsqueeze.nn.importance`; schedule, Zhu and Gupta 2017, "To prune, or not to prune"; distillation beside it, Xia et al. 2022,
    "Structured Pruning Learns Compact and Accurate Models", section 3.2.
    """

    tools: ClassVar[tuple[str, ...]] = (*TaughtSettings.tools, "onnx", "onnxruntime", "optimum", "optimum-onnx")  # the last four measure

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
        from onnxsqueeze.nn import batches, checkpoint, distillation, structure, training
        from onnxsqueeze.nn import family as families

        task = context.task
        model, family = checkpoint.load(parent.path, task)
        examples, selection = (batches.encode(parent.path, rows.rows, task.max_length) for rows in (context.train, context.selection))
        had, had_hidden = structure.of(model, family), int(model.config.hidden_size)
        if had.kept_tokens:  # which go by what heads attend to, the masked ones too
            raise StageError(f"{self.name}: the parent drops tokens", remedy="put drop-tokens behind this stage")
        deep = len(families.layers(model, family))
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            times = _times(self.budget, parent.path, Path(scratch), context)
            full = self._cost_of_all(model, family, times)
            kept = self._cut_whole(model, family, parent, context)
            lessons = distillation.Distillation(self, model, family, context, parent, teacher, kept=kept, of=deep)
            total = math.ceil(len(examples) / self.batch_size) * self.epochs
            chooser = _Chooser.of(self, model, family, full, total, times)
            masked = chooser.masked

            def loss(batch: training.Batch) -> Any:
                extra = masked.penalty()
                return lessons.loss(batch) if extra is None else lessons.loss(batch) + extra

            outcome = training.train(
                model,
                family,
                self,
                context,
                examples=examples,
                selection=selection,
                loss=loss,
                companion=training.together(masked, lessons.companion),
                after_step=chooser.after_step,
                first_epoch_to_keep=math.ceil(chooser.last * self.epochs / total),
            )
            training.place(model)
            before = training.predict(model, family, selection)
            masked.release()
            structure.shrink(model, family, masked.kept("heads"), masked.kept("neurons"))
            self._require_same(before, training.predict(model, family, selection))
            cost = chooser.cost_of(model, family)
        checkpoint.save(model, parent.path, out, task)
        again, _ = checkpoint.load(out, task)
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
            **({self.budget.measure: cost, f"{self.budget.measure}_before": full} if self.budget else {}),
            "with_teacher": lessons.taught,
        }
        return Changed(gone, "heads, neurons, hidden units and layers", details)

    def _cut_whole(self, model: PreTrainedModel, family: Family, parent: Artifact, context: Context) -> tuple[int, ...]:
        """Take out layers and hidden units; the layers that are left."""
        from onnxsqueeze.nn import batches, importance, structure
        from onnxsqueeze.nn import family as families
        from onnxsqueeze.stages import calibration

        deep, wide = len(families.layers(model, family)), int(model.config.hidden_size)
        for field, wanted, available in (("layers", self.layers, deep), ("hidden", self.hidden, wide)):
            if wanted is not None and wanted > available:
                raise StageError(
                    f"{self.name}: {field}: the model has {available}, {wanted} cannot be kept", remedy=f"set it to {available} or less"
                )
        kept = tuple(range(deep))
        if self.layers is None and self.hidden is None:
            return kept
        rows = calibration.spread(context.train.rows, self.asked_rows)
        examples = batches.encode(parent.path, rows, context.task.max_length)
        asked = importance.Asked(model, family, examples, regression=context.task.kind == "regression")
        if self.layers is not None:
            kept = importance.layers_to_keep(model, family, asked, self.layers)
            structure.keep_layers(model, family, kept)
        if self.hidden is not None:
            best = importance.hidden_units(model, asked).argsort(descending=True, stable=True)[: self.hidden]
            structure.narrow(model, family, sorted(best.tolist()))
        return kept

    def _cost_of_all(self, model: PreTrainedModel, family: Family, times: LayerTimes | None) -> float:
        """What the parent's heads and neurons cost: the whole of which a budget's share is a part."""
        from onnxsqueeze.nn import structure

        shape = structure.of(model, family)
        return times.milliseconds(model, family, [shape])[0] if times else self._counted(model, shape).of(shape)

    def _counted(self, model: PreTrainedModel, shape: Structure) -> Costs:
        from onnxsqueeze.nn import budget

        hidden = int(model.config.hidden_size)
        if self.budget is not None and self.budget.measure == "multiply-adds":
            return budget.multiply_adds(hidden, shape.head_size, self.budget.tokens)
        return budget.parameters(hidden, shape.head_size)

    def _require_possible(self, had: Structure, costs: Costs, limit: float) -> None:
        least = replace(had, heads=tuple(1 for _ in had.heads), neurons=tuple(min(n, self.multiple_of) for n in had.neurons))
        if costs.of(least) > limit:
            raise StageError(
                f"{self.name}: budget: one head and {self.multiple_of} neurons a layer cost {costs.of(least):.4g} {self.budget.measure if self.budget else ''},"
                f" the budget is {limit:.4g}",
                remedy="raise it, lower multiple_of, or keep fewer layers or hidden units",
            )

    def _require_same(self, masked: NDArray[np.float32], cut: NDArray[np.float32]) -> None:
        import numpy as np

        off, scale = float(np.abs(masked - cut).max()), float(np.abs(masked).max())
        if not off <= _NOISE * scale:  # "not": NaN fails too
            raise StageError(
                f"{self.name}: without its masked parts the model's logits move by {off:.3g}, more than float32 noise explains",
                remedy="report this as a bug",
            )


@dataclass(frozen=True)
class _Chooser:
    """Masks what the budget does not allow, more of it at each step of a schedule."""

    stage: PruneStructure
    model: PreTrainedModel
    family: Family
    masked: Gates
    costs: Costs
    limit: float
    schedule: Mapping[int, float]  # finished step → how much of the way to the limit
    times: LayerTimes | None

    @staticmethod
    def of(stage: PruneStructure, model: PreTrainedModel, family: Family, full: float, total: int, times: LayerTimes | None) -> _Chooser:
        """The chooser of a training of ``total`` steps, where all that the parent has costs ``full``."""
        from onnxsqueeze.nn import gates, masks, structure

        shape = structure.of(model, family)
        costs = times.costs(model, family, shape) if times else stage._counted(model, shape)  # its own helper
        limit, schedule = math.inf, {}
        if stage.budget is not None and stage.budget.of(full) < costs.of(shape):
            limit = stage.budget.of(full)
            stage._require_possible(shape, costs, limit)
            last = max(1, math.floor(total * (1 - stage.recovery)))
            schedule = masks.schedule("cubic", 0.0, 1.0, min(math.ceil(total * stage.warmup), last - 1), last)
        kinds = {"taylor": gates.Gates, "magnitude": gates.MagnitudeGates}
        masked = (
            gates.LearnedGates(model, family, costs, stage.learning_rate)
            if stage.importance == "gates"
            else kinds[stage.importance](model, family)
        )
        return _Chooser(stage, model, family, masked, costs, limit, schedule, times)

    @property
    def last(self) -> int:
        """The step after which nothing more is masked; 0 where nothing is."""
        return max(self.schedule, default=0)

    def after_step(self, done: int) -> None:
        """Take in what the step has said, and mask more where the schedule says so."""
        self.masked.watch()
        if done not in self.schedule:
            return
        start = self.costs.of(self.masked.shape)
        goal = start - self.schedule[done] * (start - self.limit)
        if done == self.last:
            self.masked.keep(*self._final())
        elif not self.masked.aims(goal / start):
            self.masked.keep(*self._choice(goal))

    def cost_of(self, model: PreTrainedModel, family: Family) -> float:
        """What the finished model costs; milliseconds are measured."""
        from onnxsqueeze.nn import structure

        shape = structure.of(model, family)
        return self.times.milliseconds(model, family, [shape])[0] if self.times else self.costs.of(shape)

    def _choice(self, goal: float) -> tuple[Kept, Kept]:
        from onnxsqueeze.nn import budget

        heads, neurons = self.masked.importance("heads"), self.masked.importance("neurons")
        return budget.choose(heads, neurons, self.costs, goal, self.stage.multiple_of)

    def _final(self) -> tuple[Kept, Kept]:
        """The choice that stays; of milliseconds, one that was measured to keep the limit."""
        self.masked.settle()
        goal, chosen = self.limit, self._choice(self.limit)
        for _ in range(_TRIES if self.times else 0):
            shape = replace(self.masked.shape, heads=tuple(map(len, chosen[0])), neurons=tuple(map(len, chosen[1])))
            assert self.times is not None  # noqa: S101  # as the range says
            took = self.times.milliseconds(self.model, self.family, [shape])[0]
            if took <= _OVER * self.limit:
                break
            goal -= took - self.limit
            chosen = self._choice(goal)
        return chosen


def _times(budget: Budget | None, folder: Path, scratch: Path, context: Context) -> LayerTimes | None:
    from onnxsqueeze.stages.layer_times import LayerTimes

    timed = budget is not None and budget.measure == "milliseconds"
    return LayerTimes(folder, scratch, budget.backend, context) if budget and timed else None
