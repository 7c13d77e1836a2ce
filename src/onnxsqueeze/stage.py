"""What a stage is: frozen settings, what it takes and gives, and one method that does the work.

A stage reads a parent (and perhaps a teacher), writes a model folder and says what it changed. It knows no other
stage, no store and no dev set. What every stage needs done around it (key, atomic write, timing, checking the result)
is the loop's work: `onnxsqueeze.pipeline`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field

from onnxsqueeze.artifact import Artifact
from onnxsqueeze.tasks.rows import SplitRows, TaskInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# What lies between two stages. "checkpoint": PyTorch; the others are .onnx files: with float32 weights and activations,
# with some weights or activations in integers, with float16 activations, or any of them with packed weights.
State = Literal["checkpoint", "onnx", "onnx-int", "onnx-fp16", "onnx-packed"]


class Progress(Protocol):
    """Where a stage says how far it is; called often, must be cheap."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total`` units; ``note`` is shown beside the bar ("epoch 2/3, loss 0.31")."""


class Kept(Protocol):
    """What outlives a stage and is found again by what made it: `onnxsqueeze.store.Store`."""

    def measurement(self, kind: str, causes: Mapping[str, Any]) -> bytes | None:
        """The bytes that were kept for these causes, or None."""

    def keep_measurement(self, kind: str, causes: Mapping[str, Any], value: bytes) -> None:
        """Keep them; later ones of the same causes take their place."""


@dataclass(frozen=True)
class Changed:
    """What a stage changed, counted in the files it wrote. A count of 0 is an error: quantizers fail by silence."""

    count: int
    what: str  # the unit: "tensors", "weights", "nodes", "layers"
    details: Mapping[str, Any] = field(default_factory=dict)  # JSON values for the record: scores per epoch, sparsity, …


@dataclass(frozen=True)
class Call:
    """The call that the finished model will serve: the shape that the recipe measures."""

    batch: int
    tokens: int
    threads: int


@dataclass(frozen=True)
class Context:
    """Everything a stage may use besides its parent and teacher. It holds no dev rows.

    ``select(logits[n, outputs])`` gives the task's primary metric on the selection rows, in their order: higher is better.
    ``checkpoint`` is a folder that survives a killed process and is the same when the same stage is started again.
    ``kept`` is what several stages share. ``threads`` is what PyTorch and ONNX Runtime may use.
    """

    task: TaskInfo
    train: SplitRows
    selection: SplitRows
    select: Callable[[NDArray[np.float32]], float]
    seed: int
    threads: int
    call: Call
    checkpoint: Path
    kept: Kept
    progress: Progress


class Stage(BaseModel):
    """Settings of one stage. Subclasses set the class variables, add fields, and implement `run`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    takes: ClassVar[tuple[State, ...]]
    gives: ClassVar[State]
    version: ClassVar[int] = 1  # raise it when the same settings give other bytes: old results are then made anew
    tools: ClassVar[tuple[str, ...]] = ()  # distributions whose version can change the bytes
    uses_data: ClassVar[bool] = False  # the rows join the key
    uses_seed: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False
    embeds: ClassVar[bool] = True  # False: makes no sense for a model that gives vectors
    needs_head: ClassVar[bool] = True  # False: may stand above the first finetune of a model without a trained head
    text_files: ClassVar[
        tuple[str, ...]
    ] = ()  # fields that name files, one text a line, relative to the recipe: their content joins the key
    models: ClassVar[tuple[str, ...]] = ()  # fields that name models, as a recipe's `model` does: their content joins the key

    kind: str
    id: str | None = Field(None, description="Name of this stage in the recipe; default: its kind", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")

    @property
    def name(self) -> str:
        """The stage's id in its recipe."""
        return self.id or self.kind

    def beside(self, folder: Path) -> Self:
        """The same, with relative ``text_files`` taken from ``folder`` (where the recipe lies)."""
        return self.model_copy(update={field: folder / path for field, path in self.files().items()})

    def files(self) -> dict[str, Path]:
        """Field → path of those ``text_files`` that are given."""
        return {field: path for field in self.text_files if (path := getattr(self, field)) is not None}

    def named_models(self) -> dict[str, str]:
        """Field → name of those ``models`` that are given."""
        return {field: name for field in self.models if (name := getattr(self, field)) is not None}

    def reads(self, train: SplitRows, seed: int) -> SplitRows:  # noqa: ARG002  # for those who override it
        """Those of the task's training rows that this stage gets."""
        return train

    def machine_bound(self) -> bool:
        """True where the bytes depend on the CPU (bf16 training, tuned graphs): CPU model, instruction set and threads join the key."""
        return False

    def parts(self) -> tuple[Stage, ...]:
        """Stages that this one runs inside itself: their versions join its key."""
        return ()

    def given(self, state: State) -> State:  # noqa: ARG002  # for those who override it
        """What lies behind this stage where ``state`` lies before it."""
        return self.gives

    def integer_inputs(self) -> str | None:
        """The type that this stage gives the file's inputs ("int32"), or None where they stay as they were."""
        return None

    def outputs(self) -> tuple[str, ...] | None:
        """The names of the only outputs that this stage leaves of the parent file's, or None where they stay as they were."""
        return None

    def timed(self) -> bool:
        """True where the bytes depend on times or scores at the measured shape: that shape joins the key."""
        return False

    def reads_at_most(self, max_length: int) -> int | None:  # noqa: ARG002  # for those who override it
        """The longest input in tokens of what this stage makes, for a task whose rows have up to ``max_length``, or None where it stays as it was."""
        return None

    def refuses(self, backend: str) -> str | None:  # noqa: ARG002  # for those who override it
        """Why this stage makes no sense for a backend ("cpu", "cuda", …), or None. Checked before anything runs."""
        return None

    def clashes(self, behind: Sequence[Stage]) -> str | None:  # noqa: ARG002  # for those who override it
        """Why this stage makes no sense before those ``behind`` it in a target, or None. Checked before anything runs."""
        return None

    def misfit(self, config: Mapping[str, Any]) -> str | None:  # noqa: ARG002  # for those who override it
        """Which setting the model below does not allow, or None; ``config`` is its config.json. Checked before anything runs."""
        return None

    def unavailable(self) -> tuple[str, str] | None:
        """(reason, remedy) where something this stage needs is not installed, else None. Must not import it."""
        return None

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:
        """Read ``parent`` (and ``teacher``), fill the empty folder ``out``, and say what changed.

        Raises StageError where it cannot be done.
        """
        raise NotImplementedError
