"""distill: a student with fewer layers learns from the teacher's logits, hidden states and attention."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from onnxsqueeze.artifact import Artifact
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn.family import family_of
from onnxsqueeze.nn.settings import TrainingSettings
from onnxsqueeze.stage import Changed, Context


class Distill(TrainingSettings):
    """Keeps some layers of the parent, with its embeddings and head, and trains them on a weighted sum of losses.

    Source: initialisation from the teacher's layers, Sanh et al. 2019, "DistilBERT", section 3; losses, `onnxsqueeze.nn.losses`.
    """

    needs_teacher: ClassVar[bool] = True

    kind: Literal["distill"] = "distill"
    teacher: str | None = Field(
        None, description="Id of the stage above whose result teaches, or 'model'; default: the last finetune above"
    )
    layers: Annotated[int, Field(ge=1)] | tuple[int, ...] = Field(
        3, description="How many layers to keep, evenly chosen up to the last; or which, counted from 0"
    )
    temperature: float = Field(2.0, gt=0, description="Softens the logits of teacher and student")
    alpha_task: float = Field(0.5, ge=0, description="Weight of the loss against the labels")
    alpha_logits: float = Field(1.0, ge=0, description="Weight of the loss against the teacher's logits")
    alpha_hidden: float = Field(1.0, ge=0, description="Weight of the loss against the teacher's hidden states")
    alpha_attention: float = Field(0.0, ge=0, description="Weight of the loss against the teacher's attention")

    @model_validator(mode="after")
    def _has_a_loss(self) -> Self:
        if self.alpha_task == self.alpha_logits == self.alpha_hidden == self.alpha_attention == 0:
            raise ValueError("one of alpha_task, alpha_logits, alpha_hidden and alpha_attention must be above 0")
        return self

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        """``layers``, where the model has not that many; None too where config.json leaves their number to transformers' defaults."""
        available = config.get(family_of(config["model_type"]).layers_field)
        return _unfit_layers(self.layers, available) if isinstance(available, int) else None

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:
        """Write the best epoch's student; counts the tensors that differ from the parent's or are gone."""
        import torch
        from torch import Tensor

        from onnxsqueeze.nn import batches, checkpoint, losses, training
        from onnxsqueeze.nn import family as families
        from onnxsqueeze.nn import teacher as teachers

        if teacher is None:
            raise StageError(
                f"{self.name}: has no teacher", remedy="put a finetune stage before it, or start from a model with a trained head"
            )
        task, regression = context.task, context.task.kind == "regression"
        attentions, states = self.alpha_attention > 0, self.alpha_hidden > 0
        beside = attentions or states  # the teacher runs in every step; else its kept logits are enough

        model, family = checkpoint.load(parent.path, task, eager_attention=attentions)
        examples = batches.encode(parent.path, context.train.rows, task.max_length)
        if beside:
            token_by_token = [setting for setting in ("alpha_hidden", "alpha_attention") if getattr(self, setting) > 0]
            teachers.require_same_tokens(self.name, token_by_token, teacher.path, parent.path, context)
        master = teachers.load(teacher.path, context, eager_attention=attentions)
        had = len(families.layers(model, family))
        masters = len(families.layers(master.model, master.family))
        kept = chosen_layers(self.layers, had, self.name)
        families.keep_layers(model, family, kept)
        targets = teaching_layers(kept, had, masters)

        known = teachers.logits(master, self.precision, context) if self.alpha_logits > 0 else None
        projections: losses.Projections | None = None
        if states and model.config.hidden_size != master.model.config.hidden_size:
            with torch.random.fork_rng():
                torch.manual_seed(context.seed)
                projections = losses.Projections(len(kept) + 1, model.config.hidden_size, master.model.config.hidden_size)
        if attentions:
            _require_equal_heads(self.name, model.config.num_attention_heads, master.model.config.num_attention_heads)
            families.without_attention_dropout(model, family)

        def loss(batch: training.Batch) -> Tensor:
            own = model(**batch.inputs, output_hidden_states=states, output_attentions=attentions)
            total = self.alpha_task * losses.task(own.logits, batch.labels, regression=regression)
            if known is not None:
                softened = losses.logits(own.logits, known[batch.index], temperature=self.temperature, regression=regression)
                total = total + self.alpha_logits * softened
            if beside:
                with torch.no_grad():
                    other = master.model(**master.inputs(batch), output_hidden_states=states, output_attentions=attentions)
                mask = batch.inputs["attention_mask"]
            if states:
                mine = own.hidden_states if projections is None else projections(own.hidden_states)
                theirs = [other.hidden_states[0], *(other.hidden_states[i + 1] for i in targets)]  # 0: the embeddings' output
                pairs = [losses.hidden(a, b, mask) for a, b in zip(mine, theirs, strict=True)]
                total = total + self.alpha_hidden * torch.stack(pairs).mean()
            if attentions:
                pairs = [losses.attention(a, other.attentions[i], mask) for a, i in zip(own.attentions, targets, strict=True)]
                total = total + self.alpha_attention * torch.stack(pairs).mean()
            return total

        outcome = training.train(
            model,
            family,
            self,
            context,
            examples=examples,
            selection=batches.encode(parent.path, context.selection.rows, task.max_length),
            loss=loss,
            companion=projections,
        )
        checkpoint.save(model, parent.path, out, task)
        details = {**outcome.details(), "layers": len(kept), "layers_before": had, "kept": list(kept)}
        return Changed(checkpoint.changed_tensors(parent.path, out), "tensors", details)


def chosen_layers(wanted: int | tuple[int, ...], available: int, name: str) -> tuple[int, ...]:
    """Indices of the layers to keep. Of a number n: the last layer of each of n equal parts, so that the top one is always among them.

    Source: the uniform mapping of Jiao et al. 2020, "TinyBERT", section 4.3, rounded up where the parts are not whole.

    Raises StageError where the model has not enough layers, or an index is out of range or out of order.
    """
    if (unfit := _unfit_layers(wanted, available)) is not None:
        raise StageError(f"{name}: {unfit}", remedy="keep fewer layers, or name each one to keep once")
    if isinstance(wanted, int):
        return tuple(-(-(i + 1) * available // wanted) - 1 for i in range(wanted))
    return wanted


def _unfit_layers(wanted: int | tuple[int, ...], available: int) -> str | None:
    if isinstance(wanted, int):
        fits, rule = 1 <= wanted <= available, f"from 1 to {available}, the model's layers"
    else:
        fits = bool(wanted) and list(wanted) == sorted(set(wanted)) and wanted[0] >= 0 and wanted[-1] < available
        rule = f"rising indices from 0 to {available - 1}, the model's last layer"
    return None if fits else f"layers: must be {rule}, got {wanted if isinstance(wanted, int) else list(wanted)}"


def teaching_layers(kept: tuple[int, ...], parent: int, teacher: int) -> tuple[int, ...]:
    """Which of ``teacher`` layers each student layer learns from: the very one it was where the parent was as deep, else even parts."""
    if teacher == parent:
        return kept
    return tuple(-(-(i + 1) * teacher // len(kept)) - 1 for i in range(len(kept)))


def _require_equal_heads(name: str, student: int, teacher: int) -> None:
    if student != teacher:
        raise StageError(
            f"{name}: alpha_attention: the student has {student} heads a layer and the teacher {teacher}", remedy="set alpha_attention to 0"
        )
