"""The `measure:` part of a recipe."""

from __future__ import annotations

from typing import Annotated

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


class Sweep(BaseModel):
    """Lists of which every combination is a shape."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: tuple[Annotated[int, Field(ge=1)], ...] = Field((1,), min_length=1, description="Rows a call")
    sequence: tuple[Annotated[int, Field(ge=1)], ...] = Field((128,), min_length=1, description="Tokens a row")
    threads: tuple[Annotated[int, Field(ge=1)], ...] = Field((1,), min_length=1, description="Threads inside an operator")

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Batch within sequence within threads."""
        return tuple(Shape(batch=b, sequence=s, threads=t) for t in self.threads for s in self.sequence for b in self.batch)


class LoadSettings(BaseModel):
    """How a session is loaded with the task's own rows: one caller, a backlog in full batches, requests that come at random."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds: float = Field(5.0, gt=0, le=3600, description="Least time of each span; an MLPerf run takes 600")
    batch: int = Field(32, ge=1, description="Rows a call where all rows are there at once")
    bound_ms: float | None = Field(
        None, gt=0, description="Bound that 99 % of the requests must hold; the highest rate that does is searched; default: not searched"
    )


class MeasureSettings(BaseModel):
    """How the model will be served, and how long its latency is measured.

    The metric is computed at ``batch`` rows a call too: outputs of dynamically quantized models depend on it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: int = Field(1, ge=1, description="Rows a call when serving: for the metric and the latency")
    sequence: int = Field(128, ge=1, description="Tokens a row for the latency")
    threads: int = Field(1, ge=1, description="Threads a session may use")
    shapes: tuple[Shape, ...] = Field((Shape(batch=1, sequence=32, threads=1),), description="Further shapes whose latency is measured")
    latency: bool = Field(
        default=True, description="Measure latency; false: sizes and metrics alone, where the machine is in use or its speed says nothing"
    )
    task_lengths: bool = Field(
        default=True, description="Measure the latency of the task's own rows, too, each at its own length, and of the way from text to ids"
    )
    sweep: Sweep | None = Field(None, description="Further shapes: every combination of its lists")
    load: LoadSettings | None = Field(None, description="Load each target with the task's rows; default: not")
    profile: bool = Field(default=True, description="Record from the runtime's own profile which operators ran where and how long")
    processes: int = Field(
        5,
        ge=2,
        le=20,
        description="How often each model gets a new process, which shares out the runs below: processes of one file differ by a few per cent",
    )
    min_runs: int = Field(100, ge=20, description="Least runs per target and shape")
    min_seconds: float = Field(3.0, ge=0, le=600, description="Least measured time per target and shape")

    @property
    def shape(self) -> Shape:
        """The shape that decides."""
        return Shape(batch=self.batch, sequence=self.sequence, threads=self.threads)

    @property
    def all_shapes(self) -> tuple[Shape, ...]:
        """Every shape once, the one that decides first."""
        return tuple(dict.fromkeys((self.shape, *self.shapes, *(self.sweep.shapes if self.sweep else ()))))

    @property
    def call(self) -> Call:
        """The same, for stages."""
        return Call(self.batch, self.sequence, self.threads)
