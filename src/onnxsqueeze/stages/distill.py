"""distill: a student with fewer layers learns from the teacher's logits, hidden states and attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from onnxsqueeze.artifact import Artifact
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn.family import family_of
from onnxsqueeze.nn.settings import LossWeights, StatesTaughtSettings
from onnxsqueeze.stage import Changed, Context


class Distill(StatesTaughtSettings):
    """Keeps some layers of the parent, with its embeddings and head, and trains them on a weighted sum of losses; or trains another model so.

    Source: initialisation from the teacher's layers, Sanh et al. 2019, "DistilBERT", section 3; losses, `onnxsqueeze.nn.losses`.
    """

    needs_teacher: ClassVar[bool] = True
    models: ClassVar[tuple[str, ...]] = ("student",)

    kind: Literal["distill"] = "distill"
    student: str | None = Field(
        None,
        description="A model to teach in place of the parent's layers, with all of its own: a folder or a name on the Hub, as `model` names one; "
        "where its tokens are not the teacher's, logits alone can teach (`alpha_hidden: 0`)",
    )
    layers: Annotated[int, Field(ge=1)] | tuple[int, ...] = Field(3, description="How many layers to keep, or which, counted from 0")
    choose: Literal["even", "useful"] = Field(
        "even", description="Of a number: evenly up to the last, or those without which the loss on some training rows is highest"
    )
    asked_rows: int = Field(512, ge=32, description="Training rows that are asked which layers are useful")
    alpha_attention: float = Field(0.0, ge=0, description="Weight of the loss against the teacher's attention")
    alpha_relations: float = Field(
        0.0,
        ge=0,
        description="Weight of the loss against how queries, keys and values of the teacher's last layer relate; widths may differ",
    )
    relation_heads: int = Field(12, ge=1, description="Into how many heads relations are split; must divide both widths")

    def loss_weights(self) -> LossWeights:
        """With attention and relations."""
        known = super().loss_weights()
        return replace(known, attention=self.alpha_attention, relations=self.alpha_relations, relation_heads=self.relation_heads)

    @model_validator(mode="after")
    def _has_a_loss(self) -> Self:
        if self.alpha_task == self.alpha_logits == self.alpha_hidden == self.alpha_attention == self.alpha_relations == 0:
            raise ValueError("one of alpha_task, alpha_logits, alpha_hidden, alpha_attention and alpha_relations must be above 0")
        chosen = sorted({"layers", "choose"} & self.model_fields_set)
        if self.student is not None and chosen:
            raise ValueError(f"`student` and `{chosen[0]}` exclude each other: a student of its own keeps all of its layers")
        return self

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        """``layers``, where the model has not that many; None too where config.json leaves their number to transformers' defaults."""
        if self.student is not None:
            return None
        available = config.get(family_of(config["model_type"]).layers_field)
        return _unfit_layers(self.layers, available) if isinstance(available, int) else None

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:
        """Write the best epoch's student; counts the tensors that differ from the parent's or are gone."""
        from onnxsqueeze import models
        from onnxsqueeze.nn import checkpoint, distillation, importance, structure
        from onnxsqueeze.nn import family as families

        if teacher is None:
            raise StageError(
                f"{self.name}: has no teacher", remedy="put a finetune stage before it, or start from a model with a trained head"
            )
        task = context.task
        other = models.resolve(self.student) if self.student is not None else None
        source = other.artifact if other else parent
        new_head = context.seed if other else None
        model, family = checkpoint.load(source.path, task, new_head_seed=new_head, eager_attention=self.alpha_attention > 0)
        structure.require_none(model, family, self.name, "exits", "kept_tokens")
        had = len(families.layers(model, family))
        kept = tuple(range(had)) if other else chosen_layers(self.layers, had, self.name)
        if not other and self.choose == "useful" and isinstance(self.layers, int):
            asked = importance.Asked(model, family, parent.path, context, self.asked_rows)
            kept = importance.layers_to_keep(model, family, asked, self.layers)
        structure.keep_layers(model, family, kept)
        outcome = distillation.Distillation(self, model, family, context, source, teacher, kept=kept, of=had).train()
        checkpoint.save(model, source.path, out, task)
        details = {
            **outcome.details(),
            "layers": len(kept),
            "layers_before": had,
            "kept": list(kept),
            **({"student": other.name} if other else {}),
        }
        return Changed(checkpoint.changed_tensors(source.path, out), "tensors", details)


def chosen_layers(wanted: int | tuple[int, ...], available: int, name: str) -> tuple[int, ...]:
    """Indices of the layers to keep; of a number, evenly (`onnxsqueeze.nn.structure.evenly`).

    Raises StageError where the model has not enough layers, or an index is out of range or out of order.
    """
    from onnxsqueeze.nn import structure

    if (unfit := _unfit_layers(wanted, available)) is not None:
        raise StageError(f"{name}: {unfit}", remedy="keep fewer layers, or name each one to keep once")
    return structure.evenly(wanted, available) if isinstance(wanted, int) else wanted


def _unfit_layers(wanted: int | tuple[int, ...], available: int) -> str | None:
    if isinstance(wanted, int):
        fits, rule = 1 <= wanted <= available, f"from 1 to {available}, the model's layers"
    else:
        fits = bool(wanted) and list(wanted) == sorted(set(wanted)) and wanted[0] >= 0 and wanted[-1] < available
        rule = f"rising indices from 0 to {available - 1}, the model's last layer"
    return None if fits else f"layers: must be {rule}, got {wanted if isinstance(wanted, int) else list(wanted)}"
