"""cluster-weights: every weight becomes a place in a code book of few values, found by weighted k-means; the values are trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from onnxsqueeze.artifact import Artifact
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn.settings import FewValuesSettings
from onnxsqueeze.stage import Changed, Context

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from onnxsqueeze.nn.family import Family


class ClusterWeights(FewValuesSettings):
    """Every weight of the layers ends on one of few values of its row (or matrix): clusters by weighted k-means, whose values are then trained beside the teacher.

    The file stays as large as it was until `pack` writes it in few bits: in float as it is, or behind `quantize-dynamic`, which rounds equal weights of a
    row to equal integers, so that no row gets more values. The tables of words, positions and token types, where they take part, share values by the whole table,
    since quantizers give a table one scale. Source: Choi et al. 2017, "Towards the Limit of Network Quantization"; Han et al. 2016, "Deep
    Compression", section 3; both in `onnxsqueeze.nn.clusters`.
    """

    kind: Literal["cluster-weights"] = "cluster-weights"
    bits: int = Field(4, ge=1, le=8, description="Bits a weight: 2 to 256 values")
    embedding_bits: int | None = Field(
        None,
        ge=1,
        le=8,
        description="Bits a weight of the tables of words, positions and token types, where `embeddings` is set; default: as bits",
    )
    importance: Literal["fisher", "magnitude", "uniform"] = Field(
        "fisher", description="What a weight counts for: its mean squared gradient over some rows, its size, or as much as any other"
    )
    asked_rows: int = Field(512, ge=32, description="Training rows whose gradients are looked at")
    keep_zeros: bool = Field(default=False, description="Zeros are a value of their own and stay zero, for pruned weights")
    reassign: int | None = Field(
        None, ge=1, description="Steps after which each weight moves to the value that it has come nearest to; default: none ever does"
    )

    @model_validator(mode="after")
    def _has_more_than_zero(self) -> Self:
        if self.keep_zeros and 1 in (self.bits, self.embedding_bits):
            raise ValueError("keep_zeros leaves one other value at 1 bit; take 2 bits or more")
        if self.embedding_bits is not None and not self.embeddings:
            raise ValueError("embedding_bits: the tables take no part; set `embeddings: true`")
        return self

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:
        """Write the best epoch; counts the weights that have one of the few values in the written file.

        Raises StageError where a row (or matrix) has no more weights than values.
        """
        from onnxsqueeze.nn import checkpoint, clusters, distillation, few_values, training
        from onnxsqueeze.nn import family as families

        task = context.task
        model, family = checkpoint.load(parent.path, task)
        names = few_values.matrices(self, model, family)
        tables = set(families.embedding_weights(model, family))
        bits = [(self.embedding_bits or self.bits) if name in tables else self.bits for name in names]
        per_row = [self.scope == "row" and name not in tables for name in names]
        self._require_more_weights(model, names, bits, per_row)
        training.place(model)
        books = clusters.CodeBooks(
            model,
            names,
            bits,
            self._importance(model, family, names, parent.path, context),
            per_row=per_row,
            keep_zeros=self.keep_zeros,
            movable=self.reassign is not None,
        )
        lessons = distillation.Distillation(self, model, family, context, parent, teacher)

        def after_step(done: int) -> None:
            if self.reassign and done % self.reassign == 0:
                books.reassign()
            if done % lessons.steps == 0:  # an epoch's end: the model's own weights are what is kept of it
                books.write()

        with books:
            untrained = lessons.score()
            outcome = lessons.train(companion=books, after_step=after_step)
        checkpoint.save(model, parent.path, out, task)
        found = few_values.written(self, out, task, {name: 2**width for name, width in zip(names, bits, strict=True)}, per_row)
        details = {**outcome.details(), "score_before_training": untrained, **found, "with_teacher": lessons.taught}
        return Changed(found["weights"], "weights", details)

    def _importance(
        self, model: PreTrainedModel, family: Family, names: Sequence[str], folder: Path, context: Context
    ) -> dict[str, Tensor]:
        import torch

        from onnxsqueeze.nn import importance

        if self.importance == "fisher":
            return importance.fisher(model, names, importance.Asked(model, family, folder, context, self.asked_rows, batch=1))
        weights = {name: model.get_parameter(name).detach() for name in names}
        return {name: weight.abs() if self.importance == "magnitude" else torch.ones_like(weight) for name, weight in weights.items()}

    def _require_more_weights(self, model: PreTrainedModel, names: Sequence[str], bits: Sequence[int], per_row: Sequence[bool]) -> None:
        for name, width, rowwise in zip(names, bits, per_row, strict=True):
            weight = model.get_parameter(name)
            size = weight.shape[1] if rowwise else weight.numel()
            if size <= 2**width:
                raise StageError(
                    f"{self.name}: bits: a {'row' if rowwise else 'matrix'} of {name} has {size} weights, {2**width} values are no fewer",
                    remedy="take fewer bits" + (", or scope: matrix" if rowwise else ""),
                )
