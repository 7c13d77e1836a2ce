"""factorize: writes matrices as products of two thin ones, by singular values, and trains what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from onnxsqueeze.artifact import Artifact
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn.settings import StatesTaughtSettings
from onnxsqueeze.stage import Changed, Context
from onnxsqueeze.tasks.rows import spread

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from onnxsqueeze.nn.family import Family

_BATCH = 32


class Factorize(StatesTaughtSettings):
    """Low-rank factors of the layers' matrices, each with a rank of its own, and of the table of words; then training beside the teacher.

    Source: the nearest matrix of a rank, Eckart and Young 1936; nearest on what flows through it, Wang et al. 2024, "SVD-LLM"; the table, Lan et al.
    2020, "ALBERT", section 3.1.
    """

    kind: Literal["factorize"] = "factorize"
    share: float | None = Field(0.5, gt=0, lt=1, description="Part of the layers' matrices' weights that is left; null: they stay whole")
    vocabulary_rank: int | None = Field(None, ge=1, description="Rank of the table of words; default: it stays whole")
    weighting: Literal["activations", "none"] = Field(
        "activations",
        description="What the factors are nearest in: the outputs on training rows (and rows of words by how often they occur), or the weights",
    )
    asked_rows: int = Field(512, ge=32, description="Training rows whose activations are looked at")
    multiple_of: int = Field(8, ge=1, description="Ranks are a multiple of it")

    @model_validator(mode="after")
    def _factors_something(self) -> Self:
        if self.share is None and self.vocabulary_rank is None:
            raise ValueError("share: null leaves nothing to factorize: give a share or a vocabulary_rank")
        return self

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:
        """Write the best epoch; counts the weights that are gone from the written file.

        Raises StageError where the ranks asked for would save nothing, or something is in factors already.
        """
        from onnxsqueeze.nn import checkpoint, distillation, structure

        model, family = checkpoint.load(parent.path, context.task)
        had = _weights(model)
        before = structure.of(model, family)
        if any(before.ranks) or before.vocabulary_rank is not None:
            raise StageError(f"{self.name}: the parent has factors already", remedy="factorize once, with the shares wanted in the end")
        errors = self._factor_layers(model, family, parent, context) if self.share is not None else {}
        if self.vocabulary_rank is not None:
            self._factor_words(model, family, parent, context, self.vocabulary_rank)
        structure.note(model, structure.of(model, family))
        if _weights(model) >= had:
            raise StageError(
                f"{self.name}: factors of these ranks have no fewer weights", remedy="lower share, vocabulary_rank or multiple_of"
            )
        lessons = distillation.Distillation(self, model, family, context, parent, teacher)
        untrained = lessons.score()
        outcome = lessons.train()
        checkpoint.save(model, parent.path, out, context.task)
        again, _ = checkpoint.load(out, context.task)
        left = structure.of(again, family)
        details: dict[str, Any] = {
            **outcome.details(),
            "score_before_training": untrained,
            "weights": _weights(again),
            "weights_before": had,
            "ranks": [dict(ranks) for ranks in left.ranks],
            "vocabulary_rank": left.vocabulary_rank,
            "left_out": errors,
            "with_teacher": lessons.taught,
        }
        return Changed(had - _weights(again), "weights", details)

    def _factor_layers(self, model: PreTrainedModel, family: Family, parent: Artifact, context: Context) -> dict[str, float]:
        """Put factors in place of matrices; per matrix that has some, the part of its square (weighted) that they leave out."""
        from torch import nn

        from onnxsqueeze.nn import factors, structure
        from onnxsqueeze.nn import family as families

        paths = [
            f"{family.encoder}.{family.layers}.{i}.{path}"
            for i in range(len(families.layers(model, family)))
            for path in (*family.attention, *family.feed_forward)
        ]
        matrices = {path: module for path in paths if isinstance(module := model.get_submodule(path), nn.Linear)}
        roots: dict[str, Tensor | None] = dict.fromkeys(matrices)
        if self.weighting == "activations":
            roots = dict(self._roots(model, family, matrices, parent, context))
        spectra = [factors.spectrum(module.weight, roots[path]) for path, module in matrices.items()]
        shapes = [(module.out_features, module.in_features) for module in matrices.values()]
        assert self.share is not None  # noqa: S101  # the caller's condition
        errors = {}
        ranks = factors.choose_ranks(spectra, shapes, self.share, self.multiple_of)
        for (path, module), values, rank in zip(matrices.items(), spectra, ranks, strict=True):
            if rank is not None:
                squares = values.square()
                errors[path] = float(squares[rank:].sum() / squares.sum())
                structure.replace_module(model, path, factors.factored(module, rank, roots[path]))
        return errors

    def _roots(
        self, model: PreTrainedModel, family: Family, matrices: dict[str, Any], parent: Artifact, context: Context
    ) -> dict[str, Tensor]:
        """Of each matrix, `factors.root` of its inputs' second moment on training rows."""
        import torch

        from onnxsqueeze.nn import batches, factors, training

        examples = batches.encode(parent.path, spread(context.train.rows, self.asked_rows), context.task.max_length)
        moments = {path: torch.zeros(module.in_features, module.in_features, dtype=torch.float64) for path, module in matrices.items()}
        mask: list[Tensor] = []

        def watch(path: str) -> Any:
            def look(_: Any, given: tuple[Tensor, ...]) -> None:
                states = given[0][mask[0]].double().cpu()  # of tokens that are none of the padding
                moments[path] += states.T @ states

            return look

        training.place(model)
        hooks = [module.register_forward_pre_hook(watch(path)) for path, module in matrices.items()]
        try:
            with torch.inference_mode():
                for some in batches.by_length([len(row) for row in examples.encoded], _BATCH):
                    inputs = training.inputs(family, examples, some)
                    mask[:] = [inputs["attention_mask"].bool()]
                    model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return {path: factors.root(moment) for path, moment in moments.items()}

    def _factor_words(self, model: PreTrainedModel, family: Family, parent: Artifact, context: Context, rank: int) -> None:
        import torch
        from torch import nn

        from onnxsqueeze.nn import batches, factors, structure

        table = model.get_submodule(family.table_of_words)
        assert isinstance(table, nn.Embedding)  # noqa: S101  # nothing is in factors, as the caller has found
        if rank > min(table.weight.shape):
            raise StageError(
                f"{self.name}: vocabulary_rank: the table of words, {table.num_embeddings:,} × {table.embedding_dim}, has no rank of {rank}",
                remedy=f"give less than {min(table.weight.shape)}, or leave it out",
            )
        frequency = torch.zeros(table.num_embeddings)
        for row in batches.encode(parent.path, context.train.rows, context.task.max_length).encoded:
            frequency += torch.bincount(torch.tensor(row.ids), minlength=table.num_embeddings)
        weighting = frequency if self.weighting == "activations" else None
        structure.replace_module(model, family.table_of_words, factors.factored_table(table, rank, weighting))


def _weights(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
