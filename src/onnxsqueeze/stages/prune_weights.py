"""prune-weights: set the smallest weights to zero, a few more with every training step, and let the rest recover."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from onnxsqueeze.artifact import Artifact
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn.settings import TaughtSettings
from onnxsqueeze.stage import Changed, Context

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LAYER = re.compile(r".*?\.layer\.\d+\.")  # in the name of a weight: up to the number of its encoder layer
_TOLERANCE = 0.001  # of the weights: equal magnitudes at the threshold fall together


class PruneWeights(TaughtSettings):
    """Sets single weights to zero while training: zeros make a file smaller where it is packed, and make nothing faster.

    Source: Zhu and Gupta 2017, "To prune, or not to prune" (schedule); Sanh et al. 2020, "Movement Pruning" (the criterion, and in section 4 a dense
    start, a recovery at the final sparsity, and distillation beside pruning); Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks" (2:4).
    """

    version: ClassVar[int] = 2  # 2: by movement pruned weights may come back

    kind: Literal["prune-weights"] = "prune-weights"
    sparsity: float = Field(0.5, gt=0, lt=1, description="Share of the pruned matrices' weights that is zero in the end")
    criterion: Literal["magnitude", "movement"] = Field(
        "magnitude", description="Prune what is small, or what training moves towards zero (better above about 80 %)"
    )
    scope: Literal["global", "layer", "uniform"] = Field(
        "global", description="Compare weights over all matrices, within each layer of the encoder, or within each matrix"
    )
    pattern: str | None = Field(
        None,
        pattern=r"^[1-9]\d?:[1-9]\d?$",
        description='"2:4": of every four weights in a row two stay, for hardware that skips the others; sets the sparsity',
    )
    curve: Literal["cubic", "linear", "once"] = Field("cubic", description="How the sparsity rises between warm-up and recovery")
    embeddings: bool = Field(default=False, description="Prune the embeddings, too")
    recovery: float = Field(0.34, ge=0, lt=1, description="Last fraction of all steps, trained at the final sparsity")

    @model_validator(mode="after")
    def _prunes_nothing_frozen(self) -> Self:
        if self.embeddings and self.freeze_embeddings:
            raise ValueError("embeddings and freeze_embeddings exclude each other: what is pruned must be trained")
        if self.pattern is not None:
            n, m = _numbers(self.pattern)
            if n >= m:
                raise ValueError(f"pattern: of every {m} weights {n} cannot stay: the first number must be the smaller")
            if "sparsity" in self.model_fields_set and self.sparsity != 1 - n / m:
                raise ValueError(f"pattern {self.pattern} is a sparsity of {1 - n / m:.4g}, got sparsity: {self.sparsity}; leave one out")
        return self

    @property
    def _goal(self) -> float:
        if self.pattern is None:
            return self.sparsity
        n, m = _numbers(self.pattern)
        return 1 - n / m

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:
        """Write the best epoch at the final sparsity; counts the zeros that the written file has more than the parent.

        Raises StageError where the parent is already sparser, or the written file misses the sparsity.
        """
        from onnxsqueeze.nn import checkpoint, distillation, masks
        from onnxsqueeze.nn import family as families

        task = context.task
        model, family = checkpoint.load(parent.path, task)
        names = list(families.linear_weights(model, family)) + (list(families.embedding_weights(model, family)) if self.embeddings else [])
        pattern = _numbers(self.pattern) if self.pattern else None
        self._require_whole_rows(model, names, pattern)
        pruned = masks.Masks(model, _groups(names, self.scope), self.criterion, pattern)
        weights, zeros_before = pruned.total(), pruned.zeros()
        before = zeros_before / weights
        if before >= self._goal:
            raise StageError(
                f"{self.name}: sparsity: {before:.1%} of the parent's weights are zero already", remedy=f"ask for more than {before:.3f}"
            )

        lessons = distillation.Distillation(self, model, family, context, parent, teacher)
        total = lessons.steps * self.epochs
        last = max(1, math.floor(total * (1 - self.recovery)))
        first = min(math.ceil(total * self.warmup), last - 1)
        schedule = masks.schedule(self.curve, before, self._goal, first, last)

        def after_step(done: int) -> None:
            pruned.watch()
            if done in schedule:
                pruned.update(schedule[done])
            pruned.apply_()

        outcome = lessons.train(companion=pruned, after_step=after_step, first_epoch_to_keep=math.ceil(last * self.epochs / total))
        checkpoint.save(model, parent.path, out, task)
        zeros = checkpoint.count_zeros(out, names)
        if abs(zeros / weights - self._goal) > _TOLERANCE:
            raise StageError(
                f"{self.name}: {zeros / weights:.2%} of the written weights are zero, not {self._goal:.2%}",
                remedy="report this as a bug",
            )
        details = {**outcome.details(), "weights": weights, "zeros": zeros, "sparsity": zeros / weights, "with_teacher": lessons.taught}
        return Changed(zeros - zeros_before, "weights", details)

    def _require_whole_rows(self, model: PreTrainedModel, names: Sequence[str], pattern: tuple[int, int] | None) -> None:
        odd = next((name for name in names if pattern and model.get_parameter(name).shape[1] % pattern[1]), None)
        if odd is not None and pattern:
            raise StageError(
                f"{self.name}: pattern: {odd} has {model.get_parameter(odd).shape[1]} inputs, which are no multiple of {pattern[1]}",
                remedy="take another pattern, or leave embeddings out",
            )


def _numbers(pattern: str) -> tuple[int, int]:
    n, m = pattern.split(":")
    return int(n), int(m)


def _groups(names: Sequence[str], scope: str) -> list[list[str]]:
    """The names whose weights are compared with each other."""
    if scope == "global":
        return [list(names)]
    if scope == "uniform":
        return [[name] for name in names]
    groups: dict[str, list[str]] = {}
    for name in names:
        found = _LAYER.match(name)
        groups.setdefault(found.group() if found else name, []).append(name)
    return list(groups.values())
