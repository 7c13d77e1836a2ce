"""prune-positions: take rows out of the table of positions that no row of the task reaches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from onnxsqueeze.artifact import Artifact, copy_side_files
from onnxsqueeze.errors import StageError
from onnxsqueeze.nn import checkpoint
from onnxsqueeze.nn.family import family_of
from onnxsqueeze.stage import Changed, Context, Stage, State

_TOKENIZER_CONFIG = "tokenizer_config.json"


class PrunePositions(Stage):
    """Keeps the positions that the task's longest row needs; longer texts are cut there, as the task cuts them, and all others get the same logits, bit for bit.

    tokenizer_config.json states the new length (``model_max_length``).
    """

    takes: ClassVar[tuple[State, ...]] = ("checkpoint",)
    gives: ClassVar[State] = "checkpoint"
    tools: ClassVar[tuple[str, ...]] = ("safetensors", "torch")
    uses_data: ClassVar[bool] = True  # the task's max_length
    needs_head: ClassVar[bool] = False

    kind: Literal["prune-positions"] = "prune-positions"
    length: int | None = Field(
        None, ge=1, description="Tokens a row that the model still reads, special ones included; default: the task's max_length"
    )

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        """``length``, where the model reads no more than that."""
        longest = family_of(config["model_type"]).max_tokens(config)
        if self.length is None or self.length < longest:
            return None
        return f"length: must be below {longest}, what the model reads, got {self.length}"

    def reads_at_most(self, max_length: int) -> int | None:
        """``length``, or the task's."""
        return self.length or max_length

    def run(self, parent: Artifact, teacher: Artifact | None, out: Path, context: Context) -> Changed:  # noqa: ARG002, needs no teacher
        """Write the smaller model; counts the rows that the written table of positions has fewer.

        Raises StageError where the task's rows may be longer than ``length``, or the model reads no more than that already.
        """
        asked, longest = self.reads_at_most(context.task.max_length), context.task.max_length
        if asked is None or asked < longest:
            raise StageError(
                f"{self.name}: length: must be at least {longest}, as long as the task's rows may be, got {asked}",
                remedy="set the task's max_length to less, or length to more",
            )
        before = checkpoint.save_positions(parent.path, out, asked)
        _state_length(parent.path, out, asked)
        copy_side_files(parent.path, out)
        return Changed(before - asked, "positions", {"positions": asked, "positions_before": before})


def _state_length(parent: Path, out: Path, length: int) -> None:
    file = parent / _TOKENIZER_CONFIG
    if not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8")) | {"model_max_length": length}
    (out / _TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
