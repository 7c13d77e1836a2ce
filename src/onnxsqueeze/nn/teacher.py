"""What a teacher says about rows: logits once and for all, hidden states and attention beside the student."""

from __future__ import annotations

import os
import tokenize
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from onnxsqueeze.errors import StageError
from onnxsqueeze.nn import batches, checkpoint, training

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from onnxsqueeze.nn.family import Family
    from onnxsqueeze.nn.precision import Precision
    from onnxsqueeze.stage import Context

_LOGITS_FILE = "teacher_logits.npy"


@dataclass(frozen=True)
class Teacher:
    """A model that teaches, and the training rows as its own tokenizer reads them."""

    model: PreTrainedModel
    family: Family
    examples: batches.Examples

    def inputs(self, batch: training.Batch) -> dict[str, torch.Tensor]:
        """What the teacher reads for the rows of a student's batch."""
        return training.inputs(self.family, self.examples, batch.index.tolist())


def load(folder: Path, context: Context, *, eager_attention: bool = False) -> Teacher:
    """The teacher on the training device, in evaluation mode, without gradients."""
    model, family = checkpoint.load(folder, context.task, eager_attention=eager_attention)
    training.place(model.requires_grad_(requires_grad=False))
    return Teacher(model, family, batches.encode(folder, context.train.rows, context.task.max_length))


def require_same_tokens(name: str, settings: Sequence[str], folder: Path, parent: Path, context: Context) -> None:
    """Raise StageError where the teacher's tokens are not the student's, which losses token by token (``settings`` weigh them) need."""
    rows = context.train.rows
    differ = batches.cut_otherwise(folder, parent, rows, context.task.max_length)
    if differ:
        raise StageError(
            f"{name}: {', '.join(settings)}: the teacher's tokenizer cuts {differ} of {len(rows)} training rows into other tokens than the student's",
            remedy=f"set {' and '.join(f'{setting}: 0' for setting in settings)} (logits alone need no equal tokens), or keep the pieces of the "
            "training rows where the vocabulary is pruned (min_count: 1 and no size)",
        )


def logits(teacher: Teacher, precision: Precision, context: Context) -> torch.Tensor:
    """The teacher's logits ``[rows, outputs]`` on all training rows, computed once and kept in ``context.checkpoint``.

    A kept file that cannot be read is made again, and the progress says so.
    """
    file = context.checkpoint / _LOGITS_FILE
    known = file.is_file()
    kept = _read(file) if known else None
    if kept is None:
        note = "the teacher's logits, anew: the saved ones could not be read" if known else "the teacher's logits"
        torch.set_num_threads(context.threads)
        found = training.predict(
            teacher.model,
            teacher.family,
            teacher.examples,
            precision=training.effective_precision(precision),
            progress=lambda done, total: context.progress(done, total, note),
        )
        draft = file.with_suffix(".draft")
        with draft.open("wb") as handle:
            np.save(handle, found, allow_pickle=False)
            handle.flush()
            os.fsync(handle.fileno())
        draft.replace(file)
        kept = found
    return torch.from_numpy(kept).to(training.device())


def _read(file: Path) -> NDArray[np.float32] | None:
    """The kept logits; None where the file is cut short or is something else."""
    try:
        found: NDArray[np.float32] = np.load(file, allow_pickle=False)
    except (EOFError, ValueError, tokenize.TokenError, zipfile.BadZipFile):  # what np.load raises for these
        return None
    return found
