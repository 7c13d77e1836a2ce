"""The settings that every stage which trains has in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from onnxsqueeze.nn.precision import Precision, machine_bound
from onnxsqueeze.stage import Stage, State
from onnxsqueeze.tasks.rows import SplitRows
from onnxsqueeze.tasks.selection import draw


class TrainingSettings(Stage):
    """AdamW with linear warm-up and linear decay over length-bucketed batches.

    Source: warm-up, decay, weight decay and clipping as in Devlin et al. 2019, appendix A.2 and their code.
    """

    takes: ClassVar[tuple[State, ...]] = ("checkpoint",)
    gives: ClassVar[State] = "checkpoint"
    tools: ClassVar[tuple[str, ...]] = ("safetensors", "tokenizers", "torch", "transformers")
    uses_data: ClassVar[bool] = True
    uses_seed: ClassVar[bool] = True

    epochs: int = Field(3, ge=1, le=100, description="Passes over the training rows; the best one by the selection split is kept")
    learning_rate: float = Field(5e-5, gt=0, le=0.1, description="The highest one, after warm-up")
    batch_size: int = Field(32, ge=1, description="Rows a step")
    train_rows: int | None = Field(None, ge=1, description="Train on this many of the task's training rows at most, drawn by the seed")
    warmup: float = Field(0.1, ge=0, lt=1, description="Fraction of all steps in which the learning rate rises")
    weight_decay: float = Field(0.01, ge=0, description="On matrices; never on biases and norms")
    freeze_embeddings: bool = Field(
        default=False,
        description="Leave the tables of words, positions and token types as they are: faster, and unseen words keep their place",
    )
    compiled: bool | None = Field(
        None,
        description="Compile the model with torch.compile: takes a minute or two, and pays in long trainings; on CPUs it needs a C++ compiler",
    )
    precision: Precision = Field("auto", description="auto: bf16 where the CPU or GPU multiplies it natively, else fp32")

    def machine_bound(self) -> bool:
        """True where the trained bytes depend on the CPU or GPU model."""
        return bool(self.compiled) or machine_bound(self.precision)

    def reads(self, train: SplitRows, seed: int) -> SplitRows:
        """At most ``train_rows`` of them, in their order."""
        if self.train_rows is None or len(train.rows) <= self.train_rows:
            return train
        return replace(train, rows=tuple(train.rows[i] for i in draw(range(len(train.rows)), self.train_rows, f"train {seed}")))


@dataclass(frozen=True)
class LossWeights:
    """Of each loss; 0 leaves it out. ``similarities`` is for models that embed. ``temperature`` softens logits; relations are split into ``relation_heads``."""

    task: float
    logits: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0
    relations: float = 0.0
    similarities: float = 0.0
    temperature: float = 1.0
    relation_heads: int = 1

    @property
    def token_by_token(self) -> tuple[str, ...]:
        """The settings of those losses that need the teacher's tokens to be the student's."""
        return tuple(f"alpha_{name}" for name in ("hidden", "attention", "relations") if getattr(self, name) > 0)

    @property
    def taught(self) -> bool:
        """Whether a teacher has a part in it."""
        return self.logits > 0 or self.similarities > 0 or bool(self.token_by_token)


class TaughtSettings(TrainingSettings):
    """Training beside a teacher, where there is one; where asked for on more rows than the task has, of which the teacher says what they are.

    Losses: `onnxsqueeze.nn.losses`; more rows: `onnxsqueeze.nn.augment`.
    """

    text_files: ClassVar[tuple[str, ...]] = ("texts",)

    teacher: str | None = Field(
        None, description="Id of the stage above whose result teaches, or 'model'; default: the last finetune above"
    )
    temperature: float = Field(2.0, gt=0, description="Softens the logits of teacher and student")
    alpha_task: float = Field(0.5, ge=0, description="Weight of the loss against the labels, where there is a teacher")
    alpha_logits: float = Field(
        1.0, ge=0, description="Weight of the loss against the teacher's logits (or vectors), where there is a teacher"
    )
    alpha_similarities: float | None = Field(
        None,
        ge=0,
        description="Of models that embed: weight of the loss against how alike the teacher finds the texts of a batch; default: as alpha_logits",
    )

    texts: Path | None = Field(
        None, description="Text file, one text a line, relative to the recipe: more rows, without labels; the teacher says what they are"
    )
    texts_count: int = Field(20_000, ge=1, description="How many of its lines are drawn")
    other_words: int = Field(0, ge=0, le=20, description="Copies of each training row with words replaced by near ones, without labels")
    other_words_share: float = Field(0.3, gt=0, le=1, description="Part of a copy's words that is replaced")

    @property
    def asks_for_more_rows(self) -> bool:
        """Whether it trains on more than the task's own rows."""
        return self.texts is not None or self.other_words > 0

    @model_validator(mode="after")
    def _has_a_teachers_loss(self) -> Self:
        if self.asks_for_more_rows and not self.loss_weights().taught:
            raise ValueError("texts and other_words have no labels: a loss against the teacher must be above 0")
        return self

    def loss_weights(self) -> LossWeights:
        """What the losses beside a teacher weigh."""
        return LossWeights(self.alpha_task, self.alpha_logits, similarities=self.alpha_similarities or 0.0, temperature=self.temperature)


class StatesTaughtSettings(TaughtSettings):
    """Training beside a teacher whose hidden states teach, too."""

    alpha_hidden: float = Field(1.0, ge=0, description="Weight of the loss against the teacher's hidden states, where there is a teacher")

    def loss_weights(self) -> LossWeights:
        """With the hidden states."""
        return replace(super().loss_weights(), hidden=self.alpha_hidden)


class FewValuesSettings(StatesTaughtSettings):
    """Training that ends with every weight of the layers on one of few values. What shares them, and what the record says of it: `onnxsqueeze.nn.few_values`."""

    scope: Literal["row", "matrix"] = Field("row", description="Who shares values: the weights of one output, or of one matrix")
    embeddings: bool = Field(default=False, description="The tables of words, positions and token types, too")

    @model_validator(mode="after")
    def _moves_nothing_frozen(self) -> Self:
        if self.embeddings and self.freeze_embeddings:
            raise ValueError("embeddings and freeze_embeddings exclude each other: what is moved must be trained")
        return self
