"""What heads and neurons may cost in the end, and what is masked on the way there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from onnxsqueeze.errors import StageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from onnxsqueeze.nn.budget import Costs
    from onnxsqueeze.nn.family import Family
    from onnxsqueeze.nn.gates import Gates, Kept
    from onnxsqueeze.nn.structure import Structure
    from onnxsqueeze.stages.layer_times import LayerTimes
    from onnxsqueeze.stages.prune_structure import PruneStructure

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

    def cost(self, model: PreTrainedModel, family: Family, times: LayerTimes | None) -> float:
        """What the heads and neurons that a model has cost; milliseconds are measured."""
        from onnxsqueeze.nn import structure

        shape = structure.of(model, family)
        return times.milliseconds(model, family, [shape])[0] if times else self.costs(model, family, None).of(shape)

    def costs(self, model: PreTrainedModel, family: Family, times: LayerTimes | None) -> Costs:
        """What one head and one neuron of a model cost; milliseconds are fitted to measurements."""
        from onnxsqueeze.nn import budget, structure

        shape, hidden = structure.of(model, family), int(model.config.hidden_size)
        if times:
            return times.costs(model, family, shape)
        if self.measure == "multiply-adds":
            return budget.multiply_adds(hidden, shape.head_size, self.tokens)
        return budget.parameters(hidden, shape.head_size)


@dataclass(frozen=True)
class Chooser:
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
    def of(stage: PruneStructure, model: PreTrainedModel, family: Family, full: float, total: int, times: LayerTimes | None) -> Chooser:
        """The chooser of a training of ``total`` steps, where all that the parent has costs ``full``.

        Raises StageError where a head and a group of neurons in each layer cost more than the budget.
        """
        from onnxsqueeze.nn import gates, masks, structure

        shape, asked = structure.of(model, family), stage.budget or Budget()
        costs = asked.costs(model, family, times)
        limit, schedule = math.inf, {}
        if stage.budget is not None and asked.of(full) < costs.of(shape):
            limit = asked.of(full)
            _require_possible(stage, shape, costs, limit)
            last = max(1, math.floor(total * (1 - stage.recovery)))
            schedule = masks.schedule("cubic", 0.0, 1.0, min(math.ceil(total * stage.warmup), last - 1), last)
        if stage.importance == "gates":
            masked: Gates = gates.LearnedGates(model, family, costs, stage.learning_rate)
        else:
            masked = (gates.Gates if stage.importance == "taylor" else gates.MagnitudeGates)(model, family)
        return Chooser(stage, model, family, masked, costs, limit, schedule, times)

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
            self.masked.settle()
            self.masked.keep(*(self._measured(self.times) if self.times else self._choice(self.limit)))
        elif not self.masked.aims(goal / start):
            self.masked.keep(*self._choice(goal))

    def _choice(self, goal: float) -> tuple[Kept, Kept]:
        from onnxsqueeze.nn import budget

        heads, neurons = self.masked.importance("heads"), self.masked.importance("neurons")
        return budget.choose(heads, neurons, self.costs, goal, self.stage.multiple_of)

    def _measured(self, times: LayerTimes) -> tuple[Kept, Kept]:
        """A choice that was measured to keep the limit. Raises StageError where none of a few does."""
        goal, took = self.limit, math.inf
        for _ in range(_TRIES):
            chosen = self._choice(goal)
            shape = replace(self.masked.shape, heads=tuple(map(len, chosen[0])), neurons=tuple(map(len, chosen[1])))
            took = times.milliseconds(self.model, self.family, [shape])[0]
            if took <= _OVER * self.limit:
                return chosen
            goal -= took - self.limit
        raise StageError(
            f"{self.stage.name}: budget: the model still takes {took:.3g} ms after {_TRIES} choices, the budget is {self.limit:.3g}",
            remedy="raise the budget, or run it on a machine that others leave alone",
        )


def _require_possible(stage: PruneStructure, had: Structure, costs: Costs, limit: float) -> None:
    least = replace(had, heads=tuple(1 for _ in had.heads), neurons=tuple(min(n, stage.multiple_of) for n in had.neurons))
    if costs.of(least) > limit:
        measure = stage.budget.measure if stage.budget else ""
        raise StageError(
            f"{stage.name}: budget: one head and {stage.multiple_of} neurons a layer cost {costs.of(least):.4g} {measure}, the budget is {limit:.4g}",
            remedy="raise it, lower multiple_of, or keep fewer layers or hidden units",
        )
