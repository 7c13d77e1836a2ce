"""What a recipe says about its task: one of the named ones, or files of the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from onnxsqueeze.errors import nearest

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
CORRELATIONS: frozenset[Metric] = frozenset({"pearson", "spearman"})
GLUE_NAMES = ("sst2", "cola", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
NAMES = (*GLUE_NAMES, "toy")
_OWN_FILES = ("train", "dev", "text", "text_pair", "label", "metric")


class TaskSettings(BaseModel):
    """A task by ``name``, or by the files ``train`` and ``dev``; a plain string is short for ``{name: …}``."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    name: str | None = Field(None, description=f"One of {', '.join(NAMES)}; or leave it out and give `train` and `dev`")
    train: Path | None = Field(None, description="Your training rows: .csv, .tsv, .jsonl or .parquet")
    dev: Path | None = Field(None, description="Your dev rows, opened when all choices are made: .csv, .tsv, .jsonl or .parquet")
    text: str = Field("text", description="Column of the text")
    text_pair: str | None = Field(None, description="Column of the second text, where the task is about pairs")
    label: str = Field("label", description="Column of the label: a class name, or a score where the metric is a correlation")
    metric: tuple[Metric, ...] = Field(("accuracy",), min_length=1, description="Metrics of your own task; the first one decides")
    labels: tuple[str, ...] | None = Field(
        None, min_length=2, description="Class names in the order of the model's outputs; default: the model's order, or sorted"
    )
    max_length: int = Field(128, ge=8, description="Tokens a row, special tokens included; longer rows are cut")
    compare: Literal["cosine"] | None = Field(
        None,
        description="For pairs with a score, and models that embed: each text becomes a vector, and the cosine of a pair's two is what the model says; "
        "such a model is the teacher as it is",
    )
    pooling: Literal["mean", "first"] = Field(
        "mean",
        description="With `compare`: a text's vector is the mean of its tokens' last states, or the first token's; scaled to length 1",
    )
    train_rows: int | None = Field(None, ge=1, description="Train on this many rows at most, drawn by the seed after the selection split")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given

    @field_validator("name")
    @classmethod
    def _known_name(cls, name: str | None) -> str | None:
        if name is not None and name not in NAMES:
            raise ValueError(f"unknown task {name!r}{nearest(name, NAMES)}")
        return name

    @field_validator("metric", mode="before")
    @classmethod
    def _one_or_many(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given

    @field_validator("metric")
    @classmethod
    def _one_kind(cls, metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
        if len(set(metrics)) != len(metrics):
            raise ValueError("names a metric twice")
        if 0 < len(CORRELATIONS.intersection(metrics)) < len(metrics):
            raise ValueError("mixes correlations (for scores) with metrics for classes; use one kind")
        return metrics

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels and len(set(labels)) != len(labels):
            raise ValueError("names a class twice")
        return labels

    @model_validator(mode="after")
    def _named_or_own(self) -> Self:
        given = [key for key in _OWN_FILES if key in self.model_fields_set]
        if self.name is not None:
            if given:
                keys = ", ".join(f"`{key}`" for key in given)
                raise ValueError(f"`name` and {keys} exclude each other: a named task has its own files, columns and metrics")
        elif self.train is None or self.dev is None:
            raise ValueError(f"needs `name` ({', '.join(NAMES)}), or both `train` and `dev` for files of your own")
        elif self.train == self.dev:
            raise ValueError("`train` and `dev` are the same file; a model is not scored on rows that it was trained on")
        if self.labels and (self.name == "stsb" or CORRELATIONS.intersection(self.metric)):
            raise ValueError("`labels` is for classes, but this task's label is a score")
        if self.compare and not (self.name == "stsb" or (self.name is None and self.text_pair and CORRELATIONS.issuperset(self.metric))):
            raise ValueError(
                "`compare` is for pairs of texts with a score: stsb, or files of your own with `text_pair` and a correlation as `metric`"
            )
        if "f1" in self.metric and self.labels and len(self.labels) != 2:
            raise ValueError(f"`f1` needs two classes, `labels` names {len(self.labels)}; use accuracy or matthews")
        return self

    def beside(self, folder: Path) -> Self:
        """The same, with relative ``train`` and ``dev`` taken from ``folder`` (where the recipe lies)."""
        if self.train is None or self.dev is None:
            return self
        return self.model_copy(update={"train": folder / self.train, "dev": folder / self.dev})
