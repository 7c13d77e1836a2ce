"""A student beside its teacher: the loss (labels, logits or vectors, hidden states, attention and relations, each with its weight), and the training on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onnxsqueeze.errors import StageError
from onnxsqueeze.nn import augment, batches, losses, structure, training
from onnxsqueeze.nn import family as families
from onnxsqueeze.nn import teacher as teachers
from onnxsqueeze.nn.settings import LossWeights, TaughtSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from onnxsqueeze.artifact import Artifact
    from onnxsqueeze.nn.family import Family
    from onnxsqueeze.stage import Context


class Distillation:
    """What one student is trained on, and its training.

    Where the settings ask for more rows than the task has (`onnxsqueeze.nn.augment`), they stand behind its own. Without a teacher the loss is the task's alone. The parent's tokenizer reads the student's rows; the teacher reads them with its own. The student's
    layers were those with the indices ``kept`` ``of`` so many; they are all of the parent's where neither is given. Logits of the teacher are computed once, its hidden
    states, attention and relations beside the student in every step; relations are those of the last layers that face each other.

    Raises StageError where more rows are asked for and no teacher is there to label them, where heads do not fit for the attention's loss or the relations', and where tokens are others for a loss token by token.
    """

    def __init__(
        self,
        settings: TaughtSettings,
        model: Any,
        family: Family,
        context: Context,
        parent: Artifact,
        teacher: Artifact | None,
        *,
        kept: Sequence[int] | None = None,
        of: int = 0,
    ) -> None:
        weights = _weights(settings, embeds=context.task.embeds)
        given = len(context.train.rows)
        if settings.asks_for_more_rows:
            if teacher is None:
                raise StageError(
                    f"{settings.name}: texts and other_words ask for rows without labels, and there is no teacher to say what they are",
                    remedy="put a finetune stage above it, or take the setting out",
                )
            context = augment.more_rows(settings, teacher, parent.path, context)
        self._unlabelled = len(context.train.rows) - given
        self._settings, self._model, self._family, self._context, self._folder = settings, model, family, context, parent.path
        self._regression = context.task.kind == "regression"
        self._projections: losses.Projections | None = None
        self._known: Tensor | None = None
        self._master: teachers.Teacher | None = None
        self._weights = weights if teacher and weights.taught else LossWeights(task=1.0)
        if teacher is None or not weights.taught:
            return
        if weights.token_by_token:
            teachers.require_same_tokens(settings.name, weights.token_by_token, teacher.path, parent.path, context)
        master = teachers.load(teacher, context, eager_attention=weights.attention > 0)
        if kept is None:
            of = len(families.layers(model, family))
            kept = range(of)
        self._teaching = teaching_layers(kept, of, len(families.layers(master.model, master.family)))
        if weights.logits > 0 or weights.similarities > 0:
            self._known = teachers.logits(master, settings.precision, context)
            if context.task.embeds and weights.logits > 0:
                _require_equal_widths(settings.name, model.config.hidden_size, self._known.shape[1])
        if weights.hidden > 0 and model.config.hidden_size != master.model.config.hidden_size:
            with torch.random.fork_rng():
                torch.manual_seed(context.seed)
                self._projections = losses.Projections(len(self._teaching) + 1, model.config.hidden_size, master.model.config.hidden_size)
        if weights.attention > 0:
            heads = [structure.of(one, of_).heads for one, of_ in ((model, family), (master.model, master.family))]
            _require_equal_heads(settings.name, heads[0], heads[1], self._teaching)
            families.without_attention_dropout(model, family)
        if weights.relations > 0:
            place, heads_of = len(self._teaching) - 1, weights.relation_heads
            self._own_relations = _Relations(settings.name, model, family, place, heads_of)
            self._its_relations = _Relations(settings.name, master.model, master.family, self._teaching[-1], heads_of)
        if weights.token_by_token:  # else its kept logits are enough
            self._master = master

    @property
    def taught(self) -> bool:
        """Whether a teacher has a part in it."""
        return self._weights.taught

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return math.ceil(len(self._context.train.rows) / self._settings.batch_size)

    @cached_property
    def selection(self) -> batches.Examples:
        """The selection rows as the student reads them."""
        return batches.encode(self._folder, self._context.selection.rows, self._context.task.max_length)

    def score(self) -> float | None:
        """The student's score on the selection rows, as it is; None where it is not finite."""
        return training.score(self._model, self._family, self.selection, self._context)

    def train(
        self,
        *,
        loss: Callable[[training.Batch], Tensor] | None = None,
        companion: nn.Module | None = None,
        after_step: Callable[[int], None] | None = None,
        first_epoch_to_keep: int = 1,
        scored: Callable[[], float | None] | None = None,
    ) -> training.Outcome:
        """`training.train` on the context's rows; ``loss`` where it is not `loss` alone, ``companion`` beside what the losses train themselves."""
        together = [one for one in (companion, self._projections) if one is not None]
        outcome = training.train(
            self._model,
            self._family,
            self._settings,
            self._context,
            examples=batches.encode(self._folder, self._context.train.rows, self._context.task.max_length),
            selection=self.selection,
            loss=loss or self.loss,
            companion=together[0] if len(together) == 1 else nn.ModuleList(together),
            after_step=after_step,
            first_epoch_to_keep=first_epoch_to_keep,
            scored=scored,
        )
        return replace(outcome, unlabelled=self._unlabelled)

    def loss(self, batch: training.Batch) -> Tensor:
        """The weighted sum for one batch; runs the student, and the teacher where its layers teach."""
        return self.loss_of(self.run(batch), batch)

    def run(self, batch: training.Batch, *, states: bool = False) -> Any:
        """What the student says of a batch, with all that the losses need (and its hidden states, where asked): transformers' output."""
        asked = {"output_hidden_states": states or self._weights.hidden > 0, "output_attentions": self._weights.attention > 0}
        return self._model(**batch.inputs, **{name: True for name, wanted in asked.items() if wanted})

    def loss_of(self, own: Any, batch: training.Batch) -> Tensor:
        """The same of what `run` gave."""
        weights, states, attentions = self._weights, self._weights.hidden > 0, self._weights.attention > 0
        total: Tensor = weights.task * losses.task(own.logits, batch.labels, regression=self._regression)
        if self._known is not None:
            total = total + self._answers(own.logits, self._known[batch.index])
        if self._master is None:
            return total
        with torch.no_grad():
            other = self._master.model(**self._master.inputs(batch), output_hidden_states=states, output_attentions=attentions)
        mask = batch.inputs["attention_mask"]
        if states:
            mine = own.hidden_states if self._projections is None else self._projections(own.hidden_states)
            theirs = [other.hidden_states[0], *(other.hidden_states[i + 1] for i in self._teaching)]  # 0: the embeddings' output
            pairs = [losses.hidden(a, b, mask) for a, b in zip(mine, theirs, strict=True)]
            total = total + weights.hidden * torch.stack(pairs).mean()
        if attentions:
            pairs = [losses.attention(a, other.attentions[i], mask) for a, i in zip(own.attentions, self._teaching, strict=True)]
            total = total + weights.attention * torch.stack(pairs).mean()
        if weights.relations > 0:
            facing = zip(self._own_relations.take(), self._its_relations.take(), strict=True)
            pairs = [losses.relations(a, b, mask, weights.relation_heads) for a, b in facing]
            total = total + weights.relations * torch.stack(pairs).mean()
        return total

    def _answers(self, own: Tensor, known: Tensor) -> Tensor:
        """Against the teacher's logits, or its vectors."""
        weights = self._weights
        if not self._context.task.embeds:
            return weights.logits * losses.logits(own, known, temperature=weights.temperature, regression=self._regression)
        total = weights.similarities * losses.similarities(own, known)
        return total + weights.logits * losses.cosine(own, known) if weights.logits > 0 else total


class _Relations:
    """Keeps the queries, keys and values ``[batch, tokens, width]`` that one layer of a model makes in a forward pass."""

    def __init__(self, name: str, model: PreTrainedModel, family: Family, place: int, heads: int) -> None:
        layer = families.layers(model, family)[place]
        self._seen: dict[str, Tensor] = {}
        for path in family.attention[:3]:
            width = structure.matrix(layer, path).out_features
            if width % heads:
                raise StageError(
                    f"{name}: relation_heads: the queries, keys and values of layer {place} are {width} wide, which {heads} heads cannot share",
                    remedy="take a number that divides the widths of student and teacher",
                )
            layer.get_submodule(path).register_forward_hook(self._keep(path))

    def _keep(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def keep(_: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001, a hook's arguments
            self._seen[path] = output

        return keep

    def take(self) -> tuple[Tensor, ...]:
        """Queries, keys and values of the last pass."""
        found = tuple(self._seen.values())
        self._seen.clear()
        return found


def teaching_layers(kept: Sequence[int], parent: int, teacher: int) -> tuple[int, ...]:
    """Which of ``teacher`` layers each student layer learns from: the very one it was where the parent was as deep, else even parts."""
    if teacher == parent:
        return tuple(kept)
    return structure.evenly(len(kept), teacher)


def _weights(settings: TaughtSettings, *, embeds: bool) -> LossWeights:
    """With what similarities weigh where the settings leave it open. Raises StageError where they weigh something for a model without vectors."""
    weights = settings.loss_weights()
    if embeds:
        return replace(weights, similarities=weights.logits if settings.alpha_similarities is None else settings.alpha_similarities)
    if weights.similarities > 0:
        raise StageError(
            f"{settings.name}: alpha_similarities: is for models that embed, and this task's model gives logits",
            remedy="take it out, or set the task's `compare`",
        )
    return weights


def _require_equal_widths(name: str, student: int, teacher: int) -> None:
    if student != teacher:
        raise StageError(
            f"{name}: alpha_logits: the student's vectors are {student} wide, the teacher's {teacher}",
            remedy="set alpha_logits to 0 and alpha_similarities above 0: how texts compare needs no equal widths",
        )


def _require_equal_heads(name: str, student: tuple[int, ...], teacher: tuple[int, ...], teaching: tuple[int, ...]) -> None:
    off = next((i for i, j in enumerate(teaching) if student[i] != teacher[j]), None)
    if off is not None:
        raise StageError(
            f"{name}: alpha_attention: layer {off} of the student has {student[off]} heads, the one that teaches it {teacher[teaching[off]]}",
            remedy="set alpha_attention to 0",
        )
