"""The `measure:` part of a recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from onnxsqueeze.stage import Call


class Shape(BaseModel):
    """The shape of one call and the threads it may use."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: int = Field(1, ge=1, description="Rows a call")
    sequence: int = Field(128, ge=1, description="Tokens a row")
    threads: int = Field(1, ge=1, description="Threads inside an operator")

    def __str__(self) -> str:
        return f"{self.batch} × {self.sequence} tokens, {self.threads} thread{'s' if self.threads > 1 else ''}"


class MeasureSettings(BaseModel):
    """How the model will be served, and how long its latency is measured.

    The metric is computed at ``batch`` rows a call too: outputs of dynamically quantized models depend on it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: int = Field(1, ge=1, description="Rows a call when serving: for the metric and the latency")
    sequence: int = Field(128, ge=1, description="Tokens a row for the latency")
    threads: int = Field(1, ge=1, description="Threads a session may use")
    shapes: tuple[Shape, ...] = Field((Shape(batch=1, sequence=32, threads=1),), description="Further shapes whose latency is measured")
    min_runs: int = Field(100, ge=20, description="Least runs per target and shape")
    min_seconds: float = Field(3.0, ge=0, le=600, description="Least measured time per target and shape")

    @property
    def shape(self) -> Shape:
        """The shape that decides."""
        return Shape(batch=self.batch, sequence=self.sequence, threads=self.threads)

    @property
    def call(self) -> Call:
        """The same, for stages."""
        return Call(self.batch, self.sequence, self.threads)
